# SPDX-License-Identifier: Apache-2.0
"""Multipliers from the signal-to-noise ratio, and additions to the preset `tuned`."""
