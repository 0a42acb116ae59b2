# SPDX-License-Identifier: Apache-2.0
"""Decisions that all ranks make together: errors, flags, and whether they agree about a digest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from ds_blockwise.parallel.reduce import ReductionGroups

_T = TypeVar("_T")


def if_many(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group if it has several ranks, else None: nothing has to be communicated."""
    return None if group is None or dist.get_world_size(group) == 1 else group


def raise_together(failure: Exception | None) -> None:
    """Collective over all ranks: raise this rank's failure, or a `ValueError` with the text of another rank's.

    A rank that failed alone would leave the others waiting in their next collective.

    Raises:
        Exception: ``failure`` itself.
        ValueError: another rank failed.
    """
    message = first_error(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if message is not None:
        raise ValueError(message)


def together(action: Callable[[], _T]) -> _T:
    """Collective over all ranks: run an action without collectives of its own, and raise on all if it fails on one.

    Raises:
        Exception: what the action raised.
        ValueError: it failed on another rank.
    """
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:  # all ranks hear of it and raise
        failure = error
    raise_together(failure)
    return result


def any_rank(flag: bool, groups: Sequence[ReductionGroups], device: torch.device) -> bool:
    """True if ``flag`` is true on any rank of any of the groups; all their ranks must call it."""
    value = torch.tensor([float(flag)], dtype=torch.float64, device=device)
    seen: list[dist.ProcessGroup] = []
    # twice, so that a flag raised in one group reaches the groups of its peers
    for _ in range(2):
        seen.clear()
        for group in (g for pair in groups for g in (pair.dp_group, pair.tp_group)):
            if group is not None and group not in seen:
                seen.append(group)
                dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return bool(value.item())


def any_peer(flag: torch.Tensor, groups: ReductionGroups) -> bool:
    """True if ``flag`` is true on any rank of the tensor-parallel and data-parallel groups, which form a grid.

    Collective over both groups, each of which sends one message. Waits for the device, once.

    Args:
        flag: of no dimension, on any device.
        groups: of one stepped tensor, or of all.
    """
    value = flag.to(device=groups.device, dtype=torch.float32)
    for group in (groups.dp_group, groups.tp_group):
        if group is not None:
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return bool(value.item())


def any_rank_of_all(flag: bool, device: torch.device) -> bool:
    """Collective over all ranks: True if ``flag`` is true on any."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    value = torch.tensor([float(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def is_first_rank() -> bool:
    """Whether this process is rank 0, or alone: the one that speaks for all."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def first_error(error: str | None) -> str | None:
    """Collective over all ranks: the error of the lowest rank that has one, with its rank; None if none has."""
    if not (dist.is_available() and dist.is_initialized()):
        return error
    for rank, text in enumerate(gather(error)):
        if text is not None:
            return text if error == text else f"rank {rank}: {text}"
    return None


def gather(value: _T) -> list[_T]:
    """Collective over all ranks: what every rank gave, in the order of ranks; a process alone is the only rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    gathered = [value] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This rank's place in a group (None: all ranks) and the group's size; (0, 1) for a process alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def disagreement(digest: str, group: dist.ProcessGroup | None) -> list[int]:
    """Collective over ``group``: the group ranks whose digest differs from rank 0's; empty if all agree."""
    if group is None:
        return []
    digests: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(digests, digest, group=group)
    return [rank for rank, other in enumerate(digests) if other != digests[0]]
