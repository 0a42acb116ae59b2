# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: one launch for all tensors of a step, through tables of addresses, jobs and tiles.

Launches of a step: `_prepare` (counts steps, computes bias corrections and each multiplier's rates) and `_update`.
Blocks that one tile cannot sum add `_sum`, those in several pieces, runs or ranks `_finish`, between the two.

No races, by kind of job (`triton_plan`). ROWS and LOOP: the program that sums a block is the only one that reads or
writes its second moment, and a barrier lies between all its threads' reading of the old value and the writing of the
new one. CHUNK and RECT only read second moments that `_sum` or `_finish` wrote in an earlier launch, each in exactly
one program. ELEMENTS and ELEMENT_RECT: as parameters, every value belongs to one lane of one program. Lanes may be
replicated over threads; then one of them stores, what it loaded itself. There are no atomics: sums are in fp64 and in
a fixed order.

Squares of fp32 are exact in fp64, and their sums are good to 1e-12 however a block is cut. A chain of 32 squares in
fp32 is only known to be good to 32 * 2^-24 = 2e-6, more than the 1e-6 that a cut may change. By the data sheets fp64
hides behind the memory traffic at half rate (H200), and at 1/64 (consumer GPUs) takes a sixth of its time (unmeasured).
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from ds_blockwise.blocks.segment_table import SegmentTable
from ds_blockwise.kernels.base import Item, Kernels
from ds_blockwise.kernels.triton.batch import Batch, Batches, Group, SumProgram
from ds_blockwise.kernels.triton.batch import group as group_items
from ds_blockwise.kernels.triton.plan import TritonPlan, make_plan
from ds_blockwise.kernels.triton.sums import _finish, _sum
from ds_blockwise.kernels.triton.update import _prepare, _update

# 16 elements a thread: four 16-byte loads of each fp32 tensor, and few enough registers for two or three programs on a
# multiprocessor. Nothing is autotuned: a trial run of an in-place kernel would be a step.
NUM_WARPS = 8
FINISH_WARPS = 1

_INTERPRETED = not isinstance(_update, triton.JITFunction)


def unavailable(device: torch.device) -> str | None:
    """Why these kernels cannot step tensors of a device; None if they can."""
    if device.type == "cpu":
        return None if _INTERPRETED else "Triton steps CPU tensors only in its interpreter (TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"Triton kernels step CUDA tensors, not tensors on {device}"
    if _INTERPRETED:
        return "TRITON_INTERPRET=1 is set, with which Triton reads host memory only; unset it"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return f"Triton needs compute capability 7.0 and {torch.cuda.get_device_name(device)} has less"
    return None


def _launch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
    if programs:
        kernel[(programs,)](*args, **meta)


def _bits(numbers: frozenset[int]) -> int:
    return sum(1 << number for number in numbers)


def _type(dtype: torch.dtype | None) -> Any:
    return None if dtype is None else getattr(tl, str(dtype).removeprefix("torch."))


class TritonKernels(Kernels):
    """See `ds_blockwise.kernels.base.Kernels`. ``state["step"]`` is an int64 tensor on the device under this backend.

    The sums that `sum_split_blocks` sets are its own memory, valid until its next call with the same plans.
    """

    name = "triton"

    def __init__(self) -> None:
        self.batches = Batches()

    def plan(self, table: SegmentTable, device: torch.device) -> TritonPlan:
        """See `Kernels.plan`.

        Raises:
            ValueError: the device cannot run these kernels.
        """
        problem = unavailable(device)
        if problem is not None:
            raise ValueError(f'backend "triton" cannot be had: {problem}. Or use "auto" or "reference".')
        return make_plan(table)

    def sum_split_blocks(self, items: Sequence[Item]) -> None:
        """See `Kernels.sum_split_blocks`."""
        for group in group_items(items):
            batch = self.batches.of(group, sums=True)
            with _on(batch.device):
                batch.upload(group)
                _add_up(batch, batch.split, group, to_sums=True)

    def step_(self, items: Sequence[Item]) -> None:
        """See `Kernels.step_`."""
        for group in group_items(items):
            batch = self.batches.of(group, sums=False)
            with _on(batch.device):
                batch.upload(group)
                scalars = (batch.row_ends, batch.multipliers, batch.scalars)
                _launch(_prepare, len(group.items), batch.addresses, batch.hyper, *scalars, num_warps=1)
                _add_up(batch, batch.own, group, to_sums=False)
                self._update(batch, group)
        torch.autograd.graph.increment_version([item.param for item in items])

    def _update(self, batch: Batch, group: Group) -> None:
        types = tuple(_type(dtype) for dtype in group.dtypes)
        wide = tl.float64 if torch.float64 in (group.dtypes[0], group.dtypes[2]) else tl.float32
        program = batch.update
        tables = (program.tiles, program.jobs, batch.addresses, batch.scalars)
        meta = {"SAME": not group.shares, "A": group.aligned, "W": wide, "TYPES": types, "BY_HAND": _INTERPRETED}
        has = {"HAS": _bits(program.has), "SHIFTS": _bits(program.shifts)}
        _launch(_update, program.tiles.numel(), *tables, **has, **meta, num_warps=NUM_WARPS)


def _add_up(batch: Batch, sums: SumProgram | None, group: Group, *, to_sums: bool) -> None:
    if sums is None:
        return
    program = sums.program
    # tensors without a gradient are not read: any dtype will do
    grad_type, v_type = (_type(group.dtypes[i] or torch.float32) for i in (1, 3))
    meta = {"HAS": _bits(program.has), "SHIFTS": _bits(program.shifts), "A": group.aligned, "G": grad_type, "V": v_type}
    tables = (program.tiles, program.jobs, batch.addresses, batch.scalars, sums.entries)
    _launch(_sum, program.tiles.numel(), *tables, **meta, num_warps=NUM_WARPS)
    blocks = len(sums.finish)
    totals = (sums.finish, sums.order, sums.entries, batch.addresses, batch.scalars, batch.row_ends, blocks)
    _launch(_finish, -(-blocks // 32), *totals, TO_SUMS=to_sums, V=v_type, num_warps=FINISH_WARPS)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
