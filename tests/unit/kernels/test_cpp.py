# SPDX-License-Identifier: Apache-2.0
"""The C++ backend on random segment tables, beyond what today's models contain, against the reference."""

import random

import pytest
import torch

from ds_blockwise.blocks.segment_table import SegmentTable, _merge_multipliers
from ds_blockwise.blocks.settings.update_settings import UpdateSettings
from ds_blockwise.blocks.table_runs import TableRun
from ds_blockwise.kernels.base import Hyper, Item, ReferenceKernels
from ds_blockwise.kernels.cpp.backend import CppKernels

CPU = torch.device("cpu")
LR = 1e-2
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


class Runs:
    """Random runs one after the other, some of them sharing their blocks."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.runs: list[TableRun] = []
        self.numels: list[int] = []
        self.betas: dict[int, tuple[float | None, float | None]] = {}  # by slot: one block has one beta2
        self.at = rng.randrange(9)

    def add(self, count, numel, slot=None, repeat=1, stride=0, factor=1):
        new = slot is None
        slot = len(self.numels) if new else slot
        multipliers = self.rng.choice([1.0, 4.0, 8.0]), self.rng.choice([0.0, 1.0])
        change = self.rng.choice([0.0, 0.0, 2.0])
        betas = self.betas.setdefault(
            slot, self.rng.choice([(None, None)] * 3 + [(None, 0.99), (0.5, None), (0.0, 0.9)])
        )
        update = UpdateSettings(*multipliers, change, *betas)
        self.runs.append(TableRun(self.at, count, numel, slot, repeat, stride, 0, update))
        if new:
            self.numels += [numel * repeat * factor] * count
        return slot

    def rows(self):
        """Rows, perhaps with a part on another rank."""
        count, numel = self.rng.randrange(1, 50), self.rng.choice([1, 3, 31, 32, 33, 64, 500, 1027, 5000])
        self.add(count, numel, factor=self.rng.choice([1, 2]))
        self.at += count * numel

    def elements(self):
        count = self.rng.choice([1, 17, 1000, 140_000])
        self.add(count, 1)
        self.at += count

    def large(self):
        """Around the limits of one piece, one task and one thread's cache."""
        count, numel = self.rng.randrange(1, 3), self.rng.choice([32_769, 131_072, 262_144, 262_145, 400_001])
        self.add(count, numel)
        self.at += count * numel

    def columns(self):
        """A transposed weight with two roles; half the time a partial stripe of the first follows."""
        repeat = self.rng.randrange(2, 40)
        first = self.rng.randrange(1, 40), self.rng.choice([1, 2, 7, 64, 100])
        second = self.rng.randrange(1, 9), self.rng.choice([1, 5, 70])
        width = first[0] * first[1]
        stride = width + second[0] * second[1]
        slot = self.add(*first, repeat=repeat, stride=stride)
        self.at += width
        self.add(*second, repeat=repeat, stride=stride)
        self.at += repeat * stride - width
        if self.rng.random() < 0.5:
            self.add(*first, slot=slot)
            self.at += width

    def shared(self):
        """One block in two places, with different multipliers."""
        numel = self.rng.randrange(1, 5000)
        slot = self.add(1, numel, factor=2)
        self.at += numel
        self.add(1, numel, slot=slot)
        self.at += numel


def random_table(rng, shares):
    made = Runs(rng)
    for _ in range(rng.randrange(1, 6)):
        getattr(made, rng.choice(["rows", "elements", "large", "columns", "shared"]))()
        made.at += rng.choice([0, 0, 3])
    slots = len(made.numels)
    split = sorted(rng.sample(range(slots), min(slots, rng.choice([0, 0, 1, 5, 50, slots])))) if shares else []
    numels = torch.tensor(made.numels if shares else [], dtype=F64)
    return SegmentTable(
        made.at + rng.randrange(20),
        shares,
        (),
        tuple(made.runs) if shares else (),
        tuple(_merge_multipliers(made.runs)),
        slots if shares else 0,
        numels,
        torch.tensor(split, dtype=torch.int64),
        torch.empty(0, dtype=torch.int64),
    )


def stepped(kernels, table, tensors, hyper, offset, steps):
    """Clones of the tensors after some steps, at an address that nothing is aligned to."""
    param, grad, exp_avg, exp_avg_sq = tensors
    moved = torch.zeros(table.numel + offset, dtype=param.dtype)[offset:]
    moved.copy_(param)
    copy = torch.zeros(table.numel, dtype=BF16)
    state = {"step": 3, "exp_avg": exp_avg.clone(), "exp_avg_sq": exp_avg_sq.clone()}
    item = Item(table, kernels.plan(table, CPU), moved, state, hyper, grad.clone(), None, copy)
    for _ in range(steps):
        if table.has_split_blocks:
            kernels.sum_split_blocks([item])
            item.sums[table.dp_slots] *= 1.5  # the other ranks' share
        kernels.step_([item])
    return moved, state, copy


@pytest.mark.parametrize("seed", range(120))
def test_random_tables_are_stepped_as_by_the_reference(seed):
    """Kernels cut blocks into tasks by size, place, repetition and ranks: any wrong edge shows as a wrong element."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    table = random_table(rng, shares=rng.random() < 0.75)
    param_type = rng.choice([F32, F32, F32, BF16, F16, F64])
    grad_type = rng.choice([param_type, param_type, BF16, F32])
    wide = torch.promote_types(param_type, F32)
    momentum = rng.choice([wide, BF16])
    inside = torch.zeros(table.numel, dtype=torch.bool)
    for run in table.multiplier_runs:
        run.of(inside).fill_(True)
    second = torch.rand(table.num_blocks if table.shares_second_moment else table.numel) * 1e-6 + 1e-9
    tensors = (
        torch.randn(table.numel).mul(0.02).to(param_type),
        (torch.randn(table.numel) * 1e-3 * inside).to(grad_type),
        (torch.randn(table.numel) * 1e-3 * inside).to(momentum),
        (second if table.shares_second_moment else second * inside).to(wide),
    )
    hyper = Hyper(LR, rng.choice([0.0, 1e-4]), 0.9, 0.95, 1e-8, rng.choice([0.0, 0.1]), 0.25, rng.random() < 0.3)
    exact = param_type in (F32, F64) and momentum is not BF16
    steps = 2 if exact else 1  # a rounding to 16 bits that falls to the other side would be carried on
    (a, state_a, copy_a), (b, state_b, copy_b) = (
        stepped(kernels, table, tensors, hyper, rng.randrange(5), steps)
        for kernels in (ReferenceKernels(), CppKernels())
    )
    assert state_a["step"] == state_b["step"] == 3 + steps
    assert torch.equal(b[~inside], tensors[0][~inside]), "padding was touched"
    update = (a.double() - tensors[0].double()).abs()
    error = (a.double() - b.double()).abs()
    # two updates of the largest multiplier may cancel, and what they were subtracted from was rounded as well
    magnitude = torch.maximum(a.double().abs(), tensors[0].double().abs())
    ulp = {F32: 2.0**-23, F64: 0.0, BF16: 2.0**-7, F16: 2.0**-10}[param_type] * magnitude
    largest = state_a["exp_avg"].double().abs().max()
    # a first moment that cancels to nothing has the sign of its rounding: such an element may decay or not
    undecided = hyper.cautious * (state_a["exp_avg"].double().abs() <= 1e-7 * largest)
    decay = undecided * LR * 9 * hyper.weight_decay * magnitude
    assert bool((error <= 1e-6 * update.clamp(min=8 * LR) + ulp + decay).all())
    moved = (state_a["exp_avg"].double() - state_b["exp_avg"].double()).abs().max()
    assert moved <= largest * (2.0**-8 if momentum is BF16 else 3e-7)
    torch.testing.assert_close(state_a["exp_avg_sq"].double(), state_b["exp_avg_sq"].double(), rtol=1e-6, atol=0)
    if param_type not in (F32, F64):
        return  # a copy of what is 16 bits already
    difference = (copy_a.double() - copy_b.double()).abs()[inside]
    assert bool((difference <= (error + 2.0**-7 * a.double().abs())[inside]).all())


def sum_in_lanes(squares):
    """The order of a short row's additions: element k goes to lane k modulo 32, then lanes are folded in halves."""
    lanes = torch.zeros(squares.shape[0], 32, dtype=F64)
    for k in range(squares.shape[1]):
        lanes[:, k % 32] += squares[:, k]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


@pytest.mark.parametrize("grad_type", [F32, BF16])
@pytest.mark.parametrize("numel", [*range(2, 34), 48, 63, 64, 65, 100])
def test_the_sum_of_a_row_depends_on_its_elements_alone(numel, grad_type):
    """Rows alone, among many and split over ranks must have one sum, bit by bit, wherever a run is resumed."""
    kernels, count = CppKernels(), 700
    torch.manual_seed(numel)
    grad = (torch.randn(count, numel) * torch.logspace(-6, 0, numel)[torch.randperm(numel)]).to(grad_type)
    expected = sum_in_lanes(grad.double().square())
    for split in ([], list(range(count))):
        for rows in (slice(0, count), slice(5, 6)):
            part = grad[rows].contiguous()
            n = len(part)
            runs = TableRun(0, n, numel, 0, 1, 0, 0, UpdateSettings(1.0, 1.0))
            slots = torch.tensor(split[:n], dtype=torch.int64)
            numels = torch.full((n,), float(numel), dtype=F64)
            none = torch.empty(0, dtype=torch.int64)
            table = SegmentTable(
                n * numel, True, (), (runs,), tuple(_merge_multipliers([runs])), n, numels, slots, none
            )
            param = torch.zeros(n * numel, dtype=F64)
            state = {"step": 0, "exp_avg": param.clone(), "exp_avg_sq": torch.zeros(n, dtype=F64)}
            hyper = Hyper(LR, 0.0, 0.9, 0.0, 1e-8, 0.0)
            item = Item(table, kernels.plan(table, CPU), param, state, hyper, part.view(-1))
            if split:
                kernels.sum_split_blocks([item])
            kernels.step_([item])
            assert torch.equal(state["exp_avg_sq"], expected[rows] / numel)


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize(
    ("param_type", "grad_type", "momentum"), [(F32, F32, F32), (F32, BF16, BF16), (BF16, BF16, F32)]
)
def test_no_bit_of_an_element_depends_on_what_is_stepped_with_it(param_type, grad_type, momentum, cautious):
    """Whole groups of elements have a loop of their own, and the last ones another: shards would differ in bits."""
    torch.manual_seed(0)
    n = 2000
    tensors = (
        torch.randn(n).mul(0.02).to(param_type),
        torch.randn(n).mul(1e-3).to(grad_type),
        torch.randn(n).mul(1e-3).to(momentum),
        torch.rand(n) * 1e-6,
    )
    hyper = Hyper(LR, 0.0, 0.9, 0.95, 1e-8, 0.1, 0.0, cautious)
    none = torch.empty(0, dtype=torch.int64)

    def stepped_from(start, end):
        run = TableRun(0, end - start, 1, 0, 1, 0, 0, UpdateSettings(1.0, 1.0))
        merged = tuple(_merge_multipliers([run]))
        table = SegmentTable(end - start, False, (), (), merged, 0, torch.empty(0, dtype=F64), none, none)
        param, state, _ = stepped(CppKernels(), table, [t[start:end] for t in tensors], hyper, start % 5, 2)
        return param, state["exp_avg"], state["exp_avg_sq"]

    whole = stepped_from(0, n)
    for start, size in [(0, 1), (1, 15), (3, 16), (5, 31), (7, 33), (11, 64), (40, 95), (129, 1871)]:
        for all_of, part in zip(whole, stepped_from(start, start + size), strict=True):
            assert torch.equal(all_of[start : start + size], part), (start, size)
