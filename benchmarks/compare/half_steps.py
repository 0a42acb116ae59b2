# SPDX-License-Identifier: Apache-2.0
"""Does Blockwise Muon reach tuned AdamW's final loss in half of its steps? The rule was written before the runs.

python -m benchmarks.compare.half_steps             # about two hours on two cores; goes on where it stopped
python -m benchmarks.compare.half_steps --minutes 30

The first seed chooses for every side: learning rate, settings, and the warm-up among a twentieth and a fifth of the
steps. The verdict is from the four other seeds, which chose nothing. AdamW trains 800 steps, the others 400, all with
complete decays. Differences are between runs of one seed. "Reached": the mean difference is at least two standard
errors below 0. "Missed": as far above. Else the runs do not decide. AdamW's first seed is that of `make compare`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from benchmarks.compare import report
from benchmarks.compare.results import Estimate, Results, at_best, best_of, loss_of
from benchmarks.compare.run import RUN_FILE, Stopped, Trials, sweep
from benchmarks.compare.trials import ARMS, BASELINE, FULL, HALF, PATIENT, Trial
from benchmarks.provenance import ROOT, cores, write_between

OURS = tuple(arm for arm in HALF.arms if arm.startswith("blockwise"))
PEERS = tuple(arm for arm in HALF.arms if arm not in OURS)
CHOOSING, JUDGING = 1, tuple(range(2, HALF.seeds + 1))
WHOLE_SEEDS = range(1, FULL.seeds + 1)
PAGE, MARK = ROOT / "docs" / "evidence.md", "half_steps"
CSV = report.DOCS / "half_steps.csv"


def baseline() -> list[Trial]:
    """Tuned AdamW, every seed: the better warm-up of the published comparisons with the rate that was best there."""
    best = []
    for name, plan in (("compare", FULL), ("compare_warmup", PATIENT)):
        results = report.read_csv(report.DOCS / f"{name}.csv", plan)
        first = at_best(results, plan, BASELINE)[0]
        best.append((loss_of(results, first), first))
    _, first = min(best, key=lambda found: found[0])
    return [replace(first, seed=seed) for seed in range(1, HALF.seeds + 1)]


def short_warmups(results: Results, arms: Sequence[str]) -> list[Trial]:
    """The best of some arms with the usual warm-up, at its best rate and at half of it: short warm-ups bear less."""
    best = _best(results, arms, warmup=HALF.warmup)
    return [replace(best, lr=lr, warmup=FULL.warmup) for lr in (best.lr, best.lr / 2)]


def chosen(results: Results, arms: Sequence[str]) -> Trial:
    """The first seed's best of some arms: settings, rate and warm-up."""
    return _best(results, arms)


def _best(results: Results, arms: Sequence[str], warmup: float | None = None) -> Trial:
    return best_of(
        results,
        [
            t
            for t in results
            if t.arm in arms and (t.steps, t.seed) == (HALF.steps, CHOOSING) and warmup in (None, t.warmup)
        ],
    )


def train(trials: Trials) -> None:
    """Everything; each part depends on the results of those before.

    Raises:
        Stopped: The time is up.
    """
    trials.train(baseline(), "AdamW")
    sweep(trials, HALF)  # type: ignore[arg-type]
    sides = (OURS, PEERS)
    trials.train([trial for arms in sides for trial in short_warmups(trials.results, arms)], "short warm-ups")
    best = [chosen(trials.results, arms) for arms in sides]
    trials.train([replace(trial, seed=seed) for trial in best for seed in JUDGING], "seeds")
    trials.train([t for trial in best for t in whole(trial)], "whole runs")


def whole(trial: Trial) -> list[Trial]:
    """The same settings for as many steps as AdamW has."""
    return [replace(trial, steps=FULL.steps, seed=seed) for seed in WHOLE_SEEDS]


def verdict_table(results: Results) -> str:
    """AdamW, the best of ours and the best peer, over the seeds that chose nothing."""
    adamw = baseline()
    lines = [
        "| optimizer | lr | warm-up | steps | final validation loss, nats | minus AdamW's at 800, nats "
        "| CPU time / AdamW's | state, bytes per parameter |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    sides = [chosen(results, arms) for arms in (OURS, PEERS)]
    judged = [seed for seed in JUDGING if all(replace(t, seed=seed) in results for t in (adamw[0], *sides))]
    if not judged:
        return f"No verdict yet: {len(JUDGING)} of {len(JUDGING)} seeds are not trained."
    shown = [(adamw[0], judged), *((trial, judged) for trial in sides)]
    for trial in sides:
        seeds = [t.seed for t in whole(trial) if t in results]
        shown += [(replace(trial, steps=FULL.steps), seeds)] if len(seeds) == len(WHOLE_SEEDS) else []
    lines += [_row(results, adamw[0], trial, seeds) for trial, seeds in shown]
    words = [_verdict(results, adamw[0], trial, judged) for trial in sides if len(judged) == len(JUDGING)]
    missing = len(JUDGING) - len(judged)
    words += [f"{missing} of {len(JUDGING)} seeds are missing: no verdict yet."] if missing else []
    rates = "Every side has the best of its own rates, settings and warm-ups, found with the first seed."
    plan = replace(FULL, warmup=HALF.warmup)
    return "\n".join([*lines, "", *words, "", report.provenance_text(results, plan, rates=rates, seeds=len(judged))])


def _difference(results: Results, adamw: Trial, trial: Trial, seeds: Sequence[int]) -> Estimate:
    return Estimate.of(
        [loss_of(results, replace(trial, seed=s)) - loss_of(results, replace(adamw, seed=s)) for s in seeds]
    )


def _row(results: Results, adamw: Trial, trial: Trial, seeds: Sequence[int]) -> str:
    runs = [replace(trial, seed=seed) for seed in seeds]
    loss = Estimate.of([loss_of(results, run) for run in runs])
    difference = "" if trial == adamw else _difference(results, adamw, trial, seeds).text("+.4f")
    seconds = [sum(results[replace(of, seed=s)]["cpu_seconds"] for s in seeds) for of in (trial, adamw)]
    state = results[runs[0]]["optimizer_state_bytes_per_parameter"]
    return (
        f"| {ARMS[trial.arm].label} | {trial.lr:g} | {trial.warmup:.0%} | {trial.steps} | {loss.text()} "
        f"({len(seeds)} seeds) | {difference} | {seconds[0] / seconds[1]:.2f} | {state:.2f} |"
    )


def _verdict(results: Results, adamw: Trial, trial: Trial, seeds: Sequence[int]) -> str:
    difference = _difference(results, adamw, trial, seeds)
    word = {-1: "reached", 0: "not decided", 1: "missed"}[difference.sign]
    return (
        f"{ARMS[trial.arm].label}: AdamW's loss after {adamw.steps} steps in {trial.steps}: **{word}** "
        f"({difference.text('+.4f')}, {len(seeds)} seeds).\n"
    )


def choice_table(results: Results) -> str:
    """What the first seed said of every arm and warm-up, the best first."""
    tried: dict[tuple[str, float], list[Trial]] = {}
    for trial in results:
        if trial.arm in HALF.arms and (trial.steps, trial.seed) == (HALF.steps, CHOOSING):
            tried.setdefault((trial.arm, trial.warmup), []).append(trial)
    best = {key: best_of(results, trials) for key, trials in tried.items()}
    lines = [
        "| optimizer | warm-up | rates tried | best lr | loss after 400 steps, nats |",
        "|---|---:|---:|---:|---:|",
    ]
    for (arm, warmup), trial in sorted(best.items(), key=lambda found: loss_of(results, found[1])):
        lines.append(
            f"| {ARMS[arm].label} | {warmup:.0%} | {len(tried[arm, warmup])} | {trial.lr:g} "
            f"| {loss_of(results, trial):.4f} |"
        )
    adamw = baseline()[0]
    target = f"AdamW's best rate ends {adamw.steps} steps at {loss_of(results, adamw):.4f} with this seed."
    shown = {t: result for t, result in results.items() if t.arm in HALF.arms and t.steps == HALF.steps}
    return "\n".join([*lines, "", report.provenance_text(shown, HALF, rates=target, seeds=1)])


def tables(results: Results) -> Iterator[tuple[str, str]]:
    """Marks of the page and what stands between them."""
    if any(t.arm in PEERS for t in results) and any(t.arm in OURS for t in results):
        yield f"{MARK} verdict", verdict_table(results)
        yield f"{MARK} choice", choice_table(results)


def read() -> Results:
    """What has been trained, from the published file."""
    return report.read_csv(CSV, FULL)


def main() -> int:
    """Train what is missing, then write the tables into the evidence page.

    Returns:
        0; 1 if the time was up before all had been trained.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=cores(), help="runs at a time, one core each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    options = parser.parse_args()
    os.chdir(ROOT)
    deadline, stopped = time.monotonic() + 60 * options.minutes, None
    with Trials(ROOT / "runs" / "compare" / "half_steps", RUN_FILE, options.workers, deadline, finished=CSV) as found:
        for name in ("compare", "compare_warmup"):
            found.add_finished(report.DOCS / f"{name}.csv")
        try:
            train(found)
        except Stopped as reason:
            stopped = reason
        report.write_csv(found.results, CSV)
        # tables come from the file, so that they can be had again from it, digit by digit
        for mark, text in tables(read()):
            print(text)
            write_between(PAGE, mark, text)
    if stopped is not None:
        print(f"not complete: {stopped}")
    return int(stopped is not None)


if __name__ == "__main__":
    sys.exit(main())
