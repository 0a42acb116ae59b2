# SPDX-License-Identifier: Apache-2.0
"""Parts of many things that lie on several ranks, brought to one owner each and back, many in one exchange."""

from __future__ import annotations

import functools
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

    What a rank sends is one vector, with the parts for the first owner first; what it gets as an owner is another one.
    Both stay where they are: parts that come back are written over those that were sent.

    Attributes:
        group: the ranks.
        owners: per thing the rank that gets all its parts.
        sizes: per thing the elements of this rank's part; 0 where it holds none.
        arriving: per thing that this rank owns the elements of its part on each rank.
        dtype: of all parts.
        device: of all parts.
        travels_on: device on which collectives run.
    """

    group: Group
    owners: tuple[int, ...]
    sizes: tuple[int, ...]
    arriving: Mapping[int, tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device
    travels_on: torch.device

    @functools.cached_property
    def _sent(self) -> list[int]:
        """The things of which this rank holds a part, in the order in which they travel."""
        held = (thing for thing, size in enumerate(self.sizes) if size)
        return sorted(held, key=self.owners.__getitem__)  # a stable order

    @functools.cached_property
    def _away(self) -> list[int]:
        """Per rank the elements that it gets."""
        found = [0] * size_of(self.group)
        for thing in self._sent:
            found[self.owners[thing]] += self.sizes[thing]
        return found

    @functools.cached_property
    def _coming(self) -> list[int]:
        """Per rank the elements that come from it."""
        return [sum(sizes) for sizes in zip(*self.arriving.values(), strict=True)] or [0] * size_of(self.group)

    @property
    def sent_bytes(self) -> int:
        """What leaves this rank, there and back."""
        mine = rank_in(self.group)
        numel = sum(self._away) - self._away[mine] + sum(self._coming) - self._coming[mine]
        return numel * self.dtype.itemsize

    def own_parts(self) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Memory for what this rank sends: the vector, and in it, as views, its part of each thing; not filled."""
        vector = torch.empty(sum(self._away), dtype=self.dtype, device=self.device)
        parts = torch.split_with_sizes(vector, [self.sizes[thing] for thing in self._sent])
        return vector, dict(zip(self._sent, parts, strict=True))

    def to_owners(self, sent: torch.Tensor) -> tuple[torch.Tensor, dict[int, dict[int, torch.Tensor]]]:
        """Collective over the group: bring all parts to the owners.

        Args:
            sent: the vector of `own_parts`, filled.

        Returns:
            The vector that arrived, and in it, as views, the parts of each thing that this rank owns, by rank.
        """
        arrived = torch.empty(sum(self._coming), dtype=self.dtype, device=self.device)
        self._exchange_(arrived, sent, self._coming, self._away)
        places = [(thing, by) for by in range(size_of(self.group)) for thing in self.arriving]
        parts = torch.split_with_sizes(arrived, [self.arriving[thing][by] for thing, by in places])
        found: dict[int, dict[int, torch.Tensor]] = {thing: {} for thing in self.arriving}
        for (thing, by), part in zip(places, parts, strict=True):
            if part.numel():
                found[thing][by] = part
        return arrived, found

    def back_(self, sent: torch.Tensor, arrived: torch.Tensor) -> None:
        """Collective over the group: bring parts back to where they came from.

        Args:
            sent: the vector of `own_parts`; what comes back is written over it.
            arrived: the vector of `to_owners`, with other values.
        """
        self._exchange_(sent, arrived, self._away, self._coming)

    def _exchange_(
        self, target: torch.Tensor, source: torch.Tensor, coming: Sequence[int], away: Sequence[int]
    ) -> None:
        if self.travels_on == self.device:
            dist.all_to_all_single(target, source, list(coming), list(away), group=self.group)
            return
        there = torch.empty_like(target, device=self.travels_on)
        dist.all_to_all_single(there, source.to(self.travels_on), list(coming), list(away), group=self.group)
        target.copy_(there)
