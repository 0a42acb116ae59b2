# SPDX-License-Identifier: Apache-2.0
"""The two forms of a second moment: which one a tensor has, and the way from one to the other."""

from __future__ import annotations

import copy
import io
from functools import partial

import pytest
import torch

from ds_blockwise import BlockwiseAdamMini
from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.segment_table import Placement
from ds_blockwise.kernels.base import StepState
from ds_blockwise.kernels.bindings import Binding, Bindings
from ds_blockwise.kernels.select import kernels_for
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
