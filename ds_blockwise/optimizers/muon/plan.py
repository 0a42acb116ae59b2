# SPDX-License-Identifier: Apache-2.0
"""Who orthogonalises which matrix: made once from the segment tables.

A matrix that lies whole on a rank is done there. Any other gets an owner, to which its parts travel. Parts that
data-parallel ranks hold come together first, then the shards of tensor-parallel ranks, over the groups that a host has
anyway. Owners are balanced by the cost of their matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ds_blockwise.blocks.ranges import runs_of_range
from ds_blockwise.blocks.segment_table import Placement, SegmentTable, build_table, same_windows
from ds_blockwise.kernels.base import wide_dtype
from ds_blockwise.kernels.bindings import Binding
from ds_blockwise.optimizers.muon.matrices import LocalMatrix, Matrix, Rectangle, local_matrix, matrices_of, of_rank
from ds_blockwise.parallel.owners import Group, Loads, Routes, gather_in, rank_in, size_of

Window = tuple[int, int]
"""Start and end of what a data-parallel rank holds of a flattened shard."""


@dataclass(frozen=True)
class Part:
    """What one data-parallel rank holds of a local matrix.

    Attributes:
        rectangles: its elements, from the window to the local matrix.
        rows: the rows that it touches, counted in the local matrix.
    """

    rectangles: tuple[Rectangle, ...]
    rows: torch.Tensor

    @property
    def size(self) -> int:
        """Numbers that travel: the elements, and a second moment for each row."""
        return sum(r.numel for r in self.rectangles) + self.rows.numel()


@dataclass(frozen=True, eq=False)
class Task:
    """One matrix of one stepped tensor, as this rank's tensor-parallel shard has it.

    Attributes:
        binding: number of the tensor in the plan.
        flat_start: where the parameter begins in it.
        matrix: the matrix.
        local: what this tensor-parallel rank holds of it.
        shards: what each tensor-parallel rank holds of it; one if it is not split.
        windows: per data-parallel rank what it holds of the flattened shard.
        parts: what each data-parallel rank holds of ``local``; None for nothing.
        mine: which of them is this rank's.
        slots: of the rows of this rank's part in the tensor's block vector.
        dtype: of the arithmetic.
    """

    binding: int
    flat_start: int
    matrix: Matrix
    local: LocalMatrix
    shards: tuple[LocalMatrix, ...]
    windows: tuple[Window, ...]
    parts: tuple[Part | None, ...]
    mine: int
    slots: torch.Tensor
    dtype: torch.dtype

    @property
    def holders(self) -> list[int]:
        """The data-parallel ranks with elements of ``local``."""
        return [rank for rank, part in enumerate(self.parts) if part is not None]

    @property
    def is_split(self) -> bool:
        """Whether several tensor-parallel ranks hold elements of the matrix."""
        return sum(1 for shard in self.shards if shard.size) > 1


@dataclass(frozen=True)
class Plan:
    """What this rank does in a step.

    Attributes:
        bindings: the stepped tensors, in the order common to all ranks.
        tables: of each its elements that are orthogonalised.
        whole: tasks done here without an exchange.
        over_dp: exchanges that bring local matrices together, with their tasks.
        over_tp: exchanges that bring whole matrices together, with their tasks: those whose local matrix is put
            together on this data-parallel rank.
    """

    bindings: tuple[Binding, ...]
    tables: tuple[SegmentTable, ...]
    whole: tuple[Task, ...]
    over_dp: tuple[tuple[Routes, tuple[Task, ...]], ...]
    over_tp: tuple[tuple[Routes, tuple[Task, ...]], ...]


def is_shared(binding: Binding) -> bool:
    """Whether other ranks may wait for this one's part in the exchange of a tensor."""
    several = binding.groups.dp_group is not None or binding.groups.tp_group is not None
    return several and any(matrices_of(p.spec) for p in binding.table.placements)


def make_plan(bindings: Sequence[Binding]) -> Plan:
    """Find an owner for every matrix; a collective over the groups of the tensors.

    Args:
        bindings: the tensors of a step, in the order common to all ranks.

    Raises:
        ValueError: on every rank of a tensor-parallel group, if its ranks do not have the same place in their
            data-parallel groups.
    """
    return _Planner(bindings).plan()


class _Planner:
    """The tasks of a step, sorted by what has to travel for them."""

    def __init__(self, bindings: Sequence[Binding]) -> None:
        self.bindings = tuple(bindings)
        self.groups = [binding.groups for binding in bindings]
        _check_grid(bindings)
        windows = _windows(bindings)
        self.tasks = [
            task for number, binding in enumerate(bindings) for task in _tasks_of(number, binding, windows[number])
        ]
        self.split_owners = self._owners_of_split()

    def plan(self) -> Plan:
        whole = [task for task in self.tasks if not task.is_split and task.holders == [task.mine]]
        apart = [task for task in self.tasks if self._travels_over_dp(task)]
        split = [task for task in self.tasks if task.is_split and self.split_owners[task][0] == task.mine]
        over_dp = []
        for members in _by(apart, lambda task: self.groups[task.binding].dp_group):
            owners = self._owners_over_dp(members)
            sizes = [tuple(0 if part is None else part.size for part in task.parts) for task in members]
            group = self.groups[members[0].binding].dp_group
            over_dp.append((self._routes(group, members, owners, sizes), tuple(members)))
        over_tp = []
        for members in _by(split, lambda task: self.groups[task.binding].tp_group):
            owners = [self.split_owners[task][1] for task in members]
            sizes = [tuple(shard.size for shard in task.shards) for task in members]
            group = self.groups[members[0].binding].tp_group
            over_tp.append((self._routes(group, members, owners, sizes), tuple(members)))
        tables = [
            build_table(b.table.numel, b.table.placements, shares_second_moment=True, orthogonalized=True)
            for b in self.bindings
        ]
        return Plan(self.bindings, tuple(tables), tuple(whole), tuple(over_dp), tuple(over_tp))

    def _travels_over_dp(self, task: Task) -> bool:
        if task.is_split:
            return bool(task.holders) and task.holders != [self.split_owners[task][0]]
        return len(task.holders) > 1

    def _owners_of_split(self) -> dict[Task, tuple[int, int]]:
        """Per matrix that tensor parallelism splits, the data- and the tensor-parallel rank that own it.

        Decided from what all ranks of both groups know: the windows of other tensor-parallel ranks are those of this
        one only where all splits are even.
        """
        loads: dict[Hashable, Loads] = {}
        found: dict[Task, tuple[int, int]] = {}
        for task in _largest_first(task for task in self.tasks if task.is_split):
            groups, binding = self.groups[task.binding], self.bindings[task.binding]
            ranks, shards = len(task.parts), len(task.shards)
            grid = loads.setdefault((groups.dp_group, groups.tp_group), Loads(ranks * shards))
            held = set(task.holders) if same_windows(binding.table.placements) else set()
            for shard in task.shards if held else ():
                held |= {rank for rank, window in enumerate(task.windows) if shard.window(*window)}
            among = range(ranks * shards)
            if len(held) == 1:
                (only,) = held
                among = range(only * shards, (only + 1) * shards)
            found[task] = divmod(grid.give(task.matrix.cost, among), shards)
        return found

    def _owners_over_dp(self, members: Sequence[Task]) -> list[int]:
        """Per task the data-parallel rank that owns it."""
        group = self.groups[members[0].binding].dp_group
        loads = Loads(len(members[0].parts))
        for task in self.tasks:
            if self.groups[task.binding].dp_group is group:
                if task.is_split:
                    loads.add(self.split_owners[task][0], task.matrix.cost // len(task.shards))
                elif len(task.holders) == 1:
                    loads.add(task.holders[0], task.matrix.cost)
        owners = {task: self.split_owners[task][0] for task in members if task.is_split}
        for task in _largest_first(task for task in members if not task.is_split):
            owners[task] = loads.give(task.matrix.cost)
        return [owners[task] for task in members]

    def _routes(
        self, group: Group | None, members: Sequence[Task], owners: Sequence[int], sizes: Sequence[tuple[int, ...]]
    ) -> Routes:
        groups = self.groups[members[0].binding]
        device = self.bindings[members[0].binding].tensor.device
        dtype = functools.reduce(torch.promote_types, (task.dtype for task in members))
        return Routes(group, tuple(owners), tuple(sizes), dtype, device, groups.device or device)


def _by(tasks: Iterable[Task], key: Callable[[Task], Hashable]) -> list[list[Task]]:
    found: dict[Hashable, list[Task]] = {}
    for task in tasks:
        found.setdefault(key(task), []).append(task)
    return list(found.values())


def _largest_first(tasks: Iterable[Task]) -> list[Task]:
    return sorted(tasks, key=lambda task: -task.matrix.cost)  # a stable order


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


def _windows(bindings: Sequence[Binding]) -> list[list[list[Window]]]:
    """Per tensor, per data-parallel rank, per parameter what that rank holds of the flattened shard."""
    numbers: dict[Hashable, list[int]] = {}
    for number, binding in enumerate(bindings):
        numbers.setdefault(binding.groups.dp_group, []).append(number)
    found: dict[int, list[list[Window]]] = {}
    for of_group in numbers.values():
        mine = [[(p.param_start, p.param_start + p.numel) for p in bindings[n].table.placements] for n in of_group]
        everyone = gather_in(bindings[of_group[0]].groups.dp_group, mine)
        for place, number in enumerate(of_group):
            found[number] = [held[place] for held in everyone]
    return [found[number] for number in range(len(bindings))]


def _tasks_of(number: int, binding: Binding, windows: Sequence[Sequence[Window]]) -> Iterator[Task]:
    mine = rank_in(binding.groups.dp_group)
    for place, placement in enumerate(binding.table.placements):
        matrices = matrices_of(placement.spec)
        slots = _slots_of(binding.table, placement) if matrices else None
        held = [of_rank[place] for of_rank in windows]
        for matrix in matrices:
            yield _task(number, placement, matrix, held, mine, slots, wide_dtype(binding.tensor.dtype))


def _task(
    number: int,
    placement: Placement,
    matrix: Matrix,
    windows: Sequence[Window],
    mine: int,
    slots: Callable[[torch.Tensor], torch.Tensor] | None,
    dtype: torch.dtype,
) -> Task:
    spec, shard = placement.spec, placement.shard
    local = local_matrix(spec, shard, matrix)
    ranks = 1 if shard is None else len(shard.chunks)
    shards = [local] if ranks == 1 else [local_matrix(spec, of_rank(shard, rank), matrix) for rank in range(ranks)]
    parts = [_part(local, window) for window in windows]
    own = parts[mine]
    rows = torch.empty(0, dtype=torch.int64)
    if own is not None and slots is not None:
        rows = slots(matrix.block_ids(spec)[local.rows_in_whole()[own.rows]])
    return Task(
        number, placement.flat_start, matrix, local, tuple(shards), tuple(windows), tuple(parts), mine, rows, dtype
    )


def _part(local: LocalMatrix, window: Window) -> Part | None:
    rectangles = local.window(*window)
    return Part(rectangles, local.rows_of(rectangles)) if rectangles else None


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
