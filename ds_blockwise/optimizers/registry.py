# SPDX-License-Identifier: Apache-2.0
"""Every optimizer of the package, by the name that a DeepSpeed JSON uses."""

from __future__ import annotations

from ds_blockwise.optimizers.adam_mini import BlockwiseAdamMini
from ds_blockwise.optimizers.adamw import BlockwiseAdamW
from ds_blockwise.optimizers.base import BlockwiseOptimizer

OPTIMIZERS: tuple[type[BlockwiseOptimizer], ...] = (BlockwiseAdamW, BlockwiseAdamMini)
