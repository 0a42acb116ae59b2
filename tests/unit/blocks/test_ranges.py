# SPDX-License-Identifier: Apache-2.0
"""Layout on integers, exhaustively: the union of segments over all ranks is the tensor, each element once."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_blockwise.blocks.ranges import (
    AxisSpan,
    Batch,
    TensorShard,
    cut_blocks,
    local_view,
    runs_of_range,
    tensor_split_blocks,
)
from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.segment_table import Placement, build_table
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.spec import apply_settings
from ds_blockwise.blocks.structure import RoleSpan, TensorStructure


def spans_of(cuts, granularities):
    """Spans between consecutive cuts; a granularity is rows per block, 0 for element-wise, -1 for one shared block."""
    spans, block, shared = [], 0, None
    for index, (start, end) in enumerate(itertools.pairwise(cuts)):
        rows = granularities[index % len(granularities)]
        if rows == -1:
            if shared is None:
                shared, block = block, block + 1
            spans.append(AxisSpan(start, end, shared, end - start, index))
        else:
            spans.append(AxisSpan(start, end, block, rows, index))
            block += (end - start) // rows if rows else 0
    return spans


def block_of_index(spans, index):
    """Brute force: (tag, block id or None) of one index of the block axis."""
    for span in spans:
        if span.start <= index < span.end:
            if span.rows_per_block == 0:
                return span.tag, None
            return span.tag, span.first_block + (index - span.start) // span.rows_per_block
    raise AssertionError(index)


def local_elements(shape, shard):
    """Brute force: for each local flat element its global multi-index."""
    ranges = [list(range(n)) for n in shape]
    if shard is not None:
        ranges[shard.dim] = [i for start, end in shard.chunks[shard.rank] for i in range(start, end)]
    return list(itertools.product(*ranges))


def expand(runs):
    """Flat offset -> (tag, block or None) for every element of the runs; each offset at most once."""
    found = {}
    for run in runs:
        for r, i, k in itertools.product(range(run.repeat), range(run.count), range(run.numel)):
            offset = run.start + r * run.repeat_stride + i * run.numel + k
            assert offset not in found, "an element lies in two segments"
            found[offset] = (run.tag, None if run.element_wise else run.block + r * run.block_stride + i)
    return found


def check_everything(shape, axis, spans, tp, dp, stride=1, tp_dim=None, uneven=0, batch=None):
    """All tensor-parallel ranks, all data-parallel windows: coverage, block ids, and which blocks are split."""
    seen, tp_owners, dp_owners = [], {}, {}
    shards = [None]
    if tp > 1:
        shards = [TensorShard.even(shape, tp_dim, rank, tp, stride) for rank in range(tp)]
    for tp_rank, shard in enumerate(shards):
        elements = local_elements(shape, shard)
        view = local_view(shape, axis, spans, shard, batch)
        assert view.numel == len(elements)
        size = -(-(len(elements) + uneven) // dp)
        cuts = tuple(k * size for k in range(1, dp) if k * size < len(elements))
        dp_owners.clear()
        for dp_rank in range(dp):
            start, end = min(dp_rank * size, len(elements)), min((dp_rank + 1) * size, len(elements))
            found = expand(runs_of_range(view, start, end))
            assert set(found) == set(range(end - start)), "the segments do not cover the range"
            for offset, (tag, block) in found.items():
                element = elements[start + offset]
                expected_tag, expected_block = block_of_index(spans, element[axis] if shape else 0)
                if batch is not None and expected_block is not None:
                    expected_block += element[0] * batch.blocks_per_matrix
                assert (tag, block) == (expected_tag, expected_block)
                seen.append(element)
                if block is not None:
                    tp_owners.setdefault(block, set()).add(tp_rank)
                    dp_owners.setdefault(block, set()).add(dp_rank)
        assert cut_blocks(view, cuts) == {b for b, owners in dp_owners.items() if len(owners) > 1}
    assert sorted(seen) == sorted(itertools.product(*map(range, shape))), "not every element exactly once"
    expected = {b for b, owners in tp_owners.items() if len(owners) > 1}
    for shard in shards:
        assert tensor_split_blocks(shape, axis, spans, shard, batch) == expected


ROW_CUTS = {1: [0, 1], 5: [0, 5], 6: [0, 2, 3, 6], 8: [0, 4, 6, 8], 12: [0, 4, 6, 8, 10, 11, 12]}


@pytest.mark.parametrize("dp", [1, 2, 3, 4])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("granularities", [(1,), (0,), (-1,), (2, 1, 0), (-1, 1), (1, 0, -1)])
def test_every_element_lies_in_exactly_one_segment_however_zero_cuts_the_tensor(dp, axis, granularities):
    """A gap would leave weights untrained, an overlap would train them twice."""
    for rows, inner in itertools.product(ROW_CUTS, (1, 2, 3, 5)):
        cuts = ROW_CUTS[rows]
        sizes = [b - a for a, b in itertools.pairwise(cuts)]
        if any(g > 0 and s % g for s, g in zip(sizes, itertools.cycle(granularities), strict=False)):
            continue
        shape = (rows, inner) if axis == 0 else (inner, rows)
        spans = spans_of(cuts, granularities)
        for uneven in (0, 1, 4):
            check_everything(shape, axis, spans, 1, dp, uneven=uneven)


@pytest.mark.parametrize("dp", [1, 2, 3, 4])
@pytest.mark.parametrize("tp_dim", [0, 1])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("stride", [1, 2])
def test_every_element_lies_in_exactly_one_segment_under_tensor_parallelism(dp, tp_dim, axis, stride):
    """Column-parallel cuts may pass through a head, row-parallel ones through every row; gate and up interleave."""
    for rows, other, granularities in itertools.product((4, 8, 12), (4, 8), ((1,), (4,), (2, 0), (-1,), (0,))):
        cuts = [0, rows // 2, rows]
        if any(g > 0 and (rows // 2) % g for g in granularities):
            continue
        shape = (rows, other) if axis == 0 else (other, rows)
        check_everything(shape, axis, spans_of(cuts, granularities), 2, dp, stride, tp_dim, uneven=1)


def test_a_head_may_straddle_two_tensor_parallel_ranks():
    """Fewer query groups than ranks: 3 heads of 4 rows on 2 ranks put the middle head on both."""
    spans = [AxisSpan(0, 12, 0, 4, 0)]
    check_everything((12, 3), 0, spans, 2, 2, tp_dim=0)
    assert tensor_split_blocks((12, 3), 0, spans, TensorShard.even((12, 3), 0, 0, 2)) == {1}


@pytest.mark.parametrize("shape", [(7,), (1,), (6, 1), (3, 4, 5), ()])
@pytest.mark.parametrize("dp", [1, 2, 3, 4])
def test_vectors_scalars_and_convolution_kernels(shape, dp):
    """Norm vectors are one block; a kernel's row is everything behind its first dimension."""
    rows = shape[0] if shape else 1
    for rows_per_block in {0, 1, rows}:
        check_everything(shape, 0, [AxisSpan(0, rows, 0, rows_per_block, 0)], 1, dp)


@pytest.mark.parametrize("dp", [1, 2, 3, 5])
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("granularities", [(1,), (0,), (-1,), (2, 0, 1)])
@pytest.mark.parametrize("tp_dim", [None, 1, 2])
def test_matrices_of_experts_have_blocks_of_their_own(dp, axis, granularities, tp_dim):
    """A stacked [experts, out, in] weight read as one matrix would give row i of all experts one second moment."""
    for experts, other in itertools.product((1, 2, 3), (1, 2, 4)):
        cuts = [0, 4, 6, 8]
        spans = spans_of(cuts, granularities)
        blocks = 1 + max((b for i in range(8) if (b := block_of_index(spans, i)[1]) is not None), default=-1)
        shape = (experts, 8, other) if axis == 1 else (experts, other, 8)
        if tp_dim is not None and shape[tp_dim] % 2:
            continue
        tp = 1 if tp_dim is None else 2
        check_everything(shape, axis, spans, tp, dp, tp_dim=tp_dim, uneven=1, batch=Batch(experts, blocks))


def test_rows_of_stacked_experts_are_one_run():
    """A run costs a kernel launch's bookkeeping; 128 experts must not cost 128 times as much as one matrix."""
    view = local_view((128, 6, 5), 1, [AxisSpan(0, 6, 0, 1, 0)], None, Batch(128, 6))
    (run,) = runs_of_range(view, 0, view.numel)
    assert (run.count, run.numel, run.block) == (128 * 6, 5, 0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_fused_layouts(data):
    """Property-based: any tiling of the axis, any granularity, any cut."""
    groups = data.draw(st.integers(1, 3))
    unit = data.draw(st.integers(1, 3))
    sizes = [data.draw(st.integers(1, 3)) * unit for _ in range(3)] * groups
    cuts = [0, *itertools.accumulate(sizes)]
    granularities = [data.draw(st.sampled_from([0, 1, unit, -1])) for _ in range(3)]
    axis = data.draw(st.integers(0, 1))
    inner = data.draw(st.integers(1, 4))
    shape = (cuts[-1], inner) if axis == 0 else (inner, cuts[-1])
    tp_dim = data.draw(st.integers(0, 1))
    tp = 2 if shape[tp_dim] % 2 == 0 else 1
    dp = data.draw(st.integers(1, 4))
    check_everything(
        shape, axis, spans_of(cuts, granularities), tp, dp, tp_dim=tp_dim, uneven=data.draw(st.integers(0, 5))
    )


def row_parallel_tables(chunks, windows):
    """Tables of all (dp, tp) ranks of an 8 x 8 weight whose columns are split, cut into flat windows."""
    structure = TensorStructure("mlp.down_proj.weight", (8, 8), 0, (RoleSpan(0, 8, Role.FFN),), False)
    spec = apply_settings(structure, BlockSettings.parse(None, None, None, None))
    tables = {}
    for tp, held in enumerate(chunks):
        shard = TensorShard((8, 8), 1, tp, chunks)
        columns = sum(end - start for start, end in held)
        for dp, (low, high) in enumerate(windows(8 * columns)):
            cuts = tuple(end for _, end in windows(8 * columns)[:-1])
            placement = Placement(spec, shard, 0, low, high - low, cuts)
            tables[dp, tp] = build_table(high - low, [placement], shares_second_moment=True)
    return tables


def halves(numel):
    return [(0, numel // 2 + 1), (numel // 2 + 1, numel)]


def test_evenly_split_rows_travel_only_where_they_are_held():
    """All rows of every row-parallel weight on every data-parallel rank were more than 0.1% of the gradient at tp 8."""
    for table in row_parallel_tables((((0, 4),), ((4, 8),)), halves).values():
        assert table.tp_slots.numel() == table.num_blocks in (4, 5)
        assert table.dp_slots.numel() == 1, "the one row that the cut goes through"
        assert table.num_slots == table.num_blocks


def test_unevenly_split_rows_travel_to_every_rank():
    """Peers whose windows hold other rows would add sums of different rows."""
    for table in row_parallel_tables((((0, 5),), ((5, 8),)), halves).values():
        assert table.tp_slots.numel() == table.dp_slots.numel() == table.num_slots == 8


def test_an_uneven_split_is_refused():
    """A dimension that does not divide by the ranks cannot be an even split."""
    with pytest.raises(ValueError, match="does not divide"):
        TensorShard.even((6, 3), 0, 0, 4)


def test_parts_that_are_split_by_themselves():
    """Q, K and V of different sizes in a row: every rank holds a share of each, and a share must be whole rows."""
    shard = TensorShard.even((12, 3), 0, 1, 2).part_by_part([8, 10, 12])
    assert shard.chunks == (((0, 4), (8, 9), (10, 11)), ((4, 8), (9, 10), (11, 12))) and shard.rank == 1
    with pytest.raises(ValueError, match="parts of 8, 3, 1 rows do not all divide by 2"):
        TensorShard.even((12, 3), 0, 1, 2).part_by_part([8, 11, 12])


def test_a_range_outside_the_tensor_is_refused():
    """Offsets beyond the tensor mean that the host's lists were misread."""
    view = local_view((4, 2), 0, [AxisSpan(0, 4, 0, 1, 0)])
    with pytest.raises(ValueError, match="not inside"):
        runs_of_range(view, 0, 9)
    assert math.prod((4, 2)) == view.numel
