# SPDX-License-Identifier: Apache-2.0
"""Lion's C++ kernel: every bit is that of torch's operations."""

import random
from dataclasses import replace

import pytest
import torch

from ds_blockwise.kernels.base import Hyper, ReferenceKernels
from ds_blockwise.kernels.cpp.backend import CppKernels
from tests.helpers.kernel_cases import CASES, SCALE, clone, covered, item_of
from tests.unit.kernels.test_cpp import BF16, F16, F32, F64, LR, random_table, stepped


def same_bits(a, b):
    """Whether two tensors hold the same numbers, the sign of 0 included, and NaN in the same places."""
    numbers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(numbers)[~nan], b.view(numbers)[~nan])


ODD = (0.0, -0.0, float("nan"), -float("nan"), float("inf"), -float("inf"))
TINY = 1e-41


def check_random_table(kernels, seed, param_types, odd=(*ODD, TINY), most=10**9):
    """Whether three steps of a random tensor have the bits of the reference; a few of its sums cancel to no sign.

    ``odd`` are numbers that a tenth of the elements have, ``most`` limits the elements.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    while (table := random_table(rng, shares=False)).numel > most:
        pass
    factors = [0.3, 1.0, 1.7, 8.0]  # products of these are rounded, in whatever order they are taken
    updates = [
        replace(run.update, lr_multiplier=rng.choice(factors), weight_decay_multiplier=rng.choice([0.0, *factors]))
        for run in table.multiplier_runs
    ]
    runs = [replace(run, update=update) for run, update in zip(table.multiplier_runs, updates, strict=True)]
    table = replace(table, multiplier_runs=tuple(runs))
    param_type = rng.choice(param_types)
    grad_type = rng.choice([F32, F64, BF16, F16])
    momentum = rng.choice([torch.promote_types(param_type, F32), BF16])
    scaled = param_type is F32 and grad_type in (F32, BF16) and rng.random() < 0.5
    inside = torch.zeros(table.numel, dtype=torch.bool)
    for run in table.multiplier_runs:
        run.of(inside).fill_(True)
    param, grad, exp_avg = (torch.randn(table.numel, dtype=F64) * scale for scale in (0.02, 1e-2, 1e-2))
    for values in (param, grad, exp_avg):
        at = torch.randint(table.numel, (table.numel // 10,))
        values[at] = torch.tensor(odd)[torch.randint(len(odd), at.shape)].double()
    beta1, beta2 = rng.choice([(0.9, 0.99), (0.95, 0.98), (0.5, 0.4), (0.0, 0.6)])
    cancels = torch.rand(table.numel) < 0.2  # to a number of no sign, or of that of a rounding
    exp_avg = torch.where(cancels, -(1 - beta1) / (beta1 or 1.0) * grad.to(grad_type).double(), exp_avg)
    grad, exp_avg = (torch.where(inside, values, 0.0) for values in (grad, exp_avg))
    tensors = param.to(param_type), grad.to(grad_type), exp_avg.to(momentum)
    floor, decay = rng.choice([0.0, 1e-4]), rng.choice([0.0, 0.1])
    hyper = Hyper(LR, floor, beta1, beta2, 1e-8, decay, 0.3, rng.random() < 0.4)
    (a, state_a, copy_a), (b, state_b, copy_b) = (
        stepped(by, table, tensors, hyper, rng.randrange(5), 3, grad_scale=SCALE if scaled else None)
        for by in (ReferenceKernels(), kernels)
    )
    assert int(state_a["step"]) == int(state_b["step"]) == 6
    assert same_bits(a, b) and same_bits(state_a["exp_avg"], state_b["exp_avg"])
    assert same_bits(b[~inside], tensors[0][~inside]), "padding was touched"
    if param_type in (F32, F64):
        assert same_bits(copy_a[inside], copy_b[inside])


def check_tables_of_models(kernels, name, same=same_bits, device="cpu"):
    """Whether two steps of a case of `CASES` are the reference's."""
    steps = []
    for by in (ReferenceKernels(), kernels):
        items = [clone(item_of(case, i, False)[0], by, device) for i, case in enumerate(CASES[name]())]
        for item in items:
            del item.state["exp_avg_sq"]
            item.keeps_update = True
        for _ in range(2):
            by.step_by_sign_(items)
        steps.append([t for i in items for t in (i.param, i.state["exp_avg"], i.update)])
        steps[-1] += [i.param_copy[covered(i)] for i in items if i.param_copy is not None]
    assert all(same(a, b) for a, b in zip(*steps, strict=True))


@pytest.mark.parametrize("seed", range(120))
def test_it_has_the_bits_of_the_reference_on_random_tables(seed):
    """A sign that is rounded otherwise is an update of the other direction."""
    check_random_table(CppKernels(), seed, [F32, F32, BF16, F16, F64])


@pytest.mark.parametrize("name", CASES)
def test_it_has_the_bits_of_the_reference_on_tables_of_models(name):
    check_tables_of_models(CppKernels(), name)
