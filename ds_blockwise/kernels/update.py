# SPDX-License-Identifier: Apache-2.0
"""The mathematics of the optimizers on flat tensors and a segment table: the readable definition.

Tensors are positional and 1-D contiguous; scalars are keyword-only. Nothing here knows optimizers, groups or ranks.
AdamW: arXiv 1711.05101, algorithm 2. One second moment per block: arXiv 2406.16793, algorithm 1.
Lion: arXiv 2302.06675, algorithm 2. Learning rate per block type: arXiv 2502.19002, section 5.
Cautious weight decay: arXiv 2510.12402, algorithm 1.
"""

from __future__ import annotations

import math
from typing import TypedDict

import torch

from ds_blockwise.blocks.segment_table import SegmentTable
from ds_blockwise.blocks.settings.update_settings import UpdateSettings


class Rates(TypedDict):
    """What a block's learning rate is made of; see `block_lr` and `UpdateSettings.lr_multiplier_at`."""

    lr: float
    lr_floor: float
    progress: float


def block_lr(multiplier: float, *, lr: float, lr_floor: float) -> float:
    """Learning rate of a block: ``multiplier * (lr - lr_floor) + lr_floor``.

    ``lr_floor`` is 0 unless a schedule decays every block to one absolute minimum (paper, section 6): with
    ``lr = f * peak + (1 - f) * min_lr`` and ``lr_floor = (1 - f) * min_lr`` this is
    ``f * multiplier * peak + (1 - f) * min_lr``.
    """
    return multiplier * (lr - lr_floor) + lr_floor


def block_sums(values: torch.Tensor, table: SegmentTable, *, square: bool) -> torch.Tensor:
    """Sum the local elements of every block.

    Args:
        values: 1-D, ``table.numel`` elements, any floating dtype (a gradient).
        table: the tensor's segments.
        square: sum squares instead of values.

    Returns:
        fp64, shape ``(num_slots,)``, on the device of ``values``. fp64 so that cutting a block elsewhere changes
        nothing that fp32 can hold.
    """
    sums = torch.zeros(table.num_slots, dtype=torch.float64, device=values.device)
    for run in table.runs:
        part = run.of(values).to(torch.float64)
        part = part.square() if square else part
        target = run.blocks_of(sums)[..., 0]
        target += part.sum(2) if run.block_stride else part.sum((0, 2)).unsqueeze(0)
    return sums


def update_second_moment_(exp_avg_sq: torch.Tensor, sums: torch.Tensor, table: SegmentTable, *, beta2: float) -> None:
    """``v = beta2 * v + (1 - beta2) * mean of g^2 over the unsharded block``, in place.

    Args:
        exp_avg_sq: shape ``(num_blocks,)``, changed in place.
        sums: fp64, shape ``(num_slots,)``: sums of squares over the whole, unsharded blocks.
        table: gives the blocks' sizes, and their own betas where they have any.
        beta2: decay rate of the second moment in this param group.
    """
    numel = table.on(sums.device).slot_numel[: table.num_blocks]
    mean = (sums[: table.num_blocks] / numel).to(exp_avg_sq.dtype)
    for group in table.beta_groups:
        rate = group.update.beta2_or(beta2)
        values = exp_avg_sq[group.values]
        exp_avg_sq[group.values] = values.mul_(rate).add_(mean[group.values], alpha=1 - rate)


def update_exp_avg_sq_(exp_avg_sq: torch.Tensor, grad: torch.Tensor, table: SegmentTable, *, beta2: float) -> None:
    """``v = beta2 * v + (1 - beta2) * g^2`` element by element, in place; both 1-D, ``exp_avg_sq`` fp32 or fp64."""
    grad = grad.to(exp_avg_sq.dtype)
    for group in table.beta_groups:
        rate = group.update.beta2_or(beta2)
        values, part = exp_avg_sq[group.elements], grad[group.elements]
        exp_avg_sq[group.elements] = values.mul_(rate).addcmul_(part, part, value=1 - rate)


def update_exp_avg_(exp_avg: torch.Tensor, grad: torch.Tensor, table: SegmentTable, *, beta1: float) -> torch.Tensor:
    """``m = beta1 * m + (1 - beta1) * g``, stored in place.

    Args:
        exp_avg: 1-D, fp32, fp64 or bf16; changed in place.
        grad: 1-D, any floating dtype.
        table: the tensor's segments, with their own betas where they have any.
        beta1: decay rate of the first moment in this param group.

    Returns:
        The new first moment before it was rounded to the dtype of ``exp_avg`` (``exp_avg`` itself if that is wide).
    """
    wide = exp_avg.to(torch.promote_types(exp_avg.dtype, torch.float32))
    for group in table.beta_groups:
        rate = group.update.beta1_or(beta1)
        wide[group.elements] = wide[group.elements].lerp_(grad[group.elements].to(wide.dtype), 1 - rate)
    if wide is not exp_avg:
        exp_avg.copy_(wide)
    return wide


def directions(exp_avg: torch.Tensor, grad: torch.Tensor, table: SegmentTable, *, beta1: float) -> torch.Tensor:
    """``sign(beta1 * m + (1 - beta1) * g)``, which Lion descends: 1, -1, and 0 where that is 0 or NaN.

    Args:
        exp_avg: m before this step, 1-D, fp32 or fp64.
        grad: g, of the same dtype.
        table: the tensor's segments, with their own betas where they have any.
        beta1: weight of the momentum in this param group.

    Returns:
        Like ``exp_avg``; 0 where no segment lies.
    """
    found = torch.zeros_like(exp_avg)
    for group in table.beta_groups:
        rate = group.update.beta1_or(beta1)
        found[group.elements] = exp_avg[group.elements].lerp(grad[group.elements], 1 - rate).sign_()
    return found


def update_momentum_(exp_avg: torch.Tensor, grad: torch.Tensor, table: SegmentTable, *, beta2: float) -> None:
    """Lion's ``m = beta2 * m + (1 - beta2) * g``, in place; both 1-D of one dtype, fp32 or fp64."""
    for group in table.beta_groups:
        rate = group.update.beta2_or(beta2)
        exp_avg[group.elements] = exp_avg[group.elements].lerp(grad[group.elements], 1 - rate)


def momentum_part_(
    exp_avg: torch.Tensor, grad: torch.Tensor, ahead: torch.Tensor, *, momentum: float, nesterov: bool
) -> None:
    """``M = momentum * M + (1 - momentum) * g``, and what of it is orthogonalised; all tensors of any one shape.

    Args:
        exp_avg: M, fp32, fp64 or bf16; changed in place.
        grad: g, any floating dtype.
        ahead: fp32 or fp64; becomes ``momentum * M + (1 - momentum) * g`` with the new M, not rounded to the dtype of
            ``exp_avg``; without ``nesterov`` that M itself.
        momentum: decay rate.
        nesterov: look one step ahead.
    """
    wide = grad.to(ahead.dtype)
    moved = exp_avg.to(ahead.dtype).lerp_(wide, 1 - momentum)
    if moved is not exp_avg:
        exp_avg.copy_(moved)
    if nesterov:
        torch.lerp(wide, moved, momentum, out=ahead)
    else:
        ahead.copy_(moved)


def denominator(exp_avg_sq: torch.Tensor, *, step: int, beta2: float, eps: float) -> torch.Tensor:
    """``sqrt(v) / sqrt(1 - beta2^step) + eps``, in the shape of ``exp_avg_sq``."""
    return (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)


def denominators(exp_avg_sq: torch.Tensor, table: SegmentTable, *, step: int, beta2: float, eps: float) -> torch.Tensor:
    """`denominator` with each block's own beta2; ``beta2`` is the param group's."""
    found = torch.ones_like(exp_avg_sq)
    for group in table.beta_groups:
        rate = group.update.beta2_or(beta2)
        found[group.values] = denominator(exp_avg_sq[group.values], step=step, beta2=rate, eps=eps)
    return found


def decay_(
    param: torch.Tensor,
    exp_avg: torch.Tensor,
    table: SegmentTable,
    *,
    lr: float,
    lr_floor: float,
    weight_decay: float,
    progress: float,
    cautious: bool,
) -> None:
    """Decoupled weight decay with each block's own learning rate, ``p *= 1 - lr_block * weight_decay``, in place.

    Args:
        param: 1-D fp32 or fp64, changed in place.
        exp_avg: the new first moment, like ``param``.
        table: the tensor's segments.
        lr: base learning rate.
        lr_floor: see `block_lr`.
        weight_decay: before the weight decay multiplier.
        progress: see `UpdateSettings.lr_multiplier_at`.
        cautious: leave out the elements that the update moves away from zero: those whose ``exp_avg`` has the other
            sign than they have. (An element of ``exp_avg`` 0 is decayed, as in the paper.)
    """
    for run in table.multiplier_runs:
        decay_part_(
            run.of(param),
            run.of(exp_avg),
            run.update,
            lr=lr,
            lr_floor=lr_floor,
            weight_decay=weight_decay,
            progress=progress,
            cautious=cautious,
        )


def decay_part_(
    param: torch.Tensor,
    exp_avg: torch.Tensor,
    update: UpdateSettings,
    *,
    lr: float,
    lr_floor: float,
    weight_decay: float,
    progress: float,
    cautious: bool,
) -> None:
    """`decay_` of elements with the same settings ``update``; both tensors of any one shape."""
    decay = weight_decay * update.weight_decay_multiplier
    if not decay:
        return
    factor = 1 - block_lr(update.lr_multiplier_at(progress), lr=lr, lr_floor=lr_floor) * decay
    if cautious:
        grows = ((exp_avg < 0) & (param > 0)) | ((exp_avg > 0) & (param < 0))
        param.copy_(torch.where(grows, param, param * factor))
    else:
        param.mul_(factor)


def step_(
    param: torch.Tensor,
    exp_avg: torch.Tensor,
    denom: torch.Tensor,
    table: SegmentTable,
    *,
    lr: float,
    lr_floor: float,
    progress: float,
    step: int,
    beta1: float,
) -> None:
    """``p -= lr_block / (1 - beta1^step) * m / denom``, in place.

    Args:
        param: 1-D fp32 or fp64, changed in place.
        exp_avg: like ``param``.
        denom: in the form of the table's second moment: like ``param``, or of shape ``(num_blocks,)``.
        table: the tensor's segments.
        lr: base learning rate.
        lr_floor: see `block_lr`.
        progress: see `UpdateSettings.lr_multiplier_at`.
        step: updates made, with this one.
        beta1: decay rate of the first moment in this param group.
    """
    for run, run_denom in table.runs_with(denom):
        rate = block_lr(run.update.lr_multiplier_at(progress), lr=lr, lr_floor=lr_floor)
        size = rate / (1 - run.update.beta1_or(beta1) ** step)
        run.of(param).addcdiv_(run.of(exp_avg), run_denom, value=-size)


def descend_(
    param: torch.Tensor, update: torch.Tensor, table: SegmentTable, *, lr: float, lr_floor: float, progress: float
) -> None:
    """``p -= lr_block * update``, in place; both 1-D, fp32 or fp64."""
    for run in table.multiplier_runs:
        descend_part_(run.of(param), run.of(update), run.update, lr=lr, lr_floor=lr_floor, progress=progress)


def descend_part_(
    param: torch.Tensor,
    direction: torch.Tensor,
    update: UpdateSettings,
    *,
    lr: float,
    lr_floor: float,
    progress: float,
) -> None:
    """`descend_` of elements with the same settings ``update``; both tensors of any one shape."""
    rate = block_lr(update.lr_multiplier_at(progress), lr=lr, lr_floor=lr_floor)
    param.sub_(direction, alpha=rate)
