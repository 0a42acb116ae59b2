# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that updates parameters and state; see `backend` for how a step uses it.

Names in its functions: ``p g m v c`` point to parameter, gradient, first and second moments and 16-bit copy, ``s`` to
the scalars of a row of settings, ``q`` to the factor of gradients, read if ``SCALED``. ``WIDE`` is the dtype of the
arithmetic, ``COPY`` whether there is a 16-bit copy, ``SECOND`` is of `ds_blockwise.kernels.triton.tables.Second`,
``CAUTIOUS`` whether weight decay is (arXiv 2510.12402).
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
    known_even,
    lerp,
    new_second_moment,
    scaled,
    squares,
    store,
    tensor_pointer,
    tile_base,
    vector_body,
)
from ds_blockwise.kernels.triton.tables import Address, Job, Kind, Scalar, Second, Vectors

JOB_COLUMNS, JOB_ITEM, JOB_ROW = constants(len(Job), Job.ITEM, Job.ROW)
JOB_START, JOB_NUMEL, JOB_COUNT, JOB_SLOT = constants(Job.START, Job.NUMEL, Job.COUNT, Job.SLOT)
JOB_REPEAT, JOB_REPEAT_STRIDE = constants(Job.REPEAT, Job.REPEAT_STRIDE)
JOB_BLOCK_STRIDE, JOB_BLOCK_NUMEL = constants(Job.BLOCK_STRIDE, Job.BLOCK_NUMEL)
(JOB_PARTS,) = constants(Job.PARTS)
ADDRESS_COLUMNS, GRAD_SCALE = constants(len(Address), Address.GRAD_SCALE)
ROWS, LOOP, CHUNK, ELEMENTS = constants(Kind.ROWS, Kind.LOOP, Kind.CHUNK, Kind.ELEMENTS)
RECT, ELEMENT_RECT = constants(Kind.RECT, Kind.ELEMENT_RECT)
PARAM, GRAD, PARAM_COPY = constants(Address.PARAM, Address.GRAD, Address.PARAM_COPY)
EXP_AVG, EXP_AVG_SQ = constants(Address.EXP_AVG, Address.EXP_AVG_SQ)
SCALAR_COLUMNS, SCALAR_DECAY, SCALAR_STEP_SIZE = constants(len(Scalar), Scalar.DECAY, Scalar.STEP_SIZE)
SCALAR_ROOT_CORRECTION, SCALAR_EPS = constants(Scalar.ROOT_CORRECTION, Scalar.EPS)
SCALAR_GRAD_WEIGHT, SCALAR_BETA2 = constants(Scalar.GRAD_WEIGHT, Scalar.BETA2)
(SCALAR_SQUARE_WEIGHT,) = constants(Scalar.SQUARE_WEIGHT)
OF_BLOCK, OWN, BY_SIGN = constants(Second.OF_BLOCK, Second.OWN, Second.NONE)
TILE, EDGED = constants(tables.TILE, Vectors.EDGED)
INDEX_BITS, INDEX_MASK = constants(tables.TILE_INDEX_BITS, tables.TILE_INDEX_MASK)


@triton.jit
def _spared(param, decayed, update):
    """``decayed``, but ``param`` where the update moves it away from 0."""
    grows = ((update < 0) & (param > 0)) | ((update > 0) & (param < 0))
    return tl.where(grows, param, decayed)


@triton.jit
def _apply(p, m, c, offs, mask, grad, scale, s, WIDE: tl.constexpr, COPY: tl.constexpr, SCALED: tl.constexpr,
           CAUTIOUS: tl.constexpr, BY_HAND: tl.constexpr):  # fmt: skip
    """Decay, first moment, step; ``scale`` is the step size over the denominator."""
    exp_avg = tl.load(m + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(WIDE)
    if not SCALED:
        param = tl.load(p + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(WIDE)
    exp_avg = exp_avg + tl.load(s + SCALAR_GRAD_WEIGHT).to(WIDE) * (grad.to(WIDE) - exp_avg)
    store(m + offs, exp_avg, mask, BY_HAND)
    if SCALED:  # later: with the factor and the copy's address there are not enough registers for both
        param = tl.load(p + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(WIDE)
    decayed = param * tl.load(s + SCALAR_DECAY).to(WIDE)
    if CAUTIOUS:
        decayed = _spared(param, decayed, exp_avg)
    param = decayed - scale * exp_avg
    store(p + offs, param, mask, BY_HAND)
    if COPY:
        store(c + offs, param, mask, BY_HAND)


@triton.jit
def _descend_by_sign(p, m, c, offs, mask, grad, s, WIDE: tl.constexpr, COPY: tl.constexpr, CAUTIOUS: tl.constexpr,
                     BY_HAND: tl.constexpr):  # fmt: skip
    """Lion (arXiv 2302.06675, algorithm 2). A number that is neither above nor below 0 moves nothing."""
    exp_avg = tl.load(m + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(WIDE)
    param = tl.load(p + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(WIDE)
    grad = grad.to(WIDE)
    ahead = lerp(exp_avg, grad, tl.load(s + SCALAR_GRAD_WEIGHT).to(WIDE), BY_HAND)
    store(m + offs, lerp(exp_avg, grad, tl.load(s + SCALAR_SQUARE_WEIGHT).to(WIDE), BY_HAND), mask, BY_HAND)
    decayed, size = param * tl.load(s + SCALAR_DECAY).to(WIDE), tl.load(s + SCALAR_STEP_SIZE).to(WIDE)
    if CAUTIOUS:
        decayed = _spared(param, decayed, ahead)
    param = decayed - tl.where(ahead > 0, size, tl.where(ahead < 0, -size, size * 0.0))
    store(p + offs, param, mask, BY_HAND)
    if COPY:
        store(c + offs, param, mask, BY_HAND)


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
def _rows(p, g, m, v, c, s, q, start, numel, count, block_numel, NUM_ROWS: tl.constexpr, LENGTH: tl.constexpr,
          VECTORS: tl.constexpr, WIDE: tl.constexpr, COPY: tl.constexpr, SCALED: tl.constexpr, CAUTIOUS: tl.constexpr,
          BY_HAND: tl.constexpr):  # fmt: skip
    """``count`` rows of at most ``LENGTH`` elements, each held in registers between its sum and its update."""
    base = tile_base(start, VECTORS)
    p, g, m, c = p + base, g + base, m + base, c + base
    row = tl.arange(0, NUM_ROWS)
    inside = row < tl.minimum(count, NUM_ROWS).to(tl.int32)
    length = known_even(numel.to(tl.int32), VECTORS)
    begin = (start - base).to(tl.int32) + row * length
    end = tl.where(inside, begin + length, begin)
    low, high = vector_body(begin, end, VECTORS)
    offs = low[:, None] + tl.arange(0, LENGTH)[None, :]
    mask = offs < high[:, None]
    grad = scaled(tl.load(g + offs, mask=mask, other=0.0), q, SCALED)
    total = tl.sum(squares(grad), axis=1)
    if EDGED == VECTORS:
        lane = edge_lanes()[None, :]
        edge, edge_mask = edges(begin[:, None], end[:, None], low[:, None], high[:, None], lane)
        edge_grad = scaled(tl.load(g + edge, mask=edge_mask, other=0.0), q, SCALED)
        total += tl.sum(squares(edge_grad), axis=1)
    old = tl.load(v + row, mask=inside, other=0.0)
    new = new_second_moment(old, total, block_numel.to(tl.float64), s)
    # several threads load one second moment; none may load what another one has already stored
    tl.debug_barrier()
    tl.store(v + row, new, mask=inside)
    scale = _scale(new, s, WIDE)[:, None]
    _apply(p, m, c, offs, mask, grad, scale, s, WIDE, COPY, SCALED, CAUTIOUS, BY_HAND)
    if EDGED == VECTORS:
        _apply(p, m, c, edge, edge_mask, edge_grad, scale, s, WIDE, COPY, SCALED, CAUTIOUS, BY_HAND)


@triton.jit
def _loop(p, g, m, v, c, s, q, start, numel, block_numel, VECTORS: tl.constexpr, WIDE: tl.constexpr,
          COPY: tl.constexpr, SCALED: tl.constexpr, CAUTIOUS: tl.constexpr, BY_HAND: tl.constexpr):  # fmt: skip
    """One long row: sum it, then update it while its gradient is still cached."""
    base = tile_base(start, VECTORS)
    p, g, m, c = p + base, g + base, m + base, c + base
    begin, length = (start - base).to(tl.int32), numel.to(tl.int32)
    end = begin + length
    low, high = vector_body(begin, end, VECTORS)
    total = tl.zeros([TILE], tl.float64)
    at = 0
    while at < length:
        offs = low + at + tl.arange(0, TILE)
        grad = scaled(tl.load(g + offs, mask=offs < high, other=0.0, eviction_policy="evict_last"), q, SCALED)
        total += squares(grad)
        at += TILE
    whole = tl.sum(total, axis=0)
    if EDGED == VECTORS:
        edge, edge_mask = edges(begin, end, low, high, edge_lanes())
        edge_grad = scaled(tl.load(g + edge, mask=edge_mask, other=0.0), q, SCALED)
        whole += tl.sum(squares(edge_grad), axis=0)
    new = new_second_moment(tl.load(v), whole, block_numel.to(tl.float64), s)
    tl.debug_barrier()  # as in `_rows`
    tl.store(v, new)
    scale = _scale(new, s, WIDE)
    at = 0
    while at < length:
        offs = low + at + tl.arange(0, TILE)
        mask = offs < high
        grad = scaled(tl.load(g + offs, mask=mask, other=0.0, eviction_policy="evict_first"), q, SCALED)
        _apply(p, m, c, offs, mask, grad, scale, s, WIDE, COPY, SCALED, CAUTIOUS, BY_HAND)
        at += TILE
    if EDGED == VECTORS:
        _apply(p, m, c, edge, edge_mask, edge_grad, scale, s, WIDE, COPY, SCALED, CAUTIOUS, BY_HAND)


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
def _contiguous(p, g, m, v, c, s, q, start, end, LENGTH: tl.constexpr, SECOND: tl.constexpr,
                VECTORS: tl.constexpr, WIDE: tl.constexpr, COPY: tl.constexpr, SCALED: tl.constexpr,
                CAUTIOUS: tl.constexpr, BY_HAND: tl.constexpr):  # fmt: skip
    """At most ``LENGTH`` elements: with their own second moments, those of a block whose value is known, or none.

    ``v`` points to the block's value, or is to own values what ``p`` is to the parameters.
    """
    base = tile_base(start, VECTORS)
    p, g, m, c = p + base, g + base, m + base, c + base
    begin, after = (start - base).to(tl.int32), (end - base).to(tl.int32)
    low, high = vector_body(begin, after, VECTORS)
    offs = low + tl.arange(0, LENGTH)
    mask = offs < high
    grad = scaled(tl.load(g + offs, mask=mask, other=0.0, eviction_policy="evict_first"), q, SCALED)
    if BY_SIGN == SECOND:
        _descend_by_sign(p, m, c, offs, mask, grad, s, WIDE, COPY, CAUTIOUS, BY_HAND)
    else:
        if OWN == SECOND:
            v += base
            scale = _scale(_own_v(v, offs, mask, grad, s), s, WIDE)
        else:
            scale = _scale(tl.load(v), s, WIDE)
        _apply(p, m, c, offs, mask, grad, scale, s, WIDE, COPY, SCALED, CAUTIOUS, BY_HAND)
    if EDGED == VECTORS:
        edge, edge_mask = edges(begin, after, low, high, edge_lanes())
        edge_grad = scaled(tl.load(g + edge, mask=edge_mask, other=0.0), q, SCALED)
        if BY_SIGN == SECOND:
            _descend_by_sign(p, m, c, edge, edge_mask, edge_grad, s, WIDE, COPY, CAUTIOUS, BY_HAND)
        else:
            if OWN == SECOND:
                scale = _scale(_own_v(v, edge, edge_mask, edge_grad, s), s, WIDE)
            _apply(p, m, c, edge, edge_mask, edge_grad, scale, s, WIDE, COPY, SCALED, CAUTIOUS, BY_HAND)


@triton.jit
def _rect(p, g, m, v, c, s, q, job, index, LOG2: tl.constexpr, SHIFT: tl.constexpr, SECOND: tl.constexpr,
          SAME: tl.constexpr, VECTORS: tl.constexpr, WIDE: tl.constexpr, COPY: tl.constexpr, SCALED: tl.constexpr,
          CAUTIOUS: tl.constexpr, BY_HAND: tl.constexpr):  # fmt: skip
    """Strided elements: ``2^SHIFT`` columns of as many repetitions as fit; vectors only where all is even."""
    NUM_ROWS: tl.constexpr = 1 << (LOG2 - SHIFT)
    numel, slot, repeat = tl.load(job + JOB_NUMEL), tl.load(job + JOB_SLOT), tl.load(job + JOB_REPEAT)
    parts, stride = tl.load(job + JOB_PARTS), known_even(tl.load(job + JOB_REPEAT_STRIDE), VECTORS)
    first_column, first_row = (index % parts) << SHIFT, (index // parts) << (LOG2 - SHIFT)
    columns = tl.minimum(tl.load(job + JOB_COUNT) * numel - first_column, 1 << SHIFT).to(tl.int32)
    columns = known_even(columns, VECTORS)
    base = known_even(tl.load(job + JOB_START) + first_row * stride + first_column, VECTORS)
    p, g, m, c = p + base, g + base, m + base, c + base
    row, column = tl.arange(0, NUM_ROWS)[:, None], tl.arange(0, 1 << SHIFT)[None, :]
    offs = row * stride + column
    mask = (row < tl.minimum(repeat - first_row, NUM_ROWS).to(tl.int32)) & (column < columns)
    grad = scaled(tl.load(g + offs, mask=mask, other=0.0), q, SCALED)
    if BY_SIGN == SECOND:
        _descend_by_sign(p, m, c, offs, mask, grad, s, WIDE, COPY, CAUTIOUS, BY_HAND)
    else:
        if OWN == SECOND:
            if SAME:
                scale = _scale(_own_v(v + base, offs, mask, grad, s), s, WIDE)
            else:
                v_stride = tl.load(job + JOB_BLOCK_STRIDE)
                v += slot + first_row * v_stride + first_column
                scale = _scale(_own_v(v, row * v_stride + column, mask, grad, s), s, WIDE)
        else:
            block = ((first_column % numel).to(tl.int32) + column) // numel.to(tl.int32)
            scale = _scale(tl.load(v + slot + first_column // numel + block, mask=column < columns, other=0.0), s, WIDE)
        _apply(p, m, c, offs, mask, grad, scale, s, WIDE, COPY, SCALED, CAUTIOUS, BY_HAND)


@triton.jit
def update_kernel(tiles, jobs, addresses, scalars, KIND: tl.constexpr, LOG2: tl.constexpr, SHIFT: tl.constexpr,
                  VECTORS: tl.constexpr, SAME: tl.constexpr, WIDE: tl.constexpr, P: tl.constexpr, G: tl.constexpr,
                  M: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ALIGN_P: tl.constexpr, ALIGN_G: tl.constexpr,
                  ALIGN_M: tl.constexpr, ALIGN_V: tl.constexpr, ALIGN_C: tl.constexpr, SCALED: tl.constexpr,
                  CAUTIOUS: tl.constexpr, BY_HAND: tl.constexpr, VERSION: tl.constexpr):  # fmt: skip
    """One tile of ``2^LOG2`` elements.

    ``P G M V C`` are the dtypes of the tensors, None of what is not there (no ``V``: the update is by sign), ``ALIGN_``
    what divides their addresses.
    ``KIND`` and ``SHIFT`` are those of `ds_blockwise.kernels.triton.batch.Program`, ``VECTORS`` is of
    `ds_blockwise.kernels.triton.tables.Vectors`. ``SAME``: the second moment of an element has the element's index.
    """
    COPY: tl.constexpr = C is not None
    OF_ELEMENT: tl.constexpr = BY_SIGN if V is None else OWN
    tile = tl.load(tiles + tl.program_id(0))
    job = jobs + (tile >> INDEX_BITS) * JOB_COLUMNS
    index = tile & INDEX_MASK
    item = tl.load(job + JOB_ITEM)
    s = scalars + tl.load(job + JOB_ROW) * SCALAR_COLUMNS
    start, numel = tl.load(job + JOB_START), tl.load(job + JOB_NUMEL)
    count, slot = tl.load(job + JOB_COUNT), tl.load(job + JOB_SLOT)
    p = tensor_pointer(addresses, item, PARAM, P, ALIGN_P)
    g = tensor_pointer(addresses, item, GRAD, G, ALIGN_G)
    m = tensor_pointer(addresses, item, EXP_AVG, M, ALIGN_M)
    v = tensor_pointer(addresses, item, EXP_AVG_SQ, P if V is None else V, ALIGN_V)
    c = tensor_pointer(addresses, item, PARAM_COPY, P if C is None else C, ALIGN_C)
    q = addresses + item * ADDRESS_COLUMNS + GRAD_SCALE
    block_numel = tl.load(job + JOB_BLOCK_NUMEL)
    # constants of ours on the left: in the interpreter KIND is an int, which is compared with no constant of Triton's
    if ROWS == KIND:
        first = index << (LOG2 - SHIFT)
        _rows(p, g, m, v + slot + first, c, s, q, start + first * numel, numel, count - first, block_numel,
              1 << (LOG2 - SHIFT), 1 << SHIFT, VECTORS, WIDE, COPY, SCALED, CAUTIOUS, BY_HAND)  # fmt: skip
    if LOOP == KIND:
        _loop(p, g, m, v + slot + index, c, s, q, start + index * numel, numel, block_numel, VECTORS, WIDE, COPY,
              SCALED, CAUTIOUS, BY_HAND)  # fmt: skip
    if CHUNK == KIND:
        parts = tl.load(job + JOB_PARTS)
        block, part = index // parts, index % parts
        begin = start + block * numel
        low, high = begin + (part << LOG2), tl.minimum(begin + numel, begin + ((part + 1) << LOG2))
        _contiguous(p, g, m, v + slot + block, c, s, q, low, high, 1 << LOG2, OF_BLOCK, VECTORS, WIDE, COPY, SCALED,
                    CAUTIOUS, BY_HAND)  # fmt: skip
    if ELEMENTS == KIND:
        low, high = start + (index << LOG2), tl.minimum(start + count, start + ((index + 1) << LOG2))
        own = v if SAME else v + slot - start
        _contiguous(p, g, m, own, c, s, q, low, high, 1 << LOG2, OF_ELEMENT, VECTORS, WIDE, COPY, SCALED, CAUTIOUS,
                    BY_HAND)  # fmt: skip
    if RECT == KIND:
        _rect(p, g, m, v, c, s, q, job, index, LOG2, SHIFT, OF_BLOCK, SAME, VECTORS, WIDE, COPY, SCALED, CAUTIOUS,
              BY_HAND)  # fmt: skip
    if ELEMENT_RECT == KIND:
        _rect(p, g, m, v, c, s, q, job, index, LOG2, SHIFT, OF_ELEMENT, SAME, VECTORS, WIDE, COPY, SCALED, CAUTIOUS,
              BY_HAND)  # fmt: skip
