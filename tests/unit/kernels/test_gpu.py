# SPDX-License-Identifier: Apache-2.0
"""The same updates on a CUDA device as on the CPU (`make test-gpu`)."""

from dataclasses import replace

import pytest
import torch

from ds_blockwise import tag_parameters
from ds_blockwise.kernels.select import kernels_for
from ds_blockwise.kernels.self_check import disagreement
from ds_blockwise.optimizers.registry import OPTIMIZERS
from tests.helpers.kernel_cases import BF16, CASES, HYPER, clone, compare, item_of
from tests.helpers.optimizers import SHORT_NAMES
from tests.unit.kernels.test_cpp_lion import check_tables_of_models
from tests.unit.optimizers.test_base import feed, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LR = 1e-3


@pytest.mark.parametrize("cls", [OPTIMIZERS[name] for name in SHORT_NAMES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_makes_the_same_updates_as_the_cpu(cls, dtype):
    """Reductions run in another order on a GPU; fp64 sums keep that out of the result."""
    on_cpu, on_gpu = tiny(dtype=dtype), tiny(dtype=dtype).cuda()
    tag_parameters(on_gpu)
    pairs = [(m, cls(m.parameters(), lr=LR)) for m in (on_cpu, on_gpu)]
    for step in range(4):
        before = [[p.detach().double().cpu() for p in m.parameters()] for m, _ in pairs]
        feed(on_cpu, step)
        for p, q in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True):
            q.grad = p.grad.cuda()
        for _, optimizer in pairs:
            optimizer.step()
        for index, (p, q) in enumerate(zip(on_cpu.parameters(), on_gpu.parameters(), strict=True)):
            cpu, gpu = p.detach().double() - before[0][index], q.detach().double().cpu() - before[1][index]
            # bf16 weights of 0.02 round by up to 2^-14: one rounding may fall to the other side
            tolerance = 1e-6 * LR + 1e-9 if dtype == torch.float32 else 2.0**-13
            torch.testing.assert_close(gpu, cpu, rtol=1e-5, atol=tolerance)


BOTH = pytest.mark.parametrize("shared", [False, True], ids=["AdamW", "AdamMini"])
# Lion: no second moment
ALL = pytest.mark.parametrize("shared", [False, True, None], ids=["AdamW", "AdamMini", "Lion"])


@pytest.fixture
def kernels():
    return kernels_for("triton", torch.device("cuda"))


def on_the_gpu(kernels, shared, names=("flat", "fused", "heads", "transposed", "bias and norm")):
    cases = [case for name in names for case in CASES[name]()]
    made = [item_of(replace(case, peers=()), i, bool(shared))[0] for i, case in enumerate(cases)]
    items = [clone(item, kernels, "cuda") for item in made]
    for item in items if shared is None else ():
        del item.state["exp_avg_sq"]
    return items


def run(kernels, items):
    kernels.sum_split_blocks([item for item in items if item.table.has_split_blocks])
    (kernels.step_ if "exp_avg_sq" in items[0].state else kernels.step_by_sign_)(items)


@BOTH
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels_make_the_steps_of_the_reference(kernels, name, shared):
    compare(kernels, CASES[name](), shared, device="cuda")


@pytest.mark.parametrize("name", CASES)
def test_lions_kernel_has_the_bits_of_torchs_operations(kernels, name):
    check_tables_of_models(kernels, name, device="cuda")


def test_compiled_kernels_pass_the_check_before_the_first_step(kernels):
    """It steps parts of matrices too."""
    assert disagreement(kernels, torch.device("cuda")) is None


@BOTH
def test_bf16_is_rounded_to_nearest_even(kernels, shared):
    cases = [replace(case, param=BF16, grad=BF16, exp_avg=BF16) for case in CASES["fused"]()]
    compare(kernels, cases, shared, device="cuda")


@ALL
def test_a_step_never_waits_for_the_device(kernels, shared):
    items = on_the_gpu(kernels, shared)
    run(kernels, items)  # compiles, builds tables, makes the step counts
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lr in (1e-3, 2e-3):
            for item in items:
                item.hyper = replace(HYPER, lr=lr)
            run(kernels, items)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ALL
def test_a_captured_step_equals_eager_steps(kernels, shared):
    """The replays count steps and read a learning rate that changes on the device."""
    rate = torch.tensor(1e-3, device="cuda", dtype=torch.float32)
    both = [on_the_gpu(kernels, shared) for _ in range(2)]
    for items in both:
        for item in items:
            item.hyper = replace(HYPER, lr=rate)
        run(kernels, items)
    torch.cuda.synchronize()
    eager, captured = both
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(kernels, captured)
    for number in range(5):
        rate.fill_(1e-3 / (number + 1))
        run(kernels, eager)
        graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(eager, captured, strict=True):
        assert int(a.state["step"]) == int(b.state["step"]) == 6
        assert torch.equal(a.param, b.param)
        assert all(torch.equal(a.state[key], b.state[key]) for key in a.state)


@ALL
def test_compiled_kernels_are_deterministic(kernels, shared):
    both = [on_the_gpu(kernels, shared) for _ in range(2)]
    for items in both:
        for _ in range(3):
            run(kernels, items)
    for a, b in zip(*both, strict=True):
        assert torch.equal(a.param, b.param) and all(torch.equal(a.state[key], b.state[key]) for key in a.state)
