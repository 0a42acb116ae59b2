# SPDX-License-Identifier: Apache-2.0
"""The figures of a comparison: loss against steps, final loss against learning rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib import color_sequences
from matplotlib.ticker import NullLocator

from benchmarks.compare.results import ArmResult, Results
from benchmarks.compare.trials import ARMS, BASELINE, Plan, Trial
from ds_blockwise.figure_style import (
    OPTIMIZER_COLOURS,
    finish_lines,
    new_figure,
    save,
    scale_y,
    show_coinciding,
    step_axis,
)

_OTHERS = color_sequences["tab20"]
COLOURS = {arm: _OTHERS[number % len(_OTHERS)] for number, arm in enumerate(ARMS)} | {
    arm: OPTIMIZER_COLOURS[name]
    for arm, name in {
        "adamw": "AdamW",
        "blockwise_adamw": "BlockwiseAdamW",
        "adam_mini": "Adam-mini",
        "blockwise_adam_mini": "BlockwiseAdamMini",
        "muon": "Muon",
        "adamw_8bit": "AdamW8bit",
        "muon_roles_3x": "MuonRoles",
        "blockwise_muon_heads_3x": "BlockwiseMuon",
        "blockwise_lion": "BlockwiseLion",
    }.items()
}
_LOSS = "validation loss (nats per token)"


def losses(results: Results, rows: Sequence[ArmResult], plan: Plan, title: str, path: Path) -> None:
    """Validation loss against steps at each arm's best learning rate, mean over seeds; shorter runs as points.

    The first third of the steps, where the loss falls most, is left out. Where a run has no curve (an older CSV), every
    arm is drawn by the ends of its complete decays alone.

    Args:
        results: Of all trials.
        rows: Arms with their best learning rates.
        plan: Its steps.
        title: Of the figure.
        path: PNG file to write.
    """
    figure, (axes,) = new_figure(10.0, 5.0)
    whole = [r for t, r in results.items() if t.steps == plan.steps and any(_at(t, row) for row in rows)]
    has_curves = all(r["curve"] for r in whole if r["diverged"] is None)
    lines, drawn, has_stars = {}, list[float](), not has_curves
    for row in rows:
        points = _ends(results, row)
        if has_curves:
            curves = [r["curve"] for t, r in results.items() if _at(t, row) and t.steps == plan.steps and r["curve"]]
            means = zip(*([loss for _, loss in curve] for curve in curves), strict=True)
            shown = list(zip([step for step, _ in curves[0]], map(statistics.fmean, means), strict=True))
            shown = shown[len(shown) // 3 :]
            shorter = [point for point in points if point[0] != plan.steps]
            has_stars = has_stars or bool(shorter)
            drawn += [loss for _, loss in shorter]
            for point in shorter:
                axes.plot(*point, color=COLOURS[row.arm], marker="*", markersize=9)
        else:
            shown = points
            if row.arm == BASELINE:
                axes.axhline(row.loss.mean, color=COLOURS[row.arm], linestyle=":")
        label = f"{ARMS[row.arm].label}\nlr {ARMS[row.arm].adamw_rate(row.lr):.3g}: {row.loss.mean:.3f}"
        mark = {"marker": "o", "markersize": 3} if has_curves else {"marker": "*", "markersize": 9}
        (lines[label],) = axes.plot(*zip(*shown, strict=True), color=COLOURS[row.arm], **mark)
        drawn += [loss for _, loss in shown]
    of = "shorter complete decays" if has_curves else "complete decays"
    step_axis(axes, "optimizer step" + f" (stars: the end of {of})" * has_stars)
    axes.set_ylabel(_LOSS)
    axes.set_title(f"{title}: best learning rate of each optimizer")
    scale_y(axes, [loss for loss in drawn if math.isfinite(loss)], log=False)
    finish_lines(axes, lines)
    save(figure, path)


def _ends(results: Results, row: ArmResult) -> list[tuple[int, float]]:
    """(steps, final loss averaged over seeds) of an arm's runs of each length, at its best learning rate."""
    found: dict[int, list[float]] = {}
    for trial, result in results.items():
        if _at(trial, row) and result["diverged"] is None:
            found.setdefault(trial.steps, []).append(result["final_validation_loss"])
    return [(steps, statistics.fmean(found[steps])) for steps in sorted(found)]


def sweeps(results: Results, plan: Plan, title: str, path: Path) -> None:
    """Final loss against learning rate in AdamW's unit, the first seed; runs that diverged stand at the upper edge.

    Args:
        results: Of all trials.
        plan: Its steps.
        title: Of the figure.
        path: PNG file to write.
    """
    figure, (axes,) = new_figure(10.0, 5.0)
    swept = [t for t in results if not t.change and t.seed == 1 and t.steps == plan.steps]
    ended = [results[t]["final_validation_loss"] for t in swept if results[t]["diverged"] is None]
    ceiling = min(max(ended), min(ended) + 0.5) + 0.02
    drawn: list[float] = []
    for arm in (a for a in ARMS if any(t.arm == a for t in swept)):
        rate = ARMS[arm].adamw_rate
        points = sorted(
            (rate(t.lr), _finite(results[t]["final_validation_loss"], ceiling)) for t in swept if t.arm == arm
        )
        axes.plot(*zip(*points, strict=True), color=COLOURS[arm], label=ARMS[arm].label, marker="o", markersize=4)
        drawn += [loss for _, loss in points]
    axes.set_xscale("log", base=2)
    axes.set_xlabel("learning rate, in AdamW's unit (at the upper edge: this loss or more, or diverged)")
    ticks = sorted({ARMS[t.arm].adamw_rate(t.lr) for t in swept})
    axes.set_xticks(ticks, [f"{lr:.3g}" for lr in ticks], fontsize=7, rotation=45)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylabel(f"final {_LOSS}")
    axes.set_title(f"{title}: learning rates, {plan.steps} steps, one seed")
    scale_y(axes, drawn, log=False)
    axes.set_ylim(top=ceiling)
    show_coinciding(axes.lines)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    save(figure, path)


def _at(trial: Trial, row: ArmResult) -> bool:
    return trial.arm == row.arm and not trial.change and trial.lr == row.lr


def _finite(loss: float | None, ceiling: float) -> float:
    return ceiling if loss is None or not math.isfinite(loss) else min(loss, ceiling)
