# SPDX-License-Identifier: Apache-2.0
"""Sums per block type over the whole model: what telemetry and measured multipliers read of a step.

Everything is read after the update, from gradients and states that are still there, one role of one parameter at a
time: temporary memory is a few values per element of the largest of these, never a copy of the model. What travels is
a handful of numbers per block type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from ds_blockwise.blocks.roles import BlockType
from ds_blockwise.kernels.base import Item, StepState, wide_dtype
from ds_blockwise.kernels.bindings import Binding
from ds_blockwise.kernels.param_groups import ParamGroup, hyper_of
from ds_blockwise.kernels.update import block_lr, denominator
from ds_blockwise.measure.role_sums import RolePart, RoleSums
from ds_blockwise.parallel.agree import gather

SECOND_MOMENT = ("second_moment",)
UPDATE = "update"
ALL = ("grad", "param", UPDATE, "momentum", *SECOND_MOMENT, "lr", "lr_multiplier")


class TypeSums:
    """Sums per block type, collected tensor by tensor and then completed over all ranks.

    Args:
        bindings: all that the optimizer steps, on every rank.
    """

    def __init__(self, bindings: Iterable[Binding]) -> None:
        self._roles = RoleSums(bindings)
        self._parts = {id(binding.tensor): parts for binding, parts in self._roles.parts}
        self._share: list[float] | None = None
        self._local: dict[str, list[float]] = {}

    def add(
        self, binding: Binding, group: ParamGroup, state: StepState, names: Sequence[str], item: Item | None
    ) -> None:
        """Collect from one tensor after its update.

        Args:
            binding: of the tensor.
            group: its param group.
            state: its state; empty if it has never been stepped.
            names: `ALL`, or some of them.
            item: of this step, if it has updated the tensor; else its update, and its gradient, are zero.
        """
        read = _Reader(binding, group, state, item)
        where: list[tuple[str, int]] = []
        values: list[torch.Tensor] = []
        for part in self._parts[id(binding.tensor)]:
            for name in names:
                value: torch.Tensor | float | None = getattr(read, name)(part)
                if isinstance(value, torch.Tensor):
                    where.append((name, part.piece))
                    values.append(value)
                elif value is not None:
                    self._sum_of(name)[part.piece] += value
        if values:  # one copy to the host for all that is read of a tensor
            for (name, piece), number in zip(where, torch.stack(values).tolist(), strict=True):
                self._sum_of(name)[piece] += number

    def _sum_of(self, name: str) -> list[float]:
        return self._local.setdefault(name, [0.0] * len(self._roles.block_types))

    def completed(self, names: Sequence[str]) -> dict[BlockType, dict[str, float]]:
        """Collective over all ranks: the sums of the whole model since the last call, the same numbers on every rank.

        Args:
            names: as given to `add`.

        Returns:
            Per block type of the model the sums by name, and ``numel``. Copies count once (`RoleSums.merged`).
        """
        if self._share is None:
            self._share = (1.0 / self._roles.copies()).tolist()
        self._local["numel"] = self._roles.numels().tolist()
        columns = [self._sum_of(name) for name in ("numel", *names)]
        self._local = {}
        mine: dict[BlockType, list[float]] = {}
        for index, (kind, share) in enumerate(zip(self._roles.block_types, self._share, strict=True)):
            held = mine.setdefault(kind, [0.0] * len(columns))
            for at, column in enumerate(columns):
                held[at] += column[index] * share
        everyone = gather(mine)
        kinds = dict.fromkeys(kind for of_rank in everyone for kind in of_rank)
        return {
            kind: {
                name: math.fsum(of_rank[kind][at] for of_rank in everyone if kind in of_rank)
                for at, name in enumerate(("numel", *names))
            }
            for kind in sorted(kinds)
        }


class _Reader:
    """One stepped tensor after its update; each method sums over one part of it, fp64, None where there is nothing."""

    def __init__(self, binding: Binding, group: ParamGroup, state: StepState, item: Item | None) -> None:
        self._hyper = hyper_of(group)
        self._param = binding.tensor.detach().reshape(-1)
        self._grad = None if item is None or item.grad is None else item.grad.detach().reshape(-1)
        self._step = int(state.get("step", 0))
        self._exp_avg = state["exp_avg"].reshape(-1) if self._step else None
        self._exp_avg_sq = state["exp_avg_sq"].reshape(-1) if "exp_avg_sq" in state and self._step else None
        self._item = item
        # a loaded checkpoint's second moments are one per element until the next step
        self._in_blocks = binding.table.shares_second_moment
        self._wide = wide_dtype(binding.tensor.dtype)

    def _block_lr(self, part: RolePart) -> float:
        hyper = self._hyper
        return block_lr(self._multiplier(part), lr=float(hyper.lr), lr_floor=hyper.lr_floor)

    def _multiplier(self, part: RolePart) -> float:
        return part.elements.update.lr_multiplier_at(self._hyper.progress)

    def _by_adam(self, part: RolePart) -> bool:
        return self._exp_avg_sq is not None and not part.is_matrix

    def _correction1(self, part: RolePart) -> float:
        if not self._by_adam(part):
            return 1.0
        return 1 - part.elements.update.beta1_or(self._hyper.beta1) ** self._step

    def lr(self, part: RolePart) -> float:
        return self._block_lr(part) * part.elements.count * part.elements.repeat

    def lr_multiplier(self, part: RolePart) -> float:
        return self._multiplier(part) * part.elements.count * part.elements.repeat

    def param(self, part: RolePart) -> torch.Tensor:
        return _squares(part.elements.of(self._param))

    def grad(self, part: RolePart) -> torch.Tensor | None:
        if self._grad is None or self._item is None:
            return None
        squares, scale = _squares(part.elements.of(self._grad)), self._item.grad_scale
        return squares if scale is None else squares * scale**2

    def momentum(self, part: RolePart) -> torch.Tensor | None:
        if self._exp_avg is None:
            return None
        return _squares(part.elements.of(self._exp_avg)) / self._correction1(part) ** 2

    def second_moment(self, part: RolePart) -> torch.Tensor | None:
        if self._exp_avg_sq is None:
            return None
        correction = 1 - part.elements.update.beta2_or(self._hyper.beta2) ** self._step
        if part.blocks is None or not self._in_blocks:
            return part.elements.of(self._exp_avg_sq).sum(dtype=torch.float64) / correction
        values = part.blocks.blocks_of(self._exp_avg_sq)
        each = part.elements.count * part.elements.repeat / values.numel()
        return values.sum(dtype=torch.float64) * each / correction

    def update(self, part: RolePart) -> torch.Tensor | None:
        if self._exp_avg is None or self._item is None:
            return None
        if not self._by_adam(part):
            kept = self._item.update
            return None if kept is None else _squares(part.elements.of(kept)) * self._block_lr(part) ** 2
        assert self._exp_avg_sq is not None
        if part.blocks is None:
            second, first = part.elements.of(self._exp_avg_sq), part.elements.of(self._exp_avg)
        else:
            second, first = part.blocks.blocks_of(self._exp_avg_sq), part.blocks.of(self._exp_avg)
        hyper = self._hyper
        beta2 = part.elements.update.beta2_or(hyper.beta2)
        denom = denominator(second, step=self._step, beta2=beta2, eps=hyper.eps)
        factor = self._block_lr(part) / self._correction1(part)
        return _squares(first.to(self._wide) / denom) * factor**2


def _squares(values: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm.square()


NormSource = Callable[[], tuple[float | None, float]]
"""The norm of all gradients before clipping (None if unknown) and what it is clipped to (0: not)."""
