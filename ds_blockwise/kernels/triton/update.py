# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels that prepare and apply an update; see `triton_kernels` for how a step uses them."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from ds_blockwise.kernels.triton import plan as tp
from ds_blockwise.kernels.triton.batch import ADDRESSES, SCALARS

_WORDS = tl.constexpr(tp.JOB_WORDS)
_ADDRESSES = tl.constexpr(ADDRESSES)
_SCALARS = tl.constexpr(SCALARS)
_T = tl.constexpr(tp.TILE)
_LOG2 = tl.constexpr(tp.TILE_LOG2)
_ROWS, _LOOP, _CHUNK = tl.constexpr(tp.ROWS), tl.constexpr(tp.LOOP), tl.constexpr(tp.CHUNK)
_ELEMENTS, _RECT, _ELEMENT_RECT = tl.constexpr(tp.ELEMENTS), tl.constexpr(tp.RECT), tl.constexpr(tp.ELEMENT_RECT)


@triton.jit
def _pointer(addresses, item, index: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(addresses + item * _ADDRESSES + index).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _power(base, exponent):
    result = base * 0.0 + 1.0
    while exponent > 0:
        if exponent & 1:
            result = result * base
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def _prepare(addresses, hyper, row_ends, multipliers, scalars):
    """One program per tensor: count the step, then the scalars of each of its multiplier rows.

    Scalars: decay factor, step size, 1 / sqrt(1 - beta2^t), eps, 1 - beta1, beta2, 1 - beta2.
    """
    item = tl.program_id(0).to(tl.int64)
    step_ptr = tl.load(addresses + item * _ADDRESSES + 6).to(tl.pointer_type(tl.int64))
    step = tl.load(step_ptr) + 1
    tl.debug_barrier()
    tl.store(step_ptr, step)
    mine = hyper + item * 7
    lr, lr_floor = tl.load(mine), tl.load(mine + 1)
    beta1, beta2 = tl.load(mine + 2), tl.load(mine + 3)
    eps, weight_decay, lr_bits = tl.load(mine + 4), tl.load(mine + 5), tl.load(mine + 6)
    lr_address = tl.load(addresses + item * _ADDRESSES + 7)
    if lr_bits == 32.0:
        lr = tl.load(lr_address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    elif lr_bits == 64.0:
        lr = tl.load(lr_address.to(tl.pointer_type(tl.float64)))
    correction1 = 1.0 - _power(beta1, step)
    correction2 = 1.0 / tl.sqrt(1.0 - _power(beta2, step))
    row = tl.load(row_ends + item)
    last = tl.load(row_ends + item + 1)
    while row < last:
        block_lr = tl.load(multipliers + 2 * row) * (lr - lr_floor) + lr_floor
        out = scalars + row * _SCALARS
        tl.store(out, 1.0 - block_lr * (weight_decay * tl.load(multipliers + 2 * row + 1)))
        tl.store(out + 1, block_lr / correction1)
        tl.store(out + 2, correction2)
        tl.store(out + 3, eps)
        tl.store(out + 4, 1.0 - beta1)
        tl.store(out + 5, beta2)
        tl.store(out + 6, 1.0 - beta2)
        row += 1


@triton.jit
def _store(pointers, value, mask, TYPE: tl.constexpr, BY_HAND: tl.constexpr):
    # the interpreter truncates to bf16; compiled code rounds to nearest even in one instruction
    if BY_HAND and TYPE == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)
        tl.store(pointers, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointers, value.to(TYPE), mask=mask)


@triton.jit
def _apply(p, m, c, offs, mask, grad, scale, s, W: tl.constexpr, TYPES: tl.constexpr, BY_HAND: tl.constexpr):
    """Decay, first moment, step; ``scale`` is the step size over the denominator."""
    exp_avg = tl.load(m + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(W)
    param = tl.load(p + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(W)
    exp_avg = exp_avg + tl.load(s + 4).to(W) * (grad.to(W) - exp_avg)
    _store(m + offs, exp_avg, mask, TYPES[2], BY_HAND)
    param = param * tl.load(s).to(W) - scale * exp_avg
    _store(p + offs, param, mask, TYPES[0], BY_HAND)
    if TYPES[4] is not None:
        _store(c + offs, param, mask, TYPES[4], BY_HAND)


@triton.jit
def _scale(v, s, W: tl.constexpr):
    if W == tl.float32:
        root = tl.sqrt_rn(v.to(tl.float32))
        return tl.div_rn(tl.load(s + 1).to(W), root * tl.load(s + 2).to(W) + tl.load(s + 3).to(W))
    else:
        return tl.load(s + 1) / (tl.sqrt(v.to(W)) * tl.load(s + 2) + tl.load(s + 3))


@triton.jit
def _new_v(v, total, numel, s, V: tl.constexpr):
    mean = (total / numel).to(V).to(tl.float64)
    return (tl.load(s + 5) * v.to(tl.float64) + tl.load(s + 6) * mean).to(V)


@triton.jit
def _squares(grad):
    wide = grad.to(tl.float64)
    return wide * wide


@triton.jit
def _body(start, end, ALIGNED: tl.constexpr):
    """The part of ``[start, end)`` that vectors of 8 elements can cover."""
    if ALIGNED:
        return tl.multiple_of((start + 7) // 8 * 8, 8), tl.multiple_of(end // 8 * 8, 8)
    else:
        return start, end


@triton.jit
def _edges(start, end, low, high, lane):
    """Offsets of the at most 7 elements before and after the body, and which of the 16 lanes have one."""
    head, tail = start + lane, tl.maximum(low, high) + (lane - 8)
    offs = tl.where(lane < 8, head, tail)
    return offs, tl.where(lane < 8, head < tl.minimum(low, end), tail < end)


@triton.jit
def _rows(p, g, m, v, c, s, first, start, numel, count, slot, block_numel, C: tl.constexpr, A: tl.constexpr,
          W: tl.constexpr, TYPES: tl.constexpr, BY_HAND: tl.constexpr):  # fmt: skip
    """``_T / C`` rows of at most ``C`` elements, each held in registers between its sum and its update."""
    R: tl.constexpr = _T // C
    row = first + tl.arange(0, R)
    begin = start + row * numel
    end = tl.where(row < count, begin + numel, begin)
    low, high = _body(begin, end, A)
    offs = low[:, None] + tl.arange(0, C)[None, :]
    mask = offs < high[:, None]
    grad = tl.load(g + offs, mask=mask, other=0.0)
    total = tl.sum(_squares(grad), axis=1)
    if A:
        lane = tl.arange(0, 16)[None, :]
        edge, edge_mask = _edges(begin[:, None], end[:, None], low[:, None], high[:, None], lane)
        edge_grad = tl.load(g + edge, mask=edge_mask, other=0.0)
        total += tl.sum(_squares(edge_grad), axis=1)
    old = tl.load(v + slot + row, mask=row < count, other=0.0)
    new = _new_v(old, total, block_numel.to(tl.float64), s, TYPES[3])
    tl.debug_barrier()
    tl.store(v + slot + row, new, mask=row < count)
    scale = _scale(new, s, W)[:, None]
    _apply(p, m, c, offs, mask, grad, scale, s, W, TYPES, BY_HAND)
    if A:
        _apply(p, m, c, edge, edge_mask, edge_grad, scale, s, W, TYPES, BY_HAND)


@triton.jit
def _loop(p, g, m, v, c, s, start, numel, slot, block_numel, A: tl.constexpr, W: tl.constexpr, TYPES: tl.constexpr,
          BY_HAND: tl.constexpr):  # fmt: skip
    """One long row: sum it, then update it while its gradient is still cached."""
    low, high = _body(start, start + numel, A)
    total = tl.zeros([_T], tl.float64)
    at = 0
    while at < numel:
        offs = low + at + tl.arange(0, _T)
        total += _squares(tl.load(g + offs, mask=offs < high, other=0.0, eviction_policy="evict_last"))
        at += _T
    whole = tl.sum(total, axis=0)
    if A:
        edge, edge_mask = _edges(start, start + numel, low, high, tl.arange(0, 16))
        edge_grad = tl.load(g + edge, mask=edge_mask, other=0.0)
        whole += tl.sum(_squares(edge_grad), axis=0)
    new = _new_v(tl.load(v + slot), whole, block_numel.to(tl.float64), s, TYPES[3])
    tl.debug_barrier()
    tl.store(v + slot, new)
    scale = _scale(new, s, W)
    at = 0
    while at < numel:
        offs = low + at + tl.arange(0, _T)
        mask = offs < high
        grad = tl.load(g + offs, mask=mask, other=0.0, eviction_policy="evict_first")
        _apply(p, m, c, offs, mask, grad, scale, s, W, TYPES, BY_HAND)
        at += _T
    if A:
        _apply(p, m, c, edge, edge_mask, edge_grad, scale, s, W, TYPES, BY_HAND)


@triton.jit
def _own_v(v, offs, mask, grad, s, W: tl.constexpr, V: tl.constexpr):
    """Update element-wise second moments; return the scale."""
    wide = grad.to(V)
    new = tl.load(v + offs, mask=mask, other=0.0).to(V) * tl.load(s + 5).to(V) + tl.load(s + 6).to(V) * (wide * wide)
    tl.store(v + offs, new, mask=mask)
    return _scale(new, s, W)


@triton.jit
def _contiguous(p, g, m, v, c, s, start, end, slot, SAME: tl.constexpr, OWN: tl.constexpr, A: tl.constexpr,
                W: tl.constexpr, TYPES: tl.constexpr, BY_HAND: tl.constexpr):  # fmt: skip
    """At most ``_T`` elements: with their own second moments (``OWN``), or those of a block whose value is known.

    ``slot`` is the index of the second moment of the first element; with ``SAME`` it is ``start``.
    """
    low, high = _body(start, end, A)
    offs = low + tl.arange(0, _T)
    mask = offs < high
    grad = tl.load(g + offs, mask=mask, other=0.0, eviction_policy="evict_first")
    if OWN:
        v_offs = offs if SAME else offs - start + slot
        scale = _own_v(v, v_offs, mask, grad, s, W, TYPES[3])
    else:
        scale = _scale(tl.load(v + slot), s, W)
    _apply(p, m, c, offs, mask, grad, scale, s, W, TYPES, BY_HAND)
    if A:
        edge, edge_mask = _edges(start, end, low, high, tl.arange(0, 16))
        edge_grad = tl.load(g + edge, mask=edge_mask, other=0.0)
        if OWN:
            edge_scale = _own_v(v, edge - start + slot, edge_mask, edge_grad, s, W, TYPES[3])
            _apply(p, m, c, edge, edge_mask, edge_grad, edge_scale, s, W, TYPES, BY_HAND)
        else:
            _apply(p, m, c, edge, edge_mask, edge_grad, scale, s, W, TYPES, BY_HAND)


@triton.jit
def _rect(p, g, m, v, c, s, job, index, OWN: tl.constexpr, W: tl.constexpr, TYPES: tl.constexpr, BY_HAND: tl.constexpr):
    """Strided elements, ``2^shift`` columns of as many stripes as fit; nothing is known of their alignment."""
    numel, slot, repeat = tl.load(job + 4), tl.load(job + 6), tl.load(job + 7)
    width, parts, shift = tl.load(job + 5) * numel, tl.load(job + 11), tl.load(job + 14)
    lane = tl.arange(0, _T).to(tl.int64)
    column = ((index % parts) << shift) + (lane & ((1 << shift) - 1))
    stripe = ((index // parts) << (_LOG2 - shift)) + (lane >> shift)
    offs = tl.load(job + 3) + stripe * tl.load(job + 8) + column
    mask = (column < width) & (stripe < repeat)
    grad = tl.load(g + offs, mask=mask, other=0.0)
    if OWN:
        scale = _own_v(v, slot + stripe * tl.load(job + 9) + column, mask, grad, s, W, TYPES[3])
    else:
        scale = _scale(tl.load(v + slot + column // numel, mask=mask, other=0.0), s, W)
    _apply(p, m, c, offs, mask, grad, scale, s, W, TYPES, BY_HAND)


@triton.jit
def _update(tiles, jobs, addresses, scalars, HAS: tl.constexpr, SHIFTS: tl.constexpr, SAME: tl.constexpr,
            A: tl.constexpr, W: tl.constexpr, TYPES: tl.constexpr, BY_HAND: tl.constexpr):  # fmt: skip
    """One tile. ``TYPES``: dtypes of param, grad, exp_avg, exp_avg_sq, param_copy; ``HAS``: kinds of job as bits."""
    tile = tl.load(tiles + tl.program_id(0))
    job = jobs + (tile >> 32) * _WORDS
    index = tile & 0xFFFFFFFF
    kind, item = tl.load(job), tl.load(job + 1)
    s = scalars + tl.load(job + 2) * _SCALARS
    start, numel, count, slot = tl.load(job + 3), tl.load(job + 4), tl.load(job + 5), tl.load(job + 6)
    p = _pointer(addresses, item, 0, TYPES[0], A)
    g = _pointer(addresses, item, 1, TYPES[1], A)
    m = _pointer(addresses, item, 2, TYPES[2], A)
    v = _pointer(addresses, item, 3, TYPES[3], A)
    c = _pointer(addresses, item, 4, TYPES[0] if TYPES[4] is None else TYPES[4], A)
    block_numel = tl.load(job + 10)
    for shift in tl.static_range(5, _LOG2 + 1):
        if (HAS & 1) and (SHIFTS >> shift) & 1:
            if (kind == _ROWS) & (tl.load(job + 14) == shift):
                first = index << (_LOG2 - shift)
                _rows(p, g, m, v, c, s, first, start, numel, count, slot, block_numel, 1 << shift, A, W, TYPES, BY_HAND)
    if HAS & 2:
        if kind == _LOOP:
            _loop(p, g, m, v, c, s, start + index * numel, numel, slot + index, block_numel, A, W, TYPES, BY_HAND)
    if HAS & 4:
        if kind == _CHUNK:
            parts = tl.load(job + 11)
            segment, part = index // parts, index % parts
            begin = start + segment * numel
            low, high = begin + part * _T, tl.minimum(begin + numel, begin + (part + 1) * _T)
            _contiguous(p, g, m, v, c, s, low, high, slot + segment, SAME, False, A, W, TYPES, BY_HAND)
    if HAS & 8:
        if kind == _ELEMENTS:
            low, high = start + index * _T, tl.minimum(start + count, start + (index + 1) * _T)
            _contiguous(p, g, m, v, c, s, low, high, slot + index * _T, SAME, True, A, W, TYPES, BY_HAND)
    if HAS & 16:
        if kind == _RECT:
            _rect(p, g, m, v, c, s, job, index, False, W, TYPES, BY_HAND)
    if HAS & 32:
        if kind == _ELEMENT_RECT:
            _rect(p, g, m, v, c, s, job, index, True, W, TYPES, BY_HAND)
