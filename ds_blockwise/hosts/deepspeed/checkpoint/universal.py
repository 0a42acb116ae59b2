# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed's universal-checkpoint converter has to be told about a model's tensor parallelism.

The converter joins tensor-parallel shards by patterns on parameter names that the saving program supplies
(``deepspeed/checkpoint/ds_to_universal.py``, 0.19.8). They are needed at tensor-parallel size 1 as well: a later run
with more ranks cuts each parameter as its file says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from deepspeed.checkpoint import constants
from deepspeed.checkpoint.constants import (
    PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0,
    PARAMETER_WITH_ROW_PARALLELISM_PATTERNS,
    TP_REPLICATED_PARAMETER_PATTERNS,
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from torch import nn

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.hosts.deepspeed.engine import Engine
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.tagging.module_reader import TensorSplit, tensor_splits

_UNSUPPORTED: str | None = getattr(constants, "AUTOTP_UNSUPPORTED_PARAMETER_PATTERNS", None)
_COLUMN_PARALLEL = ""  # what the converter does with a parameter that no pattern names: join along dimension 0


def universal_checkpoint_info(engine: Engine) -> dict[str, object] | None:
    """Value of ``client_state["universal_checkpoint_info"]`` for a checkpoint that can be made universal.

    Args:
        engine: a ``DeepSpeedEngine`` with any optimizer.

    Returns:
        Version and patterns, one per parameter; None if DeepSpeed writes its own (AutoTP) and nothing has to be added.
    """
    reason = _unconvertible(engine)
    own = getattr(engine.module, UNIVERSAL_CHECKPOINT_INFO, None)
    if own is not None:
        return None if reason is None else _stopped(own, {".*": reason})
    patterns: dict[str, list[str]] = {}
    unsupported: dict[str, str] = {}
    splits = tensor_splits(engine.module)
    for param in engine.module.parameters():
        if not param.requires_grad:
            continue
        pattern = f"{re.escape(engine.param_names[param])}$"
        category = _category(param, splits.get(param))
        if category in (_REPLICATED, *_OF_SPLIT.values()):
            patterns.setdefault(category, []).append(pattern)
        elif category != _COLUMN_PARALLEL:
            unsupported[pattern] = category
    if reason is not None:
        unsupported[".*"] = reason
    info = {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE, **patterns}
    return _stopped(info, unsupported) if unsupported else info


def _stopped(info: Mapping[str, Any], unsupported: Mapping[str, str]) -> dict[str, object]:
    """The same, on which the converter stops.

    Args:
        info: as without anything unsupported.
        unsupported: by pattern of names, the reason.
    """
    if _UNSUPPORTED is not None:
        return {**info, _UNSUPPORTED: {**info.get(_UNSUPPORTED, {}), **unsupported}}
    # Converters before 0.19.6 have no such list. They stop where two patterns of a kind match, and show them; what
    # stands in (?#...) matches nothing.
    comments = [f"(?#{reason.replace(')', ']')})" for reason in unsupported.values()]
    twice = [f".*{comment}{again}" for comment in comments for again in ("", "(?#)")]
    return {**info, _REPLICATED: [*info.get(_REPLICATED, ()), *twice]}


def _unconvertible(engine: Engine) -> str | None:
    """Why DeepSpeed's converter would make a wrong checkpoint of this engine's, or none."""
    if getattr(engine.optimizer, "round_robin_gradients", False):
        return "round_robin_gradients: the converter mixes up parameters; use ds-blockwise convert"
    optimizer = engine.basic_optimizer
    if not isinstance(optimizer, BlockwiseOptimizer):
        return None
    if optimizer.second_moment == "none":
        return f"{type(optimizer).__name__} keeps no exp_avg_sq, which the converter needs; use ds-blockwise convert"
    if optimizer.checkpoint_format == "compact" and optimizer.shares_second_moment:
        return "compact: the converter needs exp_avg_sq with one value per element; use ds-blockwise convert"
    return None


_REPLICATED = str(TP_REPLICATED_PARAMETER_PATTERNS)
_OF_SPLIT: dict[TensorSplit, str] = {
    TensorSplit(dim=1, parts=1): PARAMETER_WITH_ROW_PARALLELISM_PATTERNS,
    TensorSplit(dim=0, parts=2): PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0,
}


def _category(param: nn.Parameter, split: TensorSplit | None) -> str:
    """Key of the converter's pattern list, `_COLUMN_PARALLEL`, or the reason why it cannot join this parameter."""
    shard: TensorShard | None = getattr(param, "block_shard", None)
    if split is None:
        return _REPLICATED
    if shard is not None and not shard.is_even:
        return "its tensor-parallel shards differ in size; use ds-blockwise convert"
    if shard is not None and len(shard.chunks[0]) != split.parts:
        return f"a shard is {len(shard.chunks[0])} runs of its rows (of Q, K and V); use ds-blockwise convert"
    if split == TensorSplit(dim=0, parts=1):
        return _COLUMN_PARALLEL
    return _OF_SPLIT.get(
        split, f"it is split in {split.parts} parts of dimension {split.dim}; use ds-blockwise convert"
    )
