# SPDX-License-Identifier: Apache-2.0
"""The state of one parameter with a value per element, whatever tensor holds it and in whatever form.

For hosts whose tools show and set optimizer state parameter by parameter. A rank sees its own elements.
"""

from __future__ import annotations

import torch

from ds_blockwise.kernels.base import wide_dtype
from ds_blockwise.kernels.bindings import Binding
from ds_blockwise.kernels.update import block_sums
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.second_moment import is_per_block
from ds_blockwise.parallel.reduce import reduce_block_sums_

_STEP, _SECOND = "step", "exp_avg_sq"


def state_keys(optimizer: BlockwiseOptimizer) -> tuple[str, ...]:
    """What `read_state` can be asked for, the same on every rank and before the first step."""
    return (_STEP, "exp_avg") if optimizer.second_moment == "none" else (_STEP, "exp_avg", _SECOND)


def is_settable(key: str) -> bool:
    """Whether `write_state` may change it; a step count belongs to all parameters of a stepped tensor."""
    return key != _STEP


def is_set_together(optimizer: BlockwiseOptimizer, key: str) -> bool:
    """Whether `write_state` is a collective: all elements of a block get one value."""
    return key == _SECOND and optimizer.shares_second_moment


def has_state(optimizer: BlockwiseOptimizer, binding: Binding) -> bool:
    """Whether a tensor was stepped or loaded; a rank that holds none of its parameters has all there is."""
    return binding.is_absent or "exp_avg" in optimizer.state.get(binding.tensor, {})


def read_state(optimizer: BlockwiseOptimizer, binding: Binding, index: int, key: str) -> torch.Tensor:
    """This rank's elements of one parameter's state.

    Args:
        optimizer: with state of the tensor.
        binding: of the stepped tensor.
        index: of the parameter among the tensor's placements.
        key: one of `state_keys`.

    Returns:
        A 1-D tensor of the placement's ``numel``, on the device of the state. A view of the state where it has one
        value per element; each element with its block's value, or the step count, otherwise.
    """
    placement, state = binding.table.placements[index], optimizer.state.get(binding.tensor, {})
    if key == _STEP or binding.is_absent:
        dtype = wide_dtype(binding.tensor.dtype)
        return torch.full((placement.numel,), float(state.get(_STEP, 0)), dtype=dtype, device=binding.tensor.device)
    values: torch.Tensor = state[key]
    if is_set_together(optimizer, key) and is_per_block(values, binding):
        return binding.table.part(index).expand(values).to(values.device)
    return values.view(-1).narrow(0, placement.flat_start, placement.numel)


def write_state(optimizer: BlockwiseOptimizer, binding: Binding, index: int, key: str, values: torch.Tensor) -> None:
    """Set this rank's elements of one parameter's state; a collective over the tensor's ranks if `is_set_together`.

    A second moment per block becomes the mean over the unsharded block, as that of a loaded AdamW checkpoint does.

    Args:
        optimizer: with state of the tensor.
        binding: of the stepped tensor.
        index: of the parameter among the tensor's placements.
        key: of `state_keys`, and `is_settable`.
        values: 1-D, ``numel`` of the placement, any device.
    """
    state = optimizer.state.get(binding.tensor, {})
    if is_set_together(optimizer, key):
        part = binding.table.part(index)
        own = values.detach().to(binding.tensor.device).contiguous()
        sums = block_sums(own, part, square=False)
        reduce_block_sums_([(sums, part, binding.groups)])
        if key in state and is_per_block(state[key], binding):
            means = sums / part.on(sums.device).slot_numel
            for run in part.runs:
                run.blocks_of(state[key]).copy_(run.blocks_of(means))
            return
    if not binding.is_absent:
        read_state(optimizer, binding, index, key).copy_(values)
