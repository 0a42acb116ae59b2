# SPDX-License-Identifier: Apache-2.0
"""What is measured of a run: telemetry, sharpness, and multipliers that follow from it."""
