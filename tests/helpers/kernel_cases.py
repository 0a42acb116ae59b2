# SPDX-License-Identifier: Apache-2.0
"""Tensors with segment tables of every shape that kernels must step, and the comparison with the reference."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.segment_table import Placement, build_table, whole_placement
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.spec import BlockSpec, apply_settings
from ds_blockwise.blocks.structure import HeadGeometry, fused_qkv, whole_tensor
from ds_blockwise.kernels import step_sets
from ds_blockwise.kernels.base import Hyper, Item, Kernels, ReferenceKernels
from ds_blockwise.kernels.cpp.backend import CppKernels
from ds_blockwise.kernels.cpp.look import CompiledLook, compiled_look
from tests.helpers import ROOT

LR = 1e-3
HYPER = Hyper(LR, 0.0, 0.9, 0.95, 1e-8, 0.1)
BLOCK_SETTINGS = BlockSettings.parse(None, {"norm": 0.0}, None, None)
SCALE = 0.37203192710876465  # as a clipped norm gives it: no power of two, an fp32 number
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """One stepped tensor: what lies in it, where, and in which dtypes.

    ``offset`` elements lie before it in its storage; ``sums_of`` are the other ranks' placements, whose sums of split
    blocks are added by hand.
    """

    numel: int
    placements: tuple[Placement, ...]
    param: torch.dtype = F32
    grad: torch.dtype = F32
    exp_avg: torch.dtype = F32
    param_copy: torch.dtype | None = None
    grad_scale: float | None = None
    offset: int = 0
    hyper: Hyper = HYPER
    step: int = 0
    peers: tuple[tuple[int, tuple[Placement, ...]], ...] = ()


def spec(shape: tuple[int, ...], role: Role, **settings: object) -> BlockSpec:
    granularity = settings.pop("granularity", None)
    block_settings = BLOCK_SETTINGS if granularity is None else BlockSettings.parse(None, None, granularity, None)
    return apply_settings(whole_tensor("w", shape, role, **{"is_bias": False, **settings}), block_settings)


def qkv(width: int, heads: int, groups: int, layout: str, axis: int = 0, granularity: object = None) -> BlockSpec:
    rows = (heads + 2 * groups) * 4
    shape = (rows, width) if axis == 0 else (width, rows)
    structure = fused_qkv("qkv", shape, layout, HeadGeometry(heads, groups, 4, "test"), is_bias=False, axis=axis)
    return apply_settings(
        structure, BLOCK_SETTINGS if granularity is None else BlockSettings.parse(None, None, granularity, None)
    )


def whole(block_spec: BlockSpec, shard: TensorShard | None = None, **settings: object) -> Case:
    placement = whole_placement(block_spec, shard)
    return Case(placement.numel, (placement,), **settings)


def flat(specs: Sequence[BlockSpec], start: int, end: int, padding: int = 0, **settings: object) -> Case:
    """The partition ``[start, end)`` of flattened parameters, between two other ranks' partitions."""
    cuts, total = (start, end), sum(s.numel for s in specs)
    mine = placements_of(specs, start, end, cuts)
    ranges = [(0, start), (end, total)]
    peers = tuple((b - a, placements_of(specs, a, b, cuts)) for a, b in ranges if b > a)
    return Case(end - start + padding, mine, peers=peers, **settings)


def placements_of(specs: Sequence[BlockSpec], start: int, end: int, cuts: Sequence[int]) -> tuple[Placement, ...]:
    found, at = [], 0
    for s in specs:
        low, high = max(start, at), min(end, at + s.numel)
        inner = tuple(c - at for c in cuts if 0 < c - at < s.numel)
        if low < high:
            found.append(Placement(s, None, low - start, low - at, high - low, inner))
        else:
            found.append(Placement(s, None, 0 if not found else found[-1].flat_start + found[-1].numel, 0, 0, inner))
        at += s.numel
    return tuple(found)


def tensors_of(case: Case, seed: int, shared: bool, numel: int, placements: tuple[Placement, ...]) -> Item:
    table = build_table(numel, placements, shares_second_moment=shared)
    generator = torch.Generator().manual_seed(seed)

    def make(dtype: torch.dtype, scale: float, size: int = numel) -> torch.Tensor:
        values = torch.randn(case.offset + size, generator=generator, dtype=F64) * scale
        return values.to(dtype)[case.offset :]

    param, exp_avg, grad = make(case.param, 0.02), make(case.exp_avg, 0.1), make(case.grad, 1.0)
    inside = torch.zeros(numel, dtype=torch.bool)
    for p in placements:
        inside[p.flat_start : p.flat_start + p.numel] = True
    grad[~inside] = 0
    exp_avg[~inside] = 0
    wide = F64 if case.param == F64 else F32
    exp_avg_sq = make(wide, 0.5, table.num_blocks if shared else numel).square_()
    if not shared:
        exp_avg_sq[~inside] = 0
    copied = None if case.param_copy is None else torch.zeros(case.offset + numel, dtype=case.param_copy)[case.offset :]
    state = {"step": case.step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    item = Item(table, None, param, state, case.hyper, grad, None, copied)
    item.grad_scale = case.grad_scale
    return item


def item_of(case: Case, seed: int, shared: bool) -> tuple[Item, list[Item]]:
    """The case's tensor and its peers' (never stepped; they only give sums)."""
    mine = tensors_of(case, seed, shared, case.numel, case.placements)
    peers = [tensors_of(case, seed + 100 + i, shared, n, p) for i, (n, p) in enumerate(case.peers)] if shared else []
    return mine, peers


def clone(item: Item, kernels: Kernels, device: torch.device | str = "cpu") -> Item:
    """A copy with the same offsets in its storage, planned by ``kernels``."""
    device = torch.device(device)

    def same(value: torch.Tensor | None) -> torch.Tensor | None:
        if value is None:
            return None
        offset = value.storage_offset()
        out = torch.empty(offset + value.numel(), dtype=value.dtype, device=device)[offset:]
        return out.copy_(value)

    state = {k: same(v) if isinstance(v, torch.Tensor) else v for k, v in item.state.items()}
    plan = kernels.plan(item.table, device)
    hyper = copy.copy(item.hyper)
    copied = Item(item.table, plan, same(item.param), state, hyper, same(item.grad), None, same(item.param_copy))
    copied.grad_scale = item.grad_scale
    return copied


def complete_sums(kernels: Kernels, items: Sequence[Item], peers: Sequence[Sequence[Item]]) -> None:
    """What the optimizer does between the two calls, the ranks being in this process."""
    split = [i for i, item in enumerate(items) if item.table.has_split_blocks]
    kernels.sum_split_blocks([items[i] for i in split])
    for i in split:
        item = items[i]
        others = [peer for peer in peers[i] if peer.table.dp_slots.numel() == item.table.dp_slots.numel()]
        ReferenceKernels().sum_split_blocks(others)
        for peer in others:
            slots = item.table.dp_slots.to(item.sums.device)
            item.sums[slots] += peer.sums[peer.table.dp_slots].to(item.sums.device)


def step(kernels: Kernels, items: Sequence[Item], peers: Sequence[Sequence[Item]]) -> None:
    complete_sums(kernels, items, peers)
    kernels.step_([item for item in items if item.grad is not None])


def covered(item: Item) -> torch.Tensor:
    inside = torch.zeros(item.table.numel, dtype=torch.bool)
    for p in item.table.placements:
        inside[p.flat_start : p.flat_start + p.numel] = True
    return inside


def assert_same_step(mine: Item, expected: Item, before: torch.Tensor, largest_step: float) -> None:
    """Updates over lr to 1e-6 of the largest; 16-bit values to one unit in the last place; padding unchanged.

    ``largest_step`` is the largest |update| / lr of the expected step (at least 1), the scale that rounding of
    intermediate values has.
    """
    inside = covered(expected)
    got, want = mine.param.detach().cpu(), expected.param
    assert torch.equal(got[~inside], before[~inside]), "padding was written"
    scale = 1e-6 * LR * largest_step
    if want.dtype in (F32, F64):
        rounding = 2.0**-23 * want.abs().double().clamp(min=1e-30) if want.dtype == F32 else 0.0
        difference = (got.double() - want.double()).abs()
        wrong = ~(difference <= scale + rounding) & ~(got.isnan() & want.isnan()) & (got != want)
        assert not wrong.any(), f"param: {int(wrong.sum())} elements, worst {float(difference[wrong].max())}"
    else:
        assert_one_ulp(got, want)
    if expected.param_copy is not None:
        assert_one_ulp(mine.param_copy.cpu()[inside], expected.param_copy[inside])
    for name in ("exp_avg", "exp_avg_sq"):
        got_state, want_state = mine.state[name].cpu(), expected.state[name]
        if want_state.dtype == BF16:
            assert_one_ulp(got_state, want_state)
        else:
            torch.testing.assert_close(
                got_state, want_state, rtol=1e-6, atol=1e-6, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
            )
    assert int(mine.state["step"]) == expected.state["step"]


def assert_one_ulp(got: torch.Tensor, want: torch.Tensor) -> None:
    def ordered(t: torch.Tensor) -> torch.Tensor:
        bits = t.contiguous().view(torch.int16).to(torch.int32)
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    nan = got.isnan() & want.isnan()
    # next to zero, a rounding of the sum of larger numbers is many units of the tiny result
    tiny = (got.float() - want.float()).abs() <= 1e-8
    wrong = ((ordered(got) - ordered(want)).abs() > 1) & ~nan & ~tiny
    assert not wrong.any(), f"{int(wrong.sum())} of {got.numel()} elements differ by more than one unit"


def row_parallel(shape: tuple[int, int]) -> Case:
    shard = TensorShard.even(shape, 1, 0, 2)
    return whole(spec(shape, Role.FFN), shard)


def _mixed() -> list[BlockSpec]:
    return [
        spec((9, 10), Role.EMBEDDING),
        qkv(12, 4, 2, "grouped"),
        spec((20,), Role.FFN, is_bias=True),
        spec((33,), Role.NORM),
        spec((7, 600), Role.FFN),
        spec((6, 10), Role.VALUE, granularity={"value": "tensor"}),
    ]


CASES: dict[str, Callable[[], list[Case]]] = {
    "empty": lambda: [Case(0, ()), whole(spec((3, 5), Role.FFN))],
    "scalar": lambda: [whole(spec((), Role.NORM)), whole(spec((1, 1), Role.FFN)), whole(spec((2,), Role.NORM))],
    "odd rows": lambda: [whole(spec((3, n), Role.FFN)) for n in (1, 2, 7, 8, 31, 33, 100, 129, 513, 1027)],
    "tile edges": lambda: [whole(spec((2, n), Role.FFN)) for n in (4095, 4096, 4097, 8193)],
    "rows of a loop": lambda: [whole(spec((2, 20001), Role.FFN)), whole(spec((1, 32769), Role.FFN))],
    "several pieces": lambda: [whole(spec((3, 100_003), Role.FFN, granularity={"ffn": "tensor"}))],
    "heads": lambda: [whole(spec((24, 3000), Role.QUERY, num_heads=2)), whole(spec((12, 5), Role.KEY, num_heads=3))],
    "fused": lambda: [whole(qkv(16, 4, 4, "concat")), whole(qkv(7, 4, 2, "grouped"))],
    "fused, one block for V": lambda: [whole(qkv(40, 4, 2, "grouped", granularity={"value": "tensor"}))],
    "transposed": lambda: [whole(qkv(11, 4, 2, "grouped", axis=1)), whole(spec((70, 37), Role.FFN, axis=1))],
    "transposed, many stripes": lambda: [whole(spec((2100, 5), Role.FFN, axis=1))],
    "transposed, element-wise": lambda: [whole(spec((6, 9), Role.FFN, axis=1, granularity={"ffn": "element"}))],
    "bias and norm": lambda: [whole(spec((4099,), Role.FFN, is_bias=True)), whole(spec((4099,), Role.NORM))],
    "flat": lambda: [flat(_mixed(), 37, 4500, padding=5), flat(_mixed(), 1001, 3001)],
    "flat, transposed": lambda: [flat([spec((30, 21), Role.FFN, axis=1), qkv(9, 4, 2, "grouped", axis=1)], 50, 800)],
    "flat, one row of a transposed weight": lambda: [
        flat([spec((30, 24), Role.FFN, axis=1)], 72, 96),
        flat([spec((30, 24), Role.FFN, axis=1)], 72, 120),
    ],
    "even": lambda: [
        *[whole(spec((16, n), Role.FFN)) for n in (8, 40, 136, 520, 1032, 2056, 4104)],
        flat([spec((40, 600), Role.FFN), spec((48,), Role.NORM)], 24, 24_048),
        whole(qkv(16, 4, 4, "concat", axis=1)),
        whole(spec((72, 1040), Role.FFN, axis=1, granularity={"ffn": "element"})),
        whole(spec((2104, 64), Role.FFN, axis=1)),
        whole(spec((24, 3000), Role.QUERY, num_heads=2)),
    ],
    "flat, short rows cut": lambda: [
        flat([spec((40, 600), Role.FFN)], 599, 20_001),
        flat([spec((9, 5), Role.FFN)], 7, 8),
    ],
    "many short rows": lambda: [
        case
        for n in (2, 3, 4, 5, 8, 11, 16, 31, 32, 33, 64, 65)
        for case in (whole(spec((600 // n + 300, n), Role.FFN), offset=1), row_parallel((150, 2 * n)))
    ],
    "row-parallel": lambda: [row_parallel((6, 40)), row_parallel((3, 2600))],
    "storage offsets": lambda: [whole(spec((3, 70), Role.FFN), offset=k) for k in (1, 2, 4, 8, 13)],
    "groups": lambda: [
        whole(spec((3, 9), Role.FFN), step=7, hyper=Hyper(2e-3, 1e-4, 0.5, 0.999, 1e-6, 0.0)),
        whole(spec((3, 9), Role.FFN), step=1000),
        whole(spec((3, 9), Role.QUERY, num_heads=1), hyper=Hyper(5e-4, 5e-4, 0.0, 0.9, 1e-8, 0.3)),
    ],
    "dtypes": lambda: [
        replace(base, param=param, grad=grad, exp_avg=exp_avg, param_copy=copied)
        for base in (whole(spec((5, 130), Role.FFN)), whole(spec((33,), Role.FFN, is_bias=True)))
        for param, grad, exp_avg, copied in (
            (F32, BF16, F32, BF16),
            (F32, F32, BF16, F16),
            (BF16, BF16, F32, None),
            (BF16, F32, BF16, None),
            (F16, F16, F32, None),
            (F64, F64, F64, BF16),
            (F64, F32, BF16, None),
        )
    ],
    "scaled": lambda: [
        replace(base, grad=grad, exp_avg=exp_avg, param_copy=copied, grad_scale=SCALE)
        for base in (
            *[whole(spec((3, n), Role.FFN)) for n in (1, 7, 33, 1027)],
            *[whole(spec((1, n), Role.FFN)) for n in (9001, 33_001)],
            whole(spec((70, 37), Role.FFN, axis=1)),
            whole(spec((99,), Role.NORM), offset=3),
            flat(_mixed(), 37, 4500, padding=5),
            row_parallel((150, 6)),
        )
        for grad, exp_avg, copied in ((BF16, F32, BF16), (F32, BF16, None))
    ],
}


def largest_step(items: Sequence[Item], before: Sequence[torch.Tensor]) -> list[float]:
    """Per tensor the largest finite |update| / lr, at least 1."""
    found = []
    for item, old in zip(items, before, strict=True):
        change = (item.param.double() - old.double()).abs().nan_to_num(0, 0, 0)
        found.append(max(1.0, float(change.max()) / LR) if change.numel() else 1.0)
    return found


def compare(kernels: Kernels, cases: Sequence[Case], shared: bool, steps: int = 2, device: str = "cpu",
            poison: float | None = None) -> list[Item]:  # fmt: skip
    """Step the cases by both backends from the same state and compare after every step; return what was stepped."""
    pairs = [item_of(case, 7 * i, shared) for i, case in enumerate(cases)]
    peers = [others for _, others in pairs]
    reference = ReferenceKernels()
    expected = [clone(item, reference) for item, _ in pairs]
    mine = [clone(item, kernels, device) for item, _ in pairs]
    generator = torch.Generator().manual_seed(3)
    for number in range(steps):
        before = [item.param.clone() for item in expected]
        if poison is not None and number == 1:
            for a, b in zip(mine, expected, strict=True):
                at = a.table.numel // 2
                if a.table.numel:
                    a.grad[at] = b.grad[at] = poison
        step(reference, expected, peers)
        step(kernels, mine, peers)
        largest = largest_step(expected, before)
        for a, b, old, size in zip(mine, expected, before, largest, strict=True):
            assert_same_step(a, b, old, size)
            factor = float(torch.rand((), generator=generator)) + 0.5
            a.grad.mul_(factor)
            b.grad.mul_(factor)
            for got, want in ((a.param, b.param), *((a.state[k], b.state[k]) for k in ("exp_avg", "exp_avg_sq"))):
                got.copy_(want)  # one rounding of a state must not grow into a difference of the next step
    return mine


LOOKS = ("compiled", "python")
"""The two ways to see whether tensors are as they were: the compiled library's, and torch's guards with Python."""


def the_look(name: str) -> CompiledLook | None:
    """What `CloseLook` gets for one of `LOOKS`; with the torch of constraints.txt there are both."""
    if name == "python":
        return None
    CppKernels()  # loads the library
    found = compiled_look()
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None and pinned is not None and torch.__version__.partition("+")[0] != pinned[1]:
        pytest.skip(f"the compiled library cannot look at tensors of torch {torch.__version__}: Python looks")
    assert found is not None, "the library sees something else than Python: every look takes several times as long"
    return found


def use_look(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sets of tensors that are made from now on look in one of the `LOOKS`."""
    look = the_look(name)
    monkeypatch.setattr(step_sets, "compiled_look", lambda: look)
