# SPDX-License-Identifier: Apache-2.0
"""Every backend equals the reference on tensors of every shape, dtype, alignment and cut."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dataclasses import replace

import pytest

from ds_blockwise.blocks.roles import Role
from ds_blockwise.kernels.base import ReferenceKernels
from ds_blockwise.kernels.select import kernels_for
from tests.helpers.kernel_cases import BF16, CASES, F32, clone, compare, flat, item_of, spec, step, whole

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


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_norms_are_those_of_fp64(kernels, dtype):
    """They decide how much is clipped, and whether a step is skipped."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator).mul_(1e3).to(dtype) for n in (0, 1, 2, 31, 32, 33, 4097, 300_001)]
    tensors += [tensors[-1].new_full((5,), torch.finfo(dtype).max), tensors[-1][1:]]
    found = kernels.norms(tensors)
    assert found.dtype == torch.float64 and bool(found.isfinite().all())
    torch.testing.assert_close(found, torch.stack([t.double().norm() for t in tensors]), rtol=1e-13, atol=0)
    for bad in (float("nan"), float("inf"), -float("inf")):
        tensors[5][7] = bad
        assert kernels.norms(tensors).isfinite().tolist() == [n != 5 for n in range(len(tensors))]
    assert kernels.norms([]).shape == (0,)


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


@pytest.mark.parametrize("cautious", [False, True], ids=["plain", "cautious"])
@BOTH
def test_a_scaled_gradient_gives_the_bits_of_one_that_was_scaled_in_memory(kernels, shared, cautious):
    """Hosts that cast, clip, step and round in four passes are replaced by one: not a bit may change.

    A compiler that merged the scaling with the addition after it would round once instead of twice.
    """
    cases = [case for case in CASES["scaled"]() if case.grad == BF16]
    for number, case in enumerate(cases):
        case = replace(case, hyper=replace(case.hyper, cautious=cautious))
        item, peers = item_of(case, number, shared)
        scaled, before = clone(item, kernels), clone(item, kernels)
        before.grad, before.grad_scale = before.grad.float().mul_(case.grad_scale), None
        for one in (scaled, before):
            step(kernels, [one], [peers])
        assert torch.equal(scaled.param, before.param) and torch.equal(scaled.param_copy, before.param_copy), number
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(scaled.state[key], before.state[key]), (number, key)
        assert not torch.equal(scaled.param, item.param) or not item.table.numel
