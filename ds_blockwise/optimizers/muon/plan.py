# SPDX-License-Identifier: Apache-2.0
"""Who orthogonalises which matrix, and when: made once from the segment tables.

A matrix that lies whole on a rank is done there. Any other gets an owner, to which its parts travel. Parts that
data-parallel ranks hold come together first, then the shards of tensor-parallel ranks, over the groups that a host has
anyway. Owners are balanced by the cost of their matrices, the largest first. In that order matrices are cut into
buckets, so that in each of them all owners have about as much to do.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from ds_blockwise.blocks.segment_table import same_windows
from ds_blockwise.kernels.bindings import Binding
from ds_blockwise.optimizers.muon.buckets import Bucket, Form, Plan, Share, Trip, cut_at, in_order
from ds_blockwise.optimizers.muon.elements import Held
from ds_blockwise.optimizers.muon.matrices import Rectangle
from ds_blockwise.optimizers.muon.tasks import Task, by, held_of, tasks_of
from ds_blockwise.parallel.owners import Group, Loads, Routes, rank_in, size_of

_T = TypeVar("_T")


def make_plan(bindings: Sequence[Binding], bucket_bytes: int) -> Plan:
    """Find an owner for every matrix; a collective over the groups of the tensors.

    Args:
        bindings: the tensors of a step, in the order common to all ranks.
        bucket_bytes: of matrices that a rank gets at a time, if it is more than one.

    Raises:
        ValueError: on every rank of a tensor-parallel group, if its ranks do not have the same place in their
            data-parallel groups.
    """
    return _Planner(bindings, bucket_bytes).plan()


class _Planner:
    """The tasks of a step, sorted by what has to travel for them."""

    def __init__(self, bindings: Sequence[Binding], bucket_bytes: int) -> None:
        self.bindings, self.bucket_bytes = tuple(bindings), bucket_bytes
        self.groups = [binding.groups for binding in bindings]
        self.mine = [rank_in(groups.dp_group) for groups in self.groups]
        self.tasks = tasks_of(bindings)
        self.split_owners = self._owners_of_split()

    def plan(self) -> Plan:
        alone = [task for task in self.tasks if not task.is_split and task.holders == [self.mine[task.binding]]]
        here = tuple((task.form, self._held_whole(task)) for task in alone)
        buckets = [*self._split_over_tp(), *self._split_over_dp()]
        if here:
            buckets[:1] = [replace(buckets[0] if buckets else Bucket(), here=here)]
        return Plan(self.bindings, tuple(buckets))

    # ------------------------------------------------------------- what shards of tensor-parallel ranks make up

    def _owners_of_split(self) -> dict[Task, tuple[int, int]]:
        """Per matrix that tensor parallelism splits, the data- and the tensor-parallel rank that own it.

        Decided from what all ranks of both groups know: the windows of other tensor-parallel ranks are those of this
        one only where all splits are even.
        """
        loads: dict[Hashable, Loads] = {}
        found: dict[Task, tuple[int, int]] = {}
        for task in _largest_first(task for task in self.tasks if task.is_split):
            groups, binding = self.groups[task.binding], self.bindings[task.binding]
            ranks, shards = len(task.windows), len(task.shards)
            grid = loads.setdefault((groups.dp_group, groups.tp_group), Loads(ranks * shards))
            among = None
            if same_windows(binding.table.placements):
                held = sum(held_of(shard, task.windows) for shard in task.shards if shard.size)
                assert isinstance(held, torch.Tensor)
                if len(only := held.nonzero()) == 1:
                    among = range(int(only) * shards, (int(only) + 1) * shards)
            found[task] = divmod(grid.give(task.matrix.cost, among), shards)
        return found

    def _split_over_tp(self) -> Iterator[Bucket]:
        """Their buckets are those of all ranks of both groups."""
        for members in by(self.split_owners, self._groups_of):
            for bucket in _runs_of(members, cut_at(map(self._load_of_split, members), self.bucket_bytes)):
                owners = [self.split_owners[task] for task in bucket]
                mine = self.mine[bucket[0].binding]
                apart = {
                    task: dp for task, (dp, _) in zip(bucket, owners, strict=True) if task.holders not in ([], [dp])
                }
                over_dp = self._over_dp(apart)
                ours = {task: tp for task, (dp, tp) in zip(bucket, owners, strict=True) if dp == mine}
                yield Bucket(over_dp, self._over_tp(ours, list(apart)))

    def _groups_of(self, task: Task) -> Hashable:
        groups = self.groups[task.binding]
        return groups.dp_group, groups.tp_group, task.dtype

    def _load_of_split(self, task: Task) -> torch.Tensor:
        """What each rank gets: the shards of its tensor-parallel place, and the matrix, if it is its owner."""
        dp, tp = self.split_owners[task]
        load = torch.zeros(len(task.windows), len(task.shards), dtype=torch.int64)
        load[dp] = torch.tensor([task.bytes(shard.size) for shard in task.shards])
        load[dp, tp] += task.bytes(task.matrix.size)
        return load

    def _over_tp(self, owners: Mapping[Task, int], before: Sequence[Task]) -> Trip | None:
        if not owners:
            return None
        tasks = list(owners)
        group = self.groups[tasks[0].binding].tp_group
        assert group is not None, "only tensor parallelism splits a shard"
        owned = [thing for thing, owner in enumerate(owners.values()) if owner == rank_in(group)]
        routes = self._routes(
            group,
            list(owners.values()),
            [task.local.size for task in tasks],
            {thing: tuple(shard.size for shard in tasks[thing].shards) for thing in owned},
            tasks[0],
        )
        held, passed_on = {}, {}
        for thing, task in enumerate(tasks):
            if task in before:
                passed_on[thing] = before.index(task)
            elif task.local.size:
                held[thing] = self._held_whole(task)
        return Trip(
            routes,
            held,
            passed_on,
            {thing: _form_of(tasks[thing]) for thing in owned},
            {thing: _shares_of_shards(tasks[thing], routes.device) for thing in owned},
            tuple(owned),
        )

    # --------------------------------------------------------------- what parts of data-parallel ranks make up

    def _split_over_dp(self) -> Iterator[Bucket]:
        apart = _largest_first(task for task in self.tasks if not task.is_split and len(task.holders) > 1)
        for members in by(apart, lambda task: (self.groups[task.binding].dp_group, task.dtype)):
            owners = self._owners_over_dp(members)
            loads = (_load(task, owner) for task, owner in owners.items())
            for bucket in _runs_of(members, cut_at(loads, self.bucket_bytes)):
                yield Bucket(self._over_dp({task: owners[task] for task in bucket}))

    def _owners_over_dp(self, members: Sequence[Task]) -> dict[Task, int]:
        """Per task the data-parallel rank that owns it."""
        group = self.groups[members[0].binding].dp_group
        loads = Loads(len(members[0].windows))
        for task in self.tasks:
            if self.groups[task.binding].dp_group is group:
                if task.is_split:
                    loads.add(self.split_owners[task][0], task.matrix.cost // len(task.shards))
                elif len(task.holders) == 1:
                    loads.add(task.holders[0], task.matrix.cost)
        return {task: loads.give(task.matrix.cost) for task in members}

    def _over_dp(self, owners: Mapping[Task, int]) -> Trip | None:
        if not owners:
            return None
        tasks = list(owners)
        group, mine = self.groups[tasks[0].binding].dp_group, self.mine[tasks[0].binding]
        assert group is not None, "only data parallelism cuts a shard"
        held = {}
        for thing, task in enumerate(tasks):
            if rectangles := task.rectangles(mine):
                held[thing] = self._held(task, in_order(rectangles)[0], task.local.rows_of(rectangles))
        device = self.bindings[tasks[0].binding].tensor.device
        shares = {
            thing: {rank: _share(tasks[thing], rank, device) for rank in tasks[thing].holders}
            for thing, owner in enumerate(owners.values())
            if owner == mine
        }
        routes = self._routes(
            group,
            list(owners.values()),
            [held[thing].size if thing in held else 0 for thing in range(len(tasks))],
            {
                thing: tuple(of[rank].size if rank in of else 0 for rank in range(size_of(group)))
                for thing, of in shares.items()
            },
            tasks[0],
        )
        forms = {thing: tasks[thing].form for thing in shares}
        return Trip(routes, held, {}, forms, shares, tuple(t for t in shares if not tasks[t].is_split))

    # ---------------------------------------------------------------------------------------------- of both

    def _held_whole(self, task: Task) -> Held:
        """Of a local matrix of which this rank holds all elements, in the form of one."""
        rows = torch.arange(task.local.shape[task.local.row_dim])
        return self._held(task, task.rectangles(self.mine[task.binding]), rows)

    def _held(self, task: Task, rectangles: Sequence[Rectangle], rows: torch.Tensor) -> Held:
        """Of rectangles from this rank's window to a vector, and the rows of the local matrix that follow them."""
        return Held(
            task.binding,
            tuple(replace(r, start=r.start + task.flat_start) for r in rectangles),
            task.slots(rows).to(self.bindings[task.binding].tensor.device),
            task.matrix.updates,
        )

    def _routes(
        self,
        group: Group,
        owners: Sequence[int],
        sizes: Sequence[int],
        arriving: Mapping[int, tuple[int, ...]],
        task: Task,
    ) -> Routes:
        device = self.bindings[task.binding].tensor.device
        travels_on = self.groups[task.binding].device or device
        return Routes(group, tuple(owners), tuple(sizes), arriving, task.dtype, device, travels_on)


def _form_of(task: Task) -> Form:
    """The unsharded matrix as it is stored."""
    sizes, row_dim = (task.matrix.rows, task.matrix.columns), task.local.row_dim
    return Form(sizes if row_dim == 0 else (sizes[1], sizes[0]), row_dim)


def _shares_of_shards(task: Task, device: torch.device) -> dict[int, Share]:
    return {
        rank: Share(shard.in_whole(), shard.rows_in_whole().to(device))
        for rank, shard in enumerate(task.shards)
        if shard.size
    }


def _share(task: Task, rank: int, device: torch.device) -> Share:
    rectangles = task.rectangles(rank)
    return Share(in_order(rectangles)[1], task.local.rows_of(rectangles).to(device))


def _load(task: Task, owner: int) -> torch.Tensor:
    """What each data-parallel rank sends, and what it gets."""
    load = torch.stack([task.held, torch.zeros_like(task.held)])
    load[1, owner] = task.matrix.size
    return load * task.dtype.itemsize


def _runs_of(members: Sequence[_T], lengths: Sequence[int]) -> Iterator[list[_T]]:
    at = 0
    for length in lengths:
        yield list(members[at : at + length])
        at += length


def _largest_first(tasks: Iterable[Task]) -> list[Task]:
    return sorted(tasks, key=lambda task: -task.matrix.cost)  # a stable order
