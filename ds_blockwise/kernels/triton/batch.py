# SPDX-License-Identifier: Apache-2.0
"""What one launch for many tensors reads beside the tensors: joined plans, addresses and settings on the device.

Tables of jobs are joined once per set of tensors. Addresses and settings are sent only when they changed. The module
`ds_blockwise.kernels.triton.tables` names the columns of all tables. Knows torch, not Triton.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary, ref

import torch

from ds_blockwise.kernels.base import Item, packed_scale
from ds_blockwise.kernels.triton.plan import Sums, TritonPlan
from ds_blockwise.kernels.triton.tables import (
    ALIGNMENT,
    TILE_INDEX_BITS,
    VECTOR,
    Address,
    Finish,
    Job,
    Kind,
    Scalar,
    Setting,
)


@dataclass(frozen=True)
class Program:
    """Jobs of several tensors that one launch does; all of one form, for which it is compiled.

    Attributes:
        jobs: int64, shape ``(jobs, len(Job))``, on the device.
        tiles: int64, shape ``(programs,)``, on the device: job in the upper half, index in it in the lower half.
        kind: of its jobs.
        shift: of rows and of the update's rectangles: a tile is ``2^shift`` elements wide; else 0.
        even: whether all rows begin and end at multiples of `VECTOR` elements.
    """

    jobs: torch.Tensor
    tiles: torch.Tensor
    kind: int
    shift: int
    even: bool


def _number(tensors: Sequence[torch.Tensor], column: int, steps: Sequence[int] | None = None) -> list[torch.Tensor]:
    """Copies with ``column`` increased by the tensor's position, or by the sum of ``steps`` before it."""
    offsets = range(len(tensors)) if steps is None else list(itertools.accumulate(steps, initial=0))
    moved = []
    for tensor, offset in zip(tensors, offsets, strict=False):
        copy = tensor.clone()
        copy[:, column] += offset
        moved.append(copy)
    return moved


def join_jobs(
    jobs: Sequence[torch.Tensor],
    tiles: Sequence[torch.Tensor],
    rows: Sequence[int],
    entries: Sequence[int] | None,
    device: torch.device,
) -> tuple[Program, ...]:
    """The jobs of several tensors, a program for each form that they have.

    Args:
        jobs: of each tensor.
        tiles: numbers of tiles of each tensor's jobs.
        rows: distinct settings that each tensor has.
        entries: partial sums that each tensor has; None if the jobs are the update's.
        device: where the kernels read them.
    """
    found = _number(_number(jobs, Job.ITEM), Job.ROW, rows)
    if entries is not None:
        found = _number(found, Job.ENTRY, entries)
    table, counts = torch.cat(found), torch.cat(list(tiles))
    forms, form_of = torch.unique(_forms(table, of_sums=entries is not None), dim=0, return_inverse=True)
    programs = []
    for number, (kind, shift, even) in enumerate(forms.tolist()):
        mine = form_of == number
        tiles_of = _tiles(counts[mine])
        programs.append(Program(table[mine].to(device), tiles_of.to(device), kind, shift, bool(even)))
    return tuple(programs)


def _forms(table: torch.Tensor, *, of_sums: bool) -> torch.Tensor:
    """Kind, shift and evenness of each job, int64."""
    kind, numel, strides = table[:, Job.KIND], table[:, Job.NUMEL], table[:, Job.REPEAT_STRIDE]
    repeats = table[:, Job.REPEAT] > 1
    # blocks that share a row, or have an element each, end where the row ends; others end every `NUMEL` elements
    fills = repeats if of_sums else repeats | (kind == Kind.ELEMENTS)
    lengths = torch.where(fills, table[:, Job.COUNT] * numel, numel)
    even = (table[:, Job.START] | lengths | torch.where(repeats, strides, 0)) % VECTOR == 0
    return torch.stack([kind, table[:, Job.SHIFT], even.to(torch.int64)], 1)


def _tiles(counts: torch.Tensor) -> torch.Tensor:
    number = torch.repeat_interleave(torch.arange(len(counts)), counts)
    index = torch.arange(len(number)) - (counts.cumsum(0) - counts)[number]
    return (number << TILE_INDEX_BITS) | index


@dataclass(frozen=True)
class SumProgram:
    """Sums of several tensors, on the device.

    Attributes:
        programs: the jobs that write entries.
        entries: fp64, shape ``(entries,)``: partial sums.
        order: int64, shape ``(entries,)``: see `Sums`.
        finish: int64, shape ``(blocks, len(Finish))``: the blocks whose sums are put together.
    """

    programs: tuple[Program, ...]
    entries: torch.Tensor
    order: torch.Tensor
    finish: torch.Tensor


def join_sums(sums: Sequence[Sums], rows: Sequence[int], device: torch.device) -> SumProgram:
    """The sums of several tensors."""
    counts = [s.num_entries for s in sums]
    programs = join_jobs([s.jobs for s in sums], [s.tiles for s in sums], rows, counts, device)
    offsets = itertools.accumulate(counts, initial=0)
    order = torch.cat([s.order + offset for s, offset in zip(sums, offsets, strict=False)])
    blocks = _number(_number([s.finish for s in sums], Finish.ITEM), Finish.FIRST, counts)
    finish = torch.cat(_number(blocks, Finish.ROW, rows))
    entries = torch.empty(len(order), dtype=torch.float64, device=device)
    return SumProgram(programs, entries, order.to(device), finish.to(device))


@dataclass
class Group:
    """Tensors of one call that one launch can serve.

    Attributes:
        items: the tensors.
        device: where all of them lie.
        dtypes: of parameter, gradient, both moments and 16-bit copy, the first columns of `Address`; None if absent.
        alignments: what divides the address of each of these, in bytes, up to `ALIGNMENT`.
        shares: whether second moments are one per block.
        cautious: whether weight decay is.
        scaled: whether gradients are multiplied by a factor where they are read.
        addresses: the table of `Address`, row after row.
        settings: the table of `Setting`, row after row.
    """

    items: list[Item]
    device: torch.device
    dtypes: tuple[torch.dtype | None, ...]
    alignments: tuple[int, ...]
    shares: bool
    cautious: bool
    scaled: bool
    addresses: list[int]
    settings: list[float]

    @property
    def by_sign(self) -> bool:
        """Whether parameters move by the sign of their momentum, without second moments."""
        return self.dtypes[Address.EXP_AVG] is not None and self.dtypes[Address.EXP_AVG_SQ] is None

    @property
    def vectors(self) -> bool:
        """Whether any of the tensors can be read or written by vectors."""
        pairs = zip(self.dtypes, self.alignments, strict=True)
        return any(dtype is not None and alignment > dtype.itemsize for dtype, alignment in pairs)


_ALIGNED = (ALIGNMENT,) * 5


def group_items(items: Sequence[Item], *, by_sign: bool = False) -> list[Group]:
    """Sort the tensors of a call into groups and collect their addresses; turns step counts into device tensors.

    Args:
        items: the tensors.
        by_sign: whether the update takes no second moments, whatever the states hold.
    """
    groups: dict[tuple[object, ...], Group] = {}
    for item in items:
        param, grad, state, copy = item.param, item.grad, item.state, item.param_copy
        device = param.device
        moments = (state.get("exp_avg"), None if by_sign else state.get("exp_avg_sq"))
        if grad is None or moments[0] is None:
            moments = (None, None)
        tensors = (param, grad, *moments, copy)  # as the columns of `Address`
        dtypes = tuple([None if t is None else t.dtype for t in tensors])
        where = [0 if t is None else t.data_ptr() for t in tensors]
        alignments: tuple[int, ...] = _ALIGNED
        if (where[0] | where[1] | where[2] | where[3] | where[4]) & (ALIGNMENT - 1):
            alignments = tuple([min(ALIGNMENT, a & -a) if a else ALIGNMENT for a in where])
        scale = packed_scale(item)
        where += [0 if item.sums is None else item.sums.data_ptr(), 0, 0, scale]
        settings = _settings(item, where, device) if moments[0] is not None else [0.0] * len(Setting)
        cautious = item.hyper.cautious
        key = (device, dtypes, alignments, item.plan.shares, cautious, scale != 0)
        found = groups.get(key)
        if found is None:
            found = groups[key] = Group([], *key, [], [])
        found.items.append(item)
        found.addresses += where
        found.settings += settings
    return list(groups.values())


def _settings(item: Item, where: list[int], device: torch.device) -> list[float]:
    """A row of `Setting`; sets the addresses of step count and learning rate."""
    step, h = item.state["step"], item.hyper
    if not isinstance(step, torch.Tensor) or step.device != device or step.dtype != torch.int64:
        step = item.state["step"] = torch.full((), int(step), dtype=torch.int64, device=device)
    where[Address.STEP] = step.data_ptr()
    lr, bits = h.lr, 0
    if isinstance(lr, torch.Tensor) and lr.device == device:
        if lr.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"lr is a tensor of dtype {lr.dtype}; it must be a number, or a tensor of dtype torch.float32 or "
                f'torch.float64. Write group["lr"] = group["lr"].float()'
            )
        where[Address.LR], bits, lr = lr.data_ptr(), 8 * lr.element_size(), 0.0
    return [float(lr), h.lr_floor, h.beta1, h.beta2, h.eps, h.weight_decay, h.progress, float(bits)]


class Batch:
    """Everything on the device that one launch for a sequence of plans reads beside the tensors themselves.

    It holds no plan: a plan holds it (see `Batches`).

    Args:
        plans: one for each tensor.
        device: where the tensors lie.
        sums: whether it is for the sums of split blocks, and not for an update.

    Attributes:
        uploads: how often addresses or settings were sent.
        update: the update's jobs; empty if it is for sums.
        adds: what sums blocks that are split, or that an update cannot sum in a tile; None if there are none.
        sums: fp64, a view for each tensor: sums of its blocks; empty if it is for an update.
    """

    def __init__(self, plans: Sequence[TritonPlan], device: torch.device, *, sums: bool) -> None:
        self.device, self.uploads = device, 0
        rows = [len(plan.rows) for plan in plans]
        self.row_ends = torch.tensor([0, *itertools.accumulate(rows)], device=device)
        self.multipliers = torch.cat([plan.rows for plan in plans]).to(device)
        self.scalars = torch.zeros(max(1, sum(rows)), len(Scalar), dtype=torch.float64, device=device)
        # one piece of memory, so that both tables travel in one copy
        self._on_device = torch.zeros(len(plans) * (len(Address) + len(Setting)), dtype=torch.int64, device=device)
        self.addresses = self._on_device[: len(plans) * len(Address)]
        self.settings = self._on_device[len(plans) * len(Address) :].view(torch.float64)
        self._sent: tuple[list[int], list[float]] | None = None
        # A capture may not allocate pinned memory, and its replays send again what it sent: from buffers made before it
        # and kept for good.
        self._spare: torch.Tensor | None = self._buffer()
        self._captured: list[tuple[torch.Tensor, tuple[list[int], list[float]]]] = []
        added = [plan.split if sums else plan.own for plan in plans]
        needed = any(len(one.finish) or len(one.jobs) for one in added)
        self.adds = join_sums(added, rows, device) if needed else None
        slots = [plan.num_slots for plan in plans] if sums else []
        self.sums = torch.zeros(sum(slots), dtype=torch.float64, device=device).split(slots)  # type: ignore[no-untyped-call]
        jobs, tiles = [plan.jobs for plan in plans], [plan.tiles for plan in plans]
        self.update = () if sums else join_jobs(jobs, tiles, rows, None, device)

    def _buffer(self) -> torch.Tensor:
        return torch.empty(self._on_device.shape, dtype=torch.int64, pin_memory=self.device.type == "cuda")

    def upload(self, group: Group) -> None:
        """Send addresses and settings if they may not be on the device.

        A captured step sends its own at every replay, because steps outside the graph use the same tables; after a
        capture those send theirs every time for the same reason.

        Raises:
            RuntimeError: they changed between two captures without a step outside CUDA graphs.
        """
        values = (group.addresses, group.settings)
        capturing = _capturing(self.device)
        if not capturing and not self._captured and self._sent == values:
            return
        self._on_device.copy_(self._to_capture(values) if capturing else self._to_send(values), non_blocking=True)
        self._sent = values
        self.uploads += 1

    def _to_send(self, values: tuple[list[int], list[float]]) -> torch.Tensor:
        if self._spare is None:
            self._spare = self._buffer()
        # a new one each time: the allocator gives pinned memory out again only after the copy is done
        return _fill(self._buffer(), values)

    def _to_capture(self, values: tuple[list[int], list[float]]) -> torch.Tensor:
        for host, sent in self._captured:
            if sent == values:
                return host
        if self._spare is None:
            raise RuntimeError(
                "gradients or optimizer settings moved between two captures of a CUDA graph. Run one step outside of "
                "graphs before the second capture."
            )
        host, self._spare = _fill(self._spare, values), None
        self._captured.append((host, values))
        return host


def _fill(host: torch.Tensor, values: tuple[list[int], list[float]]) -> torch.Tensor:
    data = array("q", values[0]).tobytes() + array("d", values[1]).tobytes()
    return host.copy_(torch.frombuffer(bytearray(data), dtype=torch.int64))


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Batches:
    """Batches by the plans of a call, each as long as its plans: a host may step any number of groups in turn.

    The first plan of a call holds its batches. Of calls that begin with the same plan (experts without tokens leave
    other tensors out in every step) the least recently used are dropped. What a CUDA graph reads is kept for good.
    """

    PER_PLAN = 16

    def __init__(self) -> None:
        self._of_plan: WeakKeyDictionary[TritonPlan, dict[tuple[object, ...], Batch]] = WeakKeyDictionary()
        self._captured: list[Batch] = []

    def of(self, group: Group, *, sums: bool) -> Batch:
        """The batch of a group; with ``sums``, whose memory becomes ``item.sums``."""
        plans = [item.plan for item in group.items]
        found = self._of_plan.get(plans[0])
        if found is None:
            found = self._of_plan[plans[0]] = {}
        # weak references are equal while their plans live, so no new plan is taken for a dead one at its address
        key = (group.device, sums, group.dtypes, group.alignments, *map(ref, plans))
        batch = found.pop(key, None)
        if batch is None:
            _drop_some(found, self.PER_PLAN)
            batch = Batch(plans, group.device, sums=sums)
        found[key] = batch
        if _capturing(group.device) and batch not in self._captured:
            self._captured.append(batch)
        for index, (item, values) in enumerate(zip(group.items, batch.sums, strict=False)):
            item.sums = values
            group.addresses[index * len(Address) + Address.SUMS] = values.data_ptr()
        return batch


def _drop_some(found: dict[tuple[object, ...], Batch], limit: int) -> None:
    """Make room for one more batch of a plan: without those of dead plans, then without the oldest."""
    for key in [key for key in found if any(isinstance(part, ref) and part() is None for part in key)]:
        del found[key]
    while len(found) >= limit:
        del found[next(iter(found))]
