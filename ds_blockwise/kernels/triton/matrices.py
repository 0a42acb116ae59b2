# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels around Muon's orthogonalisation, for elements of a matrix in rows; see `Kernels.momentum_part_`.

One launch for a part, which Newton-Schulz follows or precedes with some fifteen. Products that are added are fused by
hand: what a compiler chooses to fuse could differ from one form of a launch to another, and the parts of a matrix on
several ranks have to have the bits of the whole one.

Names: ``stride`` is the distance of rows in the stepped tensor, its gradient, momentum and copy, ``other`` that in the
vector; both are not read if there is one row. ``weight rate decay`` are bits of fp64 numbers, because Triton rounds a
Python float to fp32. A tile is ``2^SHIFT`` columns wide.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from ds_blockwise.kernels.triton import tables
from ds_blockwise.kernels.triton.device_functions import constants, store

(PART,) = constants(1 << tables.PART_LOG2)


@triton.jit
def _number(bits, DTYPE: tl.constexpr):
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(DTYPE)


@triton.jit
def _offsets(height, width, stride, other, SHIFT: tl.constexpr):
    """Of a tile in both tensors: of its first element, then of all from there on, and which of them exist."""
    across = tl.cdiv(width, 1 << SHIFT)
    first_row = (tl.program_id(0) // across).to(tl.int64) * (PART >> SHIFT)
    first_column = (tl.program_id(0) % across) << SHIFT
    row, column = tl.arange(0, PART >> SHIFT)[:, None], tl.arange(0, 1 << SHIFT)[None, :]
    mask = (row < (height - first_row).to(tl.int32)) & (column < width - first_column)
    return (
        first_row * stride + first_column,
        row * stride + column,
        first_row * other + first_column,
        row * other + column,
        mask,
    )


@triton.jit(do_not_specialize=["weight"])
def momentum_kernel(g, m, ahead, height, width, stride, other, weight, NESTEROV: tl.constexpr, SHIFT: tl.constexpr,
                    BY_HAND: tl.constexpr, VERSION: tl.constexpr):  # fmt: skip
    """``m += weight (g - m)``, and to ``ahead`` what is orthogonalised; ``weight``: one minus the momentum."""
    base, offs, other_base, other_offs, mask = _offsets(height, width, stride, other, SHIFT)
    WIDE: tl.constexpr = ahead.dtype.element_ty
    w = _number(weight, WIDE)
    grad = tl.load(g + base + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(WIDE)
    moved = tl.load(m + base + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(WIDE)
    moved = tl.fma(w, grad - moved, moved)
    store(m + base + offs, moved, mask, BY_HAND)
    if NESTEROV:
        moved = tl.fma(w, grad - moved, moved)
    tl.store(ahead + other_base + other_offs, moved, mask=mask)


@triton.jit(do_not_specialize=["rate", "decay"])
def descend_kernel(p, direction, c, height, width, stride, other, rate, decay, COPY: tl.constexpr,
                   CAUTIOUS: tl.constexpr, SHIFT: tl.constexpr, BY_HAND: tl.constexpr,
                   VERSION: tl.constexpr):  # fmt: skip
    """``p = decay p - rate direction``; ``c`` receives it in 16 bits if ``COPY``."""
    base, offs, other_base, other_offs, mask = _offsets(height, width, stride, other, SHIFT)
    WIDE: tl.constexpr = direction.dtype.element_ty
    d = tl.load(direction + other_base + other_offs, mask=mask, other=0.0, eviction_policy="evict_first")
    param = tl.load(p + base + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(WIDE)
    decayed = param * _number(decay, WIDE)
    if CAUTIOUS:
        grows = ((d < 0) & (param > 0)) | ((d > 0) & (param < 0))
        decayed = tl.where(grows, param, decayed)
    param = tl.fma(-_number(rate, WIDE), d, decayed)
    store(p + base + offs, param, mask, BY_HAND)
    if COPY:
        store(c + base + offs, param, mask, BY_HAND)
