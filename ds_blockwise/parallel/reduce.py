# SPDX-License-Identifier: Apache-2.0
"""Sums of split blocks over the ranks that hold them; the only communication of a step.

Only blocks with elements on several ranks travel: a ZeRO cut splits at most one block per parameter and cut, and
the rows of a row-parallel weight are split over the tensor-parallel group. One all-reduce per process group and step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from weakref import ref

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
    _reduce_over(work, _DP_GROUP, _DP_SLOTS)
    _reduce_over(work, _TP_GROUP, _TP_SLOTS)


def _reduce_over(
    work: Sequence[tuple[torch.Tensor, SegmentTable, ReductionGroups]],
    group_of: Callable[[ReductionGroups], dist.ProcessGroup | None],
    slots_of: Callable[[Slots], torch.Tensor],
) -> None:
    batches: dict[tuple[dist.ProcessGroup, torch.device], list[tuple[torch.Tensor, SegmentTable, ReductionGroups]]] = {}
    for sums, table, groups in work:
        group = group_of(groups)
        if group is not None and slots_of(table.on(sums.device)).numel():
            batches.setdefault((group, sums.device), []).append((sums, table, groups))
    for (group, device), members in batches.items():
        index = _INDICES.of([table for _, table, _ in members], slots_of, device)
        parts = [sums for sums, _, _ in members]
        joined = torch.cat(parts)
        vector = joined[index].to(members[0][2].device or device)
        dist.all_reduce(vector, group=group)
        joined[index] = vector.to(device)
        torch._foreach_copy_(parts, list(torch.split(joined, [part.numel() for part in parts])))


class _Indices:
    """Where the slots of tables lie in their joined sums; made once for each set of tables that takes part in a step.

    It keeps no table alive; the sets that were used last stay, `REMEMBERED` of them.
    """

    REMEMBERED = 64

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], tuple[list[ref[SegmentTable]], torch.Tensor]] = {}

    def of(
        self, tables: Sequence[SegmentTable], slots_of: Callable[[Slots], torch.Tensor], device: torch.device
    ) -> torch.Tensor:
        """The index (int64) of the slots of all tables, one after the other, on a device."""
        key = (slots_of, device, *map(id, tables))
        made = self._made.pop(key, None)
        if made is None or any(seen() is not table for seen, table in zip(made[0], tables, strict=True)):
            starts = itertools.accumulate((table.num_slots for table in tables), initial=0)
            slots = [slots_of(table.on(device)) + start for table, start in zip(tables, starts, strict=False)]
            made = [ref(table) for table in tables], torch.cat(slots)
        self._made[key] = made  # the last one again
        if len(self._made) > self.REMEMBERED:
            del self._made[next(iter(self._made))]
        return made[1]


_INDICES = _Indices()


_DP_GROUP, _TP_GROUP = attrgetter("dp_group"), attrgetter("tp_group")
_DP_SLOTS, _TP_SLOTS = attrgetter("dp_slots"), attrgetter("tp_slots")
