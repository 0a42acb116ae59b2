# SPDX-License-Identifier: Apache-2.0
"""What a param group holds, and its settings as kernels see them.

Besides AdamW's keys a group may hold ``lr_floor``: the rate to which a schedule of ours decays every block, whatever
its multiplier. The floor stands there with the ``lr`` that it was set with, because a host, a user, another schedule or
a loaded checkpoint may set ``lr`` too. A floor with another ``lr`` than the group's is left over and counts as 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_blockwise.kernels.base import Hyper

LR_FLOOR = "lr_floor"

ParamGroup = dict[str, Any]
"""A group of ``torch.optim.Optimizer.param_groups``; hosts put keys of their own into it."""

StateDict = dict[str, Any]
"""What ``torch.optim.Optimizer.state_dict`` returns."""

NO_HYPER = Hyper(0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
"""Of tensors that only take part in reductions."""


def hyper_of(group: Mapping[str, Any]) -> Hyper:
    """The settings of a param group as kernels see them."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    return Hyper(lr, lr_floor_of(group), beta1, beta2, group["eps"], group["weight_decay"])


def set_lr(group: ParamGroup, lr: float, lr_floor: float) -> None:
    """Set a group's base learning rate together with the floor that its blocks decay to (schedules only)."""
    group["lr"] = lr
    group[LR_FLOOR] = (lr, lr_floor)


def lr_floor_of(group: Mapping[str, Any]) -> float:
    """The floor that a schedule set together with the group's present ``lr``; 0 if none did."""
    lr, lr_floor = group.get(LR_FLOOR, (None, 0.0))
    return float(lr_floor) if lr == group["lr"] else 0.0
