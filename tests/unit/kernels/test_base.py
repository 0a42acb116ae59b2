# SPDX-License-Identifier: Apache-2.0
"""Every backend equals the reference on tensors of every shape, dtype, alignment and cut."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from ds_blockwise.blocks.roles import Role
from ds_blockwise.kernels.base import ReferenceKernels
from ds_blockwise.kernels.select import kernels_for
from tests.helpers.kernel_cases import CASES, F32, clone, compare, flat, item_of, spec, step, whole

CPU = torch.device("cpu")


@pytest.fixture(params=["cpp", "triton"])
def kernels(request):
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    return kernels_for(request.param, CPU)


BOTH = pytest.mark.parametrize("shared", [False, True], ids=["AdamW", "AdamMini"])


@BOTH
@pytest.mark.parametrize("name", CASES)
def test_a_backend_makes_the_steps_of_the_reference(kernels, name, shared):
    compare(kernels, CASES[name](), shared)


@BOTH
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_bad_gradient_spoils_what_it_spoils_in_the_reference(kernels, shared, poison):
    compare(kernels, [*CASES["fused"](), *CASES["transposed"]()], shared, poison=poison)


@BOTH
def test_ten_steps(kernels, shared):
    compare(kernels, CASES["groups"](), shared, steps=10)


@BOTH
def test_the_same_step_twice_is_bitwise_the_same(kernels, shared):
    cases = [*CASES["flat"](), *CASES["heads"](), *CASES["several pieces"]()]
    results = []
    for _ in range(2):
        pairs = [item_of(case, i, shared) for i, case in enumerate(cases)]
        items = [clone(item, kernels) for item, _ in pairs]
        for _ in range(2):
            step(kernels, items, [peers for _, peers in pairs])
        results.append([t for i in items for t in (i.param, i.state["exp_avg"], i.state["exp_avg_sq"])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_sums_of_tensors_without_a_gradient_are_zero(kernels):
    cases = [flat([spec((6, 50), Role.FFN)], 25, 260), flat([spec((6, 50), Role.FFN)], 30, 270)]
    items = [clone(item_of(case, i, True)[0], kernels) for i, case in enumerate(cases)]
    items[1].grad = None
    kernels.sum_split_blocks(items)
    table = items[0].table
    expected = clone(item_of(cases[0], 0, True)[0], ReferenceKernels())
    ReferenceKernels().sum_split_blocks([expected])
    torch.testing.assert_close(items[0].sums[table.dp_slots], expected.sums[table.dp_slots], rtol=1e-14, atol=0)
    assert not items[1].sums[items[1].table.dp_slots].any()


@BOTH
def test_only_the_tensors_of_the_call_are_stepped(kernels, shared):
    items = [clone(item_of(whole(spec((3, 9), Role.FFN)), i, shared)[0], kernels) for i in range(3)]
    before = items[1].param.clone()
    kernels.step_([items[0], items[2]])
    assert torch.equal(items[1].param, before) and int(items[1].state["step"]) == 0
    assert int(items[0].state["step"]) == int(items[2].state["step"]) == 1
    assert items[0].param.dtype == F32
