# SPDX-License-Identifier: Apache-2.0
"""Imports torch without its warning that NumPy is missing: nothing in a base install of this package needs NumPy."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch  # noqa: F401
