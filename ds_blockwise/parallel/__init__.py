# SPDX-License-Identifier: Apache-2.0
"""What ranks send each other during a step, and how they decide and fail together."""
