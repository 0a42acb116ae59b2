# SPDX-License-Identifier: Apache-2.0
"""Does it last? The question of half_steps.py for runs several times as long. The rule was written before the runs.

python -m benchmarks.compare.questions.longer                       # the 5M model, 1600 steps; about two hours
python -m benchmarks.compare.questions.longer --plan 1m --times 4   # the 1.26M model, 3200 steps

Each side starts from the setting, the warm-up and the rate that were best in the shorter runs: AdamW's from its whole
runs, the others' from half of them. Longer runs may want another rate. So the first seed tries that rate and the one a
factor of √2 below it, then the next rate on the side of the better one until it has a worse neighbour on both sides, at
most `MOST_RATES`. Three other seeds judge: AdamW with all steps, the others with half of them. Words as in
half_steps.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.compare import report
from benchmarks.compare.questions.half_steps import CHOOSING, SIZES, Size, difference, reached_or_missed, row
from benchmarks.compare.results import Results, best_of
from benchmarks.compare.run import Asked, Trials, answer, parser_of
from benchmarks.compare.trials import ARMS, FULL, Trial

JUDGING = (2, 3, 4)
WHOLE = (1, 2)
"""Seeds of the runs of ours that are as long as AdamW's."""
MOST_RATES = 4
PLANS = {"5m": 2, "1m": 4}
"""How many times as long, unless it is said."""


@dataclass(frozen=True)
class Question:
    """One size at one length.

    Attributes:
        size: Model and shorter runs.
        times: How many times as many steps.
    """

    size: Size
    times: int

    @property
    def steps(self) -> int:
        """AdamW's."""
        return self.times * FULL.steps

    @property
    def name(self) -> str:
        """Of its CSV, and of the mark of its table."""
        return f"{self.size.name}_x{self.times}"

    @property
    def csv(self) -> Path:
        """What has been trained."""
        return report.DOCS / f"{self.name}.csv"

    def starts(self) -> list[Trial]:
        """AdamW, ours, the peer: the first seed's trial with the rate of the shorter runs."""
        shorter = self.size.read()
        adamw = self.size.baseline(shorter)[0]
        others = [self.size.chosen(shorter, arms) for arms in self.size.sides]
        return [replace(t, steps=self.times * t.steps, seed=CHOOSING) for t in (adamw, *others)]

    def chosen(self, results: Results, start: Trial) -> Trial | None:
        """The first seed's best rate; None before every rate has been tried."""
        return None if (tried := rates(results, start)).missing else best_of(results, tried.trials)

    def read(self) -> Results:
        """What has been trained, from the published file."""
        return report.read_csv(self.csv, FULL)


@dataclass(frozen=True)
class Rates:
    """Rates of one side, ascending.

    Attributes:
        trials: Of the first seed.
        missing: Those of them that have no result. Once they have, there may be others.
    """

    trials: list[Trial]
    missing: list[Trial]


def rates(results: Results, start: Trial) -> Rates:
    """What the rule wants tried, as far as the results so far can say."""
    asked = [_scaled(start, -1), start]
    while True:
        missing = [trial for trial in asked if trial not in results]
        best = None if missing else best_of(results, asked)
        if best not in (asked[0], asked[-1]) or len(asked) == MOST_RATES:
            return Rates(asked, missing)
        asked = [_scaled(asked[0], -1), *asked] if best == asked[0] else [*asked, _scaled(asked[-1], 1)]


def _scaled(trial: Trial, halves: int) -> Trial:
    """The rate times the root of 2 to that power, to two digits, as half_steps.py has it between its factors of 2."""
    return replace(trial, lr=float(f"{trial.lr * math.sqrt(2) ** halves:.2g}"))


def train(trials: Trials, question: Question) -> None:
    """AdamW and ours first, then the peer.

    Raises:
        Stopped: The time is up.
    """
    adamw, ours, *peers = question.starts()
    _train_sides(trials, question, [adamw, ours])
    best = question.chosen(trials.results, ours)
    assert best is not None
    trials.train([replace(best, steps=question.steps, seed=seed) for seed in WHOLE], "whole runs")
    _train_sides(trials, question, peers)


def _train_sides(trials: Trials, question: Question, starts: Sequence[Trial]) -> None:
    while missing := [trial for start in starts for trial in rates(trials.results, start).missing]:
        if trials.find(missing):
            trials.train(missing, "learning rates")
    best = [trial for start in starts if (trial := question.chosen(trials.results, start))]
    trials.train([replace(trial, seed=seed) for seed in JUDGING for trial in best], "seeds")


def verdict_table(results: Results, question: Question) -> str:
    """AdamW and every side whose seeds are trained; empty before the first verdict."""
    adamw, *others = (question.chosen(results, start) for start in question.starts())
    judged = [trial for trial in others if trial and adamw and _all(results, adamw, trial)]
    if adamw is None or not judged:
        return ""
    lines = [
        f"| optimizer | lr | warm-up | steps | final validation loss, nats | minus AdamW's at {question.steps}, nats "
        "| state, bytes per parameter |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [row(results, adamw, trial, JUDGING) for trial in (adamw, *judged)]
    for trial in judged:
        whole = replace(trial, steps=question.steps)
        if seeds := [seed for seed in WHOLE if replace(whole, seed=seed) in results]:
            lines.append(row(results, adamw, whole, seeds))
    words = [reached_or_missed(results, adamw, trial, JUDGING) for trial in judged]
    if len(judged) > 1:
        between = difference(results, judged[1], judged[0], JUDGING).text("+.4f")
        ours, peer = (ARMS[trial.arm].label for trial in judged)
        words.append(f"{ours} minus {peer}: {between} after {judged[0].steps} steps.\n")
    plan = replace(FULL, steps=question.steps, bf16=question.size.plan.bf16)
    of_rates = "Every side has the best of the rates that it tried with the first seed"
    shown = [start for start in question.starts() if start.arm in {trial.arm for trial in (adamw, *judged)}]
    tried = sorted({len(rates(results, start).trials) for start in shown})
    of_rates += f", {' or '.join(map(str, tried))} rates a side."
    source = report.provenance_text(
        results, plan, rates=of_rates, seeds=len(JUDGING), warmup="warm-up as the table says"
    )
    return "\n".join([*lines, "", *words, source])


def _all(results: Results, *sides: Trial) -> bool:
    return all(replace(trial, seed=seed) in results for trial in sides for seed in JUDGING)


def tables(results: Results, question: Question) -> Iterator[tuple[Path, str, str]]:
    """Page, mark in it, and what stands there."""
    if text := verdict_table(results, question):
        yield report.EVIDENCE, f"{question.name} verdict", text


def main() -> int:
    """The exit status of `answer`."""
    parser = parser_of(__doc__)
    parser.add_argument("--plan", choices=tuple(PLANS), default="5m", help="the model: 1.26M or 5M parameters")
    parser.add_argument(
        "--times", type=int, choices=range(2, 9), help="how many times as many steps; the default is 2 for 5m, 4 for 1m"
    )
    options = parser.parse_args()
    size = SIZES[options.plan]
    question = Question(size, options.times or PLANS[options.plan])
    asked = Asked(question.name, size.run_file, (size.name,), size.plan.bf16)
    return answer(asked, options, lambda trials: train(trials, question), lambda: tables(question.read(), question))


if __name__ == "__main__":
    sys.exit(main())
