# SPDX-License-Identifier: Apache-2.0
"""Wheels that are built to be given away."""
