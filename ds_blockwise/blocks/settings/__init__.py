# SPDX-License-Identifier: Apache-2.0
"""What users set of blocks: multipliers, presets, granularity, betas, rules and the width rule."""
