# SPDX-License-Identifier: Apache-2.0
"""Segment tables as the integer tensors that the Triton kernels read; knows torch, not Triton.

A *job* is a regular group of tiles of one run (a record of `JOB_WORDS` integers), a *tile* is the work of one program:
the number of its job and its index in it, packed into one integer, so that a tile costs 8 bytes. Python handles runs,
never blocks or tiles. An *entry* is one fp64 partial sum of one block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ds_blockwise.blocks.segment_table import SegmentTable, TableRun

# A program updates 4096 elements: 48 KiB of fp32 reads in flight for Adam-mini, 64 KiB for AdamW. An H200 needs about
# 30 KiB a multiprocessor to cover its memory latency, so one resident program suffices and two or three hide the rest.
TILE_LOG2 = 12
TILE = 1 << TILE_LOG2
# Longer rows are summed in a loop and read again by the same program, which finds them in its L1 or in L2: 128 KiB of
# fp32, times two programs on each of 132 multiprocessors, is less than the 50 MiB L2 of an H100 or H200.
LOOP_LIMIT = 32768
# A block up to this size is summed by one program. Heads are larger, but a partition may hold only some tens of them:
# 64 programs of 128Ki elements fill a GPU better than 20 of 400Ki. The finish launch that it costs takes microseconds.
PIECE = 1 << 17
# Rows shorter than this share tiles with other rows even where their second moment is already known.
SHORT = 512
ROW_SHIFTS = (5, 7, 9, 10, 11, 12)
COLUMNS_LOG2 = 5
REPEATS = 1024

ROWS, LOOP, CHUNK, ELEMENTS, RECT, ELEMENT_RECT = range(6)
SUM_PIECE, SUM_ROWS, SUM_COLUMNS, SUM_RECT = range(4)

JOB_FIELDS = (
    "kind item row start numel count slot repeat repeat_stride block_stride block_numel parts entry direct shift span"
).split()
JOB_WORDS = len(JOB_FIELDS)
FINISH_WORDS = 5  # item, slot, first entry, entries (-1: the sum is complete in item.sums), numel of the block

SINGLE, SEVERAL, SPLIT = range(3)


@dataclass(frozen=True)
class Sums:
    """Jobs that sum blocks, and how their partial sums are put together.

    Attributes:
        jobs: int64, shape ``(jobs, JOB_WORDS)``.
        tiles: int64, shape ``(jobs,)``: tiles of each.
        num_entries: partial sums that the jobs write.
        order: int64, shape ``(num_entries,)``: entries sorted by block, within one in a fixed order.
        finish: int64, shape ``(blocks, FINISH_WORDS)``: which part of ``order`` belongs to which block.
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
        rows: fp64, shape ``(rows, 2)``: the distinct pairs of multipliers.
        jobs: the update's jobs.
        tiles: tiles of each.
        own: sums of blocks of this rank alone that no single tile of the update can sum.
        split: sums of blocks that travel.
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
        self.records.append([fields.get(name, 0) for name in JOB_FIELDS])
        self.tiles.append(tiles)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        records = torch.tensor(self.records, dtype=torch.int64).view(-1, JOB_WORDS)
        return records, torch.tensor(self.tiles, dtype=torch.int64)

    def sums(self, slot_numel: torch.Tensor, needed: torch.Tensor | None, also: torch.Tensor | None) -> Sums:
        """Sort entries by block.

        Args:
            slot_numel: sizes of the unsharded blocks.
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
            count = torch.cat([count, torch.full_like(also, -1)])
        numel = slot_numel[found].to(torch.int64)
        finish = torch.stack([torch.zeros_like(found), found, first, count, numel], 1)
        # blocks of many entries side by side, so that few programs loop over them
        finish = finish[torch.sort(finish[:, 3], stable=True).indices]
        return Sums(*self.tensors(), self.num_entries, order, finish)


class _Planner:
    def __init__(self, table: SegmentTable) -> None:
        self.table = table
        self.main, self.own, self.split = _Jobs(), _Jobs(), _Jobs()
        self.row_of: dict[tuple[float, float], int] = {}

    def plan(self) -> TritonPlan:
        table = self.table
        travel = torch.unique(torch.cat([table.dp_slots, table.tp_slots]))
        if table.shares_second_moment:
            classes = _classes(table, travel)
            for run in table.runs:
                self._add_run(run, classes)
        else:
            for merged in table.multiplier_runs:
                row = self._row(merged.lr_multiplier, merged.weight_decay_multiplier)
                self._add_elements(row, merged.start, merged.count, merged.start, merged.repeat, merged.repeat_stride)
        local = travel[travel < table.num_blocks]
        rows = torch.tensor(list(self.row_of), dtype=torch.float64).view(-1, 2)
        own = self.own.sums(table.slot_numel, None, local)
        split = self.split.sums(table.slot_numel, travel, None)
        return TritonPlan(
            table.numel, table.num_slots, table.shares_second_moment, rows, *self.main.tensors(), own, split
        )

    def _row(self, lr_multiplier: float, weight_decay_multiplier: float) -> int:
        return self.row_of.setdefault((lr_multiplier, weight_decay_multiplier), len(self.row_of))

    def _add_elements(
        self, row: int, start: int, count: int, slot: int, repeat: int, stride: int, v_stride: int | None = None
    ) -> None:
        fields = {"row": row, "start": start, "numel": 1, "count": count, "slot": slot, "repeat": repeat}
        if repeat == 1:
            self.main.add(-(-count // TILE), kind=ELEMENTS, **fields)
            return
        v_stride = stride if v_stride is None else v_stride
        self._add_rect(ELEMENT_RECT, fields | {"repeat_stride": stride, "block_stride": v_stride})

    def _add_rect(self, kind: int, fields: dict[str, int]) -> None:
        width = fields["count"] * fields["numel"]
        shift = min(TILE_LOG2, max(0, (width - 1).bit_length()))
        parts = -(-width >> shift)
        high = -(-fields["repeat"] >> (TILE_LOG2 - shift))
        self.main.add(parts * high, kind=kind, **fields | {"shift": shift, "parts": parts})

    def _add_run(self, run: TableRun, classes: torch.Tensor) -> None:
        if not (run.count and run.numel and run.repeat):
            return
        row = self._row(run.lr_multiplier, run.weight_decay_multiplier)
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
                self.main.add(count, kind=LOOP, **fields)
            else:
                self.main.add(-(-count >> (TILE_LOG2 - shift)), kind=ROWS, shift=shift, **fields)
            return
        self._add_sums(fields, kind)
        if fields["repeat"] > 1 or numel < SHORT:
            self._add_rect(RECT, fields)
        else:
            parts = -(-numel // TILE)
            self.main.add(count * parts, kind=CHUNK, parts=parts, **fields)

    def _add_sums(self, fields: dict[str, int], kind: int) -> None:
        jobs = self.split if kind == SPLIT else self.own
        numel, count, repeat = fields["numel"], fields["count"], fields["repeat"]
        slots = torch.arange(fields["slot"], fields["slot"] + count)
        if repeat == 1 and numel < SHORT:
            shift = next(s for s in ROW_SHIFTS if numel <= 1 << s)
            jobs.add(-(-count >> (TILE_LOG2 - shift)), slots, kind=SUM_ROWS, shift=shift, **fields)
            return
        if repeat == 1:
            parts, tiles, span, sum_kind = -(-numel // PIECE), count * -(-numel // PIECE), PIECE, SUM_PIECE
        elif numel == 1:
            parts, span, sum_kind = -(-repeat // REPEATS), REPEATS, SUM_COLUMNS
            tiles = parts * (-(-count >> COLUMNS_LOG2))
        else:
            span, sum_kind = max(1, PIECE // numel), SUM_RECT
            parts = -(-repeat // span)
            tiles = count * parts
        fields = {**fields, "kind": sum_kind, "parts": parts, "span": span}
        if kind == SINGLE and parts == 1:
            jobs.add(tiles, None, direct=1, **fields)
        elif sum_kind == SUM_COLUMNS:
            jobs.add(tiles, slots.repeat(parts), **fields)
        else:
            jobs.add(tiles, slots.repeat_interleave(parts), **fields)


def _classes(table: SegmentTable, travel: torch.Tensor) -> torch.Tensor:
    """Per local slot: in one run, in several, or split over ranks."""
    runs = torch.zeros(table.num_blocks + 1, dtype=torch.int64)
    begin = torch.tensor([run.block for run in table.runs], dtype=torch.int64)
    end = torch.tensor([run.block + run.count for run in table.runs], dtype=torch.int64)
    runs.index_add_(0, begin, torch.ones_like(begin))
    runs.index_add_(0, end, -torch.ones_like(end))
    classes = (runs.cumsum(0)[:-1] > 1).to(torch.int64) * SEVERAL
    classes[travel[travel < table.num_blocks]] = SPLIT
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
