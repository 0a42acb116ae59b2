# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels that sum the blocks which no single tile of the update can sum; see `backend`."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from ds_blockwise.kernels.triton import tables
from ds_blockwise.kernels.triton.device_functions import (
    constants,
    edge_lanes,
    edges,
    known_even,
    new_second_moment,
    scaled,
    squares,
    tensor_pointer,
    tile_base,
    vector_body,
)
from ds_blockwise.kernels.triton.tables import Address, Finish, Job, Scalar, SumKind, Vectors

JOB_COLUMNS, JOB_ITEM, JOB_ROW = constants(len(Job), Job.ITEM, Job.ROW)
JOB_START, JOB_NUMEL, JOB_COUNT, JOB_SLOT = constants(Job.START, Job.NUMEL, Job.COUNT, Job.SLOT)
JOB_REPEAT, JOB_REPEAT_STRIDE, JOB_BLOCK_NUMEL = constants(Job.REPEAT, Job.REPEAT_STRIDE, Job.BLOCK_NUMEL)
JOB_PARTS, JOB_ENTRY, JOB_DIRECT = constants(Job.PARTS, Job.ENTRY, Job.DIRECT)
JOB_SPAN, GRAD_SCALE = constants(Job.SPAN, Address.GRAD_SCALE)
SUM_PIECE, SUM_ROWS, SUM_COLUMNS, SUM_RECT = constants(SumKind.PIECE, SumKind.ROWS, SumKind.COLUMNS, SumKind.RECT)
ADDRESS_COLUMNS, GRAD, EXP_AVG_SQ, SUMS = constants(len(Address), Address.GRAD, Address.EXP_AVG_SQ, Address.SUMS)
SCALAR_COLUMNS, SCALAR_BETA2, SCALAR_SQUARE_WEIGHT = constants(len(Scalar), Scalar.BETA2, Scalar.SQUARE_WEIGHT)
FINISH_COLUMNS, FINISH_ITEM, FINISH_SLOT = constants(len(Finish), Finish.ITEM, Finish.SLOT)
FINISH_FIRST, FINISH_COUNT, FINISH_NUMEL = constants(Finish.FIRST, Finish.COUNT, Finish.NUMEL)
(FINISH_ROW,) = constants(Finish.ROW)
FINISH_BLOCKS, FINISH_LANES, COMPLETE = constants(tables.FINISH_BLOCKS, tables.FINISH_LANES, tables.COMPLETE)
TILE, TILE_LOG2, PIECE = constants(tables.TILE, tables.TILE_LOG2, tables.PIECE)
INDEX_BITS, INDEX_MASK = constants(tables.TILE_INDEX_BITS, tables.TILE_INDEX_MASK)
COLUMNS_LOG2, COLUMNS = constants(tables.COLUMNS_LOG2, 1 << tables.COLUMNS_LOG2)
COLUMN_TILE_ROWS, EDGED = constants(tables.COLUMN_TILE_ROWS, Vectors.EDGED)


@triton.jit
def sum_kernel(tiles, jobs, addresses, scalars, entries, KIND: tl.constexpr, SHIFT: tl.constexpr, VECTORS: tl.constexpr,
               SCALED: tl.constexpr, ALIGN: tl.constexpr, G: tl.constexpr, V: tl.constexpr,
               VERSION: tl.constexpr):  # fmt: skip
    """Sum of squares of one tile: to its entry or, if the tile is the whole block, into the second moment.

    ``G`` and ``V`` are the dtypes of gradients and second moments, ``ALIGN`` what divides the addresses of gradients,
    the others as in ``update_kernel``.
    """
    tile = tl.load(tiles + tl.program_id(0))
    job = jobs + (tile >> INDEX_BITS) * JOB_COLUMNS
    index = tile & INDEX_MASK
    item = tl.load(job + JOB_ITEM)
    s = scalars + tl.load(job + JOB_ROW) * SCALAR_COLUMNS
    start, numel = known_even(tl.load(job + JOB_START), VECTORS), tl.load(job + JOB_NUMEL)
    count, slot = tl.load(job + JOB_COUNT), tl.load(job + JOB_SLOT)
    repeat, stride = tl.load(job + JOB_REPEAT), known_even(tl.load(job + JOB_REPEAT_STRIDE), VECTORS)
    parts, span = tl.load(job + JOB_PARTS), tl.load(job + JOB_SPAN)
    block_numel, direct = tl.load(job + JOB_BLOCK_NUMEL).to(tl.float64), tl.load(job + JOB_DIRECT)
    out = entries + tl.load(job + JOB_ENTRY)
    g = tensor_pointer(addresses, item, GRAD, G, ALIGN)
    v = tensor_pointer(addresses, item, EXP_AVG_SQ, V, 1)
    scale = addresses + item * ADDRESS_COLUMNS + GRAD_SCALE
    if tl.load(addresses + item * ADDRESS_COLUMNS + GRAD) != 0:  # 0: no gradient; the finish kernel makes the sum 0
        if SUM_ROWS == KIND:
            first = index << (TILE_LOG2 - SHIFT)
            row, lane = tl.arange(0, TILE >> SHIFT), tl.arange(0, 1 << SHIFT)[None, :]
            inside = row < tl.minimum(count - first, TILE >> SHIFT).to(tl.int32)
            length = known_even(numel.to(tl.int32), VECTORS)
            offs, mask = row[:, None] * length + lane, inside[:, None] & (lane < length)
            grad = tl.load(g + start + first * numel + offs, mask=mask, other=0.0)
            tl.store(out + first + row, tl.sum(squares(scaled(grad, scale, SCALED)), axis=1), mask=inside)
        elif SUM_COLUMNS == KIND:
            first_column, first = index // parts << COLUMNS_LOG2, index % parts * span
            column = tl.arange(0, COLUMNS)
            inside = column < known_even(tl.minimum(count - first_column, COLUMNS).to(tl.int32), VECTORS)
            sums = tl.zeros([COLUMN_TILE_ROWS, COLUMNS], tl.float64)
            done = 0
            while done < span:
                row = tl.arange(0, COLUMN_TILE_ROWS)[:, None]
                mask = (row < tl.minimum(repeat - first - done, COLUMN_TILE_ROWS).to(tl.int32)) & inside[None, :]
                here = g + start + first_column + (first + done) * stride
                grad = tl.load(here + row * stride + column[None, :], mask=mask, other=0.0)
                sums += squares(scaled(grad, scale, SCALED))
                done += COLUMN_TILE_ROWS
            totals = tl.sum(sums, axis=0)
            if direct != 0:
                v += slot + first_column
                old = tl.load(v + column, mask=inside, other=0.0)
                tl.store(v + column, new_second_moment(old, totals, block_numel, s), mask=inside)
            else:
                tl.store(out + index % parts * count + first_column + column, totals, mask=inside)
        else:
            total = tl.zeros([TILE], tl.float64)
            done = 0
            if SUM_PIECE == KIND:
                begin = known_even(start + index // parts * numel + index % parts * PIECE, VECTORS)
                size = known_even(tl.minimum(numel - index % parts * PIECE, PIECE).to(tl.int32), VECTORS)
                base = tile_base(begin, VECTORS)
                at = (begin - base).to(tl.int32)
                low, high = vector_body(at, at + size, VECTORS)
                while done < size:
                    offs = low + done + tl.arange(0, TILE)
                    grad = tl.load(g + base + offs, mask=offs < high, other=0.0)
                    total += squares(scaled(grad, scale, SCALED))
                    done += TILE
                whole = tl.sum(total, axis=0)
                if EDGED == VECTORS:
                    edge, edge_mask = edges(at, at + size, low, high, edge_lanes())
                    grad = tl.load(g + base + edge, mask=edge_mask, other=0.0)
                    whole += tl.sum(squares(scaled(grad, scale, SCALED)), axis=0)
            else:
                first, length = index % parts * span, numel.to(tl.int32)
                size = (tl.minimum(span, repeat - first) * numel).to(tl.int32)
                here = g + start + index // parts * numel + first * stride
                while done < size:
                    lane = done + tl.arange(0, TILE)
                    row = lane // length
                    offs = row * stride + (lane - row * length)
                    grad = tl.load(here + offs, mask=lane < size, other=0.0)
                    total += squares(scaled(grad, scale, SCALED))
                    done += TILE
                whole = tl.sum(total, axis=0)
            if direct != 0:
                old = tl.load(v + slot + index)
                tl.store(v + slot + index, new_second_moment(old, whole, block_numel, s))
            else:
                tl.store(out + index, whole)


@triton.jit
def finish_kernel(finish, order, entries, addresses, scalars, blocks, TO_SUMS: tl.constexpr,
                  V: tl.constexpr, VERSION: tl.constexpr):  # fmt: skip
    """Add the entries of some blocks in their order: the sums of split blocks (``TO_SUMS``), or new second moments."""
    block = tl.program_id(0).to(tl.int64) * FINISH_BLOCKS + tl.arange(0, FINISH_BLOCKS)
    mask = block < blocks
    record = finish + block * FINISH_COLUMNS
    item, slot = tl.load(record + FINISH_ITEM, mask=mask, other=0), tl.load(record + FINISH_SLOT, mask=mask, other=0)
    first, count = (
        tl.load(record + FINISH_FIRST, mask=mask, other=0),
        tl.load(record + FINISH_COUNT, mask=mask, other=0),
    )
    mine = addresses + item * ADDRESS_COLUMNS
    lane = tl.arange(0, FINISH_LANES)[None, :].to(tl.int64)
    partial = tl.zeros([FINISH_BLOCKS, FINISH_LANES], tl.float64)
    done = 0
    last = tl.max(count, axis=0)
    while done < last:
        inside = mask[:, None] & (done + lane < count[:, None])
        entry = tl.load(order + first[:, None] + done + lane, mask=inside, other=0)
        partial += tl.load(entries + entry, mask=inside, other=0.0)
        done += FINISH_LANES
    total = tl.sum(partial, axis=1)
    sums = tl.load(mine + SUMS, mask=mask, other=0).to(tl.pointer_type(tl.float64))
    if TO_SUMS:
        has_grad = tl.load(mine + GRAD, mask=mask, other=0) != 0
        tl.store(sums + slot, tl.where(has_grad, total, 0.0), mask=mask)
    else:
        complete = count == COMPLETE
        total = tl.where(complete, tl.load(sums + slot, mask=mask & complete, other=0.0), total)
        v = tl.load(mine + EXP_AVG_SQ, mask=mask, other=0).to(tl.pointer_type(V)) + slot
        old = tl.load(v, mask=mask, other=0.0)
        numel = tl.load(record + FINISH_NUMEL, mask=mask, other=1).to(tl.float64)
        s = scalars + tl.load(record + FINISH_ROW, mask=mask, other=0) * SCALAR_COLUMNS
        # not `new_second_moment`: the lanes beyond the last block must not read scalars
        mean = (total / numel).to(V).to(tl.float64)
        beta2 = tl.load(s + SCALAR_BETA2, mask=mask, other=0.0)
        weight = tl.load(s + SCALAR_SQUARE_WEIGHT, mask=mask, other=0.0)
        tl.store(v, (beta2 * old.to(tl.float64) + weight * mean).to(V), mask=mask)
