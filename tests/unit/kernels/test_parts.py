# SPDX-License-Identifier: Apache-2.0
"""Momentum and weights of parts of matrices, as Muon has them: every backend against plain arithmetic in fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from ds_blockwise.blocks.settings.update_settings import UpdateSettings
from ds_blockwise.kernels.base import Hyper, Kernels
from ds_blockwise.kernels.select import kernels_for
from tests.helpers.kernel_cases import BF16, F16, F32, F64, assert_one_ulp

BACKENDS = ("reference", "cpp", "triton")
HYPER = Hyper(1e-2, 1e-3, 0.9, 0.95, 1e-8, 0.3, progress=0.5)
UPDATE = UpdateSettings(2.0, 0.5, lr_multiplier_change=-1.0)
RATE = (2.0 - 0.5) * (1e-2 - 1e-3) + 1e-3  # by hand: the multiplier is 1.5 halfway
FACTOR = 1 - RATE * 0.3 * 0.5


@dataclass(frozen=True)
class Part:
    """Rows, ``stride`` apart in the stepped tensor and ``other`` in the vector, ``start`` elements behind a vector."""

    height: int
    width: int
    stride: int
    other: int
    start: int = 0
    param: torch.dtype = F32
    grad: torch.dtype = F32
    exp_avg: torch.dtype = F32
    copy: torch.dtype | None = None
    wide: torch.dtype = F32

    def memory(self, seed: int, dtype: torch.dtype, *, vector: bool = False) -> torch.Tensor:
        size = self.start + self.height * (self.other if vector else self.stride)
        return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)

    def rows(self, memory: torch.Tensor, *, vector: bool = False) -> torch.Tensor:
        return memory.as_strided((self.height, self.width), (self.other if vector else self.stride, 1), self.start)


PARTS = {
    "one element": Part(1, 1, 9, 1),
    "a piece of a row": Part(1, 37, 50, 37, 3),
    "rows": Part(5, 700, 700, 700),
    "rows at an odd place": Part(3, 701, 701, 701, 5),
    "columns": Part(70, 24, 72, 24, 24),
    "one column": Part(130, 1, 3, 1, 2),
    "long pieces of longer rows": Part(18, 130, 160, 130, 7),
    "a shard in a matrix": Part(4, 48, 48, 96),
    "bf16": Part(3, 700, 700, 700, 0, F32, BF16, BF16, BF16),
    "bf16 weights": Part(33, 40, 64, 40, 1, BF16, BF16, F32),
    "fp16 weights and a copy": Part(33, 40, 64, 40, 1, F16, F16, F32, F16),
    "fp64": Part(33, 40, 64, 40, 1, F64, F64, F64, BF16, F64),
}


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernels_for(request.param, torch.device("cpu"))


def outside(part: Part, memory: torch.Tensor, *, vector: bool = False) -> torch.Tensor:
    """What lies before, between and behind the rows."""
    left = memory.clone()
    part.rows(left, vector=vector).zero_()
    return left


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """To 1e-6 of the largest value (arithmetic in fp32), or one unit of a 16-bit dtype."""
    if found.dtype in (BF16, F16):
        assert_one_ulp(found, wanted.to(found.dtype))
    else:
        limit = (1e-6 if found.dtype == F32 else 1e-14) * max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=limit)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.95, True), (0.95, False), (0.3, True), (0.0, True)])
@pytest.mark.parametrize("name", PARTS)
def test_momentum_is_one_average_and_half_a_step_more(
    kernels: Kernels, name: str, momentum: float, nesterov: bool
) -> None:
    part = PARTS[name]
    grads, moments = part.memory(1, part.grad), part.memory(2, part.exp_avg)
    vector = part.memory(3, part.wide, vector=True)
    g, m = (part.rows(memory).double() for memory in (grads, moments))
    moved = momentum * m + (1 - momentum) * g
    before = outside(part, moments), outside(part, vector, vector=True)
    ahead = part.rows(vector, vector=True)
    kernels.momentum_part_(part.rows(moments), part.rows(grads), ahead, momentum=momentum, nesterov=nesterov)
    assert_near(part.rows(moments), moved)
    assert_near(ahead, momentum * moved + (1 - momentum) * g if nesterov else moved)
    assert torch.equal(outside(part, moments), before[0]) and torch.equal(outside(part, vector, vector=True), before[1])


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_weights_decay_and_descend(kernels: Kernels, name: str, cautious: bool) -> None:
    part = PARTS[name]
    params, vector = part.memory(1, part.param), part.memory(2, part.wide, vector=True)
    copies = None if part.copy is None else part.memory(3, part.copy)
    p, d = part.rows(params).double(), part.rows(vector, vector=True).double()
    wanted = (torch.where(p * d < 0, p, FACTOR * p) if cautious else FACTOR * p) - RATE * d
    before, was = outside(part, params), vector.clone()
    version = params._version
    copied = None if copies is None else part.rows(copies)
    hyper = replace(HYPER, cautious=cautious)
    kernels.step_part_(part.rows(params), part.rows(vector, vector=True), copied, UPDATE, hyper)
    assert params._version > version, "autograd must notice the change"
    assert_near(part.rows(params), wanted)
    if copied is not None:
        assert_near(copied, wanted)
    assert torch.equal(outside(part, params), before) and torch.equal(vector, was)


def test_zeros_stay_zeros_and_a_weight_without_an_update_only_decays(kernels: Kernels) -> None:
    moments, grads, ahead, params = torch.zeros(5, 9), torch.zeros(5, 9), torch.ones(5, 9), torch.ones(5, 9)
    kernels.momentum_part_(moments, grads, ahead, momentum=0.95, nesterov=True)
    kernels.step_part_(params, ahead, None, UpdateSettings(1.0), replace(HYPER, lr=0.5, lr_floor=0.0, weight_decay=0.5))
    assert not moments.any() and not ahead.any() and torch.equal(params, torch.full((5, 9), 0.75))
    kernels.step_part_(params, torch.ones(5, 9), None, UpdateSettings(1.0), replace(HYPER, lr=0.0, lr_floor=0.0))
    assert torch.equal(params, torch.full((5, 9), 0.75)), "a rate of zero, as at the start of a warm-up"


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_no_bit_depends_on_where_a_part_is_cut(device: str) -> None:
    """A ZeRO cut, a tensor-parallel shard and a whole matrix take other forms of the launch."""
    kernels = kernels_for("triton", torch.device(device))
    whole = Part(33, 200, 200, 200)
    results = []
    for rows, columns in ((33, 200), (33, 37), (1, 200), (7, 128)):
        tensors = [whole.rows(whole.memory(seed, F32).to(device)) for seed in (1, 2, 3, 4)]
        for top in range(0, 33, rows):
            for left in range(0, 200, columns):
                piece = [t[top : top + rows, left : left + columns] for t in tensors]
                moments, grads, ahead, params = piece
                kernels.momentum_part_(moments, grads, ahead, momentum=0.95, nesterov=True)
                kernels.step_part_(params, ahead, None, UPDATE, HYPER)
        results.append(tensors)
    for cut in results[1:]:
        assert all(map(torch.equal, cut, results[0]))


def test_a_part_is_one_launch_each(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = pytest.importorskip("ds_blockwise.kernels.triton.backend", reason="Triton is not installed")
    launched: list[str] = []
    monkeypatch.setattr(backend, "_run", lambda kernel, *args, **meta: launched.append(kernel.__name__))
    kernels, part = backend.TritonKernels(), PARTS["long pieces of longer rows"]
    moments, grads, params, copies = (part.rows(part.memory(seed, F32)) for seed in range(4))
    ahead = part.rows(part.memory(4, F32, vector=True), vector=True)
    kernels.momentum_part_(moments, grads, ahead, momentum=0.95, nesterov=True)
    kernels.step_part_(params, ahead, copies.to(BF16), UPDATE, HYPER)
    assert launched == ["momentum_kernel", "descend_kernel"]
