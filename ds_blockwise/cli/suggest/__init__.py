# SPDX-License-Identifier: Apache-2.0
"""The command ``ds-blockwise suggest``: a starting rate and what to try around it."""
