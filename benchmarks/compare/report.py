# SPDX-License-Identifier: Apache-2.0
"""What a comparison writes: a CSV of all trials, tables, figures, and the pages that show them."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare import plots
from benchmarks.compare.ablations import ablations
from benchmarks.compare.results import (
    DIVERGED,
    ArmResult,
    Estimate,
    Results,
    against,
    arm_results,
    at_best,
    loss_of,
    plain,
)
from benchmarks.compare.trials import ARMS, BASELINE, Plan, Trial
from benchmarks.provenance import PROVENANCE, ROOT, write_between

DOCS = ROOT / "docs" / "compare"
EVIDENCE, COMPARISONS = ROOT / "docs" / "evidence.md", ROOT / "docs" / "comparisons.md"
COLUMNS = (
    "arm",
    "change",
    "base_lr",
    "seed",
    "steps",
    "warmup_share",
    "final_validation_loss",
    "cpu_seconds_per_step",
    "state_bytes_per_parameter",
    "parameters",
    "tokens",
    "fingerprint",
    "curve",
    *PROVENANCE,
)


def table(rows: Sequence[ArmResult], results: Results, plan: Plan) -> str:
    """The comparison as Markdown, with where it comes from."""
    lines = [
        f"| optimizer | best lr, in AdamW's unit | final validation loss, nats | minus AdamW's, nats | "
        f"steps to AdamW's loss at {plan.steps} | CPU time to it / AdamW's | CPU time per step, s | "
        f"state, bytes per parameter |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    baseline = next((row for row in rows if row.arm == BASELINE), None)
    of_baseline = math.nan if baseline is None else baseline.cpu_seconds_per_step
    is_timed = [baseline is None or row.timed == baseline.timed for row in rows]
    for row, timed in zip(rows, is_timed, strict=True):
        against = "" if row.against_baseline is None else row.against_baseline.text("+.4f")
        reached, step_over_baseline = row.steps_to_baseline, row.cpu_seconds_per_step / of_baseline
        steps = "" if reached is None else reached.steps_text()
        time = "" if reached is None or not timed else reached.time_text(step_over_baseline, plan.steps)
        per_step = f"{row.cpu_seconds_per_step:.3f}" if timed else ""
        arm, rate = ARMS[row.arm], f"{ARMS[row.arm].adamw_rate(row.lr):.3g}"
        lines.append(
            f"| {arm.label} | {rate} | {row.loss.text()} | {against} | {steps} | {time} | "
            f"{per_step} | {row.state_bytes:.2f} |"
        )
    untimed = " CPU time is left out where it was measured on another day than AdamW's." if not all(is_timed) else ""
    return "\n".join([*lines, "", provenance_text(results, plan) + untimed])


def ablation_table(results: Results, plan: Plan, best: Mapping[str, float]) -> str:
    """Each change against the same arm and seeds without it; what is not trained is counted.

    The rate without it is the same, or the arm's best where the same was not trained.

    Args:
        results: Of all trials that have finished.
        plan: Its steps and seeds.
        best: Best learning rate by arm.
    """
    lines = [
        "| optimizer | change | lr, in AdamW's unit | final validation loss, nats | change in loss, nats |",
        "|---|---|---:|---:|---:|",
    ]
    asked = ablations(best, plan)
    missing = []
    for ablation in asked:
        trials = [t for seed in range(1, plan.seeds + 1) if (t := ablation.trial(plan, seed)) in results]
        if not trials:
            missing.append(ablation.words)
            continue
        losses = [loss_of(results, t) for t in trials]
        unchanged = [t for t in plain(results, ablation.arm, plan.steps) if t.lr == ablation.lr]
        same_rate = bool(unchanged)
        difference = against(results, trials, unchanged if same_rate else at_best(results, plan, ablation.arm))
        diverged = math.isinf(max(losses))
        shown = DIVERGED if diverged else Estimate.of(losses).text()
        change = "" if difference is None or diverged else difference.text("+.4f")
        change += "" if same_rate or not change else ", to the best rate"
        arm, rate = ARMS[ablation.arm], f"{ARMS[ablation.arm].adamw_rate(ablation.lr):.3g}"
        lines.append(f"| {arm.label} | {ablation.words} | {rate} | {shown} | {change} |")
    if len(missing) == len(asked):
        lines = []
    if missing:
        lines += ["", f"{len(missing)} of {len(asked)} are not trained yet: {'; '.join(dict.fromkeys(missing))}."]
    return "\n".join(lines).lstrip("\n")


_BEST = "Every optimizer has the best of its own learning rates, found with the first seed."


def provenance_text(
    results: Results, plan: Plan, *, rates: str = _BEST, seeds: int | None = None, warmup: str = ""
) -> str:
    """One paragraph: what was trained, where, with which versions.

    Args:
        results: All that a table shows.
        plan: Its steps, warm-up and precision.
        rates: How learning rates were chosen.
        seeds: How many; None: the plan's.
        warmup: What is said of it, if not the plan's share.
    """
    seeds = plan.seeds if seeds is None else seeds
    trial, some = next((t, r) for t, r in results.items() if r["diverged"] is None)
    of = some["provenance"]
    commits = sorted({r["provenance"]["commit"] for r in results.values()})
    machines = sorted({r["provenance"]["cpu"] for r in results.values()})
    dates = sorted({r["provenance"]["date"] for r in results.values()})
    precision = "bf16 with fp32 master weights" if plan.bf16 else "fp32"
    warmup = warmup or f"{plan.warmup:.0%} of them warm-up"
    return (
        f"LLaMA of {some['parameters']:,} parameters on Python source text, {precision}, {plan.steps} steps of "
        f"{some['tokens'] // trial.steps:,} tokens, {warmup}, complete decays. {rates} "
        f"{'One seed' if seeds == 1 else f'{seeds} seeds'}; differences are between runs of the same seed; ± is one "
        f"standard error. CPU time includes validation. Measured by "
        f"`benchmarks/compare/run.py`, one process on one core of {' or '.join(machines)}, torch {of['torch']}, "
        f"DeepSpeed {of['deepspeed']}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, "
        f"commit {', '.join(commits)}."
    )


def write_csv(results: Results, path: Path) -> None:
    """One line for each trial."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for trial, result in sorted(results.items(), key=lambda item: item[0].name):
            ended = result["diverged"] is None
            writer.writerow(
                [
                    trial.arm,
                    trial.change,
                    f"{trial.lr:g}",
                    trial.seed,
                    trial.steps,
                    repr(trial.warmup),
                    f"{result['final_validation_loss']:.5f}" if ended else DIVERGED,
                    f"{result['cpu_seconds'] / trial.steps:.4f}" if ended else "",
                    f"{result['optimizer_state_bytes_per_parameter']:.4f}" if ended else "",
                    result.get("parameters", ""),
                    result.get("tokens", ""),
                    result["fingerprint"],
                    " ".join(f"{step}:{loss:.5f}" for step, loss in result["curve"]),
                    *(result["provenance"][key] for key in PROVENANCE),
                ]
            )


def read_csv(path: Path, plan: Plan) -> dict[Trial, dict[str, Any]]:
    """The results that `write_csv` wrote, by trial.

    Args:
        path: The CSV.
        plan: Under which its trials were trained.
    """
    rows = _rows(path)
    found = {trial: result for trial, result in rows if not trial.change}
    changed = {trial.name: result for trial, result in rows if trial.change}
    best = {row.arm: row.lr for row in arm_results(found, plan)}
    whole = [ablation.trial(plan, seed) for ablation in ablations(best, plan) for seed in range(1, plan.seeds + 1)]
    return found | {trial: changed[trial.name] for trial in whole if trial.name in changed}


def named_in(path: Path) -> dict[str, dict[str, Any]]:
    """The results that `write_csv` wrote, by the names of their trials."""
    return {trial.name: result for trial, result in _rows(path)}


def _rows(path: Path) -> list[tuple[Trial, dict[str, Any]]]:
    """Each line's trial, without what its change sets, and its result."""
    with open(path, newline="", encoding="utf-8") as file:
        return [
            (
                Trial(
                    row["arm"],
                    float(row["base_lr"]),
                    int(row["seed"]),
                    int(row["steps"]),
                    row["change"],
                    warmup=float(row["warmup_share"]),
                ),
                _result(row),
            )
            for row in csv.DictReader(file)
        ]


def finished_in(path: Path) -> dict[str, dict[str, Any]]:
    """The results that `write_csv` wrote, by fingerprint: those of another machine count as well."""
    with open(path, newline="", encoding="utf-8") as file:
        return {row["fingerprint"]: _result(row) for row in csv.DictReader(file)}


def _result(row: Mapping[str, str]) -> dict[str, Any]:
    """What a trial left, from its line of the CSV."""
    provenance = {key: row[key] for key in PROVENANCE}
    result: dict[str, Any] = {"fingerprint": row["fingerprint"], "provenance": provenance}
    if row["final_validation_loss"] == DIVERGED:
        return result | {"diverged": DIVERGED, "final_validation_loss": None, "curve": []}
    points = (point.split(":") for point in row["curve"].split())
    return result | {
        "diverged": None,
        "final_validation_loss": float(row["final_validation_loss"]),
        "curve": [(int(step), float(loss)) for step, loss in points],
        "cpu_seconds": float(row["cpu_seconds_per_step"]) * int(row["steps"]),
        "optimizer_state_bytes_per_parameter": float(row["state_bytes_per_parameter"]),
        "parameters": int(row["parameters"]),
        "tokens": int(row["tokens"]),
    }


def write(results: Results, name: str, plan: Plan, folder: Path, *, published: bool) -> str:
    """Write CSV, tables and figures beside the trials and, if whole, into the repository.

    Args:
        results: Of all trials that have finished.
        name: Of the comparison, in its files and the marks of its tables.
        plan: What was asked for.
        folder: Of the trials.
        published: Also replace its files in docs/compare and its tables in docs/comparisons.md.

    Returns:
        The table for the terminal.
    """
    if not arm_results(results, plan):
        return "no optimizer has finished its learning rates yet"
    write_csv(results, folder / f"{name}.csv")
    # tables come from the file, so that they can be had again from it, digit by digit
    read = read_csv(folder / f"{name}.csv", plan)
    rows = arm_results(read, plan)
    text = table(rows, read, plan)
    changes = ablation_table(read, plan, {row.arm: row.lr for row in rows})
    size = next(r["parameters"] for r in results.values() if r["diverged"] is None) / 1e6
    title = f"LLaMA of {size:.1f}M parameters, {plan.warmup:.0%} warm-up"
    if published:
        write_csv(results, DOCS / f"{name}.csv")
    for target in (folder, DOCS) if published else (folder,):
        plots.losses(results, rows, plan, title, target / f"{name}.png")
        plots.sweeps(results, plan, title, target / f"{name}_sweep.png")
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    if published:
        write_between(COMPARISONS, f"{name} results", text)
        if plan.ablations:
            write_between(COMPARISONS, f"{name} ablations", changes)
    return f"{text}\n\n{changes}\n\nwritten to {folder}"
