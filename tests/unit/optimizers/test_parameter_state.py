# SPDX-License-Identifier: Apache-2.0
"""One parameter's state with a value per element, read from and written into tensors that hold several."""

from __future__ import annotations

import pytest
import torch

from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.segment_table import Placement
from ds_blockwise.kernels.bindings import Binding
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.parameter_state import (
    has_state,
    is_set_together,
    is_settable,
    read_state,
    state_keys,
    write_state,
)
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.parallel.reduce import LOCAL
from tests.helpers.kernel_cases import spec
from tests.helpers.optimizers import SHORT_NAMES

ROWS = spec((2, 3), Role.FFN)
COLUMNS = spec((3, 8), Role.FFN, axis=1)
# two rows; then of a transposed weight the columns 6, 7, 0, 1, 2, 3, of whose blocks nothing else is here
PLACEMENTS = [Placement(ROWS, None, 0, 0, 6), Placement(COLUMNS, None, 6, 6, 6, (6, 12))]


def stepped(name: str) -> tuple[BlockwiseOptimizer, Binding, torch.Tensor]:
    """An optimizer after one step on a flat tensor with a padding of two, and its gradient."""
    tensor = torch.zeros(14)
    optimizer = OPTIMIZERS[name]([tensor], lr=1e-3, betas=(0.5, 0.75), backend="reference")
    optimizer.bind(tensor, PLACEMENTS, LOCAL)
    (binding,) = optimizer.bindings()
    assert not has_state(optimizer, binding)
    tensor.grad = torch.arange(14.0)
    optimizer.step()
    assert has_state(optimizer, binding)
    return optimizer, binding, tensor.grad


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_state_is_read_by_element(name: str) -> None:
    """A parameter behind another one began at its element's offset in a vector that has a value per block."""
    optimizer, binding, grad = stepped(name)
    shares = optimizer.shares_second_moment
    assert torch.equal(read_state(optimizer, binding, 1, "exp_avg"), 0.5 * grad[6:12])
    assert torch.equal(read_state(optimizer, binding, 1, "step"), torch.ones(6))
    if "exp_avg_sq" in state_keys(optimizer):
        rows = grad[:6].square().view(2, 3)
        rows = rows.mean(1, keepdim=True).expand(2, 3) if shares else rows
        assert torch.allclose(read_state(optimizer, binding, 0, "exp_avg_sq"), 0.25 * rows.flatten())
        # each column has three elements, two of them on other ranks
        columns = grad[6:12].square() / (3 if shares else 1)
        assert torch.allclose(read_state(optimizer, binding, 1, "exp_avg_sq"), 0.25 * columns)


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_one_parameters_state_is_written(name: str) -> None:
    """Setting one parameter changed its neighbours, or blocks in the order of elements."""
    optimizer, binding, _ = stepped(name)
    new = torch.tensor([60.0, 70.0, 0.0, 10.0, 20.0, 30.0])
    for key in state_keys(optimizer):
        if is_settable(key):
            before = read_state(optimizer, binding, 0, key).clone()
            write_state(optimizer, binding, 1, key, new)
            assert torch.equal(read_state(optimizer, binding, 0, key), before)
            divisor = 3 if is_set_together(optimizer, key) else 1
            assert torch.allclose(read_state(optimizer, binding, 1, key), new / divisor)
    rows = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    if "exp_avg_sq" in state_keys(optimizer):
        write_state(optimizer, binding, 0, "exp_avg_sq", rows)
        means = torch.tensor([3.0, 3.0, 3.0, 1.0, 1.0, 1.0])
        wanted = means if optimizer.shares_second_moment else rows
        assert torch.equal(read_state(optimizer, binding, 0, "exp_avg_sq"), wanted)


def test_state_that_a_host_wrote_is_read_and_written_as_it_is() -> None:
    """Until the next step a loaded second moment has one value per element."""
    optimizer, binding, _ = stepped("BlockwiseAdamMini")
    optimizer.state[binding.tensor]["exp_avg_sq"] = torch.arange(14.0)
    assert torch.equal(read_state(optimizer, binding, 1, "exp_avg_sq"), torch.arange(6.0, 12.0))
    write_state(optimizer, binding, 1, "exp_avg_sq", torch.ones(6))
    assert optimizer.state[binding.tensor]["exp_avg_sq"].tolist() == [0, 1, 2, 3, 4, 5, 1, 1, 1, 1, 1, 1, 12, 13]
