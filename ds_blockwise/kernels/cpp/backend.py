# SPDX-License-Identifier: Apache-2.0
"""The C++ backend for CPU tensors: OpenMP over tasks of about a megabyte, one call per step for all tensors.

Per step each byte of parameter, gradient and state is read once and written once, but for blocks that exceed a cache or
are split over ranks, whose gradient is read twice. Results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import torch
from torch.autograd.graph import increment_version

from ds_blockwise.blocks.segment_table import SegmentTable
from ds_blockwise.kernels.base import Hyper, Item, Kernels, keep_directions, packed_scale
from ds_blockwise.kernels.close_look import DATA_PTR
from ds_blockwise.kernels.cpp.build import library

_FIELDS, _GRAD, _SUMS, _SCALE = 12, 2, 5, 11  # of a row of kernels.cpp
_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@dataclass(frozen=True)
class CppPlan:
    """A plan in the library's memory; freed with this object."""

    handle: int


class CppKernels(Kernels):
    """See `ds_blockwise.kernels.base.Kernels`; its sources lie beside this file.

    Raises:
        BuildError: the library cannot be compiled or loaded.
    """

    name = "cpp"

    def __init__(self) -> None:
        lib = library()
        self._plan = lib.ds_blockwise_plan
        self._plan.restype = ctypes.c_void_p
        self._free = lib.ds_blockwise_free
        self._step = lib.ds_blockwise_step
        self._step_by_sign = lib.ds_blockwise_lion_step
        self._sum_split = lib.ds_blockwise_sum_split
        self._square_sums = lib.ds_blockwise_square_sums

    def plan(self, table: SegmentTable, device: torch.device) -> CppPlan:
        """Cut a table into tasks.

        Raises:
            ValueError: the tensor is not on the CPU.
        """
        if device.type != "cpu":
            raise ValueError(
                f'backend "cpp" steps CPU tensors, but this one is on {device}. Use "auto" or "reference".'
            )
        if table.shares_second_moment:
            runs = [(r.start, r.count, r.numel, r.block, r.repeat, r.repeat_stride, r.block_stride) for r in table.runs]
        else:
            runs = [(r.start, r.count, 1, 0, r.repeat, r.repeat_stride, 0) for r in table.multiplier_runs]
        source = table.runs if table.shares_second_moment else table.multiplier_runs
        integers = array("q", [value for run in runs for value in run])
        settings = array("d", [value for run in source for value in run.update.numbers()])
        is_split = torch.zeros(table.num_blocks, dtype=torch.uint8)
        for slots in (table.dp_slots, table.tp_slots):
            is_split[slots[slots < table.num_blocks]] = 1
        handle = self._plan(
            ctypes.c_int64(len(runs)),
            _address(integers),
            _address(settings),
            ctypes.c_int64(table.num_blocks),
            ctypes.c_void_p(table.slot_numel.data_ptr()),
            ctypes.c_void_p(is_split.data_ptr()),
            ctypes.c_int64(table.shares_second_moment),
        )
        plan = CppPlan(handle)
        weakref.finalize(plan, self._free, ctypes.c_void_p(handle))
        return plan

    def norms(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `Kernels.norms`."""
        fields = ((t.data_ptr(), t.numel(), _CODES[t.dtype]) for t in tensors)
        table = array("q", chain.from_iterable(fields))
        sums = torch.zeros(len(tensors), dtype=torch.float64)
        threads = ctypes.c_int64(torch.get_num_threads())
        self._square_sums(ctypes.c_int64(len(tensors)), _address(table), ctypes.c_void_p(sums.data_ptr()), threads)
        return sums.sqrt_()

    def sum_split_blocks(self, items: Sequence[Item]) -> None:
        """See `Kernels.sum_split_blocks`."""
        for item in items:
            item.sums = torch.zeros(item.table.num_slots, dtype=torch.float64)
        stepped = [item for item in items if item.grad is not None]
        if stepped:
            rows = self._rows(stepped)
            self._sum_split(ctypes.c_int64(len(stepped)), _address(rows), ctypes.c_int64(torch.get_num_threads()))

    def step_(self, items: Sequence[Item]) -> None:
        """See `Kernels.step_`."""
        self._update(self._step, self._rows(items), items)

    def step_by_sign_(self, items: Sequence[Item]) -> None:
        """See `Kernels.step_by_sign_`; every bit is that of `ReferenceKernels`."""
        keep_directions(items)
        self._update(self._step_by_sign, self._rows(items, has_second_moments=False), items)

    def _update(self, function: Callable[..., None], rows: array[int], items: Sequence[Item]) -> None:
        steps = [int(item.state["step"]) + 1 for item in items]
        for item, step in zip(items, steps, strict=True):
            item.state["step"] = step
        values = array("d")
        # tensors of one group mostly had as many steps
        for (hyper, step), same in groupby(zip([item.hyper for item in items], steps, strict=True)):
            values.extend(array("d", _scalars(hyper, step)) * len(list(same)))
        threads = ctypes.c_int64(torch.get_num_threads())
        function(ctypes.c_int64(len(items)), _address(rows), _address(values), threads)
        # autograd must hear of writes through raw addresses, or a backward through old values would go unnoticed
        increment_version([item.param for item in items])

    def _rows(self, items: Sequence[Item], *, has_second_moments: bool = True) -> array[int]:
        """``Row`` of kernels.cpp, field by field."""
        rows = array("q", b"".join([item.kept or _new_row(item, has_second_moments) for item in items]))
        rows[_GRAD::_FIELDS] = array("q", [*map(DATA_PTR, [item.grad for item in items if item.grad is not None])])
        for row, sums in [(row, item.sums) for row, item in enumerate(items) if item.sums is not None]:
            rows[row * _FIELDS + _SUMS] = sums.data_ptr()
        for row, item in [(row, item) for row, item in enumerate(items) if item.grad_scale is not None]:
            rows[row * _FIELDS + _SCALE] = packed_scale(item)
        return rows


def _new_row(item: Item, has_second_moment: bool) -> bytes:
    """A ``Row`` without what is other in every step: the addresses of gradient and sums, the scale."""
    param, grad, copy, state = item.param, item.grad, item.param_copy, item.state
    assert grad is not None
    if not param.is_cpu:
        raise ValueError(_moved(param))
    second = state["exp_avg_sq"].data_ptr() if has_second_moment else 0
    addresses = [item.plan.handle, param.data_ptr(), 0, state["exp_avg"].data_ptr(), second, 0]
    codes = [_CODES[tensor.dtype] for tensor in (param, grad, state["exp_avg"])]
    of_copy = (0, 0) if copy is None else (copy.data_ptr(), _CODES[copy.dtype])
    row = array("q", [*addresses, of_copy[0], *codes, of_copy[1], 0]).tobytes()
    if item.kept is not None:
        item.kept = row
    return row


def _scalars(h: Hyper, step: int) -> tuple[float, ...]:
    """``Scalars`` of step.h."""
    corrections = (1 - h.beta1**step, 1 - h.beta2**step)
    own = (h.progress, float(step), float(h.cautious))
    return (float(h.lr), h.lr_floor, h.beta1, h.beta2, h.eps, h.weight_decay, *corrections, *own)


def _moved(param: torch.Tensor) -> str:
    return (
        f"a parameter of shape {tuple(param.shape)} is on {param.device}, but it was on the CPU when the optimizer "
        f"first saw it. Move the model before the first step, or make a new optimizer."
    )


def _address(values: array[int] | array[float]) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.buffer_info()[0])
