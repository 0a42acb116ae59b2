# SPDX-License-Identifier: Apache-2.0
"""Blockwise optimizers (AdamW, Adam-mini, Lion, Muon) for DeepSpeed, Megatron-core and plain PyTorch.

Importing this package, before or after DeepSpeed, registers the optimizers and schedules with it.
DeepSpeed itself is not imported.
"""

from typing import Any

from ds_blockwise import _quiet  # noqa: F401 # before what imports torch
from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.spec import BlockSpec
from ds_blockwise.checkpoint.record import VERSION
from ds_blockwise.hosts.deepspeed.sharpness import probe_engine
from ds_blockwise.measure.sharpness import measure_sharpness
from ds_blockwise.measure.sharpness_report import SharpnessReport
from ds_blockwise.optimizers.adam_mini import BlockwiseAdamMini
from ds_blockwise.optimizers.adamw import BlockwiseAdamW
from ds_blockwise.optimizers.lion import BlockwiseLion
from ds_blockwise.optimizers.muon.optimizer import BlockwiseMuon
from ds_blockwise.optimizers.schedules.schedule import (
    BlockwiseCosineLR,
    BlockwiseLinearLR,
    BlockwiseLR,
    BlockwiseWSDLR,
)
from ds_blockwise.tagging.report import BlockReport, block_report
from ds_blockwise.tagging.tag import tag_parameters
from ds_blockwise.tagging.verify_layout import LayoutReport, verify_layout
from ds_blockwise_autoload import after_import as _after_import

__version__ = VERSION

__all__ = [
    "BlockReport",
    "BlockSpec",
    "BlockwiseAdamMini",
    "BlockwiseAdamW",
    "BlockwiseCosineLR",
    "BlockwiseLR",
    "BlockwiseLinearLR",
    "BlockwiseLion",
    "BlockwiseMuon",
    "BlockwiseWSDLR",
    "LayoutReport",
    "Role",
    "SharpnessReport",
    "attach",
    "block_report",
    "measure_sharpness",
    "probe_engine",
    "tag_parameters",
    "verify_layout",
]


def attach(engine: Any) -> None:
    """Tell a DeepSpeed engine's optimizer what lies in its tensors; ``deepspeed.initialize`` does this by itself.

    Args:
        engine: a ``DeepSpeedEngine`` whose basic optimizer is one of ours.

    Raises:
        ImportError: DeepSpeed is not installed.
        ValueError: see `ds_blockwise.hosts.deepspeed.attach.attach`.
    """
    from ds_blockwise.hosts.deepspeed.attach import attach as attach_to

    attach_to(engine)


def _register_with_deepspeed() -> None:
    # registers at its end; if its own import brought DeepSpeed in, it is not complete yet
    import ds_blockwise.hosts.deepspeed.register  # noqa: F401


_after_import("deepspeed", _register_with_deepspeed)
