# SPDX-License-Identifier: Apache-2.0
"""The two forms of a second moment: which one a tensor has, and the way from one to the other."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch

from ds_blockwise import BlockwiseAdamMini
from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.segment_table import Placement
from ds_blockwise.kernels.base import StepState
from ds_blockwise.kernels.bindings import Binding, Bindings
from ds_blockwise.kernels.select import kernels_for
from ds_blockwise.kernels.update import block_sums
from ds_blockwise.optimizers.second_moment import (
    is_per_block,
    mark_settled,
    per_block,
    per_element,
    to_blocks,
    unsettled,
    zeros_for,
)
from ds_blockwise.parallel.reduce import LOCAL
from tests.helpers.kernel_cases import spec

ON = partial(kernels_for, "reference")
WINDOW = Placement(spec((3, 8), Role.FFN, axis=1), None, 0, 6, 6, (6, 12))
"""Six elements of a transposed weight from the end of one row to the next: of the columns 6, 7, 0, 1, 2 and 3."""


def bound(numel: int = 6, placement: Placement = WINDOW) -> Binding:
    return Bindings(ON, shares_second_moment=True).bind(torch.zeros(numel), [placement], LOCAL)


def test_equal_lengths_do_not_hide_another_order() -> None:
    """As many blocks as elements, but blocks come in the order of columns."""
    binding = bound()
    assert binding.table.num_blocks == binding.table.numel
    loaded = torch.tensor([60.0, 70.0, 0.0, 10.0, 20.0, 30.0])
    states: dict[torch.Tensor, StepState] = {binding.tensor: {"exp_avg_sq": loaded.clone()}}
    assert not is_per_block(states[binding.tensor]["exp_avg_sq"], binding)
    to_blocks(states, [binding])
    mark_settled(states, [binding])
    values = states[binding.tensor]["exp_avg_sq"]
    # a column has three elements, and this rank's is the only one that is summed here
    assert torch.equal(values * 3, torch.tensor([0.0, 10.0, 20.0, 30.0, 60.0, 70.0]))
    assert torch.equal(per_element(values, binding) * 3, loaded)


@pytest.mark.parametrize("expanded", [True, False])
@pytest.mark.parametrize("role", [Role.QUERY, Role.FFN, Role.NORM])
def test_the_mean_of_a_block_has_the_bits_of_its_sum(role: Role, expanded: bool, monkeypatch: Any) -> None:
    """What our files hold is not copied in fp64, what AdamW's hold is; both are the sums of the reference."""
    from ds_blockwise.optimizers import second_moment

    shape = (21,) if role is Role.NORM else (12, 7)
    own = spec(shape, role, num_heads=3) if role is Role.QUERY else spec(shape, role)
    numel = own.numel - 4
    binding = bound(own.numel, Placement(own, None, 0, 2, numel, shape))
    generator = torch.Generator().manual_seed(1)
    loaded = torch.rand(own.numel, generator=generator)
    if expanded:
        loaded = binding.table.expand(torch.rand(binding.table.num_blocks, generator=generator))
    wanted = block_sums(loaded, binding.table, square=False)
    called = []
    monkeypatch.setattr(second_moment, "block_sums", lambda *a, **k: called.append(a) or block_sums(*a, **k))
    states: dict[torch.Tensor, StepState] = {binding.tensor: {"exp_avg_sq": loaded.clone()}}
    to_blocks(states, [binding])
    counts = binding.table.on(wanted.device).slot_numel
    assert torch.equal(states[binding.tensor]["exp_avg_sq"], (wanted / counts).float()[: binding.table.num_blocks])
    assert bool(called) == (not expanded and role is not Role.NORM)


def test_an_optimizer_settles_such_a_tensor_at_its_next_step() -> None:
    tensor = torch.zeros(6)
    optimizer = BlockwiseAdamMini([tensor], lr=1e-3, backend="reference")
    optimizer.bind(tensor, [WINDOW], LOCAL)
    tensor.grad = torch.ones(6)
    optimizer.step()
    optimizer.state[tensor]["exp_avg_sq"] = torch.tensor([60.0, 70.0, 0.0, 10.0, 20.0, 30.0])
    tensor.grad = torch.zeros(6)
    optimizer.step()
    expected = 0.95 * torch.tensor([0.0, 10.0, 20.0, 30.0, 60.0, 70.0]) / 3
    torch.testing.assert_close(optimizer.state[tensor]["exp_avg_sq"], expected)


def test_what_was_moved_is_known_by_its_length() -> None:
    placement = Placement(spec((4, 8), Role.FFN), None, 0, 0, 32)
    binding = bound(32, placement)
    values = zeros_for(binding.tensor, binding, "block")
    assert values.shape == (4,) and is_per_block(values, binding)
    moved = values.double()  # as a host does that offloads states: the mark is gone
    assert unsettled({binding.tensor: {"exp_avg_sq": moved}}, [binding]) == [binding]
    assert is_per_block(moved, binding)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_keep_the_mark(how: str) -> None:
    values = per_block(torch.arange(6.0))
    if how == "deepcopy":
        copied = copy.deepcopy(values)
    else:
        file = io.BytesIO()
        torch.save(values, file)
        file.seek(0)
        copied = torch.load(file, weights_only=True)
    assert is_per_block(copied, bound())


def test_values_of_another_model_are_refused() -> None:
    binding = bound()
    states: dict[torch.Tensor, StepState] = {binding.tensor: {"exp_avg_sq": torch.zeros(5)}}
    with pytest.raises(ValueError, match="exp_avg_sq has 5 values for a tensor of 6 elements and 6 blocks"):
        to_blocks(states, [binding])


def test_element_wise_moments_have_the_shape_of_their_tensor() -> None:
    tensor = torch.zeros(2, 3, dtype=torch.bfloat16)
    binding = Bindings(ON, shares_second_moment=False).bind(
        tensor, [Placement(spec((2, 3), Role.FFN), None, 0, 0, 6)], LOCAL
    )
    values = zeros_for(tensor, binding, "element")
    assert (values.shape, values.dtype) == ((2, 3), torch.float32)
    assert per_element(values, binding) is values
