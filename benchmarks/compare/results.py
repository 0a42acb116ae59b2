# SPDX-License-Identifier: Apache-2.0
"""What the trials of a comparison amount to: best rates, means over seeds, steps to the same loss."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.compare.trials import BASELINE, Plan, Trial

Results = Mapping[Trial, Mapping[str, Any]]
DIVERGED = "diverged"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; the standard error is NaN for a single one."""

    mean: float
    error: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """From one value per seed; infinite without an error if a seed diverged."""
        if math.inf in values:
            return cls(math.inf, math.nan, len(values))
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), spread / math.sqrt(len(values)), len(values))

    @property
    def sign(self) -> int:
        """-1 or 1 if the mean is further from 0 than two standard errors, else 0; a single seed is believed."""
        unsure = self.seeds > 1 and abs(self.mean) <= 2 * self.error  # not if one of them has diverged
        return 0 if unsure or not self.mean else int(math.copysign(1, self.mean))

    def text(self, form: str = ".4f") -> str:
        """``3.5123 ± 0.0012``."""
        return format(self.mean, form) + (f" ± {self.error:.4f}" if self.seeds > 1 else " (one seed)")


def loss_of(results: Results, trial: Trial) -> float:
    """Final validation loss in nats per token; infinite if the trial diverged."""
    loss = results[trial]["final_validation_loss"]
    return math.inf if loss is None else float(loss)


def best_of(results: Results, trials: Sequence[Trial]) -> Trial:
    """The trial with the lowest final loss."""
    return min(trials, key=lambda trial: loss_of(results, trial))


def mean_loss(results: Results, trials: Sequence[Trial]) -> float:
    """Mean final loss."""
    return statistics.fmean(loss_of(results, trial) for trial in trials)


def against(results: Results, trials: Sequence[Trial], baseline: Sequence[Trial]) -> Estimate | None:
    """Difference of final losses between runs of one seed; None for the baseline itself and without common seeds."""
    losses = {t.seed: loss_of(results, t) for t in baseline if t not in trials}
    paired = [loss_of(results, t) - losses[t.seed] for t in trials if t.seed in losses]
    return Estimate.of(paired) if paired else None


@dataclass(frozen=True)
class StepsTo:
    """Steps of a complete decay that ends at the baseline's final loss.

    Attributes:
        steps: How many.
        words: What is known of the number, for readers: empty, "about", "fewer than" or "not within".
    """

    steps: int
    words: str = ""

    def steps_text(self) -> str:
        """``fewer than 800``."""
        return f"{self.words} {self.steps}".lstrip()

    def time_text(self, step_over_baseline: float, baseline_steps: int) -> str:
        """The CPU time of these steps, of the baseline's whole run; empty where they are not enough.

        Args:
            step_over_baseline: CPU time of a step over the baseline's.
            baseline_steps: Of its whole run.
        """
        if self.words == "not within":
            return ""
        words = self.words.replace("fewer", "less")
        return f"{words} {step_over_baseline * self.steps / baseline_steps:.2f}".lstrip()


@dataclass(frozen=True)
class ArmResult:
    """What the table says of one arm.

    Attributes:
        timed: Processors and days of its runs: CPU time is compared between equal ones only.
    """

    arm: str
    lr: float
    loss: Estimate
    against_baseline: Estimate | None
    steps_to_baseline: StepsTo | None
    cpu_seconds_per_step: float
    state_bytes: float
    timed: frozenset[tuple[str, str]]


def arm_results(results: Results, plan: Plan) -> list[ArmResult]:
    """Every arm whose sweep has finished, at its best learning rate."""
    found = []
    seeds = {arm: at_best(results, plan, arm) for arm in plan.arms}
    for arm, trials in seeds.items():
        if not trials:
            continue
        ended = [t for t in trials if results[t]["diverged"] is None]
        if not ended:
            continue
        found.append(
            ArmResult(
                arm,
                trials[0].lr,
                Estimate.of([loss_of(results, t) for t in trials]),
                against(results, trials, seeds[BASELINE]),
                steps_to(results, plan, trials, seeds[BASELINE]),
                statistics.median(results[t]["cpu_seconds"] / t.steps for t in ended),
                results[ended[0]]["optimizer_state_bytes_per_parameter"],
                frozenset((of["cpu"], of["date"]) for of in (results[t]["provenance"] for t in ended)),
            )
        )
    return found


def plain(results: Results, arm: str, steps: int) -> list[Trial]:
    """The arm's trials of this length, without a change."""
    return [t for t in results if t.arm == arm and not t.change and t.steps == steps]


def at_best(results: Results, plan: Plan, arm: str) -> list[Trial]:
    """The arm's seeds at the learning rate that was best at the first."""
    trials = plain(results, arm, plan.steps)
    swept = [t for t in trials if t.seed == 1]
    if not swept:
        return []
    lr = best_of(results, swept).lr
    return sorted((t for t in trials if t.lr == lr), key=lambda t: t.seed)


def steps_to(results: Results, plan: Plan, trials: Sequence[Trial], baseline: Sequence[Trial]) -> StepsTo | None:
    """Interpolated between the lengths that were trained with the same seeds; None without a baseline.

    Args:
        results: Of all trials.
        plan: Its steps.
        trials: Whole runs of one arm at one rate. Shorter ones count with as many warm-up steps, or as large a share.
        baseline: Whole runs of the baseline.
    """
    arm, lr, warmup = trials[0].arm, trials[0].lr, trials[0].warmup
    difference = against(results, trials, baseline)
    if difference is None:
        return StepsTo(plan.steps) if arm == BASELINE else None
    if difference.sign == 0:
        return StepsTo(plan.steps, "about")
    if difference.sign > 0:
        return StepsTo(plan.steps, "not within")
    seeds = {t.seed for t in trials}
    target = mean_loss(results, [t for t in baseline if t.seed in seeds])
    lengths = sorted({t.steps for t in results if t.arm == arm and not t.change and t.lr == lr})
    points = []
    for steps in lengths:
        warmups = {warmup, warmup * plan.steps / steps}
        at = [t for t in plain(results, arm, steps) if t.lr == lr and t.warmup in warmups and t.seed in seeds]
        if len(at) == len(trials):  # a mean of other seeds would be compared with other seeds
            points.append((steps, mean_loss(results, at)))
    for (short, above), (long, below) in itertools.pairwise(points):
        if below <= target < above:
            share = (above - target) / (above - below)
            return StepsTo(round(short * (long / short) ** share))
    return StepsTo(points[0][0], "fewer than")
