# SPDX-License-Identifier: Apache-2.0
"""What lies in DeepSpeed's optimizer files, by wrapper: fp32 weights, the basic optimizer's state, the loss scale.

DeepSpeed 0.19.8: ``runtime/zero/stage_1_and_2.py``, ``zero/stage3.py``, ``bf16_optimizer.py``,
``fp16/unfused_optimizer.py``, each in ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_blockwise.blocks.segment_table import Placement
from ds_blockwise.checkpoint.manifest import CheckpointError, NotReadError
from ds_blockwise.checkpoint.portable_index import TRAINED
from ds_blockwise.checkpoint.record import PER_BLOCK_KEY, numel_of, table_of
from ds_blockwise.checkpoint.record_types import Record, has_second_moments
from ds_blockwise.checkpoint.state_dicts import check_state_dict
from ds_blockwise.checkpoint.typed_data import typed
from ds_blockwise.hosts.deepspeed.checkpoint.tag_folder import ModelFile, load_file

BaseState = Mapping[str, Any]
"""The basic optimizer's state dict: ``state`` by number, ``param_groups``, and our record if it is one of ours."""


@dataclass(frozen=True)
class OptimizerFile:
    """The contents of one rank's optimizer file.

    Attributes:
        base: the basic optimizer's state dict.
        masters: fp32 weights per stepped tensor; empty where the model's own weights are stepped.
        loss_scale: attributes of the loss scaler; empty without one.
        entries: all entries of the wrapper's state.
    """

    base: BaseState
    masters: list[torch.Tensor]
    loss_scale: Mapping[str, object]
    entries: Mapping[str, Any]


def load_optimizer_file(path: Path, *, trust: bool) -> OptimizerFile:
    """One ``*_optim_states.pt`` of ZeRO 1, 2, 3 or BF16_Optimizer.

    Raises:
        CheckpointError: it is damaged, or DeepSpeed's own entries are not in it.
        NotReadError: an elastic checkpoint.
    """
    loaded = load_file(path, trust=trust)
    entries = loaded.get("optimizer_state_dict") if isinstance(loaded, Mapping) else None
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"{path} is not a file that DeepSpeed wrote: it has no optimizer_state_dict.")
    base = entries.get("base_optimizer_state", entries.get("optimizer_state_dict"))
    masters = entries.get("single_partition_of_fp32_groups", entries.get("fp32_flat_groups"))
    return _checked(path, base, masters, getattr(entries.get("loss_scaler"), "__dict__", {}), entries)


def unpartitioned(path: Path, model: ModelFile) -> OptimizerFile:
    """What a model file of ZeRO 0 holds of the optimizer.

    Args:
        path: of the file.
        model: its contents.

    Raises:
        CheckpointError: there is no optimizer state in it, or none that DeepSpeed wrote.
    """
    entries = model.get("optimizer")
    if entries is None:
        raise CheckpointError(f"{path} has no optimizer state. Was it saved with ZeRO, without its *_optim_states.pt?")
    if "base_optimizer_state" in entries:
        raise CheckpointError(
            f"{path} was saved by BF16_Optimizer without ZeRO, and DeepSpeed cannot load its optimizer state. Load the "
            f'weights alone (load_module_only=True), and save with "zero_optimization": {{"stage": 1}}.'
        )
    if "fp32_groups" not in entries:
        return _checked(path, entries, [], {}, entries)
    groups = entries["fp32_groups"]
    nested = isinstance(groups, list) and all(isinstance(group, list) for group in groups)
    masters = [each for group in groups for each in group] if nested else groups
    return _checked(path, entries.get("optimizer_state_dict"), masters, entries, entries)


def _checked(
    path: Path, base: object, masters: object, loss_scale: Mapping[str, object], all_entries: Mapping[str, Any]
) -> OptimizerFile:
    if isinstance(base, list):
        raise NotReadError(f"{path} is an elastic checkpoint, which cannot be read. Set elastic_checkpoint to false.")
    try:
        checked = typed(masters, list[torch.Tensor], "its weights")
        state = check_state_dict(base)
        for number, entries in state["state"].items():
            for key, value in entries.items():
                if not isinstance(value, (torch.Tensor, int, float, str, list, tuple, type(None))):
                    raise ValueError(f"state[{number}][{key!r}] is a {type(value).__name__}")
    except ValueError as error:
        raise CheckpointError(f"{path} is not a file that DeepSpeed wrote: {error}.") from error
    return OptimizerFile(state, checked, loss_scale, all_entries)


def check_state(
    path: Path,
    position: int,
    record: Record,
    placements: Sequence[Placement],
    master: torch.Tensor,
    state: Mapping[str, Any],
) -> None:
    """Refuse a stepped tensor whose weights or moments are not as its placements say.

    Args:
        path: of its file.
        position: its number in the optimizer's state.
        record: of that state.
        placements: the parameters in it.
        master: its fp32 weights.
        state: step and moments; empty before the first step.

    Raises:
        CheckpointError: elements or entries are missing, or there are too many.
    """
    # ZeRO 1 and 2 cut the padding off the weights, but not off the moments
    end = max((p.flat_start + p.numel for p in placements if p.numel), default=0)
    numel = numel_of(record, position)
    sizes = {"weights": master.numel(), **{k: v.numel() for k, v in state.items() if k in TRAINED}}
    wrong = [f"{key} has {size} elements" for key, size in sizes.items() if not end <= size <= numel]
    if wrong:
        raise CheckpointError(
            f"{path}: tensor {position} of the optimizer state should have {end} to {numel} elements, but "
            f"{', '.join(wrong)}. The file is damaged or of another run."
        )
    if not state:
        return
    blocks = state.get(PER_BLOCK_KEY)
    lacking = [key for key in ("step", "exp_avg") if key not in state]
    if lacking or (blocks is None and "exp_avg_sq" not in state and has_second_moments(record)):
        raise CheckpointError(f"{path}: tensor {position} of the optimizer state has only {', '.join(sorted(state))}.")
    if blocks is not None and blocks.numel() != (wanted := table_of(record, position).num_blocks):
        raise CheckpointError(
            f"{path}: tensor {position} of the optimizer state has {blocks.numel()} second moments for {wanted} blocks."
        )
