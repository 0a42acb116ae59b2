# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that updates parameters and state; see `backend` for how a step uses it.

Names in its functions: ``p g m v c`` point to parameter, gradient, first and second moments and 16-bit copy, ``s`` to
the scalars of a row of settings. ``WIDE`` is the dtype of the arithmetic, ``COPY`` whether there is a 16-bit copy,
``OWN`` whether every element has its own second moment, ``CAUTIOUS`` whether weight decay is (arXiv 2510.12402).
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from ds_blockwise.kernels.triton import tables
from ds_blockwise.kernels.triton.device_functions import (
    constants,
    edge_lanes,
    edges,
    new_second_moment,
    squares,
    tensor_pointer,
    vector_body,
)
from ds_blockwise.kernels.triton.tables import Address, Job, Kind, Scalar

JOB_COLUMNS, JOB_KIND, JOB_ITEM, JOB_ROW = constants(len(Job), Job.KIND, Job.ITEM, Job.ROW)
JOB_START, JOB_NUMEL, JOB_COUNT, JOB_SLOT = constants(Job.START, Job.NUMEL, Job.COUNT, Job.SLOT)
JOB_REPEAT, JOB_REPEAT_STRIDE = constants(Job.REPEAT, Job.REPEAT_STRIDE)
JOB_BLOCK_STRIDE, JOB_BLOCK_NUMEL = constants(Job.BLOCK_STRIDE, Job.BLOCK_NUMEL)
JOB_PARTS, JOB_SHIFT = constants(Job.PARTS, Job.SHIFT)
ROWS, LOOP, CHUNK, ELEMENTS = constants(Kind.ROWS, Kind.LOOP, Kind.CHUNK, Kind.ELEMENTS)
RECT, ELEMENT_RECT = constants(Kind.RECT, Kind.ELEMENT_RECT)
PARAM, GRAD, PARAM_COPY = constants(Address.PARAM, Address.GRAD, Address.PARAM_COPY)
EXP_AVG, EXP_AVG_SQ = constants(Address.EXP_AVG, Address.EXP_AVG_SQ)
SCALAR_COLUMNS, SCALAR_DECAY, SCALAR_STEP_SIZE = constants(len(Scalar), Scalar.DECAY, Scalar.STEP_SIZE)
SCALAR_ROOT_CORRECTION, SCALAR_EPS = constants(Scalar.ROOT_CORRECTION, Scalar.EPS)
SCALAR_GRAD_WEIGHT, SCALAR_BETA2 = constants(Scalar.GRAD_WEIGHT, Scalar.BETA2)
SCALAR_SQUARE_WEIGHT, FIRST_SHIFT = constants(Scalar.SQUARE_WEIGHT, min(tables.ROW_SHIFTS))
TILE, TILE_LOG2 = constants(tables.TILE, tables.TILE_LOG2)
INDEX_BITS, INDEX_MASK = constants(tables.TILE_INDEX_BITS, tables.TILE_INDEX_MASK)


@triton.jit
def _store(pointers, value, mask, BY_HAND: tl.constexpr):
    # the interpreter truncates to bf16; compiled code rounds to nearest even in one instruction
    if BY_HAND and pointers.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)
        tl.store(pointers, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _apply(p, m, c, offs, mask, grad, scale, s, WIDE: tl.constexpr, COPY: tl.constexpr, CAUTIOUS: tl.constexpr,
           BY_HAND: tl.constexpr):  # fmt: skip
    """Decay, first moment, step; ``scale`` is the step size over the denominator."""
    exp_avg = tl.load(m + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(WIDE)
    param = tl.load(p + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(WIDE)
    exp_avg = exp_avg + tl.load(s + SCALAR_GRAD_WEIGHT).to(WIDE) * (grad.to(WIDE) - exp_avg)
    _store(m + offs, exp_avg, mask, BY_HAND)
    decayed = param * tl.load(s + SCALAR_DECAY).to(WIDE)
    if CAUTIOUS:
        grows = ((exp_avg < 0) & (param > 0)) | ((exp_avg > 0) & (param < 0))
        decayed = tl.where(grows, param, decayed)
    param = decayed - scale * exp_avg
    _store(p + offs, param, mask, BY_HAND)
    if COPY:
        _store(c + offs, param, mask, BY_HAND)


@triton.jit
def _scale(v, s, WIDE: tl.constexpr):
    """Step size over the denominator, in ``WIDE``."""
    if WIDE == tl.float32:
        root = tl.sqrt_rn(v.to(tl.float32))
        size, correction = tl.load(s + SCALAR_STEP_SIZE).to(WIDE), tl.load(s + SCALAR_ROOT_CORRECTION).to(WIDE)
        return tl.div_rn(size, root * correction + tl.load(s + SCALAR_EPS).to(WIDE))
    else:
        size, correction = tl.load(s + SCALAR_STEP_SIZE), tl.load(s + SCALAR_ROOT_CORRECTION)
        return size / (tl.sqrt(v.to(WIDE)) * correction + tl.load(s + SCALAR_EPS))


@triton.jit
def _rows(p, g, m, v, c, s, first, start, numel, count, slot, block_numel, LENGTH: tl.constexpr, ALIGNED: tl.constexpr,
          WIDE: tl.constexpr, COPY: tl.constexpr, CAUTIOUS: tl.constexpr, BY_HAND: tl.constexpr):  # fmt: skip
    """Rows of at most ``LENGTH`` elements, each held in registers between its sum and its update."""
    NUM_ROWS: tl.constexpr = TILE // LENGTH
    row = first + tl.arange(0, NUM_ROWS)
    begin = start + row * numel
    end = tl.where(row < count, begin + numel, begin)
    low, high = vector_body(begin, end, ALIGNED)
    offs = low[:, None] + tl.arange(0, LENGTH)[None, :]
    mask = offs < high[:, None]
    grad = tl.load(g + offs, mask=mask, other=0.0)
    total = tl.sum(squares(grad), axis=1)
    if ALIGNED:
        lane = edge_lanes()[None, :]
        edge, edge_mask = edges(begin[:, None], end[:, None], low[:, None], high[:, None], lane)
        edge_grad = tl.load(g + edge, mask=edge_mask, other=0.0)
        total += tl.sum(squares(edge_grad), axis=1)
    old = tl.load(v + slot + row, mask=row < count, other=0.0)
    new = new_second_moment(old, total, block_numel.to(tl.float64), s)
    # several threads load one second moment; none may load what another one has already stored
    tl.debug_barrier()
    tl.store(v + slot + row, new, mask=row < count)
    scale = _scale(new, s, WIDE)[:, None]
    _apply(p, m, c, offs, mask, grad, scale, s, WIDE, COPY, CAUTIOUS, BY_HAND)
    if ALIGNED:
        _apply(p, m, c, edge, edge_mask, edge_grad, scale, s, WIDE, COPY, CAUTIOUS, BY_HAND)


@triton.jit
def _loop(p, g, m, v, c, s, start, numel, slot, block_numel, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
          COPY: tl.constexpr, CAUTIOUS: tl.constexpr, BY_HAND: tl.constexpr):  # fmt: skip
    """One long row: sum it, then update it while its gradient is still cached."""
    low, high = vector_body(start, start + numel, ALIGNED)
    total = tl.zeros([TILE], tl.float64)
    at = 0
    while at < numel:
        offs = low + at + tl.arange(0, TILE)
        total += squares(tl.load(g + offs, mask=offs < high, other=0.0, eviction_policy="evict_last"))
        at += TILE
    whole = tl.sum(total, axis=0)
    if ALIGNED:
        edge, edge_mask = edges(start, start + numel, low, high, edge_lanes())
        edge_grad = tl.load(g + edge, mask=edge_mask, other=0.0)
        whole += tl.sum(squares(edge_grad), axis=0)
    new = new_second_moment(tl.load(v + slot), whole, block_numel.to(tl.float64), s)
    tl.debug_barrier()  # as in `_rows`
    tl.store(v + slot, new)
    scale = _scale(new, s, WIDE)
    at = 0
    while at < numel:
        offs = low + at + tl.arange(0, TILE)
        mask = offs < high
        grad = tl.load(g + offs, mask=mask, other=0.0, eviction_policy="evict_first")
        _apply(p, m, c, offs, mask, grad, scale, s, WIDE, COPY, CAUTIOUS, BY_HAND)
        at += TILE
    if ALIGNED:
        _apply(p, m, c, edge, edge_mask, edge_grad, scale, s, WIDE, COPY, CAUTIOUS, BY_HAND)


@triton.jit
def _own_v(v, offs, mask, grad, s):
    """Update element-wise second moments and return them."""
    old = tl.load(v + offs, mask=mask, other=0.0)
    wide = grad.to(old.dtype)
    beta2, weight = tl.load(s + SCALAR_BETA2), tl.load(s + SCALAR_SQUARE_WEIGHT)
    new = old * beta2.to(old.dtype) + weight.to(old.dtype) * (wide * wide)
    tl.store(v + offs, new, mask=mask)
    return new


@triton.jit
def _contiguous(p, g, m, v, c, s, start, end, slot, SAME: tl.constexpr, OWN: tl.constexpr, ALIGNED: tl.constexpr,
                WIDE: tl.constexpr, COPY: tl.constexpr, CAUTIOUS: tl.constexpr, BY_HAND: tl.constexpr):  # fmt: skip
    """At most one tile of elements: with their own second moments, or those of a block whose value is known.

    ``slot`` is the index of the second moment of the first element; with ``SAME`` it is ``start``.
    """
    low, high = vector_body(start, end, ALIGNED)
    offs = low + tl.arange(0, TILE)
    mask = offs < high
    grad = tl.load(g + offs, mask=mask, other=0.0, eviction_policy="evict_first")
    if OWN:
        v_offs = offs if SAME else offs - start + slot
        scale = _scale(_own_v(v, v_offs, mask, grad, s), s, WIDE)
    else:
        scale = _scale(tl.load(v + slot), s, WIDE)
    _apply(p, m, c, offs, mask, grad, scale, s, WIDE, COPY, CAUTIOUS, BY_HAND)
    if ALIGNED:
        edge, edge_mask = edges(start, end, low, high, edge_lanes())
        edge_grad = tl.load(g + edge, mask=edge_mask, other=0.0)
        if OWN:
            scale = _scale(_own_v(v, edge - start + slot, edge_mask, edge_grad, s), s, WIDE)
        _apply(p, m, c, edge, edge_mask, edge_grad, scale, s, WIDE, COPY, CAUTIOUS, BY_HAND)


@triton.jit
def _rect(p, g, m, v, c, s, job, index, OWN: tl.constexpr, WIDE: tl.constexpr, COPY: tl.constexpr,
          CAUTIOUS: tl.constexpr, BY_HAND: tl.constexpr):  # fmt: skip
    """Strided elements, ``2^shift`` columns of as many repetitions as fit; nothing is known of their alignment."""
    numel, slot, repeat = tl.load(job + JOB_NUMEL), tl.load(job + JOB_SLOT), tl.load(job + JOB_REPEAT)
    width = tl.load(job + JOB_COUNT) * numel
    parts, shift = tl.load(job + JOB_PARTS), tl.load(job + JOB_SHIFT)
    lane = tl.arange(0, TILE).to(tl.int64)
    column = ((index % parts) << shift) + (lane & ((1 << shift) - 1))
    repetition = ((index // parts) << (TILE_LOG2 - shift)) + (lane >> shift)
    offs = tl.load(job + JOB_START) + repetition * tl.load(job + JOB_REPEAT_STRIDE) + column
    mask = (column < width) & (repetition < repeat)
    grad = tl.load(g + offs, mask=mask, other=0.0)
    if OWN:
        v_offs = slot + repetition * tl.load(job + JOB_BLOCK_STRIDE) + column
        scale = _scale(_own_v(v, v_offs, mask, grad, s), s, WIDE)
    else:
        scale = _scale(tl.load(v + slot + column // numel, mask=mask, other=0.0), s, WIDE)
    _apply(p, m, c, offs, mask, grad, scale, s, WIDE, COPY, CAUTIOUS, BY_HAND)


@triton.jit
def update_kernel(tiles, jobs, addresses, scalars, HAS: tl.constexpr, SHIFTS: tl.constexpr, SAME: tl.constexpr,
                  ALIGNED: tl.constexpr, WIDE: tl.constexpr, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
                  V: tl.constexpr, C: tl.constexpr, CAUTIOUS: tl.constexpr, BY_HAND: tl.constexpr,
                  VERSION: tl.constexpr):  # fmt: skip
    """One tile.

    ``P G M V C`` are the dtypes of the tensors (``C``: None without a copy), ``HAS`` the sum of the kinds of job in the
    launch, ``SHIFTS`` has bit n set if it has rows of up to ``2^n`` elements.
    """
    COPY: tl.constexpr = C is not None
    tile = tl.load(tiles + tl.program_id(0))
    job = jobs + (tile >> INDEX_BITS) * JOB_COLUMNS
    index = tile & INDEX_MASK
    kind, item = tl.load(job + JOB_KIND), tl.load(job + JOB_ITEM)
    s = scalars + tl.load(job + JOB_ROW) * SCALAR_COLUMNS
    start, numel = tl.load(job + JOB_START), tl.load(job + JOB_NUMEL)
    count, slot = tl.load(job + JOB_COUNT), tl.load(job + JOB_SLOT)
    p = tensor_pointer(addresses, item, PARAM, P, ALIGNED)
    g = tensor_pointer(addresses, item, GRAD, G, ALIGNED)
    m = tensor_pointer(addresses, item, EXP_AVG, M, ALIGNED)
    v = tensor_pointer(addresses, item, EXP_AVG_SQ, V, ALIGNED)
    c = tensor_pointer(addresses, item, PARAM_COPY, P if C is None else C, ALIGNED)
    block_numel = tl.load(job + JOB_BLOCK_NUMEL)
    # constants on the left of `&`: in the interpreter HAS is an int, which takes no constant of Triton's on its right
    for shift in tl.static_range(FIRST_SHIFT, TILE_LOG2 + 1):
        if (ROWS & HAS) and (SHIFTS >> shift) & 1:
            if (kind == ROWS) & (tl.load(job + JOB_SHIFT) == shift):
                first = index << (TILE_LOG2 - shift)
                _rows(p, g, m, v, c, s, first, start, numel, count, slot, block_numel, 1 << shift, ALIGNED, WIDE, COPY,
                      CAUTIOUS, BY_HAND)  # fmt: skip
    if LOOP & HAS:
        if kind == LOOP:
            begin = start + index * numel
            _loop(p, g, m, v, c, s, begin, numel, slot + index, block_numel, ALIGNED, WIDE, COPY, CAUTIOUS, BY_HAND)
    if CHUNK & HAS:
        if kind == CHUNK:
            parts = tl.load(job + JOB_PARTS)
            block, part = index // parts, index % parts
            begin = start + block * numel
            low, high = begin + part * TILE, tl.minimum(begin + numel, begin + (part + 1) * TILE)
            _contiguous(p, g, m, v, c, s, low, high, slot + block, SAME, False, ALIGNED, WIDE, COPY, CAUTIOUS, BY_HAND)
    if ELEMENTS & HAS:
        if kind == ELEMENTS:
            low, high = start + index * TILE, tl.minimum(start + count, start + (index + 1) * TILE)
            v_at = slot + index * TILE
            _contiguous(p, g, m, v, c, s, low, high, v_at, SAME, True, ALIGNED, WIDE, COPY, CAUTIOUS, BY_HAND)
    if RECT & HAS:
        if kind == RECT:
            _rect(p, g, m, v, c, s, job, index, False, WIDE, COPY, CAUTIOUS, BY_HAND)
    if ELEMENT_RECT & HAS:
        if kind == ELEMENT_RECT:
            _rect(p, g, m, v, c, s, job, index, True, WIDE, COPY, CAUTIOUS, BY_HAND)
