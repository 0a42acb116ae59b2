# SPDX-License-Identifier: Apache-2.0
"""The segment table against a count of single elements: who holds which, in which block, and what has to be summed.

The property tests build the flat buffers of all (tensor-parallel, ZeRO) ranks of a few small parameters. What block an
element belongs to is worked out here, element by element, from the drawn roles and granularities.
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.segment_table import Placement, build_table, whole_placement
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.spec import apply_settings
from ds_blockwise.blocks.structure import HeadGeometry, RoleSpan, TensorStructure, fused_qkv, whole_tensor
from ds_blockwise.hosts.stepped_tensors import fingerprint
from ds_blockwise.kernels.update import block_sums

MULTIPLIERS = {Role.QUERY: 1, Role.KEY: 1, Role.VALUE: 0.5, Role.FFN: 0.75, Role.NORM: 0.125}


@dataclass(frozen=True)
class Param:
    """A parameter as the test sees it: consecutive runs of rows, each with a role and rows per head."""

    name: str
    shape: tuple[int, ...]
    axis: int
    runs: tuple[tuple[Role, int, int | None], ...]
    granularity: dict[str, str]
    chunks: tuple[tuple[tuple[int, int], ...], ...] | None  # per tensor-parallel rank, of dimension `dim`
    dim: int = 0

    @property
    def is_experts(self):
        return len(self.shape) == 3

    def spec(self):
        spans, at = [], 0
        for role, rows, head_rows in self.runs:
            spans.append(RoleSpan(at, at + rows, role, head_rows))
            at += rows
        matrices = self.shape if self.is_experts else None
        structure = TensorStructure(self.name, self.shape, self.axis, tuple(spans), False, matrices)
        return apply_settings(structure, BlockSettings.parse(granularity=self.granularity))

    def shard(self, rank):
        return None if self.chunks is None else TensorShard(self.shape, self.dim, rank, self.chunks)

    def held(self, rank):
        """Indices of the elements on a tensor-parallel rank, in storage order."""
        ranges = [list(range(size)) for size in self.shape]
        if self.chunks is not None:
            ranges[self.dim] = [i for start, end in self.chunks[rank] for i in range(start, end)]
        return list(itertools.product(*ranges))

    def block(self, element):
        """Role and block of an element; a block of one element has the element's own index in it."""
        row = element[self.axis]
        expert = element[0] if self.is_experts else None
        ends = list(itertools.accumulate(rows for _, rows, _ in self.runs))
        index = next(i for i, end in enumerate(ends) if row < end)
        role, rows, head_rows = self.runs[index]
        first_row = ends[index] - rows
        cut = self.granularity[role.value]
        alone = math.prod(self.shape) == math.prod(self.shape[: 1 if self.is_experts else 0]) * self.shape[self.axis]
        if cut == "element" or (cut == "row" and alone):
            return role, (self.name, "element", element)
        where = {"tensor": (role,), "row": (row,), "head": (index, (row - first_row) // (head_rows or 1))}[cut]
        return role, (self.name, cut, expert, *where)


def cut_in(draw, size, ranks):
    """Per rank one range of a dimension: even where that is possible and drawn, else wherever the cuts fall."""
    if size % ranks == 0 and draw(st.booleans()):
        cuts = [size // ranks * rank for rank in range(ranks + 1)]
    else:
        inner = draw(st.lists(st.integers(1, size - 1), min_size=ranks - 1, max_size=ranks - 1, unique=True))
        cuts = [0, *sorted(inner), size]
    return tuple(((start, end),) for start, end in itertools.pairwise(cuts))


@st.composite
def params(draw, name, ranks):
    kind = draw(st.sampled_from(["attention", "ffn", "experts", "norm"]))
    inner = draw(st.integers(1, 3))
    if kind == "attention":
        head, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        runs = ((Role.QUERY, 2 * head, head), (Role.KEY, head, head), (Role.VALUE, head, head)) * groups
    elif kind == "norm":
        runs = ((Role.NORM, draw(st.integers(3, 7)), None),)
    else:
        runs = ((Role.FFN, draw(st.integers(3, 6)), None),)
    rows = sum(count for _, count, _ in runs)
    axis = 0 if kind == "norm" else draw(st.integers(0, 1))
    shape = (rows,) if kind == "norm" else (rows, inner) if axis == 0 else (inner, rows)
    if kind == "experts":
        shape, axis = (draw(st.integers(1, 3)), *shape), axis + 1
    sizes = ["row", "tensor", "element"]
    granularity = {
        role.value: draw(st.sampled_from([*sizes, "head"] if head_rows else sizes)) for role, _, head_rows in runs
    }
    first = 1 if kind == "experts" else 0
    dims = [dim for dim in range(first, len(shape)) if shape[dim] >= ranks]
    if ranks == 1 or kind == "norm" or not dims or draw(st.integers(0, 3)) == 0:
        return Param(name, shape, axis, runs, granularity, None)
    dim = draw(st.sampled_from(dims))
    return Param(name, shape, axis, runs, granularity, cut_in(draw, shape[dim], ranks), dim)


def tables(model, tp, dp, *, shares):
    """{(dp rank, tp rank): (table, elements)}; elements are (param, index) per offset of the rank's flat partition."""
    found = {}
    for tp_rank in range(tp):
        flat = [(param, element) for param in model for element in param.held(tp_rank)]
        size = -(-len(flat) // dp)
        for dp_rank in range(dp):
            low, high = min(dp_rank * size, len(flat)), min((dp_rank + 1) * size, len(flat))
            placements, offset, at = [], 0, 0
            for param in model:
                numel = len(param.held(tp_rank))
                start, end = max(offset, low), min(offset + numel, high)
                cuts = tuple(k * size - offset for k in range(1, dp) if 0 < k * size - offset < numel)
                held = max(0, end - start)
                shard = param.shard(tp_rank)
                placements.append(Placement(param.spec(), shard, at, start - offset if held else 0, held, cuts))
                offset, at = offset + numel, at + held
            padded = build_table(size, placements, shares_second_moment=shares)
            found[dp_rank, tp_rank] = padded, flat[low:high]
    return found


def slots_of_elements(table, numel):
    """Per offset the slot and the multipliers of its element; every offset exactly once, no padding."""
    offsets, found = torch.arange(table.numel), {}
    for run in table.runs:
        slots = run.blocks_of(torch.arange(table.num_blocks)).expand(run.shape)
        for offset, slot in zip(run.of(offsets).flatten().tolist(), slots.flatten().tolist(), strict=True):
            assert offset not in found, "an element lies in two segments"
            found[offset] = slot, run.update.lr_multiplier, run.update.weight_decay_multiplier
    assert sorted(found) == list(range(numel)), "the segments are not the partition"
    return [found[offset] for offset in range(numel)]


def check(model, tp, dp):
    """Everything that a rank's table says, for all ranks."""
    sizes = Counter(param.block(e)[1] for param in model for e in itertools.product(*map(range, param.shape)))
    ranks, owners, held = tables(model, tp, dp, shares=True), {}, {param.name: [] for param in model}
    blocks, counts = {}, {}
    for (dp_rank, tp_rank), (table, elements) in ranks.items():
        slots = slots_of_elements(table, len(elements))
        block_in, counts[dp_rank, tp_rank] = {}, torch.zeros(table.num_slots, dtype=torch.float64)
        for (param, element), (slot, lr_multiplier, weight_decay_multiplier) in zip(elements, slots, strict=True):
            role, block = param.block(element)
            assert (lr_multiplier, weight_decay_multiplier) == (MULTIPLIERS[role], 1)
            assert block_in.setdefault(slot, block) == block, "two blocks share a second moment"
            counts[dp_rank, tp_rank][slot] += 1
            # each tensor-parallel rank has its own copy of a parameter that is not split
            owners.setdefault((block, tp_rank if param.chunks is None else None), set()).add((dp_rank, tp_rank))
            if param.chunks is not None or tp_rank == 0:
                held[param.name].append(element)
        assert len(set(block_in.values())) == len(block_in) == table.num_blocks, "a block has two second moments"
        assert [sizes[block_in[slot]] for slot in range(table.num_blocks)] == table.slot_numel[
            : table.num_blocks
        ].tolist()
        expanded = table.expand(torch.arange(table.num_blocks, dtype=torch.float64) + 1)
        padding = [0] * (table.numel - len(elements))
        assert expanded.tolist() == [slot + 1 for slot, *_ in slots] + padding
        check_parts(table, expanded, counts[dp_rank, tp_rank])
        blocks[dp_rank, tp_rank] = block_in
    for param in model:
        whole = itertools.product(*map(range, param.shape))
        assert sorted(held[param.name]) == sorted(whole), "the union over the ranks is not the tensor"
    for rank, (table, _) in ranks.items():
        split = {block for (block, copy), of in owners.items() if len(of) > 1 and copy in (None, rank[1])}
        sent = {blocks[rank][s] for s in [*table.dp_slots.tolist(), *table.tp_slots.tolist()] if s < table.num_blocks}
        assert sent == split & set(blocks[rank].values())
    for group in [[(d, t) for d in range(dp)] for t in range(tp)]:
        all_reduce(counts, {rank: ranks[rank][0].dp_slots for rank in group})
    for group in [[(d, t) for t in range(tp)] for d in range(dp)]:
        all_reduce(counts, {rank: ranks[rank][0].tp_slots for rank in group})
    for rank, (table, _) in ranks.items():
        n = table.num_blocks
        assert torch.equal(counts[rank][:n], table.slot_numel[:n]), "the sums of a step are not those of whole blocks"


def check_parts(table, expanded, counts):
    """Each parameter's part of a table has its elements, in the table's slots."""
    values, total = torch.arange(table.num_blocks, dtype=torch.float64) + 1, torch.zeros_like(counts)
    for index, placement in enumerate(table.placements):
        part = table.part(index)
        assert torch.equal(part.expand(values), expanded[placement.flat_start :][: placement.numel])
        total += block_sums(torch.ones(placement.numel), part, square=False)
    assert torch.equal(total, counts)


def all_reduce(sums, slots):
    """What `parallel.reduce` does in one process group, with every rank in this process."""
    assert len({s.numel() for s in slots.values()}) == 1, "ranks of a group would send different numbers of values"
    total = sum(sums[rank][s] for rank, s in slots.items())
    for rank, s in slots.items():
        sums[rank][s] = total


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tables_of_all_ranks_together_are_the_model(data):
    """Each element on one rank, in its own block; sums travel for exactly the blocks with elements on several ranks."""
    tp, dp = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    model = [data.draw(params(f"p{index}", tp)) for index in range(data.draw(st.integers(1, 3)))]
    check(model, tp, dp)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_element_wise_tables_hold_every_element_with_its_multipliers(data):
    """AdamW has no blocks: nothing is summed, and elements with the same multipliers are updated together."""
    tp, dp = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    model = [data.draw(params(f"p{index}", tp)) for index in range(2)]
    for table, elements in tables(model, tp, dp, shares=False).values():
        assert table.runs == () and table.num_slots == 0 and not table.has_split_blocks
        offsets, found = torch.arange(table.numel), {}
        for run in table.multiplier_runs:
            for offset in run.of(offsets).flatten().tolist():
                assert offset not in found, "an element would be updated twice"
                found[offset] = run.update.lr_multiplier
        assert [found[i] for i in range(len(elements))] == [MULTIPLIERS[p.block(e)[0]] for p, e in elements]
        assert len(found) == len(elements)


# ------------------------------------------------------------------------------------- by hand

GQA = HeadGeometry(num_heads=4, num_kv_heads=2, head_dim=2, source="test")


def placed(structure, shard=None, **granularity):
    return whole_placement(apply_settings(structure, BlockSettings.parse(granularity=granularity)), shard)


def table_of(*placements):
    return build_table(sum(p.numel for p in placements), placements, shares_second_moment=True)


def test_a_whole_fused_weight():
    """Grouped rows: per group two heads of queries, one of keys, two rows of values; 3 columns."""
    table = table_of(placed(fused_qkv("qkv", (16, 3), "grouped", GQA, is_bias=False)))
    assert table.slot_numel.tolist() == [6, 6, 6, 3, 3] * 2
    assert [(run.start, run.count, run.numel, run.block, run.update.lr_multiplier) for run in table.runs] == [
        (0, 2, 6, 0, 1),
        (12, 1, 6, 2, 1),
        (18, 2, 3, 3, 0.5),
        (24, 2, 6, 5, 1),
        (36, 1, 6, 7, 1),
        (42, 2, 3, 8, 0.5),
    ]
    assert not table.has_split_blocks
    assert [(run.start, run.count, run.update.lr_multiplier) for run in table.multiplier_runs] == [
        (0, 18, 1),
        (18, 6, 0.5),
        (24, 18, 1),
        (42, 6, 0.5),
    ]


def test_column_and_row_parallel_shards():
    """Split by rows every block is whole on its rank; split by columns every row is on all ranks, and is summed."""
    structure = whole_tensor("w", (4, 6), Role.FFN, is_bias=False)
    column_parallel = table_of(placed(structure, TensorShard.even((4, 6), 0, 1, 2)))
    assert column_parallel.slot_numel.tolist() == [6, 6] and not column_parallel.has_split_blocks
    row_parallel = table_of(placed(structure, TensorShard.even((4, 6), 1, 1, 2)))
    assert row_parallel.slot_numel.tolist() == [6] * 4, "elements of the whole row, not of the half that is here"
    assert row_parallel.tp_slots.tolist() == [0, 1, 2, 3] and row_parallel.dp_slots.tolist() == []


def test_uneven_shards_are_summed_over_zero_ranks_without_a_cut_through_them():
    """Where tensor-parallel ranks hold 1 and 3 columns, their ZeRO windows differ: the same row lies with other ranks.

    Rank (0, 0) holds both rows of tp 0, rank (1, 0) none; of tp 1 rank (0, 1) holds row 0 and rank (1, 1) row 1. Row 1
    is complete on (1, 1) only if (1, 0), which has nothing of it, gives on what (0, 0) has.
    """
    chunks = (((0, 1),), ((1, 4),))
    spec = apply_settings(whole_tensor("w", (2, 4), Role.FFN, is_bias=False), BlockSettings())
    shards = [TensorShard((2, 4), 1, rank, chunks) for rank in (0, 1)]
    held = {
        (0, 0): Placement(spec, shards[0], 0, 0, 2),
        (1, 0): Placement(spec, shards[0], 0, 2, 0),
        (0, 1): Placement(spec, shards[1], 0, 0, 3, cuts=(3,)),
        (1, 1): Placement(spec, shards[1], 0, 3, 3, cuts=(3,)),
    }
    built = {rank: build_table(4, [p], shares_second_moment=True) for rank, p in held.items()}
    assert {rank: table.dp_slots.numel() for rank, table in built.items()} == dict.fromkeys(held, 2)
    assert {rank: table.tp_slots.numel() for rank, table in built.items()} == dict.fromkeys(held, 2)
    assert [built[rank].slot_numel.tolist() for rank in held] == [[4, 4]] * 4


def test_a_bias_is_never_summed():
    """Element-wise: one second moment for each element, wherever the cut is."""
    spec = apply_settings(whole_tensor("b", (5,), Role.FFN, is_bias=True), BlockSettings())
    table = build_table(3, [Placement(spec, None, 0, 2, 3, cuts=(2,))], shares_second_moment=True)
    assert (table.num_blocks, table.slot_numel.tolist(), table.has_split_blocks) == (3, [1, 1, 1], False)


def test_a_rank_without_elements_takes_part_in_the_sums_of_its_peers():
    """A collective that one rank leaves out hangs all others."""
    spec = apply_settings(
        whole_tensor("w", (2, 4), Role.FFN, is_bias=False), BlockSettings.parse(granularity={"ffn": "tensor"})
    )
    empty = build_table(0, [Placement(spec, None, 0, 0, 0, cuts=(4,))], shares_second_moment=True)
    assert (empty.num_blocks, empty.num_slots, empty.dp_slots.tolist()) == (0, 1, [0])
    assert empty.slot_numel.tolist() == [8] and empty.has_split_blocks


def test_placements_out_of_order_are_an_error():
    """An overlap would update elements twice; a host's list of offsets was misread."""
    spec = apply_settings(whole_tensor("w", (2, 4), Role.FFN, is_bias=False), BlockSettings())
    overlapping = [Placement(spec, None, 0, 0, 8), Placement(spec, None, 4, 0, 4)]
    for placements in (overlapping, [Placement(spec, None, 8, 0, 8)]):
        with pytest.raises(ValueError, match=r"parameter 'w' is placed at \[.* of 8 elements, but must lie between"):
            build_table(8, placements, shares_second_moment=True)


def test_fingerprints_agree_between_peers_and_differ_with_what_peers_share():
    """Ranks that build different models or have other settings must be found before the first step."""
    structure = whole_tensor("w", (4, 6), Role.FFN, is_bias=False)
    first, second = (placed(structure, TensorShard.even((4, 6), 0, rank, 2)) for rank in (0, 1))
    assert fingerprint([first], of_shards=False) == fingerprint([second], of_shards=False)
    assert fingerprint([first], of_shards=True) != fingerprint([second], of_shards=True)
    others = {
        "another name": placed(whole_tensor("v", (4, 6), Role.FFN, is_bias=False), first.shard),
        "another role": placed(whole_tensor("w", (4, 6), Role.VALUE, is_bias=False), first.shard),
        "another granularity": placed(structure, first.shard, ffn="tensor"),
        "another split": placed(structure, TensorShard.even((4, 6), 1, 0, 2)),
        "no split": placed(structure),
    }
    for name, other in others.items():
        for of_shards in (True, False):
            assert fingerprint([other], of_shards=of_shards) != fingerprint([first], of_shards=of_shards), name
