# SPDX-License-Identifier: Apache-2.0
"""The elements of matrices in one stepped tensor, in one step: momentum is taken from them, updates are put into them.

Each element is read and written where it lies, a few rectangles at a time, so that a step needs no second tensor of
the stepped one's size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_blockwise.blocks.settings.update_settings import UpdateSettings
from ds_blockwise.kernels.base import WIDE, Item, wide_dtype
from ds_blockwise.kernels.update import Rates, decay_part_, descend_part_
from ds_blockwise.optimizers.muon.matrices import Rectangle


@dataclass(frozen=True)
class Held:
    """What this rank holds of a matrix in a stepped tensor, and a vector: elements, then a second moment for each row.

    Attributes:
        binding: number of the tensor in the plan.
        rectangles: the elements, from the tensor to the vector.
        slots: of the rows in the tensor's block vector, on its device.
        updates: the settings by `Rectangle.part`.
    """

    binding: int
    rectangles: tuple[Rectangle, ...]
    slots: torch.Tensor
    updates: tuple[UpdateSettings, ...]

    @property
    def size(self) -> int:
        """Numbers in the vector."""
        return sum(r.numel for r in self.rectangles) + self.slots.numel()


class Elements:
    """One stepped tensor in one step.

    Args:
        item: the tensor with its gradient, if this rank has one, and its state.
        values: length of its block vector.
        momentum: decay rate.
        nesterov: look one step ahead.

    Attributes:
        has_gradient: whether this rank steps it.
    """

    def __init__(self, item: Item, values: int, *, momentum: float, nesterov: bool) -> None:
        self._param, self.has_gradient = item.param.detach().view(-1), item.grad is not None
        self._copy = None if item.param_copy is None else item.param_copy.view(-1)
        self._momentum, self._nesterov, self._hyper = momentum, nesterov, item.hyper
        if item.grad is not None:
            self._grad, self._exp_avg = item.grad.view(-1), item.state["exp_avg"].view(-1)
        second = item.state.get("exp_avg_sq")
        wide = wide_dtype(item.param.dtype)
        self._second = self._param.new_zeros(values, dtype=wide) if second is None else second
        if item.keeps_update and self.has_gradient:
            item.update = torch.zeros_like(self._param, dtype=wide)
        self._applied = item.update

    def new_vector(self, size: int) -> torch.Tensor:
        """Memory for numbers of the arithmetic, on the tensor's device; not filled."""
        return self._second.new_empty(size)

    def take_(self, held: Held, vector: torch.Tensor) -> None:
        """Move the momentum and write what of it is orthogonalised, zeros without a gradient, into a vector.

        Args:
            held: the elements.
            vector: as `Held` says, fp32 or fp64; filled.
        """
        for r in held.rectangles:
            target = r.of_other(vector)
            if not self.has_gradient:
                target.zero_()
                continue
            kept, step = r.of(self._exp_avg), r.of(self._grad).to(vector.dtype)
            moved = kept.to(vector.dtype).lerp_(step, 1 - self._momentum)
            if moved is not kept:
                kept.copy_(moved)
            if self._nesterov:
                torch.lerp(step, moved, self._momentum, out=target)
            else:
                target.copy_(moved)
        vector[vector.numel() - held.slots.numel() :] = self._second[held.slots]

    def put_(self, held: Held, vector: torch.Tensor) -> None:
        """Update weights, where there is a gradient, and second moments of rows.

        Args:
            held: the elements.
            vector: as `Held` says: updates, and the rows' new second moments.
        """
        for r in held.rectangles if self.has_gradient else ():
            self._descend_(r, r.of_other(vector), held.updates[r.part])
            if self._applied is not None:
                r.of(self._applied).copy_(r.of_other(vector))
        rows = vector[vector.numel() - held.slots.numel() :]
        self._second[held.slots] = rows.to(self._second.dtype)

    def _descend_(self, r: Rectangle, direction: torch.Tensor, update: UpdateSettings) -> None:
        hyper, param = self._hyper, r.of(self._param)
        rates: Rates = {"lr": float(hyper.lr), "lr_floor": hyper.lr_floor, "progress": hyper.progress}
        wide = param if param.dtype in WIDE else param.to(torch.float32)
        decay_part_(wide, direction, update, weight_decay=hyper.weight_decay, cautious=hyper.cautious, **rates)
        descend_part_(wide, direction, update, **rates)
        if wide is not param:
            param.copy_(wide)
        if self._copy is not None:
            r.of(self._copy).copy_(wide)
