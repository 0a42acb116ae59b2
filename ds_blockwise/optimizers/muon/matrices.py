# SPDX-License-Identifier: Apache-2.0
"""Which elements of which matrix lie where: integers only.

A matrix is what is orthogonalised at once: some rows (indices of the block axis) of a parameter, with all their
columns. Its elements are numbered as they are stored, so a matrix of a transposed weight is ``[columns, rows]``. A rank
holds a tensor-parallel shard of it (a smaller matrix, its `LocalMatrix`), and of that a window of the flattened shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.settings.update_settings import UpdateSettings
from ds_blockwise.blocks.spec import BlockPart, BlockSpec


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of a parameter.

    Attributes:
        number: of the stored matrix (the expert) that it is a part of; 0 if there is one.
        ranges: its indices of the block axis: half-open, ascending.
        updates: the settings of each range.
        rows: their number.
        columns: elements of a row.
    """

    number: int
    ranges: tuple[tuple[int, int], ...]
    updates: tuple[UpdateSettings, ...]
    rows: int
    columns: int

    def block_ids(self, spec: BlockSpec) -> torch.Tensor:
        """Of each row the id of its block, which is the row itself (granularity ``row``)."""
        first = self.number * (spec.num_blocks // spec.structure.num_matrices)
        ids = torch.empty(spec.structure.axis_size, dtype=torch.int64)
        for part in spec.parts:
            ids[part.start : part.end] = torch.arange(part.end - part.start) + part.first_block + first
        return ids[_indices(self.ranges)]

    @property
    def size(self) -> int:
        """Numbers that arrive at its owner: the elements, and a second moment for each row."""
        return self.rows * (self.columns + 1)

    @property
    def cost(self) -> int:
        """Operations of Newton-Schulz, up to a factor: max(m, n) min(m, n)^2."""
        return self.rows * self.columns * min(self.rows, self.columns)


@dataclass(frozen=True, slots=True)
class Rectangle:
    """``height`` runs of ``width`` elements, in two flat tensors: ``start + i * stride`` is where run i begins.

    ``part`` is the number of the matrix's range in which its rows lie.
    """

    height: int
    width: int
    start: int
    stride: int
    other_start: int
    other_stride: int
    part: int = 0

    @property
    def numel(self) -> int:
        """Elements of it."""
        return self.height * self.width

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Its elements in the first tensor, a view ``[height, width]``."""
        return flat.as_strided((self.height, self.width), (self.stride, 1), flat.storage_offset() + self.start)

    def of_other(self, flat: torch.Tensor) -> torch.Tensor:
        """Its elements in the second tensor."""
        return flat.as_strided(
            (self.height, self.width), (self.other_stride, 1), flat.storage_offset() + self.other_start
        )


@dataclass(frozen=True, slots=True)
class _Segment:
    """Indices of a dimension: where they lie in a shard, where in a matrix, and in which of its ranges."""

    local: int
    place: int
    size: int
    part: int


@dataclass(frozen=True)
class LocalMatrix:
    """What one tensor-parallel rank holds of a matrix.

    Attributes:
        shape: ``(height, width)`` as stored.
        row_dim: the dimension of the block axis, 0 or 1.
        places: indices of the block axis, counted in the matrix, that this rank holds; ascending.
        numel: elements of the whole shard of the parameter.
    """

    shape: tuple[int, int]
    row_dim: int
    places: tuple[tuple[int, int], ...]
    numel: int
    _offset: int
    _shard_width: int
    _heights: tuple[_Segment, ...]
    _widths: tuple[_Segment, ...]
    _whole_width: int

    @property
    def size(self) -> int:
        """Numbers that travel: the elements, and a second moment for each row."""
        numel = self.shape[0] * self.shape[1]
        return numel + self.shape[self.row_dim] if numel else 0

    def held_before(self, places: torch.Tensor) -> torch.Tensor:
        """How many of its elements lie before places in the flattened shard; int64, of the shape of ``places``."""
        at = (places - self._offset).clamp(min=0)
        rows, columns = at // max(self._shard_width, 1), at % max(self._shard_width, 1)
        whole, in_row = torch.zeros_like(at), torch.zeros_like(at)
        for wide in self._widths:
            in_row += (columns - wide.local).clamp(0, wide.size)
        for tall in self._heights:
            above = rows - tall.local
            whole += above.clamp(0, tall.size) * self.shape[1]
            whole += torch.where((above >= 0) & (above < tall.size), in_row, 0)
        return whole

    def window(self, start: int, end: int) -> tuple[Rectangle, ...]:
        """The elements in a window of the flattened shard.

        Args:
            start: first element of the window, in the flattened tensor-parallel shard of the parameter.
            end: one past the last.

        Returns:
            Rectangles: first in the window, counted from its start, then in the flattened local matrix.
        """
        low = max(start - self._offset, 0)
        bands = list(_bands(low, end - self._offset, self._shard_width))
        found = []
        at_row = 0
        for tall in self._heights:
            at_column = 0
            for wide in self._widths:
                for top, bottom, left, right in bands:
                    r0, r1 = max(tall.local, top), min(tall.local + tall.size, bottom)
                    c0, c1 = max(wide.local, left), min(wide.local + wide.size, right)
                    if r0 < r1 and c0 < c1:
                        here = self._offset + r0 * self._shard_width + c0 - start
                        there = (at_row + r0 - tall.local) * self.shape[1] + at_column + c0 - wide.local
                        part = (tall, wide)[self.row_dim].part
                        found.append(Rectangle(r1 - r0, c1 - c0, here, self._shard_width, there, self.shape[1], part))
                at_column += wide.size
            at_row += tall.size
        return tuple(found)

    def in_whole(self) -> tuple[Rectangle, ...]:
        """All its elements: first in the flattened local matrix, then in the flattened unsharded one."""
        found = []
        at_row = 0
        for tall in self._heights:
            at_column = 0
            for wide in self._widths:
                here, there = at_row * self.shape[1] + at_column, tall.place * self._whole_width + wide.place
                found.append(Rectangle(tall.size, wide.size, here, self.shape[1], there, self._whole_width))
                at_column += wide.size
            at_row += tall.size
        return tuple(found)

    def rows_of(self, rectangles: Sequence[Rectangle]) -> torch.Tensor:
        """Indices of the block axis, counted in the local matrix, that rectangles of `window` touch; ascending."""
        size, width = self.shape[self.row_dim], self.shape[1]
        touched = torch.zeros(size, dtype=torch.bool)
        for r in rectangles:
            first = r.other_start // width if self.row_dim == 0 else r.other_start % width
            touched[first : first + (r.height if self.row_dim == 0 else r.width)] = True
        return touched.nonzero().view(-1)

    def rows_in_whole(self) -> torch.Tensor:
        """Its indices of the block axis, counted in the unsharded matrix."""
        return _indices(self.places)


def _indices(ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    return torch.cat([torch.arange(start, end) for start, end in ranges] or [torch.empty(0, dtype=torch.int64)])


def _bands(start: int, end: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """A flat range of a matrix as at most three rectangles: top, bottom, left, right."""
    if start >= end or not width:
        return
    row, column = divmod(start, width)
    if column:
        stop = min(end, (row + 1) * width)
        yield row, row + 1, column, stop - row * width
        start, row = stop, row + 1
    last, rest = divmod(end, width)
    if start < end and last > row:
        yield row, last, 0, width
    if start < end and rest:
        yield last, last + 1, 0, rest


def matrices_of(spec: BlockSpec) -> list[Matrix]:
    """The matrices of a parameter that are orthogonalised, in the order in which they begin; none for most others."""
    ranges: dict[tuple[object, ...], list[tuple[int, int, UpdateSettings]]] = {}
    for index, part in enumerate(spec.parts):
        for key, start, end in _pieces(spec, index, part):
            known = ranges.setdefault(key, [])
            if known and known[-1][1:] == (start, part.update):
                start = known.pop()[0]
            known.append((start, end, part.update))
    columns = spec.structure.numel_per_row if ranges else 0
    return [
        Matrix(
            number,
            tuple((start, end) for start, end, _ in known),
            tuple(update for _, _, update in known),
            sum(end - start for start, end, _ in known),
            columns,
        )
        for number in range(spec.structure.num_matrices)
        for known in ranges.values()
    ]


def _pieces(spec: BlockSpec, index: int, part: BlockPart) -> Iterator[tuple[tuple[object, ...], int, int]]:
    """Key of a matrix and indices of the block axis that belong to it."""
    how, structure = part.orthogonalize, spec.structure
    head_rows = structure.spans[index].head_rows
    if how == "matrix":
        yield ("matrix",), part.start, part.end
    elif how == "head" and head_rows is not None and head_rows > 1:
        for start in range(part.start, part.end, head_rows):
            yield (part.role, start), start, start + head_rows
    elif how is not None:
        size = structure.axis_size // structure.fused_parts
        for number in range(structure.fused_parts):
            start, end = max(part.start, number * size), min(part.end, (number + 1) * size)
            if start < end:
                yield (part.role, number), start, end


def local_matrix(spec: BlockSpec, shard: TensorShard | None, matrix: Matrix) -> LocalMatrix:
    """What a tensor-parallel rank holds of a matrix.

    Args:
        spec: of the parameter.
        shard: its tensor-parallel split, of the rank that is asked about; None if it is whole there.
        matrix: one of `matrices_of`.
    """
    height, width = spec.structure.stored_shape[-2:]
    axis = spec.axis
    if spec.batch is not None:
        axis -= 1
        shard = None if shard is None else shard.of_one_matrix()
    whole = (height, width)
    local = whole if shard is None else (shard.local_shape[0], shard.local_shape[1])
    dims = []
    for dim in (0, 1):
        held = ((0, whole[dim]),) if shard is None or shard.dim != dim else shard.chunks[shard.rank]
        dims.append(tuple(_segments(held, matrix.ranges if dim == axis else ((0, whole[dim]),))))
    places = [(s.place, s.place + s.size) for s in dims[axis]]
    shape = (sum(s.size for s in dims[0]), sum(s.size for s in dims[1]))
    matrices = spec.structure.num_matrices
    return LocalMatrix(
        shape,
        axis,
        tuple(places),
        matrices * math.prod(local),
        matrix.number * math.prod(local),
        local[1],
        dims[0],
        dims[1],
        matrix.rows if axis == 1 else width,
    )


def _segments(held: Sequence[tuple[int, int]], wanted: Sequence[tuple[int, int]]) -> Iterator[_Segment]:
    """The indices that are both held and wanted, in the order in which they are held."""
    at = 0
    for first, last in held:
        place = 0
        for number, (start, end) in enumerate(wanted):
            low, high = max(first, start), min(last, end)
            if low < high:
                yield _Segment(at + low - first, place + low - start, high - low, number)
            place += end - start
        at += last - first


def of_rank(shard: TensorShard | None, rank: int) -> TensorShard | None:
    """The same split as another tensor-parallel rank holds it."""
    return None if shard is None else replace(shard, rank=rank)
