# SPDX-License-Identifier: Apache-2.0
"""Segment tables as the integer tensors that the Triton kernels read; knows torch, not Triton.

A *tile* is the work of one program. A *job* is a regular group of tiles of one run: a row of a table whose columns are
`ds_blockwise.kernels.triton.tables.Job`. An *entry* is one fp64 partial sum of one block. Python loops over runs, never
over blocks or tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ds_blockwise.blocks.segment_table import SegmentTable
from ds_blockwise.blocks.settings.update_settings import UpdateSettings
from ds_blockwise.blocks.table_runs import TableRun
from ds_blockwise.kernels.triton.tables import (
    COLUMN_ROWS,
    COLUMNS_LOG2,
    COMPLETE,
    LOOP_LIMIT,
    PIECE,
    RECT_SHIFTS,
    ROW_SHIFTS,
    SHORT,
    TILE,
    TILE_LOG2,
    Finish,
    Job,
    Kind,
    Multiplier,
    SumKind,
    tile_log2,
)

# where the elements of a block lie: in one run, in several runs of this rank, or on several ranks
SINGLE, SEVERAL, SPLIT = range(3)


@dataclass(frozen=True)
class Sums:
    """Jobs that sum blocks, and how their partial sums are put together.

    Attributes:
        jobs: int64, shape ``(jobs, len(Job))``.
        tiles: int64, shape ``(jobs,)``: tiles of each.
        num_entries: partial sums that the jobs write.
        order: int64, shape ``(num_entries,)``: entries sorted by block, within one in a fixed order.
        finish: int64, shape ``(blocks, len(Finish))``: which part of ``order`` belongs to which block.
    """

    jobs: torch.Tensor
    tiles: torch.Tensor
    num_entries: int
    order: torch.Tensor
    finish: torch.Tensor


@dataclass(frozen=True, eq=False)
class TritonPlan:
    """One stepped tensor; compared by identity, which is the key of everything cached.

    Attributes:
        numel: elements of the tensor.
        num_slots: see `SegmentTable`.
        shares: whether second moments are one per block.
        rows: fp64, shape ``(rows, len(Multiplier))``: the distinct settings of its runs.
        jobs: the update's jobs.
        tiles: tiles of each.
        own: sums of blocks of this rank alone that no single tile of the update can sum.
        split: sums of the blocks that are split over ranks.
    """

    numel: int
    num_slots: int
    shares: bool
    rows: torch.Tensor
    jobs: torch.Tensor
    tiles: torch.Tensor
    own: Sums
    split: Sums


class _Jobs:
    """Collects jobs with the slots of the entries that they write."""

    def __init__(self) -> None:
        self.records: list[list[int]] = []
        self.tiles: list[int] = []
        self.slots: list[torch.Tensor] = []
        self.num_entries = 0

    def add(self, tiles: int, slots: torch.Tensor | None = None, /, **fields: int) -> None:
        if not tiles:
            return
        if slots is not None:
            fields["entry"] = self.num_entries
            self.slots.append(slots)
            self.num_entries += slots.numel()
        self.records.append([fields.get(column.name.lower(), 0) for column in Job])
        self.tiles.append(tiles)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        records = torch.tensor(self.records, dtype=torch.int64).view(-1, len(Job))
        return records, torch.tensor(self.tiles, dtype=torch.int64)

    def sums(
        self,
        slot_numel: torch.Tensor,
        slot_row: torch.Tensor,
        needed: torch.Tensor | None,
        also: torch.Tensor | None,
    ) -> Sums:
        """Sort entries by block.

        Args:
            slot_numel: sizes of the unsharded blocks.
            slot_row: rows of their settings.
            needed: slots that get a total although they may have no entry; None: those with entries.
            also: slots whose total is already in ``item.sums``.
        """
        slots = torch.cat([*self.slots, torch.empty(0, dtype=torch.int64)])
        in_order, order = torch.sort(slots, stable=True)
        found = torch.unique(slots if needed is None else needed)
        first = torch.searchsorted(in_order, found)
        count = torch.searchsorted(in_order, found, right=True) - first
        if also is not None:
            found = torch.cat([found, also])
            first = torch.cat([first, torch.zeros_like(also)])
            count = torch.cat([count, torch.full_like(also, COMPLETE)])
        numel = slot_numel[found].to(torch.int64)
        columns = {Finish.SLOT: found, Finish.FIRST: first, Finish.COUNT: count, Finish.NUMEL: numel}
        columns[Finish.ROW] = slot_row[found]
        finish = torch.stack([columns.get(column, torch.zeros_like(found)) for column in Finish], 1)
        # blocks of many entries side by side, so that few programs loop over them
        finish = finish[torch.sort(finish[:, Finish.COUNT], stable=True).indices]
        return Sums(*self.tensors(), self.num_entries, order, finish)


class _Planner:
    def __init__(self, table: SegmentTable) -> None:
        self.table = table
        self.main, self.own, self.split = _Jobs(), _Jobs(), _Jobs()
        self.row_of: dict[UpdateSettings, int] = {}
        self.slot_row = torch.zeros(table.num_slots, dtype=torch.int64)

    def plan(self) -> TritonPlan:
        table = self.table
        split_slots = torch.unique(torch.cat([table.dp_slots, table.tp_slots]))
        if table.shares_second_moment:
            classes = _classes(table, split_slots)
            for run in table.runs:
                self._add_run(run, classes)
        else:
            for merged in table.multiplier_runs:
                row = self._row(merged.update)
                self._add_elements(row, merged.start, merged.count, merged.start, merged.repeat, merged.repeat_stride)
        local = split_slots[split_slots < table.num_blocks]
        rows = torch.tensor([update.numbers() for update in self.row_of], dtype=torch.float64)
        rows = rows.view(-1, len(Multiplier))
        own = self.own.sums(table.slot_numel, self.slot_row, None, local)
        split = self.split.sums(table.slot_numel, self.slot_row, split_slots, None)
        shares = table.shares_second_moment
        return TritonPlan(table.numel, table.num_slots, shares, rows, *self.main.tensors(), own, split)

    def _row(self, update: UpdateSettings) -> int:
        return self.row_of.setdefault(update, len(self.row_of))

    def _add_elements(
        self, row: int, start: int, count: int, slot: int, repeat: int, stride: int, v_stride: int | None = None
    ) -> None:
        fields = {"row": row, "start": start, "numel": 1, "count": count, "slot": slot, "repeat": repeat}
        if repeat == 1:
            self.main.add(-(-count >> tile_log2(Kind.ELEMENTS, 0)), kind=Kind.ELEMENTS, **fields)
            return
        v_stride = stride if v_stride is None else v_stride
        self._add_rect(Kind.ELEMENT_RECT, fields | {"repeat_stride": stride, "block_stride": v_stride})

    def _add_rect(self, kind: int, fields: dict[str, int]) -> None:
        width = fields["count"] * fields["numel"]
        shift = next((s for s in RECT_SHIFTS if width <= 1 << s), RECT_SHIFTS[-1])
        parts = -(-width >> shift)
        high = -(-fields["repeat"] >> (tile_log2(kind, shift) - shift))
        self.main.add(parts * high, kind=kind, **fields | {"shift": shift, "parts": parts})

    def _add_run(self, run: TableRun, classes: torch.Tensor) -> None:
        if not (run.count and run.numel and run.repeat):
            return
        row = self._row(run.update)
        self.slot_row[run.block : run.block + run.count] = row
        numel = int(self.table.slot_numel[run.block])
        if numel == 1:  # the block's mean is the element's own square
            self._add_elements(row, run.start, run.count, run.block, run.repeat, run.repeat_stride, run.block_stride)
            return
        for first, count, kind in _uniform(classes[run.block : run.block + run.count]):
            fields = {
                "row": row,
                "start": run.start + first * run.numel,
                "numel": run.numel,
                "count": count,
                "slot": run.block + first,
                "repeat": run.repeat,
                "repeat_stride": run.repeat_stride,
                "block_numel": numel,
            }
            self._add_blocks(fields, kind)

    def _add_blocks(self, fields: dict[str, int], kind: int) -> None:
        numel, count = fields["numel"], fields["count"]
        if kind == SINGLE and fields["repeat"] == 1 and numel <= LOOP_LIMIT:
            shift = next((s for s in ROW_SHIFTS if numel <= 1 << s), None)
            if shift is None:
                self.main.add(count, kind=Kind.LOOP, **fields)
            else:
                rows = tile_log2(Kind.ROWS, shift) - shift
                self.main.add(-(-count >> rows), kind=Kind.ROWS, shift=shift, **fields)
            return
        self._add_sums(fields, kind)
        if fields["repeat"] > 1 or numel < SHORT:
            self._add_rect(Kind.RECT, fields)
        else:
            parts = -(-numel // TILE)
            self.main.add(count * parts, kind=Kind.CHUNK, parts=parts, **fields)

    def _add_sums(self, fields: dict[str, int], kind: int) -> None:
        jobs = self.split if kind == SPLIT else self.own
        numel, count, repeat = fields["numel"], fields["count"], fields["repeat"]
        slots = torch.arange(fields["slot"], fields["slot"] + count)
        if repeat == 1 and numel < SHORT:
            shift = next(s for s in ROW_SHIFTS if numel <= 1 << s)
            jobs.add(-(-count >> (TILE_LOG2 - shift)), slots, kind=SumKind.ROWS, shift=shift, **fields)
            return
        if repeat == 1:
            parts, tiles, span, sum_kind = -(-numel // PIECE), count * -(-numel // PIECE), PIECE, SumKind.PIECE
        elif numel == 1:
            parts, span, sum_kind = -(-repeat // COLUMN_ROWS), COLUMN_ROWS, SumKind.COLUMNS
            tiles = parts * (-(-count >> COLUMNS_LOG2))
        else:
            span, sum_kind = max(1, PIECE // numel), SumKind.RECT
            parts = -(-repeat // span)
            tiles = count * parts
        fields = {**fields, "kind": sum_kind, "parts": parts, "span": span}
        if kind == SINGLE and parts == 1:
            jobs.add(tiles, None, direct=1, **fields)
        elif sum_kind == SumKind.COLUMNS:
            jobs.add(tiles, slots.repeat(parts), **fields)
        else:
            jobs.add(tiles, slots.repeat_interleave(parts), **fields)


def _classes(table: SegmentTable, split_slots: torch.Tensor) -> torch.Tensor:
    """Per local slot: in one run, in several, or split over ranks."""
    runs = torch.zeros(table.num_blocks + 1, dtype=torch.int64)
    begin = torch.tensor([run.block for run in table.runs], dtype=torch.int64)
    end = torch.tensor([run.block + run.count for run in table.runs], dtype=torch.int64)
    runs.index_add_(0, begin, torch.ones_like(begin))
    runs.index_add_(0, end, -torch.ones_like(end))
    classes = (runs.cumsum(0)[:-1] > 1).to(torch.int64) * SEVERAL
    classes[split_slots[split_slots < table.num_blocks]] = SPLIT
    return classes


def _uniform(classes: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """``(first, count, class)`` of every stretch of equal classes."""
    values, counts = torch.unique_consecutive(classes, return_counts=True)
    ends = list(itertools.accumulate(counts.tolist()))
    for value, count, end in zip(values.tolist(), counts.tolist(), ends, strict=True):
        yield end - count, count, value


def make_plan(table: SegmentTable) -> TritonPlan:
    """Cut a table into jobs; a Python loop over runs."""
    return _Planner(table).plan()
