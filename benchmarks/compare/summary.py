# SPDX-License-Identifier: Apache-2.0
"""What the published comparisons say of the claim: one table of every size and warm-up, and the README's table.

python -m benchmarks.compare.summary    # writes both into docs/evidence.md and README.md, from docs/compare
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.compare.ablations import OUR_MINI, OURS
from benchmarks.compare.questions import half_steps
from benchmarks.compare.report import DOCS, EVIDENCE, read_csv
from benchmarks.compare.results import ArmResult, against, arm_results, steps_to
from benchmarks.compare.trials import ARMS, BASELINE, FULL, LARGER, PUBLISHED_PLANS, Plan
from benchmarks.provenance import ROOT, write_between

TABLE, FIRST = "compare summary", "compare first"
_CLAIMED = (OURS, OUR_MINI)
FIRST_SIZE, FIRST_COMPARISON, FIRST_PLAN = "5m", "compare_5m", LARGER


def first_table() -> str:
    """State, loss and steps of every optimizer for the largest model that all of them trained: the README's table.

    AdamW and the blockwise optimizers of Adam's update have the published plan's warm-up, Muon its own.
    """
    results = read_csv(DOCS / f"{FIRST_COMPARISON}.csv", FIRST_PLAN)
    rows = {row.arm: row for row in arm_results(results, FIRST_PLAN)}
    lines = [
        "| optimizer | optimizer state, bytes per parameter | final loss minus AdamW's, nats "
        "| AdamW's final loss after |",
        "|---|---:|---:|---:|",
    ]
    for arm in (BASELINE, *_CLAIMED):
        row = rows[arm]
        assert row.steps_to_baseline is not None
        difference = "" if row.against_baseline is None else row.against_baseline.text("+.4f")
        lines.append(_row(arm, row.state_bytes, difference, row.steps_to_baseline.steps_text()))
    size = half_steps.SIZES[FIRST_SIZE]
    of_half = size.read()
    baseline = [trial for trial in size.baseline(of_half) if trial.seed in half_steps.WHOLE_SEEDS]
    for arms in size.sides:
        trials = half_steps.whole(size.chosen(of_half, arms))
        difference, reached = against(of_half, trials, baseline), steps_to(of_half, FULL, trials, baseline)
        assert difference is not None and reached is not None
        state = of_half[trials[0]]["optimizer_state_bytes_per_parameter"]
        lines.append(_row(trials[0].arm, state, difference.text("+.4f"), reached.steps_text()))
    parameters = next(r["parameters"] for r in of_half.values() if r["diverged"] is None)
    source = (
        f"A LLaMA of {parameters / 1e6:.2f}M parameters, {FULL.steps} steps, {FULL.seeds} seeds, on CPUs. Every "
        f"optimizer has the best of its own learning rates; AdamW and Muon also the better of two warm-ups. ± is one "
        f"standard error."
    )
    return "\n".join([*lines, "", source])


def _row(arm: str, state: float, difference: str, steps: str) -> str:
    return f"| {ARMS[arm].label} | {state:.1f} | {difference} | {steps} steps |"


def table() -> str:
    """Two rows for each comparison in ``docs/compare``, with where the numbers come from."""
    lines = [
        "| parameters | steps | warm-up | optimizer | final validation loss minus AdamW's, nats "
        "| steps to AdamW's final loss | CPU time to it / AdamW's |",
        "|---:|---:|---:|---|---:|---:|---:|",
    ]
    provenance = []
    for plan, parameters, rows, sources in _comparisons():
        for row in (rows[arm] for arm in _CLAIMED):
            assert row.against_baseline is not None and row.steps_to_baseline is not None
            step_over_baseline = row.cpu_seconds_per_step / rows[BASELINE].cpu_seconds_per_step
            time = row.steps_to_baseline.time_text(step_over_baseline, plan.steps)
            cells = (row.against_baseline.text("+.4f"), row.steps_to_baseline.steps_text(), time)
            of = f"{parameters / 1e6:.2f}M | {plan.steps} | {plan.warmup:.0%}"
            lines.append(f"| {of} | {ARMS[row.arm].label} | {' | '.join(cells)} |")
        provenance += sources
    dates = sorted(of["date"] for of in provenance)
    facts = [sorted({of[key] for of in provenance}) for key in ("cpu", "torch", "deepspeed")]
    cpu, torch, deepspeed = (" or ".join(values) for values in facts)
    source = (
        "Every optimizer, AdamW too, has the best of its own learning rates. Differences are between runs of the same "
        "seed; ± is one standard error over the seeds. From `docs/compare/*.csv` by `benchmarks/compare/summary.py`: "
        f"one core of {cpu}, torch {torch}, "
        f"DeepSpeed {deepspeed}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    )
    return "\n".join([*lines, "", source])


def write() -> None:
    """Replace the tables in docs/evidence.md and README.md."""
    write_between(EVIDENCE, TABLE, table())
    for page in (EVIDENCE, ROOT / "README.md"):
        write_between(page, FIRST, first_table())


def _comparisons() -> Iterator[tuple[Plan, int, dict[str, ArmResult], list[dict[str, str]]]]:
    """Plan, parameters, results by arm and where they come from, of every comparison that has been run."""
    for name, plan in PUBLISHED_PLANS.items():
        path = DOCS / f"{name}.csv"
        if not path.is_file():
            continue
        results: dict[Any, dict[str, Any]] = read_csv(path, plan)
        rows = {row.arm: row for row in arm_results(results, plan)}
        parameters = next(r["parameters"] for r in results.values() if r["diverged"] is None)
        yield plan, parameters, rows, [result["provenance"] for result in results.values()]


if __name__ == "__main__":
    write()
