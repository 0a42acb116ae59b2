# SPDX-License-Identifier: Apache-2.0
"""Parts of many things that lie on several ranks, brought to one owner each and back, packed into one exchange."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

_T = TypeVar("_T")
Group = dist.ProcessGroup


def gather_in(group: dist.ProcessGroup | None, value: _T) -> list[_T]:
    """Collective over a group: what every rank of it gave, in the order of ranks; None: this rank alone."""
    if group is None:
        return [value]
    gathered = [value] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def rank_in(group: dist.ProcessGroup | None) -> int:
    """This rank's place in a group; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def size_of(group: dist.ProcessGroup | None) -> int:
    """The number of ranks in a group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


class Loads:
    """Who does how much: gives each thing to the rank that has the least to do, alike on every rank that asks alike."""

    def __init__(self, ranks: int) -> None:
        self._loads = [0] * ranks

    def add(self, rank: int, cost: int) -> None:
        """A rank has this to do as well."""
        self._loads[rank] += cost

    def give(self, cost: int, among: Sequence[int] | None = None) -> int:
        """The rank (of some, or of all) that has the least to do, the first of several; it has this to do now."""
        rank = min(among or range(len(self._loads)), key=self._loads.__getitem__)
        self.add(rank, cost)
        return rank


@dataclass(frozen=True)
class Routes:
    """What travels between the ranks of a group, the same list of things on all of them.

    Attributes:
        group: the ranks; None: this one alone, and nothing travels.
        owners: per thing the rank that gets all its parts.
        sizes: per thing the elements of its part on each rank; 0 where a rank holds none.
        dtype: of all parts.
        device: of all parts.
        travels_on: device on which collectives run.
    """

    group: dist.ProcessGroup | None
    owners: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device
    travels_on: torch.device

    @property
    def owned(self) -> list[int]:
        """The things that this rank owns."""
        return self._owned_by(rank_in(self.group))

    def _owned_by(self, rank: int) -> list[int]:
        return [thing for thing, owner in enumerate(self.owners) if owner == rank]

    @property
    def _ranks(self) -> range:
        return range(size_of(self.group))

    def to_owners(self, parts: Mapping[int, torch.Tensor]) -> dict[int, list[torch.Tensor]]:
        """Collective over the group: bring all parts to the owners.

        Args:
            parts: this rank's part of each thing of which it holds one, 1-D.

        Returns:
            Per thing that this rank owns its parts by rank, those without elements included.
        """
        rank, owned = rank_in(self.group), self.owned
        sent = [[parts[thing] for thing in self._owned_by(to) if self.sizes[thing][rank]] for to in self._ranks]
        flat = self._exchanged(sent, [[self.sizes[thing][by] for thing in owned] for by in self._ranks])
        return {thing: [flat[by][place] for by in self._ranks] for place, thing in enumerate(owned)}

    def back(self, owned: Mapping[int, Sequence[torch.Tensor]]) -> dict[int, torch.Tensor]:
        """Collective over the group: bring parts back to where they came from.

        Args:
            owned: as `to_owners` returned them, with other values.

        Returns:
            This rank's part of each thing of which it holds one.
        """
        rank = rank_in(self.group)
        mine = [[thing for thing in self._owned_by(by) if self.sizes[thing][rank]] for by in self._ranks]
        sent = [[owned[thing][to] for thing in self.owned] for to in self._ranks]
        flat = self._exchanged(sent, [[self.sizes[thing][rank] for thing in things] for things in mine])
        pairs = (zip(things, parts, strict=True) for things, parts in zip(mine, flat, strict=True))
        return {thing: part for of_rank in pairs for thing, part in of_rank}

    def _exchanged(
        self, sent: Sequence[Sequence[torch.Tensor]], sizes: Sequence[Sequence[int]]
    ) -> list[tuple[torch.Tensor, ...]]:
        """One ``all_to_all_single``: what each rank sent, in parts of the sizes."""
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        packed = torch.cat([empty, *(part for parts in sent for part in parts)])
        if self.group is not None:
            away = [sum(part.numel() for part in parts) for parts in sent]
            coming = [sum(each) for each in sizes]
            arrived = torch.empty(sum(coming), dtype=self.dtype, device=self.travels_on)
            dist.all_to_all_single(arrived, packed.to(self.travels_on), coming, away, group=self.group)
            packed = arrived.to(self.device)
        parts: tuple[torch.Tensor, ...] = torch.split_with_sizes(packed, [size for each in sizes for size in each])
        ends = list(itertools.accumulate((len(each) for each in sizes), initial=0))
        return [parts[start:end] for start, end in itertools.pairwise(ends)]
