# SPDX-License-Identifier: Apache-2.0
"""State dicts: what an optimizer writes, and what it takes in (its own, AdamW's, the published Adam-mini's)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ds_blockwise.blocks.segment_table import Placement
from ds_blockwise.checkpoint.record import (
    KEY,
    PER_BLOCK_KEY,
    VERSION,
    Recorded,
    placements_of,
    record_in,
    record_of,
    run_record_in,
    same_blocks,
    same_ranges,
    table_of,
)
from ds_blockwise.checkpoint.record_types import Record, RunRecord
from ds_blockwise.checkpoint.state_dicts import check_kind, check_state_dict
from ds_blockwise.kernels.base import StepState, wide_dtype
from ds_blockwise.kernels.bindings import Binding
from ds_blockwise.kernels.param_groups import ParamGroup, StateDict
from ds_blockwise.optimizers.foreign_state import (
    FOR_ADAMW,
    from_published_adam_mini,
    group_to_load,
    is_published_adam_mini,
    step_of,
)
from ds_blockwise.optimizers.second_moment import (
    SecondMoment,
    is_per_block,
    per_block,
    per_element,
    start_matrices_anew_,
)
from ds_blockwise.optimizers.settings import check_group


class Stored(Recorded, Protocol):
    """What of an optimizer is written to files and read back."""

    @property
    def second_moment(self) -> SecondMoment:
        """The form in which the second moment is kept."""
        ...

    is_given_its_own_state: bool

    def binding_of(self, tensor: torch.Tensor) -> Binding | None:
        """The binding of a stepped tensor; None if its contents are unknown."""
        ...

    def momentum_dtype_of(self, tensor: torch.Tensor) -> torch.dtype:
        """The dtype of a tensor's ``exp_avg``."""
        ...


@dataclass(frozen=True)
class Loaded:
    """A state dict that fits an optimizer, ready to be put in place.

    Attributes:
        groups: the param groups as ``torch.optim.Optimizer.load_state_dict`` takes them.
        states: by stepped tensor; tensors that the state dict does not know are missing.
        record: what wrote it says about the run; None if another optimizer wrote it.
        started_anew: what of the state starts anew, a sentence for the log; None if all goes on as it is.
    """

    groups: list[ParamGroup]
    states: dict[torch.Tensor, StepState]
    record: RunRecord | None
    started_anew: str | None = None


def to_save(optimizer: Stored, packed: StateDict) -> StateDict:
    """A state dict in AdamW's form, with the optimizer's record under the key ``ds_blockwise``.

    Args:
        optimizer: one of ours.
        packed: its state dict as ``torch.optim.Optimizer`` makes it; changed in place.
    """
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    ids = [i for group in packed["param_groups"] for i in group["params"]]
    for index, tensor in zip(ids, tensors, strict=True):
        state = packed["state"].get(index)
        if state and "exp_avg" in state:
            second = second_moment_to_save(optimizer, tensor, state["exp_avg_sq"]) if "exp_avg_sq" in state else {}
            packed["state"][index] = {"step": int(state["step"]), "exp_avg": state["exp_avg"], **second}
    packed["param_groups"] = [{**group, **FOR_ADAMW} for group in packed["param_groups"]]
    packed[KEY] = record_of(optimizer, VERSION)
    return packed


def second_moment_to_save(optimizer: Stored, tensor: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor's second moment under the key that its form has in files."""
    binding = optimizer.binding_of(tensor) if optimizer.shares_second_moment else None
    if binding is None:
        return {"exp_avg_sq": values}
    if optimizer.checkpoint_format == "compact" and is_per_block(values, binding):
        return {PER_BLOCK_KEY: values.detach()}
    return {"exp_avg_sq": per_element(values, binding)}


def to_load(optimizer: Stored, state_dict: StateDict, device: torch.device | None = None) -> Loaded:
    """Read the state dict of one of ours, of AdamW (torch's or DeepSpeed's) or of the published Adam-mini.

    Changes nothing of the optimizer.

    Args:
        optimizer: one of ours.
        state_dict: what to read.
        device: of the states; default each stepped tensor's own. On "meta" they take no memory: to see whether the
            state dict fits.

    Raises:
        ValueError: the groups, the order of the parameters, the shapes or (compact state) the topology do not fit, or
            there are no first moments.
    """
    check_state_dict(state_dict)
    if is_published_adam_mini(state_dict):
        names = [_name_of(optimizer, tensor) for group in optimizer.param_groups for tensor in group["params"]]
        state_dict = from_published_adam_mini(state_dict, optimizer.param_groups, names)
    run, record = run_record_in(state_dict), record_in(state_dict)
    started_anew = None
    if state_dict["state"] and not (run is None and optimizer.is_given_its_own_state):
        started_anew = check_kind(optimizer, run)
    saved_groups = state_dict["param_groups"]
    saved_sizes, own_sizes = ([len(g["params"]) for g in gs] for gs in (saved_groups, optimizer.param_groups))
    if saved_sizes != own_sizes:
        raise ValueError(
            f"the state dict has param groups of {saved_sizes} tensors, this optimizer of {own_sizes}. Build the "
            f"optimizer with the same groups."
        )
    groups = [
        group_to_load(saved, own, index)
        for index, (saved, own) in enumerate(zip(saved_groups, optimizer.param_groups, strict=True))
    ]
    _check_groups(groups)
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    if record is not None:
        _check_order(record, [optimizer.placements_in(tensor) for tensor in tensors])
    ids = [(i, group) for group in saved_groups for i in group["params"]]
    states: dict[torch.Tensor, StepState] = {}
    for position, ((number, group), tensor) in enumerate(zip(ids, tensors, strict=True)):
        saved = state_dict["state"].get(number)
        if saved and "exp_avg" in saved:
            state = _state_to_load(optimizer, tensor, saved, group, record, position, device or tensor.device)
            if started_anew is not None:
                start_matrices_anew_(state["exp_avg_sq"], _known(optimizer, tensor, position))
            states[tensor] = state
        elif any(key != "step" and isinstance(value, torch.Tensor) for key, value in (saved or {}).items()):
            raise ValueError(
                f"the state of tensor {position} has no first moment (it has {', '.join(sorted(saved))}): it is of "
                f"another kind of optimizer. Load weights only, and start with fresh optimizer state."
            )
    return Loaded(groups, states, run, started_anew)


def _known(optimizer: Stored, tensor: torch.Tensor, position: int) -> Binding:
    """The binding of a tensor in which matrices are looked for."""
    binding = optimizer.binding_of(tensor)
    if binding is None:
        raise ValueError(
            f"what lies in tensor {position} is not known, so its matrices cannot be told from the rest. Call "
            f"ds_blockwise.tag_parameters(model) before you load another optimizer's state."
        )
    return binding


def _check_groups(groups: Sequence[ParamGroup]) -> None:
    """Refuse hyper-parameters that no optimizer can have: they would be stepped with as they are."""
    for index, group in enumerate(groups):
        try:
            check_group(group, f"param_groups[{index}] of the state dict: ")
        except TypeError as error:
            raise ValueError(str(error)) from error


def _check_order(record: Record, own: Sequence[Sequence[Placement] | None]) -> None:
    """Refuse a state dict with the parameters in another order: states are found by their place alone."""
    saved = {p["fqn"]: place for place, held in enumerate(record["tensors"]) if held for p in held["placements"]}
    here = {p.spec.fqn: place for place, held in enumerate(own) for p in held or ()}
    moved = next((name for name, place in here.items() if saved.get(name, place) != place), None)
    if moved is not None:
        raise ValueError(
            f"the state dict has the state of {moved!r} for tensor {saved[moved]}, but this optimizer has it in tensor "
            f"{here[moved]}, which would get another parameter's moments. Give the parameters to the optimizer in the "
            f"order, and in the groups, in which they were when the state was saved."
        )


def _state_to_load(
    optimizer: Stored,
    tensor: torch.Tensor,
    saved: Mapping[str, Any],
    group: ParamGroup,
    record: Record | None,
    position: int,
    device: torch.device,
) -> StepState:
    # torch casts floating state to the parameter's dtype, which would round fp32 moments of bf16 parameters
    state: StepState = {
        "step": step_of(saved, group),
        "exp_avg": like("exp_avg", saved["exp_avg"], tensor, optimizer.momentum_dtype_of(tensor), device),
    }
    if optimizer.second_moment == "none":
        return state
    if record is not None and PER_BLOCK_KEY in saved:
        state["exp_avg_sq"] = _from_blocks(optimizer, tensor, saved[PER_BLOCK_KEY], record, position, device)
    elif "exp_avg_sq" in saved:
        state["exp_avg_sq"] = like("exp_avg_sq", saved["exp_avg_sq"], tensor, wide_dtype(tensor.dtype), device)
    else:
        raise ValueError(
            f"the state of tensor {position} has no second moment (it has {', '.join(sorted(saved))}): the optimizer "
            f"that wrote it keeps none. Load weights only, and start with fresh optimizer state."
        )
    return state


def _from_blocks(
    optimizer: Stored,
    tensor: torch.Tensor,
    values: torch.Tensor,
    record: Record,
    position: int,
    device: torch.device,
) -> torch.Tensor:
    """Second moments of a compact state: as they are if the blocks are the same, else one per element."""
    saved, own = placements_of(record, position), optimizer.placements_in(tensor)
    if own is None or not same_ranges(saved, own):
        raise ValueError(
            f"tensor {position} of the compact state dict holds other parameters or ranges than this optimizer's: "
            f"compact checkpoints load at the topology that wrote them. Convert it: ds-blockwise convert "
            f"CHECKPOINT OUTPUT, and load OUTPUT."
        )
    table = table_of(record, position)
    if values.numel() != table.num_blocks:
        raise ValueError(
            f"{PER_BLOCK_KEY} of tensor {position} has {values.numel()} values for {table.num_blocks} blocks. The "
            f"file is damaged: ds-blockwise check CHECKPOINT"
        )
    dtype = wide_dtype(tensor.dtype)
    if optimizer.shares_second_moment and same_blocks(saved, own):
        return per_block(values.detach().to(device, dtype, copy=True).contiguous())
    return like("exp_avg_sq", table.expand(values), tensor, dtype, device)


def like(
    key: str, values: torch.Tensor, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """A copy of loaded values in the shape of a tensor, on its device or a given one.

    Raises:
        ValueError: they have another number of elements, or as many in another shape (flat ones fit any).
    """
    if values.numel() != tensor.numel():
        raise ValueError(
            f"state {key!r} has {values.numel()} elements but its parameter has {tensor.numel()} (shape "
            f"{tuple(tensor.shape)}). The checkpoint is of another model or another partition."
        )
    if min(values.dim(), tensor.dim()) > 1 and values.shape != tensor.shape:
        raise ValueError(
            f"state {key!r} has the shape {tuple(values.shape)} but its parameter {tuple(tensor.shape)}: elements "
            f"would go to other weights. The checkpoint is of another model, or of one whose weight was transposed."
        )
    return values.detach().to(device or tensor.device, dtype, copy=True).reshape(tensor.shape).contiguous()


def _name_of(optimizer: Stored, tensor: torch.Tensor) -> str | None:
    placements = optimizer.placements_in(tensor)
    return placements[0].spec.fqn if placements and len(placements) == 1 else None
