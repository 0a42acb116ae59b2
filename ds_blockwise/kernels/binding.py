# SPDX-License-Identifier: Apache-2.0
"""What a step works on: bound tensors, and the settings of param groups as kernels see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ds_blockwise.blocks.segment_table import SegmentTable
from ds_blockwise.kernels.base import Hyper, Item, Kernels
from ds_blockwise.parallel.reduce import ReductionGroups

NO_HYPER = Hyper(0.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # of tensors that only take part in reductions


@dataclass(frozen=True)
class Binding:
    """A stepped tensor with its segments, the ranks that share its blocks and the kernels that step it.

    Holds the tensor, so that its id, by which bindings are found, is not given to another one.
    """

    tensor: torch.Tensor
    table: SegmentTable
    groups: ReductionGroups
    kernels: Kernels
    plan: Any


@dataclass(frozen=True, slots=True)
class Work:
    """One tensor in one step: what its kernels get, and whose memory it is."""

    binding: Binding
    item: Item


class StepObserver(Protocol):
    """Sees every step of an optimizer, on every rank alike; both methods may communicate."""

    def before_update(self, work: Sequence[Work]) -> bool:
        """Called with the gradients, before anything changes; False leaves everything as it is, on every rank."""
        ...

    def after_update(self, work: Sequence[Work]) -> None:
        """Called with the new weights and states, the gradients still there."""
        ...


def hyper_of(group: dict[str, Any]) -> Hyper:
    """The settings of a param group as kernels see them."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    return Hyper(lr, lr_floor_of(group), beta1, beta2, group["eps"], group["weight_decay"])


def by_kernels(work: Sequence[Work]) -> list[tuple[Kernels, list[Item]]]:
    """The tensors of a step, sorted by what steps them, in order."""
    sorted_out: dict[Kernels, list[Item]] = {}
    for w in work:
        sorted_out.setdefault(w.binding.kernels, []).append(w.item)
    return list(sorted_out.items())


def non_finite(work: Sequence[Work]) -> bool:
    """Whether any gradient holds a NaN or an infinity; waits for the device."""
    grads = [w.item.grad for w in work if w.item.grad is not None and w.item.grad.numel()]
    if not grads:
        return False
    largest = torch._foreach_norm(grads, ord=float("inf"))
    return not all(bool(value) for value in torch.isfinite(torch.stack([v.double().cpu() for v in largest])))


def set_lr(group: dict[str, Any], lr: float, lr_floor: float) -> None:
    """Set a group's base learning rate together with the floor that its blocks decay to (schedules only)."""
    group["lr"] = lr
    group["lr_floor"] = (lr, lr_floor)


def lr_floor_of(group: dict[str, Any]) -> float:
    """The floor that a schedule set together with the group's present ``lr``.

    0 if none did, or if something else has set ``lr`` since: a checkpoint's floor must not outlive its schedule.
    """
    lr, lr_floor = group.get("lr_floor", (None, 0.0))
    return float(lr_floor) if lr == group["lr"] else 0.0
