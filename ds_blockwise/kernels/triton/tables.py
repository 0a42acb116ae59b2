# SPDX-License-Identifier: Apache-2.0
"""The tables that the host packs and the Triton kernels read: one name per column, and the sizes that both sides use.

All tables are 2-D, contiguous and on the device, one record per row. An enum below names the columns of each. Integer
tables are int64: a flat partition may have more than 2^31 elements (a LLaMA of 2B on one GPU), so every offset into a
tensor is 64 bits wide. Knows neither torch nor Triton: `device_functions.constants` makes Triton's constants of these
numbers.
"""

from __future__ import annotations

import zlib
from enum import IntEnum
from pathlib import Path

# ------------------------------------------------------------------------------------------ sizes

# A program updates 4096 elements: 48 KiB of fp32 reads in flight for Adam-mini. An H200 needs about 30 KiB a
# multiprocessor to cover its memory latency. See `tile_log2` for what takes less.
TILE_LOG2 = 12
TILE = 1 << TILE_LOG2
# Longer rows are summed in a loop and read again by the same program, which finds them in its L1 or in L2: 128 KiB of
# fp32, times two programs on each of 132 multiprocessors, is less than the 50 MiB L2 of an H100 or H200.
LOOP_LIMIT = 32768
# A block up to this size is summed by one program. Heads are larger, but a partition may hold only some tens of them:
# 64 programs of 128Ki elements fill a GPU better than 20 of 400Ki. The finish launch that it costs takes microseconds.
PIECE = 1 << 17
# Rows shorter than this share tiles with other rows even where their second moment is already known.
SHORT_LOG2 = 9
SHORT = 1 << SHORT_LOG2
# Row lengths, as powers of two, for which a tile of rows is compiled. A row takes the next larger one.
ROW_SHIFTS = (5, 7, SHORT_LOG2, 10, 11, TILE_LOG2)
# Widths likewise of a tile of a rectangle. Wider ones are cut, so that a thread's elements lie in few columns and it
# needs few second moments.
RECT_SHIFTS = (5, 7, SHORT_LOG2)
# A program of the kernels around Muon's orthogonalisation takes 2048 elements, 8 of each tensor a thread, and one of
# these widths: all at once where rows follow each other without a gap.
PART_LOG2 = 11
PART_SHIFTS = (5, 7)
# A tile of a sum over columns is 2^5 columns wide, and a program sums at most so many rows.
COLUMNS_LOG2 = 5
COLUMN_TILE_ROWS = 64
COLUMN_ROWS = 1024
# What divides a tensor's address, up to 16 bytes, decides the width of its accesses. Vectors begin at multiples of 8
# elements of the tensor; the up to 7 elements before and after them take the two halves of 16 lanes.
ALIGNMENT = 16
VECTOR = 8
EDGE_LANES = 2 * VECTOR
# A program of the finish kernel adds up this many blocks, this many entries of each at a time.
FINISH_BLOCKS = 32
FINISH_LANES = 16

# ------------------------------------------------------------------------------- tiles: (programs,)

# A tile is one integer: the number of its job in the upper half, its index in the job in the lower half.
TILE_INDEX_BITS = 32
TILE_INDEX_MASK = (1 << TILE_INDEX_BITS) - 1


# ------------------------------------------------------------------------------ jobs: (jobs, len(Job))


class Kind(IntEnum):
    """What a job of the update does. Each kind is a launch of its own.

    In one launch with others it would take the registers of the hungriest, and so fewer programs would be resident.
    """

    ROWS = 0  # several short rows, each one block: summed and updated from registers
    LOOP = 1  # one long row, which is one block: summed in a loop, then updated
    CHUNK = 2  # a tile of a row whose new second moment is already known
    ELEMENTS = 3  # elements with a second moment each
    RECT = 4  # strided elements of blocks whose new second moments are already known
    ELEMENT_RECT = 5  # strided elements with a second moment each


def tile_log2(kind: int, shift: int) -> int:
    """Elements that one program of the update takes, as a power of two.

    Less than `TILE` for what needs more registers for an element: second moments of its own, many rows. A program then
    takes 64 registers a thread or less, and a multiprocessor has room for four.
    """
    if kind in (Kind.LOOP, Kind.CHUNK) or (kind == Kind.ROWS and shift == TILE_LOG2):
        return TILE_LOG2
    return TILE_LOG2 - 2 if kind == Kind.ROWS and shift == min(ROW_SHIFTS) else TILE_LOG2 - 1


class Vectors(IntEnum):
    """How a launch reads and writes tensors: by vectors of as many elements as addresses allow, or one by one."""

    NONE = 0  # every address divides by the size of an element only
    EDGED = 1  # vectors for what lies between multiples of `VECTOR` elements, elements before and after
    EVEN = 2  # vectors for everything: all its rows begin and end at multiples of `VECTOR` elements


class Second(IntEnum):
    """What second moment an element has."""

    OF_BLOCK = 0
    OWN = 1
    NONE = 2  # it is moved by the sign of its momentum


class SumKind(IntEnum):
    """What a job of the sum kernel does; each kind is a launch as in `Kind`."""

    PIECE = 0  # up to `PIECE` elements of one row
    ROWS = 1  # several short rows
    COLUMNS = 2  # blocks of one column each
    RECT = 3  # several pieces of rows of one block


class Job(IntEnum):
    """A job: a regular group of tiles of one run of a segment table. Unused columns are 0."""

    KIND = 0  # a `Kind` or `SumKind`
    ITEM = 1  # position of the tensor in the launch
    ROW = 2  # position of its multipliers in the launch
    START = 3  # first element
    NUMEL = 4  # elements of one block in one repetition
    COUNT = 5  # blocks
    SLOT = 6  # index of the first block's second moment
    REPEAT = 7  # repetitions of all of this
    REPEAT_STRIDE = 8  # elements from one repetition to the next
    BLOCK_STRIDE = 9  # second moments from one repetition to the next; only of ELEMENT_RECT
    BLOCK_NUMEL = 10  # elements of one unsharded block: the mean's divisor, not what is summed here
    PARTS = 11  # tiles across one block or one width
    ENTRY = 12  # first partial sum that a sum job writes
    DIRECT = 13  # 1: the sum is the whole block's, so the sum job itself updates the second moment
    SHIFT = 14  # row length as a power of two, of ROWS; width of a tile, of the update's rectangles
    SPAN = 15  # elements, or repetitions, that one tile sums


# --------------------------------------------------------------- addresses: (tensors, len(Address))


class Address(IntEnum):
    """Addresses of one tensor's memory; 0 if it has none. The first five are the order of dtypes in a launch."""

    PARAM = 0
    GRAD = 1
    EXP_AVG = 2
    EXP_AVG_SQ = 3
    PARAM_COPY = 4
    SUMS = 5  # fp64, one per slot
    STEP = 6  # int64, one
    LR = 7  # fp32 or fp64, one; only if the param group's learning rate is a tensor on the device
    GRAD_SCALE = 8  # no address: see `ds_blockwise.kernels.base.packed_scale`


# ------------------------------------------------------- settings and scalars: (…, len(...)), fp64


class Setting(IntEnum):
    """Settings of one tensor, fp64, shape ``(tensors, len(Setting))``.

    A table on the device and not arguments of the launch: Triton rounds a Python float argument to fp32, and a captured
    CUDA graph would replay the arguments of its capture for ever.
    """

    LR = 0
    LR_FLOOR = 1
    BETA1 = 2
    BETA2 = 3
    EPS = 4
    WEIGHT_DECAY = 5
    PROGRESS = 6
    LR_BITS = 7  # 32 or 64: read the learning rate at `Address.LR`, of this width; 0: it is `LR`


class Multiplier(IntEnum):
    """A distinct row of `UpdateSettings.numbers` in one tensor, fp64, shape ``(rows, len(Multiplier))``."""

    LR = 0
    WEIGHT_DECAY = 1
    LR_CHANGE = 2
    BETA1 = 3  # NaN: the tensor's, as the next
    BETA2 = 4


class Scalar(IntEnum):
    """What the prepare kernel makes of settings and multipliers, fp64, shape ``(rows, len(Scalar))``.

    Made on the device because they depend on the step count, which a captured CUDA graph counts there.
    """

    DECAY = 0  # factor of the parameter: 1 - lr * weight decay
    STEP_SIZE = 1  # lr / (1 - beta1^step)
    ROOT_CORRECTION = 2  # 1 / sqrt(1 - beta2^step)
    EPS = 3
    GRAD_WEIGHT = 4  # 1 - beta1
    BETA2 = 5
    SQUARE_WEIGHT = 6  # 1 - beta2


# ------------------------------------------------------------------ finish: (blocks, len(Finish))


class Finish(IntEnum):
    """A block whose sum is put together from partial sums."""

    ITEM = 0  # position of the tensor in the launch
    SLOT = 1  # index of its second moment and of its sum
    FIRST = 2  # its first partial sum in the table ``order``
    COUNT = 3  # how many they are; `COMPLETE`: none, the sum is already at `Address.SUMS`
    NUMEL = 4  # elements of the unsharded block
    ROW = 5  # position of its multipliers in the launch


COMPLETE = -1

#: Changes with this file, and is an argument of every kernel. Triton before 3.6 does not put the values of constants
#: into the key of its cache on disk: a kernel compiled for other columns would be taken from there and read them.
VERSION = zlib.crc32(Path(__file__).read_bytes())
