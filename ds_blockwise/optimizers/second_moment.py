# SPDX-License-Identifier: Apache-2.0
"""The second moment in its forms: none, one value per element, or one value per block.

An optimizer says which one it keeps. Files always hold one value per element, or compact ones that are marked by their
key, so a second moment changes its form when it is loaded. Hosts also write per-element values straight into
``state["exp_avg_sq"]``. A vector of one value per block therefore carries a mark: its length does not tell, because a
rank may hold one element of each block, and blocks and elements then come in different orders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Literal

import torch

from ds_blockwise.blocks.segment_table import SegmentTable, build_table
from ds_blockwise.kernels.base import StepState, wide_dtype
from ds_blockwise.kernels.bindings import Binding
from ds_blockwise.kernels.update import block_sums
from ds_blockwise.parallel.reduce import reduce_block_sums_

SecondMoment = Literal["none", "element", "block"]
"""What an optimizer keeps in memory: nothing, a value for each element, or one for all elements of a block."""

_MARK = "_is_per_block"
_EXACTLY_SUMMED = 1 << 29  # as many equal fp32 values (24 bits each) have an exact sum in fp64, in any order
_NO_STATE: StepState = {}
States = Mapping[torch.Tensor, StepState]


def per_block(values: torch.Tensor) -> torch.Tensor:
    """``values`` itself, marked as one value per local block of its stepped tensor."""
    setattr(values, _MARK, True)
    return values


def is_per_block(values: torch.Tensor, binding: Binding) -> bool:
    """Whether a second moment is one value per block.

    Args:
        values: ``exp_avg_sq`` of the tensor that is bound.
        binding: of the tensor.
    """
    # a copy of ours (moved to another device) has lost its mark, but where the lengths differ they tell
    is_told = hasattr(values, _MARK) or values.numel() != binding.table.numel
    return is_told and values.numel() == binding.table.num_blocks


def zeros_for(tensor: torch.Tensor, binding: Binding, kind: SecondMoment) -> torch.Tensor | None:
    """The second moment of a tensor that was never stepped; None if the optimizer keeps none."""
    dtype = wide_dtype(tensor.dtype)
    if kind == "none":
        return None
    if kind == "block":
        return per_block(torch.zeros(binding.table.num_blocks, dtype=dtype, device=tensor.device))
    return torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def per_element(values: torch.Tensor, binding: Binding) -> torch.Tensor:
    """A second moment in the shape of its tensor: as it is, or each element with its block's value, on the CPU."""
    if not is_per_block(values, binding):
        return values
    return binding.table.expand(values).reshape(binding.tensor.shape)


def start_matrices_anew_(values: torch.Tensor, binding: Binding) -> None:
    """Set the second moments of what is orthogonalised to zero, as before a first step; the others stay.

    Args:
        values: ``exp_avg_sq`` of the bound tensor in either form, contiguous; changed in place.
        binding: of the tensor.
    """
    if not binding.kernel_table.is_partial:
        return
    table = build_table(binding.table.numel, binding.table.placements, shares_second_moment=True, orthogonalized=True)
    in_blocks = is_per_block(values, binding)
    for run in table.runs:
        (run.blocks_of(values) if in_blocks else run.of(values.view(-1))).zero_()


def start_matrices_anew(states: States, bindings: Iterable[Binding]) -> None:
    """`start_matrices_anew_` of all tensors that have a state."""
    for binding in bindings:
        values = states.get(binding.tensor, _NO_STATE).get("exp_avg_sq")
        if values is not None:
            start_matrices_anew_(values, binding)


def unsettled(states: States, bindings: Iterable[Binding]) -> list[Binding]:
    """The tensors whose second moment somebody else wrote: a loaded checkpoint, or a host."""
    return [b for b in bindings if is_unsettled(states.get(b.tensor, _NO_STATE))]


def is_unsettled(state: StepState) -> bool:
    """Whether somebody else wrote the second moment in the state of a tensor."""
    values = state.get("exp_avg_sq")
    return values is not None and not hasattr(values, _MARK)


def are_settled(states: Iterable[StepState]) -> bool:
    """Whether no state `is_unsettled`, at a glance: False may also mean that some have no second moment."""
    return all(map(hasattr, [state.get("exp_avg_sq") for state in states], repeat(_MARK)))


def mark_settled(states: States, bindings: Iterable[Binding]) -> None:
    """Take second moments that have one value per block for our own."""
    for b in bindings:
        values = states.get(b.tensor, _NO_STATE).get("exp_avg_sq")
        if values is not None:
            per_block(values)


def to_blocks(states: States, bindings: Sequence[Binding]) -> None:
    """Replace second moments by their means over the unsharded blocks; a collective over the groups of the tensors.

    A tensor without state takes part with zeros and gets none. The fp64 mean of equal fp32 values is that value
    exactly, so saving one value per element and loading it changes no bit.

    Args:
        states: of the stepped tensors.
        bindings: every rank of a group gives the same tensors in the same order.

    Raises:
        ValueError: a second moment has neither one value per element nor one per block.
    """
    sums = [_sums(_flat_elements(states, b), b.table) for b in bindings]
    reduce_block_sums_([(total, b.table, b.groups) for total, b in zip(sums, bindings, strict=True)])
    for total, b in zip(sums, bindings, strict=True):
        state = states.get(b.tensor, _NO_STATE)
        if "exp_avg_sq" in state:
            numel = b.table.on(total.device).slot_numel[: b.table.num_blocks]
            state["exp_avg_sq"] = (total[: b.table.num_blocks] / numel).to(state["exp_avg_sq"].dtype)


def _sums(values: torch.Tensor, table: SegmentTable) -> torch.Tensor:
    """`block_sums` of the values, without a copy of them in fp64 where each block holds one fp32 value, as files do."""
    found = _sums_of_equal(values, table) if values.dtype == torch.float32 else None
    return block_sums(values, table, square=False) if found is None else found


def _sums_of_equal(values: torch.Tensor, table: SegmentTable) -> torch.Tensor | None:
    """None if the elements of a block differ, or are so many that their order would decide the last bit."""
    sums = torch.zeros(table.num_slots, dtype=torch.float64, device=values.device)
    for run in table.runs:
        part = run.of(values)
        first = part[..., :1] if run.block_stride else part[:1, :, :1]
        count = run.numel if run.block_stride else run.numel * run.repeat
        if count > _EXACTLY_SUMMED or not bool((part == first).all()):
            return None
        run.blocks_of(sums).add_(first.to(torch.float64), alpha=count)
    return sums


def _flat_elements(states: States, binding: Binding) -> torch.Tensor:
    table, tensor = binding.table, binding.tensor
    values = states.get(tensor, _NO_STATE).get("exp_avg_sq")
    if values is None:
        return torch.zeros(table.numel, dtype=wide_dtype(tensor.dtype), device=tensor.device)
    if is_per_block(values, binding):
        return table.expand(values).to(tensor.device)
    if values.numel() != table.numel:
        raise ValueError(
            f"exp_avg_sq has {values.numel()} values for a tensor of {table.numel} elements and "
            f"{table.num_blocks} blocks: the checkpoint is of another model or another granularity."
        )
    return values.reshape(-1)
