# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's functions that show, set and move weights and optimizer state, for our optimizers."""
