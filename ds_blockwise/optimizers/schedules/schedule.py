# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules that decay every block to one absolute minimum, as the blockwise paper's do.

With peak P, minimum M and a shape f(k) between 1 and 0 (`shapes`), a block of multiplier r has ``M + f * (r * P - M)``
at update k.
A multiplier on a scheduled base rate cannot express that (it would decay to ``r * M``), so these schedules set a floor
together with the base rate; see `update.block_lr`. Any other schedule may be used too: it moves the base rate alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import ClassVar, Protocol, TypedDict, runtime_checkable

import torch

from ds_blockwise.blocks.roles import BLOCK_TYPES
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.settings.update_settings import MovingMultiplier
from ds_blockwise.kernels.param_groups import set_lr, set_progress
from ds_blockwise.optimizers.schedules.keys import with_known_keys
from ds_blockwise.optimizers.schedules.shapes import curve_of, num_steps
from ds_blockwise.parallel.agree import is_first_rank
from ds_blockwise.values import as_count, number

logger = logging.getLogger(__name__)


@runtime_checkable
class WrapsOptimizer(Protocol):
    """What DeepSpeed and others put around an optimizer; a wrapper may hold another one."""

    @property
    def optimizer(self) -> object:
        """What is wrapped."""


@runtime_checkable
class HasBlockSettings(Protocol):
    """An optimizer of ours."""

    @property
    def block_settings(self) -> BlockSettings:
        """The user's settings of blocks."""


class ScheduleState(TypedDict, total=False):
    """What a schedule saves; the last two only after a re-warming began."""

    last_batch_iteration: int
    rewarm_start: int
    rewarm_num_steps: int


class BlockwiseLR:
    """Linear warm-up to the peak, then any shape; usable from DeepSpeed's JSON and with any torch optimizer.

    The peak of each param group is its ``lr`` at construction. Update number k = 0, 1, 2, ... has ``peak * k /
    warmup`` during
    warm-up, k = warmup has the peak, and from ``total_num_steps`` on every block has ``min_lr``. Call ``step()``
    after each ``optimizer.step()`` (DeepSpeed does).

    JSON: ``{"type": "BlockwiseLR", "params": {"shape": "wsd", "decay_shape": "1-sqrt", "decay_fraction": 0.2,
    "warmup_fraction": 0.05, "total_num_steps": 50000, "min_lr": 3e-5}}``.

    Args:
        optimizer: a torch optimizer, or a DeepSpeed wrapper around one.
        total_num_steps: updates from the start to ``min_lr``.
        warmup_num_steps: updates of linear warm-up from 0.
        min_lr: absolute minimum, shared by all block types.
        last_batch_iteration: -1 for a new run; updates already made minus one otherwise.
        rewarm_num_steps: after a checkpoint of a run without it (or with another value) is loaded, linear warm-up from
            0 back to the schedule's own rate over so many updates. For continual pre-training: give the new, longer
            ``total_num_steps`` with it. Resuming the re-warmed run itself goes on where it was.
        shape: required: how the rate falls after the warm-up, one of ``cosine linear 1-sqrt power exponential wsd
            inv-sqrt infinite table``; see docs/schedules.md.
        warmup_fraction: in place of ``warmup_num_steps``: fraction of ``total_num_steps``.
        decay_shape: of ``wsd inv-sqrt infinite``: shape of the decay at the end, one of ``cosine linear 1-sqrt power
            exponential``; default ``linear``.
        decay_num_steps: updates of the decay at the end; default a fifth of ``total_num_steps``.
        decay_fraction: in place of ``decay_num_steps``: fraction of ``total_num_steps``.
        cooldown_num_steps: of ``infinite``: updates of the cosine from the peak to the constant rate.
        cooldown_fraction: in place of ``cooldown_num_steps``: fraction of ``total_num_steps``.
        constant_factor: of ``infinite``: where the constant rate lies between ``min_lr`` (0) and the peak (1); default
            0.5.
        exponent: e of ``power``, ``(1 - x) ** e``, and of ``exponential``, ``exp(-e x)`` brought down to 0, over the
            decay's x from 0 to 1.
        table: of ``table``: a CSV file with the columns ``fraction`` (of the updates after warm-up) and ``factor``
            (from 0 at ``min_lr`` to 1 at the peak), as ``ds-blockwise schedule refine`` writes it.

    Raises:
        ValueError, TypeError: an unknown key, a number outside its range, an unknown shape, a key that belongs to
            another one, phases that do not fit into the run, or a table that cannot be read.
    """

    @with_known_keys
    def __init__(
        self,
        optimizer: torch.optim.Optimizer | WrapsOptimizer,
        total_num_steps: int,
        warmup_num_steps: int = 0,
        min_lr: float = 0.0,
        last_batch_iteration: int = -1,
        rewarm_num_steps: int = 0,
        *,
        shape: str | None = None,
        warmup_fraction: float | None = None,
        decay_shape: str | None = None,
        decay_num_steps: int | None = None,
        decay_fraction: float | None = None,
        cooldown_num_steps: int | None = None,
        cooldown_fraction: float | None = None,
        constant_factor: float | None = None,
        exponent: float | None = None,
        table: str | None = None,
    ) -> None:
        self.rewarm_num_steps = as_count("rewarm_num_steps", rewarm_num_steps, low=0)
        self._rewarm_start: int | None = None
        self.total_num_steps = as_count("total_num_steps", total_num_steps)
        self.warmup_num_steps = warmup_of(self.total_num_steps, warmup_num_steps, warmup_fraction)
        self.min_lr = number("min_lr", min_lr, low=0.0)
        if self.warmup_num_steps >= self.total_num_steps:
            raise ValueError(
                f"warmup_num_steps ({self.warmup_num_steps}) must be below total_num_steps ({self.total_num_steps})"
            )
        self._curve = curve_of(
            shape,
            self.warmup_num_steps,
            self.total_num_steps,
            {
                "decay_shape": decay_shape,
                "decay_num_steps": decay_num_steps,
                "decay_fraction": decay_fraction,
                "cooldown_num_steps": cooldown_num_steps,
                "cooldown_fraction": cooldown_fraction,
                "constant_factor": constant_factor,
                "exponent": exponent,
                "table": table,
            },
        )
        self.optimizer = self._unwrapped(optimizer)
        self.base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        for index, peak in enumerate(self.base_lrs):
            if self.min_lr > peak:
                raise ValueError(
                    f"min_lr ({self.min_lr:g}) is above the peak lr of param group {index} ({peak:g}); it is absolute, "
                    f"not a ratio"
                )
        self._warn_of_a_high_floor()
        self.last_batch_iteration = last_batch_iteration
        self._set(last_batch_iteration + 1)

    def _warn_of_a_high_floor(self) -> None:
        """Say it where a block type's rate would rise during the decay."""
        optimizer = self.optimizer
        if not (isinstance(optimizer, HasBlockSettings) and optimizer.block_settings.auto is None and is_first_rank()):
            return
        settings, peak = optimizer.block_settings, max(self.base_lrs)
        given = {kind: settings.lr_multiplier_of(kind) for kind in BLOCK_TYPES if kind != "other"}
        starts = {kind: one.start if isinstance(one, MovingMultiplier) else one for kind, one in given.items()}
        low = {kind: start for kind, start in starts.items() if 0 < start * peak < self.min_lr}
        if low:
            logger.warning(
                "min_lr (%g) is above the peak learning rate of %s: there the rate rises during the decay, while the "
                "others fall. Set min_lr to %g or less, or give larger lr_multipliers.",
                self.min_lr,
                " and ".join(f"{kind!r} ({start:g} x {peak:g} = {start * peak:g})" for kind, start in low.items()),
                peak * min(low.values()),
            )

    @property
    def decay_num_steps(self) -> int:
        """Updates of the decay at the end; all after the warm-up where the shape has no stable phase."""
        return self._curve.decay_steps

    def _unwrapped(self, optimizer: object) -> torch.optim.Optimizer:
        while not isinstance(optimizer, torch.optim.Optimizer):
            if not isinstance(optimizer, WrapsOptimizer):
                raise TypeError(
                    f"{type(self).__name__} needs a torch optimizer or a wrapper that has one in .optimizer, got "
                    f"{type(optimizer).__name__}"
                )
            optimizer = optimizer.optimizer
        return optimizer

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
        height = self._curve.height(update)
        return height, 1.0 - height

    def _set(self, update: int) -> None:
        factor, floor = self._factor_and_floor(update)
        lr_floor = floor * self.min_lr
        for group, peak in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            set_lr(group, factor * peak + lr_floor, lr_floor)
            set_progress(group, self._curve.progress(update))

    @property
    def progress(self) -> float:
        """Fraction of the decay that is done at the next update.

        0 through warm-up and a stable phase (all of `wsd`, `inv-sqrt` and `infinite` before their decay at the end),
        then up in equal steps to 1 at ``total_num_steps``, whatever the decay's shape. A re-warming changes nothing of
        it. The optimizer finds it in its param groups (`ds_blockwise.kernels.param_groups.progress_of`).
        """
        return self._curve.progress(self.last_batch_iteration + 1)

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
        """What a resumed run needs: the number of updates; peaks, lengths and the shape are the new run's own."""
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


def warmup_of(total_num_steps: int, warmup_num_steps: object, warmup_fraction: object) -> int:
    """Updates of a warm-up that is given as a number or as a fraction of the run.

    Args:
        total_num_steps: updates of the run.
        warmup_num_steps: updates; 0 counts as not given where there is a fraction.
        warmup_fraction: of the run; None for none.

    Raises:
        ValueError, TypeError: both are given, or one is outside its range.
    """
    steps = None if warmup_fraction is not None and warmup_num_steps == 0 else warmup_num_steps
    return num_steps("warmup", total_num_steps, steps, warmup_fraction, low=0) or 0


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


class _Named(BlockwiseLR):
    """One shape that has no keys of its own."""

    _SHAPE: ClassVar[str]

    @with_known_keys
    def __init__(
        self,
        optimizer: torch.optim.Optimizer | WrapsOptimizer,
        total_num_steps: int,
        warmup_num_steps: int = 0,
        min_lr: float = 0.0,
        last_batch_iteration: int = -1,
        rewarm_num_steps: int = 0,
        warmup_fraction: float | None = None,
    ) -> None:
        super().__init__(
            optimizer,
            total_num_steps,
            warmup_num_steps,
            min_lr,
            last_batch_iteration,
            rewarm_num_steps,
            shape=self._SHAPE,
            warmup_fraction=warmup_fraction,
        )


class BlockwiseCosineLR(_Named):
    """`BlockwiseLR` of shape ``cosine``: half a cosine to an absolute ``min_lr`` (arXiv 2502.19002, section 6).

    JSON: ``{"type": "BlockwiseCosineLR", "params": {"warmup_num_steps": 1000, "total_num_steps": 50000, "min_lr":
    3e-5}}``.
    """

    _SHAPE = "cosine"


class BlockwiseLinearLR(_Named):
    """`BlockwiseLR` of shape ``linear``: a straight line to an absolute ``min_lr``."""

    _SHAPE = "linear"


class BlockwiseWSDLR(BlockwiseLR):
    """`BlockwiseLR` of shape ``wsd``: a stable phase at the peak, then a decay to an absolute ``min_lr``.

    The arguments are those of `BlockwiseLR`, in the order that this class has always had.
    """

    @with_known_keys
    def __init__(
        self,
        optimizer: torch.optim.Optimizer | WrapsOptimizer,
        total_num_steps: int,
        warmup_num_steps: int = 0,
        decay_num_steps: int | None = None,
        min_lr: float = 0.0,
        last_batch_iteration: int = -1,
        rewarm_num_steps: int = 0,
        warmup_fraction: float | None = None,
        decay_fraction: float | None = None,
        decay_shape: str | None = None,
        exponent: float | None = None,
    ) -> None:
        super().__init__(
            optimizer,
            total_num_steps,
            warmup_num_steps,
            min_lr,
            last_batch_iteration,
            rewarm_num_steps,
            shape="wsd",
            warmup_fraction=warmup_fraction,
            decay_num_steps=decay_num_steps,
            decay_fraction=decay_fraction,
            decay_shape=decay_shape,
            exponent=exponent,
        )
