# SPDX-License-Identifier: Apache-2.0
"""One step as kernels see it: the interface that every backend implements, and the reference in plain torch.

A backend gets the tensors of one step with their segment tables and settings. It knows nothing of param groups, hosts
or process groups; between its two calls the optimizer completes the sums of split blocks over the ranks.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

import torch

from ds_blockwise.blocks.segment_table import SegmentTable
from ds_blockwise.blocks.settings.update_settings import UpdateSettings
from ds_blockwise.kernels.update import (
    Rates,
    block_sums,
    decay_,
    decay_part_,
    denominators,
    descend_,
    descend_part_,
    directions,
    momentum_part_,
    step_,
    update_exp_avg_,
    update_exp_avg_sq_,
    update_momentum_,
    update_second_moment_,
)

WIDE = (torch.float32, torch.float64)


class StepState(TypedDict, total=False):
    """The state of one stepped tensor; empty before its first step.

    Keys:
        step: updates made so far; an int, or an int64 tensor on the device, as the backend keeps it.
        exp_avg: first moment, contiguous, like the parameter but fp32, fp64 or bf16.
        exp_avg_sq: second moment, contiguous, fp32 or fp64: ``table.num_blocks`` values if blocks share second moments,
            else like the parameter; missing if the optimizer keeps none.
    """

    step: int | torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


@dataclass(frozen=True, slots=True)
class Hyper:
    """Settings of one param group in one step.

    Attributes:
        lr: base learning rate; a tensor of one element if the param group holds one (a captured CUDA graph reads it
            anew at every replay).
        lr_floor: see `ds_blockwise.kernels.update.block_lr`.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: added to the root of the second moment.
        weight_decay: before the weight decay multiplier.
        progress: how much of the schedule's decay is done, from 0 to 1; read by multipliers that move.
        cautious: weight decay only where it agrees with the update: see `ds_blockwise.kernels.update.decay_`.
    """

    lr: float | torch.Tensor
    lr_floor: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    progress: float = 0.0
    cautious: bool = False


@dataclass(slots=True)
class Item:
    """One stepped tensor in one step.

    Attributes:
        table: its segments.
        plan: what `Kernels.plan` made of the table.
        param: contiguous, any shape, of ``table.numel`` elements; fp32, fp64, bf16 or fp16; changed in place.
        state: see `StepState`; all changed in place.
        hyper: settings.
        grad: contiguous, like ``param``, any floating dtype; None if only reductions are due.
        sums: fp64, shape ``(table.num_slots,)``, on the device of ``param``: sums of squares of the split blocks. Set
            by `Kernels.sum_split_blocks`, completed by the optimizer, read by `Kernels.step_`. None if none is split.
        param_copy: contiguous, like ``param`` but of a 16-bit dtype: receives the rounded new value in the same pass.
        keeps_update: whether somebody will look at ``update``.
        grad_scale: an fp32 number that every element of ``grad`` is multiplied by, rounded to fp32, where it is read;
            None: none is. Only for fp32 parameters with bf16 or fp32 gradients.
        update: 1-D, what the step moved the parameter by, over each block's learning rate and without weight decay.
            Set where it was asked for and does not follow from the new moments, as Adam's does.
        kept: what a backend keeps of this item for its next step, empty at first; None: nothing may be kept. Who gives
            the item vouches, and must empty it when the parameter, its state or copy, or a dtype of theirs or of the
            gradient's, is another one or lies elsewhere.
    """

    table: SegmentTable
    plan: Any
    param: torch.Tensor
    state: StepState
    hyper: Hyper
    grad: torch.Tensor | None = None
    sums: torch.Tensor | None = None
    param_copy: torch.Tensor | None = None
    keeps_update: bool = False
    update: torch.Tensor | None = None
    grad_scale: float | None = None
    kept: bytes | None = None


class Kernels(ABC):
    """A backend. All its results equal `ReferenceKernels` to 1e-6 of the update (one ULP after a cast to 16 bits)."""

    #: what the setting ``backend`` calls it
    name: ClassVar[str]

    @abstractmethod
    def plan(self, table: SegmentTable, device: torch.device) -> Any:
        """What this backend needs of a table beside the tensors; made once per stepped tensor."""

    def norms(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Euclidean norms, summed in fp64 in one reading: infinite or NaN only where a value of the tensor is.

        Args:
            tensors: fp32 or 16-bit, on one device, contiguous.

        Returns:
            fp64, one value for each, there.
        """
        if not tensors:
            return torch.zeros(0, dtype=torch.float64)
        return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float64))

    @abstractmethod
    def sum_split_blocks(self, items: Sequence[Item]) -> None:
        """Set ``item.sums``: complete local sums in the slots of ``table.dp_slots`` and ``table.tp_slots``.

        Args:
            items: Adam-mini tensors with split blocks; those without a gradient contribute zeros.
        """

    @abstractmethod
    def step_(self, items: Sequence[Item]) -> None:
        """Adam's update: parameters and state in place; count the step.

        Args:
            items: tensors with a gradient. Sums of their split blocks are complete over all ranks.
        """

    @abstractmethod
    def step_by_sign_(self, items: Sequence[Item]) -> None:
        """Lion's update, likewise: `ReferenceKernels` rounds as all do.

        Args:
            items: tensors with a gradient, without second moments. Tables cover them whole.
        """

    # Elements of matrices that are orthogonalised in between. The C++ backend has no kernels of its own for them:
    # Newton-Schulz takes 20 operations an element, times the shorter side of the matrix, beside which the 16 bytes
    # that kernels would save are little on a CPU.

    def momentum_part_(
        self, exp_avg: torch.Tensor, grad: torch.Tensor, ahead: torch.Tensor, *, momentum: float, nesterov: bool
    ) -> None:
        """`ds_blockwise.kernels.update.momentum_part_` of elements in rows.

        Args:
            exp_avg: 2-D, changed in place; the elements of a row lie side by side, as in all tensors here.
            grad: of the same shape, and with the same distance from row to row.
            ahead: of the same shape, fp32 or fp64; written.
            momentum: decay rate.
            nesterov: look one step ahead.
        """
        momentum_part_(exp_avg, grad, ahead, momentum=momentum, nesterov=nesterov)

    def step_part_(
        self,
        param: torch.Tensor,
        direction: torch.Tensor,
        param_copy: torch.Tensor | None,
        update: UpdateSettings,
        hyper: Hyper,
    ) -> None:
        """Decay, then ``p -= lr_block * direction``, of elements in rows with the same settings.

        Args:
            param: 2-D, changed in place; the elements of a row lie side by side, as in all tensors here.
            direction: of the same shape, fp32 or fp64, the dtype of the arithmetic.
            param_copy: like ``param`` but of a 16-bit dtype, with the same distance from row to row; written. None:
                there is no copy.
            update: the elements' settings.
            hyper: the param group's.
        """
        rates: Rates = {"lr": float(hyper.lr), "lr_floor": hyper.lr_floor, "progress": hyper.progress}
        wide = param if param.dtype in WIDE else param.to(torch.float32)
        decay_part_(wide, direction, update, weight_decay=hyper.weight_decay, cautious=hyper.cautious, **rates)
        descend_part_(wide, direction, update, **rates)
        if wide is not param:
            param.copy_(wide)
        if param_copy is not None:
            param_copy.copy_(wide)


class ReferenceKernels(Kernels):
    """The definition, for reading and for comparison: plain torch on any device, a Python loop over runs."""

    name = "reference"

    def plan(self, table: SegmentTable, device: torch.device) -> None:
        """Nothing: it reads the table itself."""

    def sum_split_blocks(self, items: Sequence[Item]) -> None:
        """See `Kernels.sum_split_blocks`."""
        for item in items:
            if item.grad is None:
                item.sums = torch.zeros(item.table.num_slots, dtype=torch.float64, device=item.param.device)
            else:
                item.sums = block_sums(_scaled(item), item.table, square=True)

    def step_(self, items: Sequence[Item]) -> None:
        """See `Kernels.step_`."""
        for item in items:
            kept = self._left_out(item)
            self._update_moments(item)
            _changed(item, self._update_param)
            for moment, index, values in kept:
                moment[index] = values

    def step_by_sign_(self, items: Sequence[Item]) -> None:
        """See `Kernels.step_by_sign_`."""
        keep_directions(items)
        for item in items:
            item.state["step"] += 1
            _changed(item, _descend_by_sign)

    def _left_out(self, item: Item) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Moments that are not these kernels' to update, where they lie, and what they are."""
        if not item.table.is_partial:
            return []
        moments = item.state["exp_avg"].view(-1), item.state["exp_avg_sq"].view(-1)
        where = [index.to(item.param.device) for index in item.table.left_out]
        return [(m, index, m[index]) for m, index in zip(moments, where, strict=True)]

    def _update_moments(self, item: Item) -> None:
        grad, table, beta2 = _scaled(item), item.table, item.hyper.beta2
        item.state["step"] += 1
        exp_avg_sq = item.state["exp_avg_sq"].view(-1)
        if table.shares_second_moment:
            sums = block_sums(grad, table, square=True) if item.sums is None else item.sums
            update_second_moment_(exp_avg_sq, sums, table, beta2=beta2)
        else:
            update_exp_avg_sq_(exp_avg_sq, grad, table, beta2=beta2)

    def _update_param(self, item: Item, param: torch.Tensor) -> None:
        hyper, table, step = item.hyper, item.table, int(item.state["step"])
        rates: Rates = {"lr": float(hyper.lr), "lr_floor": hyper.lr_floor, "progress": hyper.progress}
        exp_avg = update_exp_avg_(item.state["exp_avg"].view(-1), _scaled(item), table, beta1=hyper.beta1)
        decay_(param, exp_avg, table, weight_decay=hyper.weight_decay, cautious=hyper.cautious, **rates)
        denom = denominators(item.state["exp_avg_sq"].view(-1), table, step=step, beta2=hyper.beta2, eps=hyper.eps)
        step_(param, exp_avg, denom, table, step=step, beta1=hyper.beta1, **rates)


def _changed(item: Item, change: Callable[[Item, torch.Tensor], None]) -> None:
    """Let a function change the parameter, 1-D in fp32 or fp64; then write it back, and the copy."""
    data = item.param.detach().view(-1)
    wide = data if data.dtype in WIDE else data.to(torch.float32)
    change(item, wide)
    if wide is not data:
        data.copy_(wide)
    if item.param_copy is not None:
        item.param_copy.view(-1).copy_(wide)


def _descend_by_sign(item: Item, param: torch.Tensor) -> None:
    hyper, table = item.hyper, item.table
    rates: Rates = {"lr": float(hyper.lr), "lr_floor": hyper.lr_floor, "progress": hyper.progress}
    exp_avg, grad = moment_and_gradient(item)
    direction = directions(exp_avg, grad, table, beta1=hyper.beta1)
    update_momentum_(exp_avg, grad, table, beta2=hyper.beta2)
    if item.state["exp_avg"].dtype != exp_avg.dtype:
        item.state["exp_avg"].view(-1).copy_(exp_avg)
    decay_(param, direction, table, weight_decay=hyper.weight_decay, cautious=hyper.cautious, **rates)
    descend_(param, direction, table, **rates)


def keep_directions(items: Sequence[Item]) -> None:
    """Set what Lion is about to move each parameter by, of the items that keep it."""
    for item in items:
        if item.keeps_update:
            item.update = directions(*moment_and_gradient(item), item.table, beta1=item.hyper.beta1)


def moment_and_gradient(item: Item) -> tuple[torch.Tensor, torch.Tensor]:
    """``exp_avg``, the state itself where that is wide, and the gradient that the update sees; 1-D, fp32 or fp64."""
    wide = wide_dtype(item.param.dtype)
    return item.state["exp_avg"].view(-1).to(wide), _scaled(item).to(wide)


def _scaled(item: Item) -> torch.Tensor:
    """The gradient that the update sees, 1-D."""
    assert item.grad is not None
    grad = item.grad.view(-1)
    return grad if item.grad_scale is None else grad.to(torch.float32) * item.grad_scale


def packed_scale(item: Item) -> int:
    """What compiled kernels are told of ``item.grad_scale``, in 64 bits; 0 for None.

    The lower half is the number's fp32 bits, the upper half those of -0. A kernel adds that to the product: the sum is
    the product, rounded, and no compiler can merge the multiplication with an addition that follows.
    """
    if item.grad_scale is None:
        return 0
    assert item.grad is not None and item.grad.dtype in (torch.float32, torch.bfloat16), item.grad
    assert item.param.dtype == torch.float32, item.param.dtype
    return int(struct.unpack("<q", struct.pack("<ff", item.grad_scale, -0.0))[0])


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a parameter of ``dtype`` is updated: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
