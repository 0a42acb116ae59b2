# SPDX-License-Identifier: Apache-2.0
"""What a param group holds, and its settings as kernels see them.

Besides AdamW's keys a group may hold ``lr_floor``: the rate to which a schedule of ours decays every block, whatever
its multiplier. The floor stands there with the ``lr`` that it was set with, because a host, a user, another schedule or
a loaded checkpoint may set ``lr`` too. A floor with another ``lr`` than the group's is left over and counts as 0.
``schedule_progress`` stands there in the same way: how much of the decay is done, from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_blockwise.kernels.base import Hyper

LR_FLOOR = "lr_floor"
PROGRESS = "schedule_progress"
SCHEDULED = ("lr", LR_FLOOR, PROGRESS)
"""The keys of a group that a schedule of ours writes."""

ParamGroup = dict[str, Any]
"""A group of ``torch.optim.Optimizer.param_groups``; hosts put keys of their own into it."""

StateDict = dict[str, Any]
"""What ``torch.optim.Optimizer.state_dict`` returns."""

NO_HYPER = Hyper(0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
"""Of tensors that only take part in reductions."""


def hyper_of(group: Mapping[str, Any], *, cautious: bool = False) -> Hyper:
    """The settings of a param group as kernels see them.

    Args:
        group: the param group.
        cautious: the optimizer's ``cautious_weight_decay``.
    """
    lr, (beta1, beta2) = group["lr"], group["betas"]
    progress = progress_of(group) or 0.0
    return Hyper(lr, lr_floor_of(group), beta1, beta2, group["eps"], group["weight_decay"], progress, cautious)


def set_lr(group: ParamGroup, lr: float, lr_floor: float) -> None:
    """Set a group's base learning rate together with the floor that its blocks decay to (schedules only)."""
    group["lr"] = lr
    group[LR_FLOOR] = (lr, lr_floor)


def lr_floor_of(group: Mapping[str, Any]) -> float:
    """The floor that a schedule set together with the group's present ``lr``; 0 if none did."""
    lr, lr_floor = group.get(LR_FLOOR, (None, 0.0))
    return float(lr_floor) if lr == group["lr"] else 0.0


def set_progress(group: ParamGroup, progress: float) -> None:
    """Set the fraction of the decay that is done, from 0 to 1, beside the ``lr`` that was set (schedules only)."""
    group[PROGRESS] = (group["lr"], progress)


def progress_of(group: Mapping[str, Any]) -> float | None:
    """The progress that a schedule set together with the group's present ``lr``; None if none did."""
    lr, progress = group.get(PROGRESS, (None, None))
    return float(progress) if progress is not None and lr == group["lr"] else None
