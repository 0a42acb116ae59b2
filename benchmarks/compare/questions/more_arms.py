# SPDX-License-Identifier: Apache-2.0
"""More optimizers beside tuned AdamW, for as many steps: the preset `tuned`, SOAP, Lion with and without multipliers.

python -m benchmarks.compare.questions.more_arms               # about three hours on two cores; goes on
python -m benchmarks.compare.questions.more_arms --minutes 60

Every arm has a sweep of rates like AdamW's and two warm-ups, of a fifth and a twentieth of the steps. The first seed
chooses, three others judge. The rule was written before the runs. Lion's weight decay, five times AdamW's, was not
tuned.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.compare import report
from benchmarks.compare.questions.half_steps import SIZES, Size, row
from benchmarks.compare.results import Results
from benchmarks.compare.run import Asked, Trials, answer, parser_of, sweep
from benchmarks.compare.trials import FULL, MORE, Trial


@dataclass(frozen=True)
class Arms(Size):
    """The same model and baseline; each arm by itself."""

    @property
    def sides(self) -> tuple[tuple[str, ...], ...]:
        """Nobody competes for a verdict."""
        return tuple((arm,) for arm in self.plan.arms)


ASKED = Arms("more_arms", SIZES["1m"].run_file, MORE, SIZES["1m"].published)


def train(trials: Trials) -> None:
    """One arm after the other, that a stopped run leaves whole arms.

    Raises:
        Stopped: The time is up.
    """
    trials.train(ASKED.baseline(trials.results), "AdamW")
    for arms in ASKED.sides:
        sweep(trials, replace(MORE, arms=arms))
        trials.train(ASKED.short_warmups(trials.results, arms), "short warm-ups")
        best = ASKED.chosen(trials.results, arms)
        trials.train([replace(best, seed=seed) for seed in ASKED.judging], "seeds")


def finished(results: Results) -> list[Trial]:
    """The first seed's best of every arm whose seeds are trained."""
    tried = {trial.arm for trial in ASKED.first_seed(results)}
    best = [ASKED.chosen(results, arms) for arms in ASKED.sides if tried.intersection(arms)]
    return [trial for trial in best if all(replace(trial, seed=seed) in results for seed in ASKED.judging)]


def table(results: Results) -> str:
    """AdamW, then the arms, the best first; empty before the first arm is finished."""
    arms, adamw = finished(results), ASKED.baseline(results)[0]
    if not arms:
        return ""
    lines = [
        f"| optimizer | lr | warm-up | steps | final validation loss, nats | minus AdamW's at {FULL.steps}, nats "
        "| state, bytes per parameter |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += sorted(row(results, adamw, trial, ASKED.judging) for trial in arms)
    lines.insert(2, row(results, adamw, adamw, ASKED.judging))
    rates = "Every optimizer has the best of what it tried, found with another seed."
    warmup, seeds = "warm-up as the table says", len(ASKED.judging)
    return "\n".join([*lines, "", report.provenance_text(results, FULL, rates=rates, seeds=seeds, warmup=warmup)])


def tables(results: Results) -> Iterator[tuple[Path, str, str]]:
    """Page, mark in it, and what stands there."""
    if text := table(results):
        yield report.COMPARISONS, ASKED.name, text


def main() -> int:
    """The exit status of `answer`."""
    options = parser_of(__doc__).parse_args()
    asked = Asked(ASKED.name, ASKED.run_file, tuple(ASKED.published))
    return answer(asked, options, train, lambda: tables(ASKED.read()))


if __name__ == "__main__":
    sys.exit(main())
