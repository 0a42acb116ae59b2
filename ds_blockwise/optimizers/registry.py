# SPDX-License-Identifier: Apache-2.0
"""Every optimizer and every schedule of the package, by the name that a DeepSpeed JSON uses.

The only place that lists them: hosts, commands, benchmarks and tests ask here.
"""

from __future__ import annotations

from ds_blockwise.optimizers.adam_mini import BlockwiseAdamMini
from ds_blockwise.optimizers.adamw import BlockwiseAdamW
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.schedules.schedule import (
    BlockwiseCosineLR,
    BlockwiseLinearLR,
    BlockwiseLR,
    BlockwiseWSDLR,
)

OPTIMIZERS: dict[str, type[BlockwiseOptimizer]] = {cls.__name__: cls for cls in (BlockwiseAdamW, BlockwiseAdamMini)}

SCHEDULES: dict[str, type[BlockwiseLR]] = {
    cls.__name__: cls for cls in (BlockwiseLR, BlockwiseCosineLR, BlockwiseWSDLR, BlockwiseLinearLR)
}
