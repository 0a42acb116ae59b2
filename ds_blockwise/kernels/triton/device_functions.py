# SPDX-License-Identifier: Apache-2.0
"""Functions on the device that several Triton kernels use, and how numbers become Triton's constants."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from ds_blockwise.kernels.triton import tables
from ds_blockwise.kernels.triton.tables import Address, Scalar, Vectors


def constants(*numbers: int) -> tuple[tl.constexpr, ...]:
    """Triton's constants of the host's numbers.

    A kernel may read a global name only if it is such a constant. It must be a global of the kernel's own file: Triton
    does not notice a change of ``module.NAME``.
    """
    return tuple(tl.constexpr(int(number)) for number in numbers)


(ADDRESS_COLUMNS,) = constants(len(Address))
SCALAR_BETA2, SCALAR_SQUARE_WEIGHT = constants(Scalar.BETA2, Scalar.SQUARE_WEIGHT)
VECTOR, EDGE_LANES = constants(tables.VECTOR, tables.EDGE_LANES)
EDGED, EVEN = constants(Vectors.EDGED, Vectors.EVEN)


@triton.jit
def tensor_pointer(addresses, item, column: tl.constexpr, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Pointer to a tensor of dtype ``TYPE``: its address, in ``column`` of row ``item``, divides by ``ALIGN``."""
    pointer = tl.load(addresses + item * ADDRESS_COLUMNS + column).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, ALIGN)


@triton.jit
def store(pointers, value, mask, BY_HAND: tl.constexpr):
    """Store in the dtype of the tensor; ``BY_HAND`` in the interpreter."""
    # the interpreter truncates to bf16; compiled code rounds to nearest even in one instruction
    if BY_HAND and pointers.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)
        tl.store(pointers, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def scaled(grad, scale, SCALED: tl.constexpr):
    """Gradients as the update sees them; ``scale`` points to `packed_scale`, which is read if ``SCALED``."""
    if SCALED:
        bits = tl.load(scale)
        factor = bits.to(tl.int32).to(tl.float32, bitcast=True)
        nothing = (bits >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        return grad.to(tl.float32) * factor + nothing
    else:
        return grad


@triton.jit
def lerp(start, end, weight, BY_HAND: tl.constexpr):
    """``start + weight * (end - start)`` as torch computes it: from the nearer end, product and sum rounded once."""
    near = tl.abs(weight) < 0.5
    factor, base, way = tl.where(near, weight, weight - 1.0), tl.where(near, start, end), end - start
    # the interpreter rounds the product too; that of fp32 numbers is exact in fp64
    if BY_HAND and way.dtype == tl.float32:
        return (factor.to(tl.float64) * way.to(tl.float64) + base.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(factor, way, base)


@triton.jit
def squares(grad):
    """In fp64, where the square of an fp32 number is exact."""
    wide = grad.to(tl.float64)
    return wide * wide


@triton.jit
def known_even(number, VECTORS: tl.constexpr):
    """The same number; where all is even the compiler learns that it is a multiple of `VECTOR`.

    By arithmetic: a hint on an argument of a function is lost when Triton inlines the function.
    """
    if EVEN == VECTORS:
        return number // VECTOR * VECTOR
    else:
        return number


@triton.jit
def tile_base(start, VECTORS: tl.constexpr):
    """Where pointers of a tile point, at most a vector before ``start``: all its offsets then fit into 32 bits."""
    if EDGED == VECTORS:
        return tl.multiple_of(start // VECTOR * VECTOR, VECTOR)
    else:
        return known_even(start, VECTORS)


@triton.jit
def vector_body(start, end, VECTORS: tl.constexpr):
    """The part of ``[start, end)`` that vectors cover; all of it if there are none, or if they cover all."""
    if EDGED == VECTORS:
        return tl.multiple_of((start + (VECTOR - 1)) // VECTOR * VECTOR, VECTOR), tl.multiple_of(
            end // VECTOR * VECTOR, VECTOR
        )
    else:
        return known_even(start, VECTORS), known_even(end, VECTORS)


@triton.jit
def edges(start, end, low, high, lane):
    """Offsets of the elements before and after the body, and which lanes have one."""
    head, tail = start + lane, tl.maximum(low, high) + (lane - VECTOR)
    offs = tl.where(lane < VECTOR, head, tail)
    return offs, tl.where(lane < VECTOR, head < tl.minimum(low, end), tail < end)


@triton.jit
def edge_lanes():
    """Numbers of the lanes that `edges` distributes elements to."""
    return tl.arange(0, EDGE_LANES)


@triton.jit
def new_second_moment(old, total, numel, s):
    """Second moment of a block from the sum of its squares; ``s`` points to the scalars of its multipliers."""
    mean = (total / numel).to(old.dtype).to(tl.float64)
    new = tl.load(s + SCALAR_BETA2) * old.to(tl.float64) + tl.load(s + SCALAR_SQUARE_WEIGHT) * mean
    return new.to(old.dtype)
