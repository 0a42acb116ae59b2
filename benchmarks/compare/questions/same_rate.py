# SPDX-License-Identifier: Apache-2.0
"""Is an AdamW JSON right with only its ``type`` changed? Three rates around AdamW's best, the same for all optimizers.

python -m benchmarks.compare.questions.same_rate            # 27 runs, a few minutes each; goes on
python -m benchmarks.compare.questions.same_rate --minutes 30

AdamW's runs are those of `make compare` where they have been published. Everything else in the JSON stays as it is: the
schedule with its absolute minimum, betas, weight decay, clipping. The optimizers have their defaults.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.compare import report
from benchmarks.compare.ablations import OUR_MINI, OURS
from benchmarks.compare.results import Estimate, Results, loss_of
from benchmarks.compare.run import Asked, answer, parser_of
from benchmarks.compare.trials import ARMS, BASELINE, FULL, MIN_LR_SHARE, Trial

RATES = (2e-3, 2.8e-3, 4e-3)  # AdamW's best in docs/compare/compare.csv, and a factor of sqrt 2 to each side
SEEDS = (1, 2, 3)
CHANGED = (OURS, OUR_MINI)
ASKED = Asked("same_rate", counted=("compare",))
MARK = "same_rate results"


def baseline(lr: float, seed: int) -> Trial:
    """AdamW, as the comparison trains it."""
    return FULL.plain(BASELINE, lr, seed)


def changed(arm: str, lr: float, seed: int) -> Trial:
    """AdamW's JSON with another ``type``: the default multipliers, the same rate and the same minimum."""
    scheduler = {"type": "BlockwiseCosineLR", "params": {"min_lr": MIN_LR_SHARE * lr}}
    params = {"lr_multipliers": {"preset": "adamw_scale"}}
    return Trial(arm, lr, seed, FULL.steps, "adamw-json", params, scheduler, FULL.warmup)


def trials() -> list[Trial]:
    """All runs, the first seed first."""
    return [
        trial
        for seed in SEEDS
        for lr in RATES
        for trial in (baseline(lr, seed), *(changed(arm, lr, seed) for arm in CHANGED))
    ]


def table(results: Results) -> str:
    """A row for each optimizer and rate, and where the numbers come from; only seeds that all of them have."""
    lines = [
        "| `lr` | optimizer | final validation loss, nats | minus AdamW's at the same `lr`, nats | not above AdamW's |",
        "|---:|---|---:|---:|---|",
    ]
    cells = [(arm, lr) for lr in RATES for arm in (BASELINE, *CHANGED)]
    seeds = [seed for seed in SEEDS if all(_trial(*cell, seed) in results for cell in cells)]
    for lr in RATES if seeds else ():
        lines += _rows(results, lr, seeds)
    same = "All optimizers have the same learning rate and the same minimum."
    shown = {trial: result for trial, result in results.items() if trial.seed in seeds} or results
    return "\n".join([*lines, "", report.provenance_text(shown, FULL, rates=same, seeds=len(seeds))])


def _trial(arm: str, lr: float, seed: int) -> Trial:
    return baseline(lr, seed) if arm == BASELINE else changed(arm, lr, seed)


def _rows(results: Results, lr: float, seeds: Sequence[int]) -> Iterator[str]:
    of_adamw = [loss_of(results, baseline(lr, seed)) for seed in seeds]
    yield f"| {lr:g} | {ARMS[BASELINE].label} | {Estimate.of(of_adamw).text()} | | |"
    for arm in CHANGED:
        losses = [loss_of(results, changed(arm, lr, seed)) for seed in seeds]
        difference = Estimate.of([loss - adamw for loss, adamw in zip(losses, of_adamw, strict=True)])
        verdict = "yes" if difference.mean <= 0 else "no"
        verdict += "" if difference.sign else ", within two standard errors"
        yield f"| {lr:g} | {ARMS[arm].label} | {Estimate.of(losses).text()} | {difference.text('+.4f')} | {verdict} |"


def read() -> Results:
    """What has been trained, from the published file."""
    named = report.named_in(ASKED.csv)
    return {trial: named[trial.name] for trial in trials() if trial.name in named}


def tables() -> Iterator[tuple[Path, str, str]]:
    """Page, mark in it, and what stands there."""
    yield report.COMPARISONS, MARK, table(read())


def main() -> int:
    """The exit status of `answer`."""
    options = parser_of(__doc__).parse_args()
    return answer(ASKED, options, lambda found: found.train(trials(), "the same rate"), tables)


if __name__ == "__main__":
    sys.exit(main())
