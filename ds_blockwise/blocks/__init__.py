# SPDX-License-Identifier: Apache-2.0
"""What a block is: roles, settings, and where blocks lie in a tensor and in the part that a rank holds."""
