# SPDX-License-Identifier: Apache-2.0
"""The matrices of a step as one rank sees them, and what it knows of the other ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ds_blockwise.blocks.ranges import runs_of_range
from ds_blockwise.blocks.segment_table import Placement, SegmentTable
from ds_blockwise.kernels.base import wide_dtype
from ds_blockwise.kernels.bindings import Binding
from ds_blockwise.optimizers.muon.buckets import Form
from ds_blockwise.optimizers.muon.matrices import LocalMatrix, Matrix, Rectangle, local_matrix, matrices_of, of_rank
from ds_blockwise.parallel.owners import gather_in, rank_in, size_of

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Task:
    """One matrix of one stepped tensor, as this rank's tensor-parallel shard has it.

    Attributes:
        binding: number of the tensor in the plan.
        flat_start: where the parameter begins in it.
        matrix: the matrix.
        local: what this tensor-parallel rank holds of it.
        shards: what each tensor-parallel rank holds of it; one if it is not split.
        windows: int64, ``(data-parallel ranks, 2)``: start and end of what each holds of the flattened shard.
        slots: from rows of the local matrix, of which this rank holds elements, to their slots in the block vector.
        dtype: of the arithmetic.
    """

    binding: int
    flat_start: int
    matrix: Matrix
    local: LocalMatrix
    shards: tuple[LocalMatrix, ...]
    windows: torch.Tensor
    slots: Callable[[torch.Tensor], torch.Tensor]
    dtype: torch.dtype

    @functools.cached_property
    def held(self) -> torch.Tensor:
        """Per data-parallel rank the elements that it holds of ``local``; int64."""
        return held_of(self.local, self.windows)

    @functools.cached_property
    def holders(self) -> list[int]:
        """The data-parallel ranks with elements of ``local``."""
        return list(map(int, self.held.nonzero()))

    @functools.cached_property
    def is_split(self) -> bool:
        """Whether several tensor-parallel ranks hold elements of the matrix."""
        return sum(1 for shard in self.shards if shard.size) > 1

    def rectangles(self, rank: int) -> tuple[Rectangle, ...]:
        """What a data-parallel rank holds, from its window to the flattened local matrix."""
        start, end = map(int, self.windows[rank])
        return self.local.window(start, end)

    @property
    def form(self) -> Form:
        """Of the local matrix."""
        return Form(self.local.shape, self.local.row_dim)

    def bytes(self, numbers: int) -> int:
        """Of as many numbers of the arithmetic."""
        return numbers * self.dtype.itemsize


def tasks_of(bindings: Sequence[Binding]) -> list[Task]:
    """The matrices of all tensors; a collective over their groups.

    Args:
        bindings: the tensors of a step, in the order common to all ranks.

    Raises:
        ValueError: on every rank of a tensor-parallel group, if its ranks do not have the same place in their
            data-parallel groups.
    """
    _check_grid(bindings)
    windows, dtypes = _windows(bindings)
    each = zip(bindings, windows, dtypes, strict=True)
    return [task for number, given in enumerate(each) for task in _tasks_of(number, *given)]


def held_of(local: LocalMatrix, windows: torch.Tensor) -> torch.Tensor:
    """Per data-parallel rank the elements of a local matrix in its window; int64, see `Task.windows`."""
    before = local.held_before(windows)
    return before[:, 1] - before[:, 0]


def by(tasks: Iterable[_T], key: Callable[[_T], Hashable]) -> list[list[_T]]:
    """Sorted out by a key, in the order in which the keys come first."""
    found: dict[Hashable, list[_T]] = {}
    for task in tasks:
        found.setdefault(key(task), []).append(task)
    return list(found.values())


def _check_grid(bindings: Sequence[Binding]) -> None:
    """Refuse tensor-parallel ranks whose places in their data-parallel groups differ: parts would not meet."""
    seen: set[Hashable] = set()
    for groups in (binding.groups for binding in bindings):
        if groups.tp_group is None or (groups.dp_group, groups.tp_group) in seen:
            continue
        seen.add((groups.dp_group, groups.tp_group))
        places = gather_in(groups.tp_group, (rank_in(groups.dp_group), size_of(groups.dp_group)))
        if len(set(places)) > 1:
            raise ValueError(
                f"BlockwiseMuon needs tensor-parallel ranks with the same place in their data-parallel groups, but "
                f"theirs are {places} (place, size). Use BlockwiseAdamMini, or another order of parallel groups."
            )


def _windows(bindings: Sequence[Binding]) -> tuple[list[torch.Tensor], list[torch.dtype]]:
    """Per tensor what every data-parallel rank holds of each parameter, and the dtype of the arithmetic.

    The former: int64, ``(parameters, ranks, 2)``, start and end in the flattened shard. A rank that holds nothing of a
    tensor does not know its dtype.
    """
    found: list[torch.Tensor] = [torch.empty(0)] * len(bindings)
    dtypes = [wide_dtype(binding.tensor.dtype) for binding in bindings]
    for of_group in by(range(len(bindings)), lambda number: bindings[number].groups.dp_group):
        placements = [bindings[number].table.placements for number in of_group]
        mine = [bound for held in placements for p in held for bound in (p.param_start, p.param_start + p.numel)]
        widths = [dtypes[number].itemsize for number in of_group]
        everyone = gather_in(bindings[of_group[0]].groups.dp_group, (mine, widths))
        windows = torch.tensor([bounds for bounds, _ in everyone], dtype=torch.int64)
        windows = windows.view(len(everyone), -1, 2).transpose(0, 1)
        each = windows.split_with_sizes([len(held) for held in placements])
        for number, part, width in zip(of_group, each, map(max, *(w for _, w in everyone), widths), strict=True):
            found[number] = part
            dtypes[number] = torch.float64 if width == torch.float64.itemsize else torch.float32
    return found, dtypes


def _tasks_of(number: int, binding: Binding, windows: torch.Tensor, dtype: torch.dtype) -> Iterator[Task]:
    for placement, held in zip(binding.table.placements, windows, strict=True):
        matrices = matrices_of(placement.spec)
        if not matrices:
            continue
        slots = _slots_of(binding.table, placement)
        for matrix in matrices:
            yield _task(number, placement, matrix, held, slots, dtype)


def _task(
    number: int,
    placement: Placement,
    matrix: Matrix,
    windows: torch.Tensor,
    slots: Callable[[torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
) -> Task:
    spec, shard = placement.spec, placement.shard
    local = local_matrix(spec, shard, matrix)
    ranks = 1 if shard is None else len(shard.chunks)
    shards = [local] if ranks == 1 else [local_matrix(spec, of_rank(shard, rank), matrix) for rank in range(ranks)]

    def slots_of(rows: torch.Tensor) -> torch.Tensor:
        return slots(matrix.block_ids(spec)[local.rows_in_whole()[rows]])

    return Task(number, placement.flat_start, matrix, local, tuple(shards), windows, slots_of, dtype)


def _slots_of(table: SegmentTable, placement: Placement) -> Callable[[torch.Tensor], torch.Tensor]:
    """From the ids of a parameter's blocks, of which this rank holds elements, to their slots in the block vector."""
    start, end = placement.flat_start, placement.flat_start + placement.numel
    runs = runs_of_range(placement.view(), placement.param_start, placement.param_start + placement.numel)
    held = [run for run in table.runs if start <= run.start < end] if placement.numel else []
    pairs = [(r.block, h.block, r.count) for r, h in zip(runs, held, strict=True) if not r.element_wise]
    ids = torch.cat([torch.arange(first, first + count) for first, _, count in pairs] or [torch.empty(0)])
    values = torch.cat([torch.arange(slot, slot + count) for _, slot, count in pairs] or [torch.empty(0)])
    order = ids.argsort(stable=True)
    ids, values = ids[order], values[order]
    return lambda wanted: values[torch.searchsorted(ids, wanted)]
