# SPDX-License-Identifier: Apache-2.0
"""Measured multipliers: when to read second moments, what follows from them, and the ramp to it.

``exp_avg_sq`` averages squared gradients of mini-batches, so its mean over a block type is, up to the batch size B as a
common factor, the paper's sharpness with data labels: S = B * ||g||^2 / number of parameters, the empirical Fisher
(arXiv 2502.19002, section 3). Only ratios between types are used, so the factor does not matter.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypedDict

from ds_blockwise.blocks.roles import BLOCK_TYPES
from ds_blockwise.blocks.settings.auto_settings import AutoMultipliers
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.measure.ratios import multipliers_from_sharpness
from ds_blockwise.parallel.agree import is_first_rank

logger = logging.getLogger(__name__)

REFERENCE = "norm"  # to whose sharpness all others are relative
READINGS = 10  # averaged, against the noise of single batches
LONGEST_SPACING = 20  # steps between readings; at beta2 = 0.95 second moments have forgotten the one before
STAGES = 10  # of the ramp; each rebuilds the segment tables


class _AutoState(TypedDict):
    sums: dict[str, float]
    readings: int
    target: dict[str, float] | None
    measured_at: int


class AutoState(_AutoState, total=False):
    """What a run with measured multipliers has read so far; see `MeasuredMultipliers`."""

    norm_multiplier: float  # 1 where an earlier version left it out


class RunState(TypedDict):
    """Position and measurements of a run, for a checkpoint."""

    steps: int
    auto: AutoState | None


def first_reading(settings: AutoMultipliers, total_num_steps: int) -> int:
    """Updates before the first measurement that multipliers may follow from.

    Args:
        settings: ``not_before`` and ``after`` are used.
        total_num_steps: updates of the whole run.
    """
    return max(settings.not_before, math.ceil(settings.after * total_num_steps))


@dataclass(slots=True)
class MeasuredMultipliers:
    """The measurement and the ramp of one run. Everything is a function of numbers that all ranks share.

    Attributes:
        settings: see `AutoMultipliers`.
        pinned: block types that the user has given a multiplier.
        total_num_steps: updates of the run; None until a host has said it.
        norm_multiplier: the multiplier of norms, to which all others are relative; it says the unit of ``lr``.
        sums: per block type the mean second moments read so far, added up.
        readings: how many.
        target: the measured multipliers; None before the measurement.
        measured_at: updates made when they were measured.
    """

    settings: AutoMultipliers
    pinned: frozenset[str]
    total_num_steps: int | None
    norm_multiplier: float
    sums: dict[str, float] = field(default_factory=dict)
    readings: int = 0
    target: dict[str, float] | None = None
    measured_at: int = 0

    @classmethod
    def of(cls, block_settings: BlockSettings) -> MeasuredMultipliers | None:
        """The state of a new run; None if the settings have fixed multipliers."""
        if block_settings.auto is None:
            return None
        # "other" is whatever fits no block type, so no order of sharpness is known of it
        pinned = frozenset(kind for kind in BLOCK_TYPES if kind in block_settings.lr_multipliers) | {"other"}
        made = cls(block_settings.auto, pinned, None, block_settings.norm_multiplier)
        if block_settings.auto.total_num_steps is not None:
            made.set_total(block_settings.auto.total_num_steps)
        return made

    def set_total(self, total_num_steps: int) -> None:
        """Say how long the run is.

        Raises:
            ValueError: measurement and ramp do not fit into it.
        """
        self.total_num_steps = total_num_steps
        last = self.start + (READINGS - 1) * self.spacing + self.ramp_steps
        if last > total_num_steps:
            raise ValueError(
                f'lr_multipliers "auto" measures and ramps until step {last}, but the run has {total_num_steps} steps '
                f"(total_num_steps). Give fixed multipliers: measuring is for long runs, since block types need steps "
                f"to come into their order of sharpness. Or lower 'not_before', 'after' or 'ramp'."
            )

    @property
    def total(self) -> int:
        """Updates of the whole run; see `require_total`."""
        return self.require_total()

    def require_total(self) -> int:
        """Updates of the whole run.

        Raises:
            ValueError: nobody has said it.
        """
        if self.total_num_steps is None:
            raise ValueError(
                'lr_multipliers "auto" needs the length of the run: give {"auto": {"total_num_steps": N}}, or, with '
                'DeepSpeed, a scheduler with "total_num_steps" in the JSON.'
            )
        return self.total_num_steps

    @property
    def start(self) -> int:
        """Updates before the first reading."""
        return first_reading(self.settings, self.total)

    @property
    def spacing(self) -> int:
        """Steps between readings: all of them take half a percent of the run, or 180 steps if that is less."""
        return min(LONGEST_SPACING, max(1, self.total // (200 * READINGS)))

    @property
    def ramp_steps(self) -> int:
        """Steps from the measurement to the full multipliers."""
        return round(self.settings.ramp * self.total)

    def is_due(self, step: int) -> bool:
        """Whether to read second moments after update number ``step``."""
        done = step - self.start
        return self.target is None and done >= 0 and done % self.spacing == 0

    def take(self, step: int, second_moments: Mapping[str, float]) -> None:
        """One reading; the last one makes the measurement.

        Args:
            step: number of the update.
            second_moments: per block type of the model the mean of bias-corrected ``exp_avg_sq``.
        """
        for kind, value in second_moments.items():
            self.sums[kind] = self.sums.get(kind, 0.0) + value
        self.readings += 1
        if self.readings >= READINGS:
            self._measure(step)

    def _measure(self, step: int) -> None:
        sharpness = {kind: total / self.readings for kind, total in self.sums.items()}
        usable = {k: s for k, s in sharpness.items() if s > 0 and math.isfinite(s)}
        found = multipliers_from_sharpness(usable, exponent=self.settings.exponent, high=self.settings.high)
        self.target = {kind: r * self.norm_multiplier for kind, r in found.items() if kind not in self.pinned}
        self.measured_at = step
        if is_first_rank():
            left_out = [kind for kind in sharpness if kind not in usable and kind not in self.pinned]
            logger.warning(
                "lr_multipliers measured at step %d: %s; ramped in over %d steps (norm / type sharpness: %s)%s",
                step,
                ", ".join(f"{kind} {value:.2f}" for kind, value in self.target.items()),
                self.ramp_steps,
                ", ".join(f"{kind} {usable[REFERENCE] / value:.3g}" for kind, value in usable.items()),
                f"; without gradients, left at 1: {', '.join(left_out)}" if left_out else "",
            )

    def check_types(self, kinds: Iterable[str]) -> None:
        """Look at the block types of the whole model before the measurement.

        Raises:
            ValueError: it has no norms, to which all sharpness is relative.
        """
        found = list(kinds)
        if REFERENCE not in found:
            raise ValueError(
                f'lr_multipliers "auto" measures sharpness relative to norms, but the model has only '
                f"{', '.join(found)}. Give fixed multipliers."
            )

    def multipliers_after(self, step: int) -> dict[str, float]:
        """The multipliers, by measured block type, of the update that follows update number ``step``; empty: all 1."""
        if self.target is None:
            return {}
        steps = self.ramp_steps
        stages = min(STAGES, steps)
        stage = stages if not steps else min(stages, (step - self.measured_at) * stages // steps)
        if stage == stages:
            return dict(self.target)
        return {kind: 1.0 + (value - 1.0) * stage / stages for kind, value in self.target.items()}

    def state(self) -> AutoState:
        """What a resumed run needs, as plain containers."""
        return {
            "sums": dict(self.sums),
            "readings": self.readings,
            "target": None if self.target is None else dict(self.target),
            "measured_at": self.measured_at,
            "norm_multiplier": self.norm_multiplier,
        }

    def load(self, state: AutoState | None) -> None:
        """Go on from `state`; None starts afresh. Settings, unit and pinned types are this object's own."""
        if state is None:
            state = {"sums": {}, "readings": 0, "target": None, "measured_at": 0}
        target, unit = state["target"], self.norm_multiplier / state.get("norm_multiplier", 1.0)
        self.sums = dict(state["sums"])
        self.readings = int(state["readings"])
        self.target = None if target is None else {k: v * unit for k, v in target.items() if k not in self.pinned}
        self.measured_at = int(state["measured_at"])
