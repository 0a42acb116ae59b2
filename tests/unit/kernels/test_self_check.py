# SPDX-License-Identifier: Apache-2.0
"""The check that a backend passes before it steps anybody's weights."""

import itertools
import re
from dataclasses import replace

import pytest
import torch

from ds_blockwise.kernels.base import ReferenceKernels
from ds_blockwise.kernels.select import kernels_for
from ds_blockwise.kernels.self_check import FORMS, disagreement, stepped, stepped_parts
from ds_blockwise.kernels.triton.tables import PART_LOG2, PART_SHIFTS, Kind, SumKind

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["cpp", "triton", "reference"])
def test_working_backends_pass_their_check(backend):
    """A check that good kernels fail would put every GPU on the slow reference."""
    assert disagreement(kernels_for(backend, CPU), CPU) is None


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_working_backends_pass_it_for_scaled_gradients(backend):
    assert disagreement(kernels_for(backend, CPU), CPU, 0.37) is None


class Unscaled(ReferenceKernels):
    """Kernels that read gradients as they lie in memory."""

    name = "unscaled"

    def step_(self, items):
        super().step_([replace(item, grad_scale=None) for item in items])


def test_gradients_that_are_not_scaled_are_found():
    """Other code than that of other gradients: on a chip where it fails every clipped step would be wrong."""
    assert "the unscaled kernels differ" in disagreement(Unscaled(), CPU, 0.37)
    assert disagreement(Unscaled(), CPU) is None


class Altered(ReferenceKernels):
    """The reference with one thing spoilt after every step."""

    name = "altered"

    def __init__(self, spoil, only_shared=None):
        self.spoil, self.only_shared = spoil, only_shared

    def step_(self, items):
        super().step_(items)
        for item in items:
            if self.only_shared in (None, item.table.shares_second_moment):
                self.spoil(item)


def scaled(key, at):
    def spoil(item):
        tensor = item.param if key == "parameters" else item.state[key]
        tensor.view(-1)[at] *= 1.01

    return spoil


@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("key", ["parameters", "exp_avg", "exp_avg_sq"])
def test_one_wrong_value_is_found(key, at):
    """A wrong edge of a tile shows in one element only, and a wrong state in the next step."""
    assert "the altered kernels differ from the reference by" in disagreement(Altered(scaled(key, at)), CPU)


@pytest.mark.parametrize(("shared", "form"), [(False, "AdamW"), (True, "Adam-mini")])
def test_both_optimizers_are_checked(shared, form):
    """Kernels may be right for one form of the second moment and wrong for the other."""
    assert disagreement(Altered(scaled("exp_avg_sq", 0), shared), CPU).endswith(f" of {form}")


@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("key", ["parameters", "exp_avg"])
def test_lion_is_checked(key, at):
    """Its kernel is other code, which nothing else of the check runs."""

    class OtherLion(ReferenceKernels):
        name = "altered"

        def step_by_sign_(self, items):
            super().step_by_sign_(items)
            for item in items:
                scaled(key, at)(item)

    assert disagreement(OtherLion(), CPU).endswith(f" in {key} of Lion")


def test_bf16_is_checked():
    """Rounded gradients, moments and copies take other code."""

    def spoil(item):
        if item.param_copy is not None:
            item.param_copy.view(-1)[-1] += 0.01

    assert disagreement(Altered(spoil), CPU).endswith(" in copies of Adam-mini in bf16")


class AlteredParts(ReferenceKernels):
    """The reference with one element spoilt of what is in rows."""

    name = "altered"

    def __init__(self, of):
        self.of = of

    def momentum_part_(self, exp_avg, grad, ahead, **rates):
        super().momentum_part_(exp_avg, grad, ahead, **rates)
        if self.of in ("exp_avg", "updates"):
            (exp_avg if self.of == "exp_avg" else ahead)[-1, -1] *= 1.02

    def step_part_(self, param, direction, param_copy, update, hyper):
        super().step_part_(param, direction, param_copy, update, hyper)
        if self.of == "parameters":
            param[-1, -1] *= 1.02
        if self.of == "copies" and param_copy is not None:
            param_copy[-1, -1] += 0.01


@pytest.mark.parametrize(
    ("name", "form"), [("exp_avg", ""), ("updates", ""), ("parameters", ""), ("copies", " in bf16")]
)
def test_parts_of_matrices_are_checked(name, form):
    """A wrong momentum shows in what is orthogonalised, and that in weights."""
    assert re.search(rf"altered kernels differ .* of Muon{form}$", disagreement(AlteredParts(name), CPU))


def test_every_kind_of_job_is_checked(monkeypatch):
    """Each is code of its own: one that the check never launches would be tried on somebody's weights."""
    backend = pytest.importorskip("ds_blockwise.kernels.triton.backend", reason="Triton is not installed")
    launched, widths = set(), set()

    def note(kernel, programs, *args, **meta):
        launched.add((kernel.__name__, meta.get("KIND"), meta.get("TO_SUMS")))
        widths.add((kernel.__name__, meta.get("SHIFT")))

    monkeypatch.setattr(backend, "_run", note)
    for update, dtype in FORMS:
        stepped(backend.TritonKernels(), update, dtype, CPU)
    stepped_parts(backend.TritonKernels(), torch.float32, CPU)
    assert {kind for name, kind, _ in launched if name == "update_kernel"} == set(Kind)
    assert {kind for name, kind, _ in launched if name == "sum_kernel"} >= {SumKind.PIECE, SumKind.COLUMNS}
    assert {*itertools.product(("momentum_kernel", "descend_kernel"), (*PART_SHIFTS, PART_LOG2))} <= widths
    assert {to_sums for name, _, to_sums in launched if name == "finish_kernel"} == {True, False}


def test_a_nan_is_a_difference():
    """A comparison with NaN is false, so `error > limit` would let it through."""
    assert "nan in parameters" in disagreement(Altered(lambda item: item.param.view(-1)[3].fill_(float("nan"))), CPU)


def test_rounding_is_not_a_difference():
    """Compilers contract and reorder; a check that no other machine passes would put it on the slow reference."""

    def spoil(item):
        item.param.mul_(1 + 2.0**-23)
        item.state["exp_avg"].mul_(1 + 2.0**-22)

    assert disagreement(Altered(spoil), CPU) is None
