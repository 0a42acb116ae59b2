# SPDX-License-Identifier: Apache-2.0
"""Integer ranges only: which elements of which block lie where on this rank.

A parameter is read as ``[batch, outer, axis, inner]`` around its block axis; the matrices of a batch (experts) have
blocks of their own. Tensor parallelism keeps some indices of one dimension (`TensorShard`), ZeRO keeps one contiguous
range of the flattened rest (`start`, `end`). The result is a list of `Run`: regularly spaced segments, which kernels
and state use. Knows nothing of roles, tensors or process groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class AxisSpan:
    """Indices ``[start, end)`` of the block axis, cut into blocks of ``rows_per_block`` (0: element-wise).

    Block ids count up from ``first_block``; ``tag`` is the caller's own index and is passed on.
    """

    start: int
    end: int
    first_block: int
    rows_per_block: int
    tag: int


@dataclass(frozen=True, slots=True)
class TensorShard:
    """What one tensor-parallel rank holds of a tensor: some index ranges of one dimension.

    Attributes:
        global_shape: unsharded shape.
        dim: the split dimension (Megatron's ``partition_dim``).
        rank: this rank in the tensor-parallel group.
        chunks: per rank, its half-open index ranges of ``dim`` in storage order (several for a fused gate and up).
    """

    global_shape: tuple[int, ...]
    dim: int
    rank: int
    chunks: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def even(cls, global_shape: tuple[int, ...], dim: int, rank: int, world_size: int, stride: int = 1) -> TensorShard:
        """An even split. With ``stride`` s, each of s equal parts of ``dim`` is split by itself (gated FFN: 2).

        Raises:
            ValueError: the dimension does not divide by ``world_size * stride``.
        """
        size = global_shape[dim]
        if size % (world_size * stride):
            raise ValueError(
                f"dimension {dim} of shape {global_shape} has {size} indices, which does not divide by {world_size} "
                f"tensor-parallel ranks x {stride} parts"
            )
        part, piece = size // stride, size // (stride * world_size)
        chunks = tuple(
            tuple((s * part + r * piece, s * part + (r + 1) * piece) for s in range(stride)) for r in range(world_size)
        )
        return cls(global_shape, dim, rank, chunks)

    def part_by_part(self, ends: Sequence[int]) -> TensorShard:
        """The even split of each part of the dimension by itself, where consecutive parts end at ``ends``.

        Raises:
            ValueError: a part does not divide by the number of ranks.
        """
        ranks = len(self.chunks)
        parts = [(start, end - start) for start, end in zip((0, *ends), ends, strict=False)]
        if any(size % ranks for _, size in parts):
            sizes = ", ".join(str(size) for _, size in parts)
            raise ValueError(f"parts of {sizes} rows do not all divide by {ranks} tensor-parallel ranks")
        chunks = tuple(
            tuple((start + rank * size // ranks, start + (rank + 1) * size // ranks) for start, size in parts)
            for rank in range(ranks)
        )
        return TensorShard(self.global_shape, self.dim, self.rank, chunks)

    @property
    def is_even(self) -> bool:
        """Whether every rank holds the same number of indices."""
        return len({sum(end - start for start, end in ranges) for ranges in self.chunks}) == 1

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's tensor."""
        local = sum(end - start for start, end in self.chunks[self.rank])
        return (*self.global_shape[: self.dim], local, *self.global_shape[self.dim + 1 :])

    def of_one_matrix(self) -> TensorShard:
        """The same split for one matrix of a batch: the shape without its leading dimension, which is not split."""
        assert self.dim > 0, self
        return TensorShard(self.global_shape[1:], self.dim - 1, self.rank, self.chunks)


@dataclass(frozen=True, slots=True)
class Run:
    """Regularly spaced segments: ``repeat`` x ``count`` segments of ``numel`` elements each.

    Element ``k`` of segment ``i`` in repetition ``r`` lies at ``start + r * repeat_stride + i * numel + k`` and
    belongs to block ``block + r * block_stride + i``. Element-wise parts are runs of one-element segments with
    ``element_wise`` set; their ``block`` counts elements, not blocks.
    """

    start: int
    count: int
    numel: int
    block: int
    tag: int
    element_wise: bool = False
    repeat: int = 1
    repeat_stride: int = 0
    block_stride: int = 0

    @property
    def total(self) -> int:
        """Elements in the run."""
        return self.repeat * self.count * self.numel


@dataclass(frozen=True, slots=True)
class LocalSpan:
    """An `AxisSpan` clipped to the indices that this tensor-parallel rank holds, in local indices.

    ``skipped`` rows of the span's first block lie before ``start`` (on another rank).
    """

    start: int
    end: int
    first_block: int
    rows_per_block: int
    skipped: int
    tag: int


@dataclass(frozen=True, slots=True)
class LocalView:
    """This rank's tensor as ``[batch, outer, axis, inner]`` with its spans, before any flat cut.

    The spans are those of the first matrix; block ids of the next one are ``blocks_per_matrix`` larger.
    """

    outer: int
    axis: int
    inner: int
    spans: tuple[LocalSpan, ...]
    batch: int = 1
    blocks_per_matrix: int = 0

    @property
    def numel(self) -> int:
        """Local elements."""
        return self.batch * self.outer * self.axis * self.inner


@dataclass(frozen=True, slots=True)
class Batch:
    """A tensor that is ``count`` matrices one after the other, each with ``blocks_per_matrix`` blocks of its own."""

    count: int
    blocks_per_matrix: int


def local_view(
    shape: tuple[int, ...],
    axis: int,
    spans: Sequence[AxisSpan],
    shard: TensorShard | None = None,
    batch: Batch | None = None,
) -> LocalView:
    """Clip spans of the unsharded tensor to what this tensor-parallel rank holds.

    Args:
        shape: unsharded shape.
        axis: block axis.
        spans: spans that tile the block axis.
        shard: the tensor-parallel split; None if the tensor is whole on every rank.
        batch: the leading dimension counts matrices with blocks of their own, the first of which the spans describe.
    """
    if batch is not None:
        one = local_view(shape[1:], axis - 1, spans, None if shard is None else shard.of_one_matrix())
        return replace(one, batch=batch.count, blocks_per_matrix=batch.blocks_per_matrix)
    local_shape = shape if shard is None else shard.local_shape
    ranges: Sequence[tuple[int, int]] = ((0, shape[axis] if shape else 1),)
    if shard is not None and shard.dim == axis:
        ranges = shard.chunks[shard.rank]
    local: list[LocalSpan] = []
    at = 0
    for start, end in ranges:
        for span in spans:
            low, high = max(start, span.start), min(end, span.end)
            if low >= high:
                continue
            first, skipped = span.first_block, 0
            if span.rows_per_block:
                blocks, skipped = divmod(low - span.start, span.rows_per_block)
                first += blocks
            offset = at - start
            local.append(LocalSpan(low + offset, high + offset, first, span.rows_per_block, skipped, span.tag))
        at += end - start
    axis_size = local_shape[axis] if local_shape else 1
    return LocalView(math.prod(local_shape[:axis]), axis_size, math.prod(local_shape[axis + 1 :]), tuple(local))


def runs_of_range(view: LocalView, start: int, end: int) -> list[Run]:
    """Runs of the flat range ``[start, end)`` of a local tensor; offsets count from ``start``.

    The union of the runs is the range, each element once. Blocks keep the ids of the spans.
    """
    if not 0 <= start <= end <= view.numel:
        raise ValueError(f"range [{start}, {end}) is not inside a tensor of {view.numel} elements")
    if view.batch > 1:
        return _runs_of_batch(view, start, end)
    stripe = view.axis * view.inner
    runs: list[Run] = []
    at = start
    while at < end:
        low = at % stripe
        high = min(stripe, low + end - at)
        repeat = (end - at) // stripe if low == 0 and high == stripe else 1
        for run in _runs_of_stripe(view, low, high):
            block_stride = run.total if run.element_wise and repeat > 1 else 0
            runs.append(
                Run(
                    at - start + run.start,
                    run.count,
                    run.numel,
                    run.block,
                    run.tag,
                    run.element_wise,
                    repeat,
                    stripe if repeat > 1 else 0,
                    block_stride,
                )
            )
        at += repeat * stripe if repeat > 1 else high - low
    return runs


def _runs_of_batch(view: LocalView, start: int, end: int) -> list[Run]:
    """`runs_of_range`, matrix by matrix; runs that continue each other across a seam are one run."""
    one = replace(view, batch=1)
    runs: list[Run] = []
    for matrix in range(start // one.numel, -(-end // one.numel)) if end > start else ():
        offset = matrix * one.numel
        low, high = max(start, offset), min(end, offset + one.numel)
        for run in runs_of_range(one, low - offset, high - offset):
            block = run.block + (0 if run.element_wise else matrix * view.blocks_per_matrix)
            run = replace(run, start=run.start + low - start, block=block)
            last = runs[-1] if runs else None
            if last is not None and last.repeat == run.repeat == 1 and last.start + last.total == run.start:
                same = (last.numel, last.tag, last.element_wise) == (run.numel, run.tag, run.element_wise)
                if same and (run.element_wise or last.block + last.count == run.block):
                    runs[-1] = replace(last, count=last.count + run.count)
                    continue
            runs.append(run)
    return runs


def _runs_of_stripe(view: LocalView, low: int, high: int) -> Iterator[Run]:
    """Runs of the range ``[low, high)`` of one ``[axis, inner]`` stripe; offsets count from ``low``."""
    for span in view.spans:
        first, last = max(low, span.start * view.inner), min(high, span.end * view.inner)
        if first >= last:
            continue
        if span.rows_per_block == 0:
            yield Run(first - low, last - first, 1, 0, span.tag, element_wise=True)
            continue
        size = span.rows_per_block * view.inner
        at = first
        while at < last:
            block, inside = divmod(at + (span.skipped - span.start) * view.inner, size)
            whole = (last - at) // size
            if inside or not whole:
                numel = min(size - inside, last - at)
                yield Run(at - low, 1, numel, span.first_block + block, span.tag)
                at += numel
            else:
                yield Run(at - low, whole, size, span.first_block + block, span.tag)
                at += whole * size


def cut_blocks(view: LocalView, cuts: Sequence[int]) -> set[int]:
    """Ids of the blocks that have elements on both sides of one of the flat offsets ``cuts``.

    Windows between cuts are contiguous, so a block lies in one window if and only if its first and its last element do;
    only blocks around a cut have to be looked at.
    """
    found: set[int] = set()
    if view.batch > 1:
        one = replace(view, batch=1)
        for cut in {c for c in cuts if 0 < c < view.numel}:
            matrix, rest = divmod(cut, one.numel)
            found |= {block + matrix * view.blocks_per_matrix for block in cut_blocks(one, [rest])}
        return found
    inside = sorted({c for c in cuts if 0 < c < view.numel})
    if not inside:
        return found
    if view.outer > 1:
        return _cut_strided_blocks(view, inside)
    seen: dict[int, tuple[int, int]] = {}
    for span in view.spans:  # blocks made of several spans (one block for all of V in a fused weight)
        if span.rows_per_block and span.end - span.start + span.skipped <= span.rows_per_block:
            first, last = span.start * view.inner, span.end * view.inner
            old = seen.get(span.first_block, (first, last))
            seen[span.first_block] = (min(old[0], first), max(old[1], last))
    for block, (first, last) in seen.items():
        if any(first < cut < last for cut in inside):
            found.add(block)
    position = 0
    for cut in inside:
        row = cut // view.inner
        while view.spans[position].end <= row:
            position += 1
        span = view.spans[position]
        if span.rows_per_block:
            begin = (span.start - span.skipped) * view.inner
            block, rest = divmod(cut - begin, span.rows_per_block * view.inner)
            if rest and cut > span.start * view.inner:
                found.add(span.first_block + block)
    return found


def _cut_strided_blocks(view: LocalView, cuts: Sequence[int]) -> set[int]:
    """`cut_blocks` for blocks along an inner dimension: their elements recur in every stripe."""
    stripe = view.axis * view.inner
    found: set[int] = set()
    for span in view.spans:
        if not span.rows_per_block:
            continue
        row = span.start
        block = span.first_block
        while row < span.end:
            rows = min(span.rows_per_block - (span.skipped if row == span.start else 0), span.end - row)
            first = row * view.inner
            last = (view.outer - 1) * stripe + (row + rows) * view.inner
            if any(first < cut < last for cut in cuts):
                found.add(block)
            row, block = row + rows, block + 1
    return found


def blocks_in(view: LocalView) -> list[tuple[int, int]]:
    """Half-open ranges of block ids with elements in this local tensor, one per span; element-wise spans have none."""
    return [
        (
            span.first_block,
            span.first_block + -(-(span.skipped + span.end - span.start) // span.rows_per_block),
        )
        for span in view.spans
        if span.rows_per_block
    ]


def tensor_split_blocks(
    shape: tuple[int, ...],
    axis: int,
    spans: Sequence[AxisSpan],
    shard: TensorShard | None,
    batch: Batch | None = None,
) -> set[int]:
    """Ids of blocks with elements on more than one tensor-parallel rank; the same set on every rank."""
    if shard is None or len(shard.chunks) == 1:
        return set()
    if batch is not None:
        one = tensor_split_blocks(shape[1:], axis - 1, spans, shard.of_one_matrix())
        return {block + matrix * batch.blocks_per_matrix for matrix in range(batch.count) for block in one}
    if shard.dim != axis:
        return {block for start, end in blocks_in(local_view(shape, axis, spans)) for block in range(start, end)}
    held: dict[int, int] = {}
    found: set[int] = set()
    for rank in range(len(shard.chunks)):
        peer = TensorShard(shard.global_shape, shard.dim, rank, shard.chunks)
        # A block of one index cannot be cut by a split along its own axis, and a vocabulary has 10^5 of them; only a
        # span of one index may share its block with other spans.
        several = [span for span in spans if span.rows_per_block > 1 or span.end - span.start == 1]
        for start, end in blocks_in(local_view(shape, axis, several, peer)):
            for block in range(start, end):
                if held.setdefault(block, rank) != rank:
                    found.add(block)
    return found
