# SPDX-License-Identifier: Apache-2.0
"""Sums of split blocks over the ranks that hold them; the only communication of a step.

Only blocks with elements on several ranks travel: a ZeRO cut splits at most one block per parameter and cut, and
the rows of a row-parallel weight are split over the tensor-parallel group. One all-reduce per process group and step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ds_blockwise.blocks.segment_table import SegmentTable, Slots


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
