# SPDX-License-Identifier: Apache-2.0
"""Does Blockwise Muon reach tuned AdamW's final loss in half of its steps? The rule was written before the runs.

python -m benchmarks.compare.questions.half_steps             # about two hours on two cores; goes on where it stopped
python -m benchmarks.compare.questions.half_steps --minutes 30
python -m benchmarks.compare.questions.half_steps --plan 5m   # 5.0M parameters, in bf16

The first seed chooses for every side: learning rate, settings, and the warm-up among a twentieth and a fifth of the
steps. The verdict is from the four other seeds, which chose nothing. AdamW trains 800 steps, the
others 400, all with complete decays. Differences are between runs of one seed. "Reached": the mean difference is at
least two standard errors below 0. "Missed": as far above. Else the runs do not decide. AdamW's first seed is that of
`make compare`, with the best rate there; where that has one warm-up only, the other one is tried here.

The larger model gets the settings that were best with the smaller one, ours and the peer's, each with a sweep of its
own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.compare import report
from benchmarks.compare.results import Estimate, Results, at_best, best_of, loss_of, steps_to
from benchmarks.compare.run import RUN_FILE, Asked, Trials, answer, parser_of, sweep
from benchmarks.compare.trials import ARMS, BASELINE, FULL, HALF, HALF_5M, LARGER, PATIENT, Plan, Trial
from benchmarks.provenance import ROOT

CHOOSING = 1
WHOLE_SEEDS = range(1, FULL.seeds + 1)


@dataclass(frozen=True)
class Size:
    """The question for one model.

    Attributes:
        name: Of its CSV, and of the marks of its tables.
        run_file: Model, data and batch.
        plan: What is trained for half of the steps.
        published: The comparisons in which AdamW was tuned, by the name of their CSV.
    """

    name: str
    run_file: Path
    plan: Plan
    published: Mapping[str, Plan]

    @property
    def csv(self) -> Path:
        """What has been trained."""
        return report.DOCS / f"{self.name}.csv"

    @property
    def sides(self) -> tuple[tuple[str, ...], ...]:
        """Arms that compete for one verdict: ours, and the peers if there are any."""
        ours = tuple(arm for arm in self.plan.arms if arm.startswith("blockwise"))
        peers = tuple(arm for arm in self.plan.arms if arm not in ours)
        return tuple(side for side in (ours, peers) if side)

    @property
    def judging(self) -> tuple[int, ...]:
        """Seeds that chose nothing."""
        return tuple(range(CHOOSING + 1, self.plan.seeds + 1))

    def baseline(self, results: Results) -> list[Trial]:
        """Tuned AdamW, every seed, with the best rate and warm-up of those that are published or were tried here."""
        tried = {t: loss_of(results, t) for t in self.short_baseline() if t in results} | self._published_baselines()
        first = min(tried, key=lambda trial: tried[trial])
        return [replace(first, seed=seed) for seed in range(1, self.plan.seeds + 1)]

    def short_baseline(self) -> list[Trial]:
        """AdamW with the usual warm-up where no published comparison has it, at its best rate and at half of it."""
        published = self._published_baselines()
        if any(trial.warmup == FULL.warmup for trial in published):
            return []
        best = min(published, key=lambda trial: published[trial])
        return [replace(best, lr=lr, warmup=FULL.warmup) for lr in (best.lr, best.lr / 2)]

    def _published_baselines(self) -> dict[Trial, float]:
        """AdamW's best of each published comparison, the first seed, with its loss."""
        found = {}
        for name, plan in self.published.items():
            results = report.read_csv(report.DOCS / f"{name}.csv", plan)
            first = at_best(results, plan, BASELINE)[0]
            found[first] = loss_of(results, first)
        return found

    def short_warmups(self, results: Results, arms: Sequence[str]) -> list[Trial]:
        """The best of some arms with the usual warm-up, at its best rate and at half of it.

        It is shorter than the plan's, and short warm-ups bear lower rates.
        """
        best = self._best(results, arms, warmup=self.plan.warmup)
        return [replace(best, lr=lr, warmup=FULL.warmup) for lr in (best.lr, best.lr / 2)]

    def chosen(self, results: Results, arms: Sequence[str]) -> Trial:
        """The first seed's best of some arms: settings, rate and warm-up."""
        return self._best(results, arms)

    def first_seed(self, results: Results) -> Iterator[Trial]:
        """What was tried in half of the steps with the seed that chooses."""
        for trial in results:
            if trial.arm in self.plan.arms and (trial.steps, trial.seed) == (self.plan.steps, CHOOSING):
                yield trial

    def _best(self, results: Results, arms: Sequence[str], warmup: float | None = None) -> Trial:
        tried = [t for t in self.first_seed(results) if t.arm in arms and warmup in (None, t.warmup)]
        return best_of(results, tried)

    def read(self) -> Results:
        """What has been trained, from the published file."""
        return report.read_csv(self.csv, FULL)


SIZES = {
    "1m": Size("half_steps", RUN_FILE, HALF, {"compare": FULL, "compare_warmup": PATIENT}),
    "5m": Size("half_steps_5m", ROOT / "configs/run/compare_5m.yaml", HALF_5M, {"compare_5m": LARGER}),
}


def train(trials: Trials, size: Size) -> None:
    """Everything; each part depends on the results of those before.

    Raises:
        Stopped: The time is up.
    """
    trials.train(size.short_baseline(), "AdamW, short warm-up")
    trials.train(size.baseline(trials.results), "AdamW")
    sweep(trials, size.plan)
    short = [trial for arms in size.sides for trial in size.short_warmups(trials.results, arms)]
    trials.train(short, "short warm-ups")
    best = [size.chosen(trials.results, arms) for arms in size.sides]
    trials.train([replace(trial, seed=seed) for trial in best for seed in size.judging], "seeds")
    trials.train([t for trial in best for t in whole(trial)], "whole runs")


def whole(trial: Trial) -> list[Trial]:
    """The same settings for as many steps as AdamW has."""
    return [replace(trial, steps=FULL.steps, seed=seed) for seed in WHOLE_SEEDS]


def verdict_table(results: Results, size: Size) -> str:
    """AdamW, the best of ours and the best peer, over the seeds that chose nothing."""
    adamw, judging = size.baseline(results), size.judging
    lines = [
        "| optimizer | lr | warm-up | steps | final validation loss, nats | minus AdamW's at 800, nats "
        "| state, bytes per parameter |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    sides = [size.chosen(results, arms) for arms in size.sides]
    judged = [seed for seed in judging if all(replace(t, seed=seed) in results for t in (adamw[0], *sides))]
    if not judged:
        return f"No verdict yet: {len(judging)} of {len(judging)} seeds are not trained."
    shown = [(adamw[0], judged), *((trial, judged) for trial in sides)]
    for trial in sides:
        seeds = [t.seed for t in whole(trial) if t in results]
        shown += [(replace(trial, steps=FULL.steps), seeds)] if len(seeds) == len(WHOLE_SEEDS) else []
    lines += [row(results, adamw[0], trial, seeds) for trial, seeds in shown]
    words = [reached_or_missed(results, adamw[0], trial, judged) for trial in sides if len(judged) == len(judging)]
    words += [text for trial in sides if (text := _reached(results, size, trial))]
    words += [_beside(results, *sides, judged)] if len(sides) > 1 else []
    missing = len(judging) - len(judged)
    words += [f"{missing} of {len(judging)} seeds are missing: no verdict yet."] if missing else []
    rates = "Every side has the best of what it tried, found with the first seed."
    plan, warmup = replace(FULL, bf16=size.plan.bf16), "warm-up as the table says"
    source = report.provenance_text(results, plan, rates=rates, seeds=len(judged), warmup=warmup)
    return "\n".join([*lines, "", *words, source])


def difference(results: Results, adamw: Trial, trial: Trial, seeds: Sequence[int]) -> Estimate:
    """Of the final losses of runs of one seed, the second minus the first."""
    return Estimate.of(
        [loss_of(results, replace(trial, seed=s)) - loss_of(results, replace(adamw, seed=s)) for s in seeds]
    )


def row(results: Results, adamw: Trial, trial: Trial, seeds: Sequence[int]) -> str:
    """A line of a table of verdicts."""
    runs = [replace(trial, seed=seed) for seed in seeds]
    loss = Estimate.of([loss_of(results, run) for run in runs])
    against = "" if trial == adamw else difference(results, adamw, trial, seeds).text("+.4f")
    state = results[runs[0]]["optimizer_state_bytes_per_parameter"]
    return (
        f"| {ARMS[trial.arm].label} | {trial.lr:g} | {trial.warmup:.0%} | {trial.steps} | {loss.text()} "
        f"({len(seeds)} seeds) | {against} | {state:.2f} |"
    )


def reached_or_missed(results: Results, adamw: Trial, trial: Trial, seeds: Sequence[int]) -> str:
    """The verdict in words."""
    against = difference(results, adamw, trial, seeds)
    word = {-1: "reached", 0: "not decided", 1: "missed"}[against.sign]
    return (
        f"{ARMS[trial.arm].label}: AdamW's loss after {adamw.steps} steps in {trial.steps}: **{word}** "
        f"({against.text('+.4f')}, {len(seeds)} seeds).\n"
    )


def _reached(results: Results, size: Size, trial: Trial) -> str:
    """In how many steps; empty before the whole runs."""
    trials = whole(trial)
    if not all(t in results for t in trials):
        return ""
    baseline = [t for t in size.baseline(results) if t.seed in WHOLE_SEEDS]
    reached = steps_to(results, replace(FULL, warmup=trial.warmup), trials, baseline)
    assert reached is not None
    how = "" if reached.words else ", by interpolation"
    return (
        f"{ARMS[trial.arm].label}: AdamW's loss after {FULL.steps} steps in {reached.steps_text()} steps{how} "
        f"({len(trials)} seeds).\n"
    )


def _beside(results: Results, ours: Trial, peer: Trial, judged: Sequence[int]) -> str:
    """Ours against the best peer, in half of the steps and in all."""
    of_half = difference(results, peer, ours, judged).text("+.4f")
    text = f"{ARMS[ours.arm].label} minus {ARMS[peer.arm].label}: {of_half} after {ours.steps} steps"
    pairs = [whole(trial) for trial in (ours, peer)]
    if all(trial in results for trials in pairs for trial in trials):
        of_whole = difference(results, pairs[1][0], pairs[0][0], WHOLE_SEEDS).text("+.4f")
        text += f", {of_whole} after {FULL.steps}"
    return f"{text}.\n"


def choice_table(results: Results, size: Size) -> str:
    """What the first seed said of every arm and warm-up, the best first."""
    tried: dict[tuple[str, float], list[Trial]] = {}
    for trial in size.first_seed(results):
        tried.setdefault((trial.arm, trial.warmup), []).append(trial)
    best = {key: best_of(results, trials) for key, trials in tried.items()}
    lines = [
        f"| optimizer | warm-up | rates tried | best lr | loss after {size.plan.steps} steps, nats |",
        "|---|---:|---:|---:|---:|",
    ]
    for (arm, warmup), trial in sorted(best.items(), key=lambda found: loss_of(results, found[1])):
        lines.append(
            f"| {ARMS[arm].label} | {warmup:.0%} | {len(tried[arm, warmup])} | {trial.lr:g} "
            f"| {loss_of(results, trial):.4f} |"
        )
    adamw = size.baseline(results)[0]
    target = f"AdamW's best rate ends {adamw.steps} steps at {loss_of(results, adamw):.4f} with this seed."
    shown = {trial: results[trial] for trial in size.first_seed(results)}
    return "\n".join(
        [
            *lines,
            "",
            report.provenance_text(shown, size.plan, rates=target, seeds=1, warmup="warm-up as the table says"),
        ]
    )


def tables(results: Results, size: Size) -> Iterator[tuple[Path, str, str]]:
    """Page, mark in it, and what stands there."""
    tried = {trial.arm for trial in size.first_seed(results)}
    if all(tried.intersection(side) for side in size.sides):
        yield report.EVIDENCE, f"{size.name} verdict", verdict_table(results, size)
        yield report.COMPARISONS, f"{size.name} choice", choice_table(results, size)


def main() -> int:
    """The exit status of `answer`."""
    parser = parser_of(__doc__)
    parser.add_argument("--plan", choices=tuple(SIZES), default="1m", help="the model: 1.26M or 5M parameters")
    options = parser.parse_args()
    size = SIZES[options.plan]
    asked = Asked(size.name, size.run_file, tuple(size.published), size.plan.bf16)
    return answer(asked, options, lambda trials: train(trials, size), lambda: tables(size.read(), size))


if __name__ == "__main__":
    sys.exit(main())
