# SPDX-License-Identifier: Apache-2.0
"""The segment table: everything an update needs to know about one tensor that the optimizer steps.

The tensor is a whole parameter or the flat ZeRO partition of many. The table is built once and holds no reference
to the tensor. Kernels read it and the tensors, nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from ds_blockwise.blocks.ranges import (
    LocalView,
    Run,
    TensorShard,
    cut_blocks,
    local_view,
    runs_of_range,
    tensor_split_blocks,
)
from ds_blockwise.blocks.settings.update_settings import UpdateSettings
from ds_blockwise.blocks.spec import BlockPart, BlockSpec
from ds_blockwise.blocks.table_runs import BetaGroup, MultiplierRun, TableRun


@dataclass(frozen=True, slots=True)
class Placement:
    """Where elements of one parameter lie in a stepped tensor.

    Attributes:
        spec: blocks of the unsharded parameter.
        shard: its tensor-parallel split; None if the parameter is whole on every tensor-parallel rank.
        flat_start: first element's offset in the stepped tensor.
        param_start: first element's offset in the flattened tensor-parallel-local parameter.
        numel: number of elements; 0 if this rank holds none (it still takes part in the reductions).
        cuts: offsets in the flattened local parameter at which another data-parallel rank's range begins.
    """

    spec: BlockSpec
    shard: TensorShard | None
    flat_start: int
    param_start: int
    numel: int
    cuts: tuple[int, ...] = ()

    def view(self) -> LocalView:
        """This rank's shard of the parameter with its role spans, in the form of `ranges`."""
        shape = self.spec.structure.stored_shape
        return local_view(shape, self.spec.axis, self.spec.axis_spans(), self.shard, self.spec.batch)


@dataclass(frozen=True, slots=True)
class Slots:
    """The index tensors of a table on one device; see `SegmentTable` for what they mean."""

    slot_numel: torch.Tensor
    dp_slots: torch.Tensor
    tp_slots: torch.Tensor


@dataclass(frozen=True)
class SegmentTable:
    """Segments of one stepped tensor.

    Attributes:
        numel: elements of the stepped tensor, padding included.
        shares_second_moment: whether second moments are one per block (Adam-mini) or one per element (AdamW).
        placements: the parameters in it, in storage order.
        runs: segments with their slots in the block vector; together they cover every non-padding element once. Empty
            if second moments are element-wise.
        multiplier_runs: the same elements, merged where settings agree.
        num_blocks: length of this rank's block vector (``exp_avg_sq`` of Adam-mini): one slot per block with local
            elements, one per element of element-wise parts.
        slot_numel: fp64, shape ``(num_slots,)``: elements of each slot's block in the unsharded tensor. Slots from
            ``num_blocks`` on belong to blocks without elements on this rank, which takes part in their sums.
        dp_slots: int64: slots to sum over the data-parallel group, in the same order on all its ranks.
        tp_slots: int64: slots to sum over the tensor-parallel group afterwards.
        is_partial: some parts have no runs: somebody else updates their elements and second moments.
    """

    numel: int
    shares_second_moment: bool
    placements: tuple[Placement, ...]
    runs: tuple[TableRun, ...]
    multiplier_runs: tuple[MultiplierRun, ...]
    num_blocks: int
    slot_numel: torch.Tensor
    dp_slots: torch.Tensor
    tp_slots: torch.Tensor
    is_partial: bool = False
    _slots_on: dict[torch.device, Slots] = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def has_split_blocks(self) -> bool:
        """Whether a step sums any block over ranks, blocks without elements on this rank included."""
        return bool(self.dp_slots.numel() or self.tp_slots.numel())

    @functools.cached_property
    def left_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the elements and of the block values that no run covers."""
        elements, values = torch.ones(self.numel, dtype=torch.bool), torch.ones(self.num_blocks, dtype=torch.bool)
        for run in self.runs:
            run.of(elements).fill_(False)
            run.blocks_of(values).fill_(False)
        return elements.nonzero().view(-1), values.nonzero().view(-1)

    @functools.cached_property
    def moves(self) -> bool:
        """Whether a multiplier in it changes over the run."""
        return any(run.update.moves for run in self.multiplier_runs)

    @functools.cached_property
    def beta_groups(self) -> tuple[BetaGroup, ...]:
        """The elements by their betas: one group with everything where all betas are the param group's."""
        updates = {(run.update.beta1, run.update.beta2): run.update for run in self.multiplier_runs}
        if not any(update.has_betas for update in updates.values()):
            return (BetaGroup(UpdateSettings(1.0), slice(None), slice(None)),)
        numbers = torch.arange(self.numel)
        slots = torch.arange(self.num_blocks)
        found = []
        for betas, update in updates.items():
            runs = [run for run in self.multiplier_runs if (run.update.beta1, run.update.beta2) == betas]
            elements = torch.cat([run.of(numbers).reshape(-1) for run in runs])
            values = elements
            if self.shares_second_moment:
                blocks = [run for run in self.runs if (run.update.beta1, run.update.beta2) == betas]
                values = torch.tensor(sorted({int(s) for run in blocks for s in run.blocks_of(slots).flatten()}))
            found.append(BetaGroup(update, elements, values))
        return tuple(found)

    def on(self, device: torch.device) -> Slots:
        """Its index tensors on a device, copied there once, so that a step never waits for the host."""
        if device not in self._slots_on:
            self._slots_on[device] = Slots(*(t.to(device) for t in (self.slot_numel, self.dp_slots, self.tp_slots)))
        return self._slots_on[device]

    @property
    def num_slots(self) -> int:
        """Number of slots, those of blocks without elements on this rank included."""
        return self.slot_numel.numel()

    def runs_with(self, values: torch.Tensor) -> Iterator[tuple[TableRun | MultiplierRun, torch.Tensor]]:
        """Pair runs with their part of ``values``, one per block or one per element as second moments are.

        Args:
            values: 1-D: ``num_blocks`` values if second moments are shared, else ``numel``.

        Yields:
            A run, and a view of its values that broadcasts against ``run.of(flat)``.
        """
        if self.shares_second_moment:
            yield from ((run, run.blocks_of(values)) for run in self.runs)
        else:
            yield from ((run, run.of(values)) for run in self.multiplier_runs)

    def expand(self, values: torch.Tensor) -> torch.Tensor:
        """Spread block values over the elements.

        Args:
            values: shape ``(num_blocks,)``, any floating dtype, any device.

        Returns:
            A 1-D CPU tensor of ``numel`` elements, each with its block's value; padding is 0.
        """
        values = values.detach().to("cpu").contiguous()
        covered = sum(math.prod(run.shape) for run in self.runs)
        make = torch.empty if covered == self.numel else torch.zeros
        flat = make(self.numel, dtype=values.dtype)
        for run in self.runs:
            run.of(flat).copy_(run.blocks_of(values).expand(run.shape))
        return flat

    def part(self, index: int) -> SegmentTable:
        """The table of one parameter's elements alone, as a tensor of their number; slots stay those of this table.

        Args:
            index: of the parameter in `placements`.
        """
        placement = self.placements[index]
        start, end = placement.flat_start, placement.flat_start + placement.numel
        runs = tuple(replace(run, start=run.start - start) for run in self.runs if start <= run.start < end)
        return replace(self, numel=placement.numel, placements=(placement,), runs=runs, multiplier_runs=())


class _SlotBuilder:
    """Collects the runs, slots and sums over ranks, parameter by parameter."""

    def __init__(self, shares_second_moment: bool, same_windows: bool, orthogonalized: bool | None) -> None:
        self.shares = shares_second_moment
        self.orthogonalized = orthogonalized
        self.same_windows = same_windows
        self.runs: list[TableRun] = []
        self.numels: list[torch.Tensor] = []
        self.through: list[float] = []
        self.dp: list[int] = []
        self.tp: list[int] = []
        self.num_blocks = 0

    def add(self, placement: Placement) -> None:
        view = placement.view()
        runs = runs_of_range(view, placement.param_start, placement.param_start + placement.numel)
        slot_of = self._add_blocks(placement.spec, runs) if self.shares else {}
        for run in runs:
            self._add_run(placement, run, slot_of)
        if self.shares:
            self._add_reductions(placement, view, slot_of)

    def slot_numel(self) -> torch.Tensor:
        return torch.cat([*self.numels, _fp64(self.through)])

    def _add_blocks(self, spec: BlockSpec, runs: Sequence[Run]) -> dict[int, int]:
        ids = sorted({b for run in runs if not run.element_wise for b in range(run.block, run.block + run.count)})
        per_row = spec.structure.numel_per_row if spec.numel else 0
        rows = spec.block_rows() if ids else []
        slot_of = {block: self.num_blocks + i for i, block in enumerate(ids)}
        self.numels.append(_fp64([float(rows[block] * per_row) for block in ids]))
        self.num_blocks += len(ids)
        return slot_of

    def _add_run(self, placement: Placement, run: Run, slot_of: dict[int, int]) -> None:
        part = placement.spec.parts[run.tag]
        if not self.shares:
            slot = 0
        elif run.element_wise:
            slot = self.num_blocks
            self.num_blocks += run.total
            self.numels.append(torch.ones(run.total, dtype=torch.float64))
        else:
            slot = slot_of[run.block]
        if not self._wants(part):
            return
        self.runs.append(
            TableRun(
                placement.flat_start + run.start,
                run.count,
                run.numel,
                slot,
                run.repeat,
                run.repeat_stride,
                run.block_stride,
                part.update,
            )
        )

    def _wants(self, part: BlockPart) -> bool:
        return self.orthogonalized in (None, part.orthogonalize is not None)

    def _add_reductions(self, placement: Placement, view: LocalView, slot_of: dict[int, int]) -> None:
        spec = placement.spec
        stored_shape = spec.structure.stored_shape
        over_tp = tensor_split_blocks(stored_shape, spec.axis, spec.axis_spans(), placement.shard, spec.batch)
        over_dp = cut_blocks(view, placement.cuts)
        if self.same_windows and placement.shard is not None and placement.shard.dim != spec.axis:
            # the tensor-parallel peers hold other columns of exactly these rows, so no other rank needs the sums
            over_tp &= slot_of.keys()
        elif placement.cuts or not self.same_windows:
            # The local parts of a block cut by tensor parallelism may lie on different data-parallel ranks of the
            # tensor-parallel peers, so every rank must know the whole data-parallel sum before the second reduction.
            # Without cuts this happens only if the windows differ: a peer's part then lies in another rank's window.
            over_dp |= over_tp
        unwanted = {block for part in spec.parts if not self._wants(part) for block in spec.blocks_of(part)}
        over_dp, over_tp = over_dp - unwanted, over_tp - unwanted
        if not over_dp and not over_tp:
            return
        rows = spec.block_rows()
        per_row = spec.structure.numel_per_row
        for block in sorted(over_dp | over_tp):
            slot = slot_of.get(block)
            if slot is None:
                self.through.append(float(rows[block] * per_row))
                slot = -len(self.through)
            if block in over_dp:
                self.dp.append(slot)
            if block in over_tp:
                self.tp.append(slot)

    def slots(self, order: list[int]) -> torch.Tensor:
        # slots of blocks without local elements follow the local ones; until all are known they are negative
        return torch.tensor([s if s >= 0 else self.num_blocks - s - 1 for s in order], dtype=torch.int64)


def _fp64(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def build_table(
    numel: int,
    placements: Sequence[Placement],
    *,
    shares_second_moment: bool,
    orthogonalized: bool | None = None,
) -> SegmentTable:
    """Build the table of one stepped tensor.

    Args:
        numel: elements of the stepped tensor, padding included.
        placements: its parameters in storage order, the same list (with other ranges) on every rank that shares blocks.
        shares_second_moment: False for element-wise second moments: no blocks, slots or reductions.
        orthogonalized: only the parts that are orthogonalised, or that are not; slots stay those of the whole table.

    Raises:
        ValueError: a placement leaves the tensor or overlaps the one before it.
    """
    at = 0
    builder = _SlotBuilder(shares_second_moment, same_windows(placements), orthogonalized)
    for placement in placements:
        if placement.flat_start < at or placement.flat_start + placement.numel > numel:
            raise ValueError(
                f"parameter {placement.spec.fqn!r} is placed at [{placement.flat_start}, "
                f"{placement.flat_start + placement.numel}) of a tensor of {numel} elements, but must lie between "
                f"{at}, where the parameter before it ends, and {numel}. Give the placements in storage order."
            )
        at = placement.flat_start + placement.numel if placement.numel else at
        builder.add(placement)
    return SegmentTable(
        numel,
        shares_second_moment,
        tuple(placements),
        tuple(builder.runs) if shares_second_moment else (),
        tuple(_merge_multipliers(builder.runs)),
        builder.num_blocks,
        builder.slot_numel(),
        builder.slots(builder.dp),
        builder.slots(builder.tp),
        is_partial=orthogonalized is not None,
    )


def same_windows(placements: Sequence[Placement]) -> bool:
    """Whether this rank and its tensor-parallel peers hold the same ranges of their shards of these parameters.

    They do if every split is even: the flat buffers of all peers then have the same offsets, so a host that cuts them
    into equal partitions cuts all at the same elements.
    """
    return all(p.shard is None or p.shard.is_even for p in placements)


def _merge_multipliers(runs: Sequence[TableRun]) -> list[MultiplierRun]:
    merged: list[MultiplierRun] = []
    for run in runs:
        new = MultiplierRun(run.start, run.count * run.numel, run.repeat, run.repeat_stride, run.update)
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.repeat == new.repeat
            and last.repeat_stride == new.repeat_stride
            and last.start + last.count == new.start
            and last.update == new.update
        ):
            merged[-1] = replace(last, count=last.count + new.count)
        else:
            merged.append(new)
    return merged


def whole_placement(spec: BlockSpec, shard: TensorShard | None) -> Placement:
    """Placement of a whole (tensor-parallel-local) parameter that is stepped by itself."""
    shape = spec.shape if shard is None else shard.local_shape
    return Placement(spec, shard, 0, 0, math.prod(shape))
