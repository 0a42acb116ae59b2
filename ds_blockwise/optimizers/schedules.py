# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules that decay every block to one absolute minimum, as the blockwise paper's do.

With peak P, minimum M and a shape f(k) that falls from 1 to 0, a block of multiplier r has ``M + f * (r * P - M)``
at update k.
A multiplier on a scheduled base rate cannot express that (it would decay to ``r * M``), so these schedules set a floor
together with the base rate; see `update.block_lr`. Any other schedule may be used too: it moves the base rate alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol, TypedDict, runtime_checkable

import torch

from ds_blockwise.kernels.param_groups import set_lr, set_progress
from ds_blockwise.values import as_count, number


@runtime_checkable
class WrapsOptimizer(Protocol):
    """What DeepSpeed and others put around an optimizer; a wrapper may hold another one."""

    @property
    def optimizer(self) -> object:
        """What is wrapped."""


class ScheduleState(TypedDict, total=False):
    """What a schedule saves; the last two only after a re-warming began."""

    last_batch_iteration: int
    rewarm_start: int
    rewarm_num_steps: int


class BlockwiseSchedule(ABC):
    """Linear warm-up to the peak, then a shape; usable from DeepSpeed's JSON and with any torch optimizer.

    The peak of each param group is its ``lr`` at construction. Update number k = 0, 1, 2, ... has ``peak * k /
    warmup`` during
    warm-up, k = warmup has the peak, and from ``total_num_steps`` on every block has ``min_lr``. Call ``step()``
    after each ``optimizer.step()`` (DeepSpeed does).

    Args:
        optimizer: a torch optimizer, or a DeepSpeed wrapper around one.
        total_num_steps: updates from the start to ``min_lr``.
        warmup_num_steps: updates of linear warm-up from 0.
        min_lr: absolute minimum, shared by all block types.
        last_batch_iteration: -1 for a new run; updates already made minus one otherwise.
        rewarm_num_steps: after a checkpoint of a run without it (or with another value) is loaded, linear warm-up from
            0 back to the schedule's own rate over so many updates. For continual pre-training: give the new, longer
            ``total_num_steps`` with it. Resuming the re-warmed run itself goes on where it was.

    Raises:
        ValueError, TypeError: a number outside its range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | WrapsOptimizer,
        total_num_steps: int,
        warmup_num_steps: int = 0,
        min_lr: float = 0.0,
        last_batch_iteration: int = -1,
        rewarm_num_steps: int = 0,
    ) -> None:
        self.rewarm_num_steps = as_count("rewarm_num_steps", rewarm_num_steps, low=0)
        self._rewarm_start: int | None = None
        self.total_num_steps = as_count("total_num_steps", total_num_steps)
        self.warmup_num_steps = as_count("warmup_num_steps", warmup_num_steps, low=0)
        self.min_lr = number("min_lr", min_lr, low=0.0)
        if self.warmup_num_steps >= self.total_num_steps:
            raise ValueError(f"warmup_num_steps ({warmup_num_steps}) must be below total_num_steps ({total_num_steps})")
        self.optimizer = self._unwrapped(optimizer)
        self.base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        for index, peak in enumerate(self.base_lrs):
            if self.min_lr > peak:
                raise ValueError(
                    f"min_lr ({self.min_lr:g}) is above the peak lr of param group {index} ({peak:g}); it is absolute, "
                    f"not a ratio"
                )
        self.last_batch_iteration = last_batch_iteration
        self._set(last_batch_iteration + 1)

    def _unwrapped(self, optimizer: object) -> torch.optim.Optimizer:
        while not isinstance(optimizer, torch.optim.Optimizer):
            if not isinstance(optimizer, WrapsOptimizer):
                raise TypeError(
                    f"{type(self).__name__} needs a torch optimizer or a wrapper that has one in .optimizer, got "
                    f"{type(optimizer).__name__}"
                )
            optimizer = optimizer.optimizer
        return optimizer

    @abstractmethod
    def _shape(self, update: int) -> float:
        """The fall from 1 (end of warm-up) to 0 (``total_num_steps``), for updates in between."""

    def _factor_and_floor(self, update: int) -> tuple[float, float]:
        """``(f, g)`` such that a block of multiplier r has learning rate ``f * r * peak + g * min_lr``."""
        factor, floor = self._own_factor_and_floor(update)
        if self._rewarm_start is None or update >= self._rewarm_start + self.rewarm_num_steps:
            return factor, floor
        warm = (update - self._rewarm_start) / self.rewarm_num_steps
        return warm * factor, warm * floor

    def _own_factor_and_floor(self, update: int) -> tuple[float, float]:
        if update < self.warmup_num_steps:
            return update / self.warmup_num_steps, 0.0
        if update >= self.total_num_steps:
            return 0.0, 1.0
        shape = self._shape(update)
        return shape, 1.0 - shape

    def _set(self, update: int) -> None:
        factor, floor = self._factor_and_floor(update)
        lr_floor = floor * self.min_lr
        for group, peak in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            set_lr(group, factor * peak + lr_floor, lr_floor)
            set_progress(group, self._progress(update))

    @property
    def progress(self) -> float:
        """Fraction of the decay that is done at the next update.

        0 through warm-up and a stable phase, then up in equal steps to 1 at ``total_num_steps``, whatever the shape;
        a re-warming changes nothing of it. The optimizer finds it in its param groups
        (`ds_blockwise.kernels.param_groups.progress_of`).
        """
        return self._progress(self.last_batch_iteration + 1)

    def _progress(self, update: int) -> float:
        begin = self._decay_begin()
        return min(1.0, max(0.0, (update - begin) / (self.total_num_steps - begin)))

    def _decay_begin(self) -> int:
        """The last update with the full rate."""
        return self.warmup_num_steps

    def get_lr(self) -> list[float]:
        """Base learning rate of each param group at the next update."""
        factor, floor = self._factor_and_floor(self.last_batch_iteration + 1)
        return [factor * peak + floor * self.min_lr for peak in self.base_lrs]

    def get_last_lr(self) -> list[float]:
        """Base learning rate that each param group has now."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Move to the next update, or to the one after ``last_batch_iteration``."""
        if last_batch_iteration is None:
            last_batch_iteration = self.last_batch_iteration + 1
        self.last_batch_iteration = last_batch_iteration
        self._set(last_batch_iteration + 1)

    def state_dict(self) -> ScheduleState:
        """What a resumed run needs: the number of updates; peaks and lengths are the new run's own."""
        state: ScheduleState = {"last_batch_iteration": self.last_batch_iteration}
        if self._rewarm_start is not None:
            state["rewarm_start"] = self._rewarm_start
            state["rewarm_num_steps"] = self.rewarm_num_steps
        return state

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Continue after ``state_dict``'s update, with this schedule's own settings.

        Args:
            state_dict: of one of our schedules, of DeepSpeed's, or of torch's (``last_epoch``).

        Raises:
            ValueError: it is none of these; nothing has changed.
        """
        last, rewarmed = _last_update(state_dict), _count(state_dict, "rewarm_num_steps")
        start = _count(state_dict, "rewarm_start") if "rewarm_start" in state_dict else None
        self.last_batch_iteration = last
        if rewarmed == self.rewarm_num_steps:
            self._rewarm_start = start
        elif self.rewarm_num_steps:
            self._rewarm_start = self.last_batch_iteration + 1
        self._set(self.last_batch_iteration + 1)


def _count(state_dict: Mapping[str, object], key: str) -> int:
    value = state_dict.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"the schedule's state has {key} {value!r}, which must be an integer of 0 or more")
    return value


def _last_update(state_dict: Mapping[str, object]) -> int:
    """Number of the last update that a schedule's state has seen, from 0; -1 for none."""
    if "last_batch_iteration" in state_dict:
        last, what = state_dict["last_batch_iteration"], "last_batch_iteration"
    elif "last_epoch" in state_dict:  # torch counts the calls of step()
        last, what = state_dict["last_epoch"], "last_epoch"
    else:
        has = ", ".join(map(str, state_dict)) or "nothing"
        raise ValueError(f"the schedule's state has no last_batch_iteration (it has {has}): it counts otherwise")
    if isinstance(last, bool) or not isinstance(last, int) or not -1 <= last < 1 << 62:
        raise ValueError(f"the schedule's state has {what} {last!r}, which must be an integer of -1 or more")
    return last if what == "last_batch_iteration" else max(last - 1, -1)


class BlockwiseCosineLR(BlockwiseSchedule):
    """Linear warm-up, then half a cosine to an absolute ``min_lr`` (arXiv 2502.19002, section 6).

    JSON: ``{"type": "BlockwiseCosineLR", "params": {"warmup_num_steps": 1000, "total_num_steps": 50000, "min_lr":
    3e-5}}``.
    """

    def _shape(self, update: int) -> float:
        done = (update - self.warmup_num_steps) / (self.total_num_steps - self.warmup_num_steps)
        return 0.5 * (1.0 + math.cos(math.pi * done))


class BlockwiseLinearLR(BlockwiseSchedule):
    """Linear warm-up, then a straight line to an absolute ``min_lr``."""

    def _shape(self, update: int) -> float:
        return (self.total_num_steps - update) / (self.total_num_steps - self.warmup_num_steps)


class BlockwiseWSDLR(BlockwiseSchedule):
    """Linear warm-up, a stable phase at the peak, then a straight line to an absolute ``min_lr`` (WSD).

    Args:
        optimizer: as the other schedules.
        total_num_steps: as the other schedules.
        warmup_num_steps: as the other schedules.
        decay_num_steps: updates of the decay at the end; default a fifth of ``total_num_steps``.
        min_lr: as the other schedules.
        last_batch_iteration: as the other schedules.
        rewarm_num_steps: as the other schedules.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | WrapsOptimizer,
        total_num_steps: int,
        warmup_num_steps: int = 0,
        decay_num_steps: int | None = None,
        min_lr: float = 0.0,
        last_batch_iteration: int = -1,
        rewarm_num_steps: int = 0,
    ) -> None:
        if decay_num_steps is None:
            decay_num_steps = max(1, as_count("total_num_steps", total_num_steps) // 5)
        self.decay_num_steps = as_count("decay_num_steps", decay_num_steps)
        if self.decay_num_steps + warmup_num_steps > total_num_steps:
            raise ValueError(
                f"warmup_num_steps ({warmup_num_steps}) and decay_num_steps ({decay_num_steps}) do not fit into "
                f"total_num_steps ({total_num_steps})"
            )
        super().__init__(optimizer, total_num_steps, warmup_num_steps, min_lr, last_batch_iteration, rewarm_num_steps)

    def _shape(self, update: int) -> float:
        return min(1.0, (self.total_num_steps - update) / self.decay_num_steps)

    def _decay_begin(self) -> int:
        return self.total_num_steps - self.decay_num_steps
