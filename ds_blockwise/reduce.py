# SPDX-License-Identifier: Apache-2.0
"""Sums of split blocks over the ranks that hold them; the only communication of a step.

Only blocks with elements on several ranks travel: a ZeRO cut splits at most one block per parameter and cut, and
the rows of a row-parallel weight are split over the tensor-parallel group. One all-reduce per process group and step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ds_blockwise.table import SegmentTable, Slots


@dataclass(frozen=True)
class ReductionGroups:
    """Process groups of one stepped tensor.

    Attributes:
        dp_group: ranks that share the tensor through ZeRO; None if each holds it whole.
        tp_group: tensor-parallel ranks; None without tensor parallelism.
        device: device on which collectives run; None means the device of the gradient. With CPU offload the gradient is
            on the CPU while the process group only knows the accelerator.
    """

    dp_group: dist.ProcessGroup | None = None
    tp_group: dist.ProcessGroup | None = None
    device: torch.device | None = None


LOCAL = ReductionGroups()


def reduce_block_sums_(
    work: Sequence[tuple[torch.Tensor, SegmentTable, ReductionGroups]],
) -> None:
    """Complete the sums of split blocks, in place.

    Every rank of a group must call this with the same tensors in the same order; what each contributes may be zero.

    Args:
        work: per stepped tensor its block sums (fp64, shape ``(num_slots,)``), its table and its process groups.
    """
    _reduce_over(work, lambda groups: groups.dp_group, lambda slots: slots.dp_slots)
    _reduce_over(work, lambda groups: groups.tp_group, lambda slots: slots.tp_slots)


def _reduce_over(
    work: Sequence[tuple[torch.Tensor, SegmentTable, ReductionGroups]],
    group_of: Callable[[ReductionGroups], dist.ProcessGroup | None],
    slots_of: Callable[[Slots], torch.Tensor],
) -> None:
    batches: dict[dist.ProcessGroup, list[tuple[torch.Tensor, torch.Tensor, ReductionGroups]]] = {}
    for sums, table, groups in work:
        group, slots = group_of(groups), slots_of(table.on(sums.device))
        if group is not None and slots.numel():
            batches.setdefault(group, []).append((sums, slots, groups))
    for group, members in batches.items():
        device = members[0][2].device or members[0][0].device
        vector = torch.cat([sums[slots].to(device) for sums, slots, _ in members])
        dist.all_reduce(vector, group=group)
        at = 0
        for sums, slots, _ in members:
            sums[slots] = vector[at : at + slots.numel()].to(sums.device)
            at += slots.numel()


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


def gather(value: Any) -> list[Any]:
    """Collective over all ranks: what every rank gave, in the order of ranks; a process alone is the only rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
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
