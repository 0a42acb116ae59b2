# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: one launch for all tensors of a step, through tables of addresses, jobs and tiles.

Launches of a step: `prepare_kernel` (counts steps, computes bias corrections and the rates of each row of settings)
and an `update_kernel` for each form of job (`ds_blockwise.kernels.triton.batch.Program`), so that each has the
registers that it needs. More launches lie between them where they are needed: `sum_kernel`, for each form of blocks
that one tile of the update cannot sum, and `finish_kernel` for blocks in several pieces, runs or ranks. Of
matrices that are orthogonalised each part takes a launch before and one after that
(`ds_blockwise.kernels.triton.matrices`).

No races, by kind of job (`ds_blockwise.kernels.triton.tables.Kind`). ROWS and LOOP: only the program that sums a block
reads or writes its second moment, and a barrier lies between the reading of the old value by all its threads and the
writing of the new one. CHUNK and RECT only read second moments. `sum_kernel` or `finish_kernel` wrote these in an
earlier launch, each in exactly one program. ELEMENTS and ELEMENT_RECT: as with parameters, every value belongs to one
lane of one program. Lanes may be replicated over threads; then one thread stores what it loaded itself. There are no
atomics: sums are in fp64 and in a fixed order.

Squares of fp32 are exact in fp64, and their sums are good to 1e-12 however a block is cut. A chain of 32 squares in
fp32 is only known to be good to 32 * 2^-24 = 2e-6, more than the 1e-6 that a cut may change. By the data sheets fp64
hides behind the memory traffic at half rate (H200), and at 1/64 (consumer GPUs) takes a sixth of its time (unmeasured).
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from ds_blockwise.blocks.segment_table import SegmentTable
from ds_blockwise.blocks.settings.update_settings import UpdateSettings
from ds_blockwise.kernels.base import Hyper, Item, Kernels, keep_directions
from ds_blockwise.kernels.triton.batch import Batch, Batches, Group, Program, group_items
from ds_blockwise.kernels.triton.matrices import descend_kernel, momentum_kernel
from ds_blockwise.kernels.triton.plan import TritonPlan, make_plan
from ds_blockwise.kernels.triton.prepare import prepare_kernel
from ds_blockwise.kernels.triton.sums import finish_kernel, sum_kernel
from ds_blockwise.kernels.triton.tables import (
    FINISH_BLOCKS,
    PART_LOG2,
    PART_SHIFTS,
    VERSION,
    Address,
    Vectors,
    tile_log2,
)
from ds_blockwise.kernels.triton.update import update_kernel
from ds_blockwise.kernels.update import block_lr

# At most 16 elements a thread (`tile_log2`): 16-byte loads, and few enough registers for four programs on a
# multiprocessor. Nothing may be autotuned: a trial run of an in-place kernel is a step of the user's weights.
NUM_WARPS = 8
MAX_REGISTERS = 64  # a thread: four programs of `NUM_WARPS` share the 65536 of a multiprocessor
SMALL_WARPS = 1  # of the kernels that step no tensors

_INTERPRETED = not isinstance(update_kernel, triton.JITFunction)


class _Kernel(Protocol):
    """A function under ``triton.jit``."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]: ...


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


def _launch(kernel: _Kernel, programs: int, *args: torch.Tensor | int, **meta: object) -> None:
    if programs:
        _run(kernel, programs, *args, **{"enable_fp_fusion": True, **meta, "VERSION": VERSION})


def _run(kernel: _Kernel, programs: int, *args: torch.Tensor | int, **meta: object) -> None:
    kernel[(programs,)](*args, **meta)


def _type(dtype: torch.dtype | None) -> object:
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
                _add_up(batch, group, to_sums=True)

    def step_(self, items: Sequence[Item]) -> None:
        """See `Kernels.step_`."""
        self._step(group_items(items))

    def step_by_sign_(self, items: Sequence[Item]) -> None:
        """See `Kernels.step_by_sign_`; every bit of fp32 and 16-bit parameters is that of `ReferenceKernels`."""
        keep_directions(items)
        self._step(group_items(items, by_sign=True))

    def _step(self, groups: Sequence[Group]) -> None:
        for group in groups:
            batch = self.batches.of(group, sums=False)
            with _on(batch.device):
                batch.upload(group)
                scalars = (batch.row_ends, batch.multipliers, batch.scalars)
                tables = (batch.addresses, batch.settings, *scalars)
                meta = {"BY_SIGN": group.by_sign, "num_warps": SMALL_WARPS, **_contraction(group)}
                _launch(prepare_kernel, len(group.items), *tables, **meta)
                _add_up(batch, group, to_sums=False)
                self._update(batch, group)
        torch.autograd.graph.increment_version([item.param for group in groups for item in group.items])

    def momentum_part_(
        self, exp_avg: torch.Tensor, grad: torch.Tensor, ahead: torch.Tensor, *, momentum: float, nesterov: bool
    ) -> None:
        """See `Kernels.momentum_part_`."""
        weight = _bits(1 - momentum)
        _launch_part(momentum_kernel, (grad, exp_avg, ahead), exp_avg, ahead, weight, NESTEROV=nesterov)

    def step_part_(
        self,
        param: torch.Tensor,
        direction: torch.Tensor,
        param_copy: torch.Tensor | None,
        update: UpdateSettings,
        hyper: Hyper,
    ) -> None:
        """See `Kernels.step_part_`."""
        rate = block_lr(update.lr_multiplier_at(hyper.progress), lr=float(hyper.lr), lr_floor=hyper.lr_floor)
        decay = 1 - rate * (hyper.weight_decay * update.weight_decay_multiplier)
        tensors = (param, direction, param if param_copy is None else param_copy)
        meta = {"COPY": param_copy is not None, "CAUTIOUS": hyper.cautious}
        _launch_part(descend_kernel, tensors, param, direction, _bits(rate), _bits(decay), **meta)
        torch.autograd.graph.increment_version([param])

    def _update(self, batch: Batch, group: Group) -> None:
        wide = torch.float64 in (group.dtypes[Address.PARAM], group.dtypes[Address.EXP_AVG])
        meta: dict[str, object] = {name: _type(dtype) for name, dtype in zip("PGMVC", group.dtypes, strict=True)}
        meta |= {f"ALIGN_{name}": bytes_ for name, bytes_ in zip("PGMVC", group.alignments, strict=True)}
        if group.shares:
            meta["ALIGN_V"] = 1  # read one by one
        meta |= {"SAME": not group.shares, "BY_HAND": _INTERPRETED}
        meta |= {"SCALED": group.scaled, "CAUTIOUS": group.cautious, "WIDE": tl.float64 if wide else tl.float32}
        for program in batch.update:
            tables = (program.tiles, program.jobs, batch.addresses, batch.scalars)
            form = {**_form(program, group), "LOG2": tile_log2(program.kind, program.shift)}
            options = {**_contraction(group), **_limits(wide=wide)}
            _launch(update_kernel, program.tiles.numel(), *tables, **meta, **form, **options)


def _launch_part(
    kernel: _Kernel,
    tensors: tuple[torch.Tensor, ...],
    stepped: torch.Tensor,
    vector: torch.Tensor,
    *numbers: int,
    **meta: object,
) -> None:
    """Launch a kernel of `ds_blockwise.kernels.triton.matrices`; ``stepped`` and ``vector`` have the two strides."""
    height, width = stepped.shape
    if height == 1 or stepped.stride(0) == vector.stride(0) == width:
        height, width, shift = 1, height * width, PART_LOG2
    else:
        shift = next((s for s in PART_SHIFTS if width <= 1 << s), PART_SHIFTS[-1])
    programs = -(-height // (1 << (PART_LOG2 - shift))) * -(-width // (1 << shift))
    form = {"SHIFT": shift, "BY_HAND": _INTERPRETED, "num_warps": NUM_WARPS}
    with _on(stepped.device):
        strides = (stepped.stride(0), vector.stride(0))
        _launch(kernel, programs, *tensors, height, width, *strides, *numbers, **meta, **form)


def _bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _form(program: Program, group: Group) -> dict[str, int]:
    vectors = (Vectors.EVEN if program.even else Vectors.EDGED) if group.vectors else Vectors.NONE
    return {"KIND": program.kind, "SHIFT": program.shift, "VECTORS": int(vectors)}


def _contraction(group: Group) -> dict[str, bool]:
    # a sign that is rounded otherwise is an update of the other direction
    return {"enable_fp_fusion": not group.by_sign}


def _limits(*, wide: bool) -> dict[str, int]:
    """Options of launches that read tensors; ``wide``: the arithmetic is in fp64."""
    if wide or torch.version.hip is not None:
        return {"num_warps": NUM_WARPS}
    return {"num_warps": NUM_WARPS, "maxnreg": MAX_REGISTERS}


def _add_up(batch: Batch, group: Group, *, to_sums: bool) -> None:
    sums = batch.adds
    if sums is None:
        return
    # tensors without a gradient are not read: any dtype will do
    g, v = (_type(group.dtypes[column] or torch.float32) for column in (Address.GRAD, Address.EXP_AVG_SQ))
    for program in sums.programs:
        tables = (program.tiles, program.jobs, batch.addresses, batch.scalars, sums.entries)
        meta = {**_form(program, group), "ALIGN": group.alignments[Address.GRAD], "SCALED": group.scaled}
        _launch(sum_kernel, program.tiles.numel(), *tables, **meta, G=g, V=v, **_limits(wide=False))
    blocks = len(sums.finish)
    totals = (sums.finish, sums.order, sums.entries, batch.addresses, batch.scalars, blocks)
    _launch(finish_kernel, -(-blocks // FINISH_BLOCKS), *totals, TO_SUMS=to_sums, V=v, num_warps=SMALL_WARPS)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
