# SPDX-License-Identifier: Apache-2.0
"""What one update does to the elements of one role: its multipliers and, where set, its own betas.

A multiplier may move over the run: RLRS (arXiv 2507.03526) gives each kind of parameter a relative learning rate at the
start of a run and another one at its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ds_blockwise.values import as_multiplier, check_keys, number

Betas = tuple[float | None, float | None]
"""Decay rates of the two moments; None: the param group's."""
_GROUPS_BETAS: Betas = (None, None)
_ENDS = ("start", "end")


@dataclass(frozen=True, slots=True)
class MovingMultiplier:
    """A factor on the learning rate that a schedule of ours moves: ``start + progress * (end - start)``.

    Attributes:
        start: through warm-up and a stable phase.
        end: when the decay is done.
    """

    start: float
    end: float

    def packed(self) -> dict[str, float]:
        """As the user writes it."""
        return {"start": self.start, "end": self.end}


LRMultiplier = float | MovingMultiplier


@dataclass(frozen=True, slots=True)
class UpdateSettings:
    """The settings of a run of elements beside those of its param group.

    Attributes:
        lr_multiplier: factor on the base learning rate; of a moving one the start.
        weight_decay_multiplier: factor on the weight decay.
        lr_multiplier_change: added to ``lr_multiplier`` over the decay of the schedule; 0: it does not move.
        beta1: decay rate of the first moment; None: the param group's.
        beta2: decay rate of the second moment; None: the param group's.
    """

    lr_multiplier: float
    weight_decay_multiplier: float = 1.0
    lr_multiplier_change: float = 0.0
    beta1: float | None = None
    beta2: float | None = None

    @classmethod
    def of(cls, lr: LRMultiplier, weight_decay_multiplier: float, betas: Betas | None) -> UpdateSettings:
        """The settings of one role from what its keys and rules say."""
        start, end = (lr.start, lr.end) if isinstance(lr, MovingMultiplier) else (lr, lr)
        return cls(start, weight_decay_multiplier, end - start, *(betas or _GROUPS_BETAS))

    def with_lr_multiplier(self, lr: LRMultiplier) -> UpdateSettings:
        """These settings with another factor on the learning rate."""
        return UpdateSettings.of(lr, self.weight_decay_multiplier, (self.beta1, self.beta2))

    def with_lr_times(self, factor: float) -> UpdateSettings:
        """These settings with the factor on the learning rate, its start and its change, times another one."""
        return replace(
            self, lr_multiplier=self.lr_multiplier * factor, lr_multiplier_change=self.lr_multiplier_change * factor
        )

    @property
    def moves(self) -> bool:
        """Whether the factor on the learning rate changes over the run."""
        return self.lr_multiplier_change != 0.0

    @property
    def lr_multiplier_end(self) -> float | None:
        """The factor when the schedule's decay is done; None if it does not change."""
        return self.lr_multiplier + self.lr_multiplier_change if self.moves else None

    @property
    def has_betas(self) -> bool:
        """Whether a beta is not the param group's."""
        return self.beta1 is not None or self.beta2 is not None

    def lr_multiplier_at(self, progress: float) -> float:
        """The factor on the base learning rate.

        Args:
            progress: how much of the schedule's decay is done, from 0 to 1.
        """
        return self.lr_multiplier + self.lr_multiplier_change * progress

    def beta1_or(self, beta1: float) -> float:
        """The decay rate of the first moment in a param group with this one."""
        return beta1 if self.beta1 is None else self.beta1

    def beta2_or(self, beta2: float) -> float:
        """The decay rate of the second moment in a param group with this one."""
        return beta2 if self.beta2 is None else self.beta2

    def numbers(self) -> tuple[float, float, float, float, float]:
        """As kernels read them, in the order of the attributes; NaN for a beta of the param group."""
        beta1, beta2 = self.beta1_or(math.nan), self.beta2_or(math.nan)
        return self.lr_multiplier, self.weight_decay_multiplier, self.lr_multiplier_change, beta1, beta2

    def __str__(self) -> str:
        """For messages: ``lr x6, weight decay x1``, and what else is set."""
        moved = "" if self.lr_multiplier_end is None else f" to x{self.lr_multiplier_end:g}"
        betas = f", betas {shown_betas((self.beta1, self.beta2))}" if self.has_betas else ""
        return f"lr x{self.lr_multiplier:g}{moved}, weight decay x{self.weight_decay_multiplier:g}{betas}"


def shown_betas(betas: Sequence[float | None]) -> str:
    """``0.9/0.99``; ``-`` stands for the param group's."""
    return "/".join("-" if beta is None else f"{beta:g}" for beta in betas)


def as_lr_multiplier(name: str, value: object) -> LRMultiplier:
    """A finite number of at least 0, or ``{"start": number, "end": number}``.

    Raises:
        TypeError: it is neither.
        ValueError: an unknown or missing key, a number outside its range.
    """
    if not isinstance(value, Mapping):
        return as_multiplier(name, value)
    check_keys(name, value, _ENDS)
    missing = [key for key in _ENDS if key not in value]
    if missing:
        raise ValueError(f'{name} must be a number, or {{"start": number, "end": number}}; {missing[0]!r} is missing')
    start, end = (as_multiplier(f"{name}[{key!r}]", value[key]) for key in _ENDS)
    return start if start == end else MovingMultiplier(start, end)


def as_betas(name: str, value: object) -> Betas:
    """Two decay rates in [0, 1); None (null in JSON) for the param group's.

    Raises:
        TypeError: it is not a pair.
        ValueError: a number outside its range, or both are None.
    """
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"{name} must be two numbers, or null for the one of the param group, got {value!r}")
    first, second = (None if v is None else number(f"{name}[{i}]", v, low=0.0, below=1.0) for i, v in enumerate(value))
    if first is None and second is None:
        raise ValueError(f"{name} sets nothing: give at least one of the two betas, such as [null, 0.99]")
    return first, second
