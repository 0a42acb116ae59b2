# SPDX-License-Identifier: Apache-2.0
"""The readable definition against the papers' formulas, written out element by element in fp64.

AdamW: arXiv 1711.05101, algorithm 2. Adam-mini: arXiv 2406.16793, algorithm 1. A block's rate with a floor: arXiv
2502.19002, section 6.
"""

from __future__ import annotations

import math

import pytest
import torch

from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.segment_table import build_table, whole_placement
from ds_blockwise.kernels.base import Hyper, Item, ReferenceKernels, StepState
from ds_blockwise.kernels.update import block_lr, block_sums, denominator, update_exp_avg_
from tests.helpers.kernel_cases import BF16, F32, F64, spec

HYPER = Hyper(lr=1e-2, lr_floor=1e-3, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1)


@pytest.mark.parametrize("shares", [False, True], ids=["AdamW", "AdamMini"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (5, 64)])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_steps_are_those_of_the_papers(shares: bool, rows: int, columns: int, dtype: torch.dtype) -> None:
    block_spec = spec((rows, columns), Role.FFN)
    multiplier = block_spec.parts[0].update.lr_multiplier
    assert multiplier != 1.0, "a multiplier of 1 would hide a wrong one"
    table = build_table(rows * columns, [whole_placement(block_spec, None)], shares_second_moment=shares)
    generator = torch.Generator().manual_seed(rows * columns)
    param = (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)
    wide = F64 if dtype == F64 else F32
    size = (rows,) if shares else (rows, columns)
    state: StepState = {"step": 0, "exp_avg": torch.zeros(rows, columns, dtype=wide)}
    state["exp_avg_sq"] = torch.zeros(size, dtype=wide)
    m = [[0.0] * columns for _ in range(rows)]
    v = [[0.0] * columns for _ in range(rows)]
    rate = multiplier * (HYPER.lr - HYPER.lr_floor) + HYPER.lr_floor
    decay = HYPER.weight_decay * block_spec.parts[0].update.weight_decay_multiplier
    for step in range(1, 4):
        before = param.double().tolist()
        grad = torch.randn(rows, columns, generator=generator).to(dtype)
        g = grad.double().tolist()
        ReferenceKernels().step_([Item(table, None, param, state, HYPER, grad)])
        for i in range(rows):
            mean = sum(x * x for x in g[i]) / columns
            for j in range(columns):
                m[i][j] = 0.8 * m[i][j] + 0.2 * g[i][j]
                v[i][j] = 0.9 * v[i][j] + 0.1 * (mean if shares else g[i][j] ** 2)
                first, second = m[i][j] / (1 - 0.8**step), v[i][j] / (1 - 0.9**step)
                update = -rate * decay * before[i][j] - rate * first / (math.sqrt(second) + 1e-6)
                if dtype == BF16:
                    # the new weight is rounded once: half a unit in its last place of 8 bits
                    assert abs(param[i, j].item() - (before[i][j] + update)) <= abs(before[i][j] + update) * 2**-8
                else:
                    found = (param[i, j].item() - before[i][j]) / HYPER.lr
                    tolerance = 1e-12 if dtype == F64 else 2e-5  # fp32 weights of 0.1, rounded, over a rate of 0.01
                    assert abs(found - update / HYPER.lr) <= tolerance * max(1.0, abs(update / HYPER.lr))


def test_a_block_decays_to_the_absolute_floor() -> None:
    """Peak P, minimum M and shape f: the base is ``f P + (1 - f) M`` and its floor ``(1 - f) M``."""
    peak, minimum = 6e-4, 3e-5
    for multiplier in (1.0, 4.0, 10.0):
        for f in (1.0, 0.25, 0.0):
            floor = (1 - f) * minimum
            found = block_lr(multiplier, lr=f * peak + floor, lr_floor=floor)
            assert found == pytest.approx(f * multiplier * peak + (1 - f) * minimum, rel=1e-12)


def test_sums_are_fp64_whatever_the_gradient_is() -> None:
    """In fp32 the small element would be lost."""
    table = build_table(3, [whole_placement(spec((1, 3), Role.FFN), None)], shares_second_moment=True)
    values = torch.tensor([1e4, 1.0, 1e4])
    assert block_sums(values, table, square=True).tolist() == [2e8 + 1.0]
    assert block_sums(values, table, square=False).tolist() == [20001.0]


def test_momentum_in_bf16_is_used_before_it_is_rounded() -> None:
    table = build_table(1, [], shares_second_moment=False)
    stored = torch.tensor([1.0], dtype=BF16)
    used = update_exp_avg_(stored, torch.tensor([1.001]), table, beta1=0.5)
    assert used.item() == pytest.approx(1.0005, abs=1e-6)
    assert stored.item() == 1.0


def test_the_denominator_is_bias_corrected() -> None:
    found = denominator(torch.tensor([0.1], dtype=F64), step=1, beta2=0.9, eps=1e-3)
    assert found.item() == pytest.approx(1.0 + 1e-3)
