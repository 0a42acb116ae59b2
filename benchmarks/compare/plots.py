# SPDX-License-Identifier: Apache-2.0
"""The figures of a comparison: loss against steps, final loss against learning rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a training machine

from matplotlib import pyplot

from benchmarks.compare.results import ArmResult, Results
from benchmarks.compare.trials import ARMS, Plan, Trial

COLOURS = {
    "adamw": "#444444",
    "blockwise_adamw": "#0b5394",
    "adam_mini": "#b45f06",
    "blockwise_adam_mini": "#38761d",
    "muon": "#a64d79",
    "adamw_8bit": "#999999",
}
_LOSS = "validation loss (nats per token)"


def losses(results: Results, rows: Sequence[ArmResult], plan: Plan, title: str, path: Path) -> None:
    """Validation loss against steps at each arm's best learning rate, mean over seeds; shorter runs as points.

    Args:
        results: Of all trials.
        rows: Arms with their best learning rates.
        plan: Its steps.
        title: Of the figure.
        path: PNG file to write.
    """
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    top, bottom = 0.0, math.inf
    for row in rows:
        curves = [r["curve"] for t, r in results.items() if _at(t, row) and t.steps == plan.steps and r["curve"]]
        steps = [step for step, _ in curves[0]]
        means = [statistics.fmean(values) for values in zip(*([loss for _, loss in c] for c in curves), strict=True)]
        label = f"{ARMS[row.arm].label}, {row.lr:g}: {row.loss.mean:.3f}"
        axes.plot(steps, means, color=COLOURS[row.arm], label=label, marker="o", markersize=3)
        top, bottom = max(top, means[len(means) // 3]), min(bottom, *means)
        for length in sorted({t.steps for t in results if _at(t, row) and t.steps != plan.steps}):
            ends = [r["final_validation_loss"] for t, r in results.items() if _at(t, row) and t.steps == length]
            axes.plot(length, statistics.fmean(ends), color=COLOURS[row.arm], marker="*", markersize=9)
    axes.set(xlabel="optimizer steps (stars: the end of shorter complete decays)", ylabel=_LOSS)
    if bottom < top:
        axes.set_ylim(bottom - 0.05 * (top - bottom), top)
    axes.set_title(f"{title}: best learning rate of each optimizer")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def sweeps(results: Results, plan: Plan, title: str, path: Path) -> None:
    """Final loss against base learning rate, the first seed; runs that diverged stand at the upper edge.

    Args:
        results: Of all trials.
        plan: Its steps.
        title: Of the figure.
        path: PNG file to write.
    """
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    swept = [t for t in results if not t.change and t.seed == 1 and t.steps == plan.steps]
    ended = [results[t]["final_validation_loss"] for t in swept if results[t]["diverged"] is None]
    ceiling = min(max(ended), min(ended) + 0.5) + 0.02
    for arm in (a for a in ARMS if any(t.arm == a for t in swept)):
        points = sorted((t.lr, _finite(results[t]["final_validation_loss"], ceiling)) for t in swept if t.arm == arm)
        axes.plot(*zip(*points, strict=True), color=COLOURS[arm], label=ARMS[arm].label, marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    ticks = sorted({t.lr for t in swept})
    axes.set_xticks(ticks, [f"{lr:g}" for lr in ticks], fontsize=8)
    axes.set(xlabel="base learning rate", ylabel=f"final {_LOSS}", ylim=(None, ceiling))
    axes.set_title(f"{title}: learning rates, {plan.steps} steps, one seed")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def is_in_losses(trial: Trial, rows: Sequence[ArmResult], plan: Plan) -> bool:
    """Whether `losses` draws the trial's curve, unless it diverged."""
    return trial.steps == plan.steps and any(_at(trial, row) for row in rows)


def _at(trial: Trial, row: ArmResult) -> bool:
    return trial.arm == row.arm and not trial.change and trial.lr == row.lr


def _finite(loss: float | None, ceiling: float) -> float:
    return ceiling if loss is None or not math.isfinite(loss) else min(loss, ceiling)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
