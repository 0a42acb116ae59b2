# SPDX-License-Identifier: Apache-2.0
"""What is asked of all tensors of a step at once."""

import pytest
import torch

from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.segment_table import whole_placement
from ds_blockwise.kernels.base import Item, ReferenceKernels
from ds_blockwise.kernels.bindings import Bindings, Work, non_finite
from ds_blockwise.kernels.param_groups import NO_HYPER
from ds_blockwise.parallel.reduce import LOCAL
from tests.helpers.counting import Operations
from tests.helpers.kernel_cases import spec


def work_of(grads):
    bindings = Bindings(lambda device: ReferenceKernels(), shares_second_moment=True)
    found = []
    for grad in grads:
        param = torch.zeros(4, 3)
        binding = bindings.bind(param, [whole_placement(spec((4, 3), Role.FFN), None)], LOCAL)
        found.append(Work(binding, Item(binding.kernel_table, None, param, {}, NO_HYPER, grad)))
    return found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 3, 5])
def test_one_bad_element_in_any_gradient_is_found(place, value):
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.bfloat16]
    grads = [torch.full((4, 3), 6e4, dtype=dtype) for dtype in dtypes]
    assert not non_finite(work_of([*grads, None]))
    grads[place][2, 1] = value
    assert non_finite(work_of([*grads, None]))


def test_the_search_makes_no_operation_per_tensor():
    """A copy to the CPU for each tensor made a step of 1000 small ones wait 1000 times."""
    counts = []
    for tensors in (2, 50):
        work = work_of([torch.ones(4, 3) for _ in range(tensors)])
        with Operations() as operations:
            assert not non_finite(work)
        counts.append(operations.names)
    assert counts[0] == counts[1]
    assert not non_finite(work_of([None])) and not non_finite([])
