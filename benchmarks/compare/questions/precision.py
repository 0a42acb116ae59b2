# SPDX-License-Identifier: Apache-2.0
"""Is bf16 why the 5M model has AdamW's loss in half of the steps and the 1.26M model, in fp32, has not?

python -m benchmarks.compare.questions.precision   # eight runs; about 20 minutes on two cores

The 1.26M model trains again in bf16 with fp32 master weights, as the 5M model does: AdamW with all steps and Blockwise
Muon with half of them, each with the settings, rate and warm-up that were best in fp32, and the seeds that judged
there. If precision were the reason, the difference between the two would be lower by more than two standard errors,
over pairs of runs of one seed. The rule was written before the runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.compare import report
from benchmarks.compare.questions.half_steps import SIZES
from benchmarks.compare.results import Estimate, Results, loss_of
from benchmarks.compare.run import Asked, Trials, answer, parser_of
from benchmarks.compare.trials import ARMS, FULL, Trial

SIZE = SIZES["1m"]
ASKED = Asked("precision", SIZE.run_file, bf16=True)


def sides() -> tuple[Trial, Trial]:
    """AdamW and ours, as they were chosen in fp32."""
    in_fp32 = SIZE.read()
    return SIZE.baseline(in_fp32)[0], SIZE.chosen(in_fp32, SIZE.sides[0])


def train(trials: Trials) -> None:
    """Both sides, every seed that judged.

    Raises:
        Stopped: The time is up.
    """
    trials.train([replace(side, seed=seed) for seed in SIZE.judging for side in sides()], "in bf16")


def differences(results: Results) -> dict[int, float]:
    """Ours minus AdamW, nats, by seed; of the seeds that both have."""
    adamw, ours = sides()
    pairs = {seed: (replace(ours, seed=seed), replace(adamw, seed=seed)) for seed in SIZE.judging}
    return {
        seed: loss_of(results, ours) - loss_of(results, adamw)
        for seed, (ours, adamw) in pairs.items()
        if ours in results and adamw in results
    }


def table(in_bf16: Results, in_fp32: Results) -> str:
    """A row for each precision, and what follows; empty before a pair of runs."""
    found, before = differences(in_bf16), differences(in_fp32)
    if not found:
        return ""
    adamw, ours = sides()
    lines = [
        f"| precision | AdamW, {adamw.steps} steps, nats | {ARMS[ours.arm].label}, {ours.steps} steps, nats "
        "| difference, nats |",
        "|---|---:|---:|---:|",
    ]
    for name, results, values in (("fp32", in_fp32, before), ("bf16", in_bf16, found)):
        losses = [Estimate.of([loss_of(results, replace(side, seed=s)) for s in found]) for side in (adamw, ours)]
        of_both = Estimate.of([values[seed] for seed in found]).text("+.4f")
        lines.append(f"| {name} | {' | '.join(loss.text() for loss in losses)} | {of_both} |")
    change = Estimate.of([found[seed] - before[seed] for seed in found])
    words = {-1: "bf16 is a reason", 0: "not decided", 1: "bf16 is not the reason: it adds to the difference"}
    text = f"bf16 changes the difference by {change.text('+.4f')}: **{words[change.sign]}**.\n"
    rates = "Rates, settings and warm-up as they were best in fp32."
    plan = replace(FULL, bf16=True)
    source = report.provenance_text(in_bf16, plan, rates=rates, seeds=len(found), warmup="warm-up as in fp32")
    return "\n".join([*lines, "", text, source])


def tables() -> Iterator[tuple[Path, str, str]]:
    """Page, mark in it, and what stands there."""
    if text := table(report.read_csv(ASKED.csv, FULL), SIZE.read()):
        yield report.COMPARISONS, ASKED.name, text


def main() -> int:
    """The exit status of `answer`."""
    return answer(ASKED, parser_of(__doc__).parse_args(), train, tables)


if __name__ == "__main__":
    sys.exit(main())
