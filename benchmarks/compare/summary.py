# SPDX-License-Identifier: Apache-2.0
"""What the published comparisons say of the claim: one table of every size and warm-up, and one line for the README."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.compare.ablations import OUR_MINI, OURS
from benchmarks.compare.report import DOCS, EVIDENCE, read_csv
from benchmarks.compare.results import ArmResult, arm_results
from benchmarks.compare.trials import ARMS, BASELINE, PUBLISHED_PLANS, Plan
from benchmarks.provenance import ROOT, write_between

TABLE, LINE = "compare summary", "compare line"
_MUON = "muon"
_CLAIMED = (OURS, OUR_MINI)


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


def line() -> str:
    """The result and its limits in three sentences."""
    compared = list(_comparisons())
    (baseline,) = {plan.steps for plan, _, _, _ in compared}
    adamw, mini = (_range(rows[arm] for _, _, rows, _ in compared) for arm in _CLAIMED)
    muon = _range(rows[_MUON] for _, _, rows, _ in compared if _MUON in rows)
    sizes = " and ".join(f"{n / 1e6:.1f}M" for n in sorted({parameters for _, parameters, _, _ in compared}))
    return (
        f"Blockwise AdamW reached the final loss of a tuned AdamW in {adamw} of its {baseline} steps. Blockwise "
        f"Adam-mini took {mini} steps, with half of AdamW's optimizer state. The limits: {len(compared)} comparisons, "
        f"LLaMAs of {sizes} parameters, CPUs only; Muon took {muon} steps where it ran."
    )


def write() -> None:
    """Replace the table in docs/evidence.md and the line in README.md."""
    write_between(EVIDENCE, TABLE, table())
    write_between(ROOT / "README.md", LINE, line())


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


def _range(rows: Iterable[ArmResult]) -> str:
    """Steps to the baseline's final loss: the fewest and the most."""
    reached = sorted((row.steps_to_baseline for row in rows if row.steps_to_baseline), key=lambda to: to.steps)
    return " to ".join(dict.fromkeys((reached[0].steps_text(), reached[-1].steps_text())))
