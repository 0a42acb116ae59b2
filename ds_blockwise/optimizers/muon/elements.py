# SPDX-License-Identifier: Apache-2.0
"""The elements of matrices in one stepped tensor, in one step: momentum is taken from them, updates are put into them.

Each element is read and written where it lies, a few rectangles at a time, so that a step needs no second tensor of
the stepped one's size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ds_blockwise.blocks.settings.update_settings import UpdateSettings
from ds_blockwise.kernels.base import Item, Kernels, wide_dtype
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
        kernels: what steps it.
        values: length of its block vector.
        momentum: decay rate.
        nesterov: look one step ahead.

    Attributes:
        has_gradient: whether this rank steps it.
    """

    def __init__(self, item: Item, kernels: Kernels, values: int, *, momentum: float, nesterov: bool) -> None:
        self._param, self.has_gradient = item.param.detach().view(-1), item.grad is not None
        self._copy = None if item.param_copy is None else item.param_copy.view(-1)
        self._kernels, self._momentum, self._nesterov = kernels, momentum, nesterov
        # the host waits for a rate on the device once, and not once for each matrix
        self._hyper = replace(item.hyper, lr=float(item.hyper.lr))
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
            ahead = r.of_other(vector)
            if self.has_gradient:
                self._kernels.momentum_part_(
                    r.of(self._exp_avg), r.of(self._grad), ahead, momentum=self._momentum, nesterov=self._nesterov
                )
            else:
                ahead.zero_()
        vector[vector.numel() - held.slots.numel() :] = self._second[held.slots]

    def put_(self, held: Held, vector: torch.Tensor) -> None:
        """Update weights, where there is a gradient, and second moments of rows.

        Args:
            held: the elements.
            vector: as `Held` says: updates, and the rows' new second moments.
        """
        for r in held.rectangles if self.has_gradient else ():
            direction, copy = r.of_other(vector), None if self._copy is None else r.of(self._copy)
            self._kernels.step_part_(r.of(self._param), direction, copy, held.updates[r.part], self._hyper)
            if self._applied is not None:
                r.of(self._applied).copy_(direction)
        rows = vector[vector.numel() - held.slots.numel() :]
        self._second[held.slots] = rows.to(self._second.dtype)
