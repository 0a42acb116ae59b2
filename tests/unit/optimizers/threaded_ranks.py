# SPDX-License-Identifier: Apache-2.0
"""Ranks that are threads of one process: the collectives that an optimizer's step uses, and what it allocates.

For many arrangements in seconds; that real process groups do the same is for the tests of the hosts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_blockwise.parallel import owners, reduce

T = TypeVar("T")
_TIMEOUT = 60.0


class ThreadedGroup:
    """A process group of threads; ``sent`` lists what each rank sent to others, in bytes, per exchange."""

    def __init__(self, ranks: ThreadedRanks, members: Sequence[int]) -> None:
        self.members = list(members)
        self.sent: dict[int, list[int]] = {rank: [] for rank in self.members}
        self._ranks = ranks
        self._given: list[Any] = [None] * len(self.members)
        self._barrier = threading.Barrier(len(self.members))
        ranks.barriers.append(self._barrier)

    @property
    def rank(self) -> int:
        """Of the calling thread."""
        return self.members.index(self._ranks.local.rank)

    def together(self, value: Any, use: Callable[[list[Any]], None]) -> None:
        """Give a value, and use those of all while nobody changes them."""
        self._given[self.rank] = value
        self._barrier.wait(_TIMEOUT)
        use(list(self._given))
        self._barrier.wait(_TIMEOUT)


class ThreadedRanks:
    """A world of threads."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size, self.local = size, threading.local()
        self.barriers: list[threading.Barrier] = []
        fake = SimpleNamespace(
            ProcessGroup=ThreadedGroup,
            get_rank=lambda group: group.rank,
            get_world_size=lambda group: len(group.members),
            all_gather_object=_all_gather_object,
            all_to_all_single=_all_to_all_single,
            all_reduce=_all_reduce,
        )
        for module in (owners, reduce):
            monkeypatch.setattr(module, "dist", fake)

    def group(self, members: Sequence[int]) -> Any:
        """A process group, the same object for all its ranks."""
        return ThreadedGroup(self, members)

    def run(self, work: Callable[[int], T]) -> list[T]:
        """What every rank returns; the first error of any."""
        results: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            self.local.rank = rank
            try:
                results[rank] = work(rank)
            except BaseException as error:
                if not isinstance(error, threading.BrokenBarrierError):
                    errors.append(error)
                for barrier in self.barriers:
                    barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in errors:
            raise error
        assert not any(barrier.broken for barrier in self.barriers), "a rank waited for others in vain"
        return results


def _all_gather_object(found: list[Any], value: Any, group: ThreadedGroup) -> None:
    def use(values: list[Any]) -> None:
        found[:] = values

    group.together(value, use)


def _all_reduce(tensor: torch.Tensor, group: ThreadedGroup) -> None:
    def use(values: list[torch.Tensor]) -> None:
        total.copy_(sum(values[1:], start=values[0]))

    total = torch.empty_like(tensor)
    group.together(tensor, use)
    tensor.copy_(total)


def _all_to_all_single(
    target: torch.Tensor, source: torch.Tensor, coming: list[int], away: list[int], group: ThreadedGroup
) -> None:
    mine = group.rank
    group.sent[group.members[mine]].append(
        sum(size for to, size in enumerate(away) if to != mine) * source.element_size()
    )

    def use(values: list[Any]) -> None:
        for place, part in zip(target.split(coming), values, strict=True):
            place.copy_(part[mine])

    group.together(source.split(away), use)


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside hold at a time, of this thread; ``peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: found for key, found in self._alive.items() if not found[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result
