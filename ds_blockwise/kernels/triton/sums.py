# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels that sum blocks which no single tile of the update can sum; see `triton_kernels`."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from ds_blockwise.kernels.triton import plan as tp
from ds_blockwise.kernels.triton.update import (
    _ADDRESSES,
    _LOG2,
    _SCALARS,
    _T,
    _WORDS,
    _body,
    _edges,
    _new_v,
    _pointer,
    _squares,
)

_FINISH_WORDS = tl.constexpr(tp.FINISH_WORDS)
_PIECE = tl.constexpr(tp.PIECE)
_CLOG2 = tl.constexpr(tp.COLUMNS_LOG2)
_COLUMNS = tl.constexpr(1 << tp.COLUMNS_LOG2)
_STRIPES = tl.constexpr(tp.TILE >> tp.COLUMNS_LOG2)
_SUM_PIECE, _SUM_ROWS = tl.constexpr(tp.SUM_PIECE), tl.constexpr(tp.SUM_ROWS)
_SUM_COLUMNS, _SUM_RECT = tl.constexpr(tp.SUM_COLUMNS), tl.constexpr(tp.SUM_RECT)


@triton.jit
def _sum(tiles, jobs, addresses, scalars, entries, HAS: tl.constexpr, SHIFTS: tl.constexpr, A: tl.constexpr,
         G: tl.constexpr, V: tl.constexpr):  # fmt: skip
    """Sum of squares of one piece; to its entry, or (``direct``: the piece is the whole block) to the second moment."""
    tile = tl.load(tiles + tl.program_id(0))
    job = jobs + (tile >> 32) * _WORDS
    index = tile & 0xFFFFFFFF
    kind, item = tl.load(job), tl.load(job + 1)
    s = scalars + tl.load(job + 2) * _SCALARS
    start, numel, count, slot = tl.load(job + 3), tl.load(job + 4), tl.load(job + 5), tl.load(job + 6)
    repeat, stride, parts, span = tl.load(job + 7), tl.load(job + 8), tl.load(job + 11), tl.load(job + 15)
    block_numel, direct = tl.load(job + 10).to(tl.float64), tl.load(job + 13)
    out = entries + tl.load(job + 12)
    g = _pointer(addresses, item, 1, G, A)
    v = _pointer(addresses, item, 3, V, A)
    if tl.load(addresses + item * _ADDRESSES + 1) != 0:  # 0: no gradient, whose sums are zero
        if HAS & 1:
            if kind == _SUM_PIECE:
                at = start + index // parts * numel + index % parts * _PIECE
                size = tl.minimum(numel - index % parts * _PIECE, _PIECE)
                low, high = _body(at, at + size, A)
                total = tl.zeros([_T], tl.float64)
                done = 0
                while done < size:
                    offs = low + done + tl.arange(0, _T)
                    total += _squares(tl.load(g + offs, mask=offs < high, other=0.0))
                    done += _T
                whole = tl.sum(total, axis=0)
                if A:
                    edge, edge_mask = _edges(at, at + size, low, high, tl.arange(0, 16))
                    whole += tl.sum(_squares(tl.load(g + edge, mask=edge_mask, other=0.0)), axis=0)
                if direct != 0:
                    old = tl.load(v + slot + index)
                    tl.store(v + slot + index, _new_v(old, whole, block_numel, s, V))
                else:
                    tl.store(out + index, whole)
        for shift in tl.static_range(5, 10):
            if (HAS & 2) and (SHIFTS >> shift) & 1:
                if (kind == _SUM_ROWS) & (tl.load(job + 14) == shift):
                    row = (index << (_LOG2 - shift)) + tl.arange(0, _T >> shift)
                    lane = tl.arange(0, 1 << shift)[None, :]
                    mask = (row[:, None] < count) & (lane < numel)
                    grad = tl.load(g + start + row[:, None] * numel + lane, mask=mask, other=0.0)
                    tl.store(out + row, tl.sum(_squares(grad), axis=1), mask=row < count)
        if HAS & 4:
            if kind == _SUM_COLUMNS:
                column = (index // parts << _CLOG2) + tl.arange(0, _COLUMNS)
                sums = tl.zeros([_STRIPES, _COLUMNS], tl.float64)
                first = index % parts * span
                done = 0
                while done < span:
                    stripe = (first + done + tl.arange(0, _STRIPES))[:, None]
                    mask = (stripe < repeat) & (column[None, :] < count)
                    sums += _squares(tl.load(g + start + stripe * stride + column[None, :], mask=mask, other=0.0))
                    done += _STRIPES
                totals = tl.sum(sums, axis=0)
                if direct != 0:
                    old = tl.load(v + slot + column, mask=column < count, other=0.0)
                    tl.store(v + slot + column, _new_v(old, totals, block_numel, s, V), mask=column < count)
                else:
                    tl.store(out + index % parts * count + column, totals, mask=column < count)
        if HAS & 8:
            if kind == _SUM_RECT:
                at = start + index // parts * numel
                first = index % parts * span
                size = tl.minimum(span, repeat - first) * numel
                total = tl.zeros([_T], tl.float64)
                done = 0
                while done < size:
                    lane = done + tl.arange(0, _T).to(tl.int64)
                    offs = at + (first + lane // numel) * stride + lane % numel
                    total += _squares(tl.load(g + offs, mask=lane < size, other=0.0))
                    done += _T
                whole = tl.sum(total, axis=0)
                if direct != 0:
                    old = tl.load(v + slot + index)
                    tl.store(v + slot + index, _new_v(old, whole, block_numel, s, V))
                else:
                    tl.store(out + index, whole)


@triton.jit
def _finish(finish, order, entries, addresses, scalars, row_starts, blocks, TO_SUMS: tl.constexpr, V: tl.constexpr):
    """Add the entries of 32 blocks in their order: the sums of split blocks, or new second moments."""
    block = tl.program_id(0).to(tl.int64) * 32 + tl.arange(0, 32)
    mask = block < blocks
    record = finish + block * _FINISH_WORDS
    item, slot = tl.load(record, mask=mask, other=0), tl.load(record + 1, mask=mask, other=0)
    first, count = tl.load(record + 2, mask=mask, other=0), tl.load(record + 3, mask=mask, other=0)
    home = addresses + item * _ADDRESSES
    lane = tl.arange(0, 16)[None, :].to(tl.int64)
    partial = tl.zeros([32, 16], tl.float64)
    done = 0
    last = tl.max(count, axis=0)
    while done < last:
        inside = mask[:, None] & (done + lane < count[:, None])
        entry = tl.load(order + first[:, None] + done + lane, mask=inside, other=0)
        partial += tl.load(entries + entry, mask=inside, other=0.0)
        done += 16
    total = tl.sum(partial, axis=1)
    sums = tl.load(home + 5, mask=mask, other=0).to(tl.pointer_type(tl.float64))
    if TO_SUMS:
        has_grad = tl.load(home + 1, mask=mask, other=0) != 0
        tl.store(sums + slot, tl.where(has_grad, total, 0.0), mask=mask)
    else:
        total = tl.where(count < 0, tl.load(sums + slot, mask=mask & (count < 0), other=0.0), total)
        v = tl.load(home + 3, mask=mask, other=0).to(tl.pointer_type(V)) + slot
        old = tl.load(v, mask=mask, other=0.0)
        numel = tl.load(record + 4, mask=mask, other=1).to(tl.float64)
        s = scalars + tl.load(row_starts + item, mask=mask, other=0) * _SCALARS
        mean = (total / numel).to(V).to(tl.float64)
        beta2, rest = tl.load(s + 5, mask=mask, other=0.0), tl.load(s + 6, mask=mask, other=0.0)
        tl.store(v, (beta2 * old.to(tl.float64) + rest * mean).to(V), mask=mask)
