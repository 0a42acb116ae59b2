# SPDX-License-Identifier: Apache-2.0
"""What the published comparisons say of the claim, in one table: every size and warm-up, both blockwise optimizers."""

from __future__ import annotations

from benchmarks.compare.ablations import OUR_MINI, OURS
from benchmarks.compare.report import DOCS, read_csv
from benchmarks.compare.results import arm_results
from benchmarks.compare.trials import ARMS, BASELINE, PUBLISHED_PLANS
from benchmarks.provenance import ROOT, write_between

NAME = "compare summary"
PAGES = ("README.md", "docs/evidence.md")
_CLAIMED = (OURS, OUR_MINI)


def table() -> str:
    """One row for each comparison in ``docs/compare``, with where the numbers come from."""
    heads = [f"{ARMS[arm].label} | steps to AdamW's loss | time to it, of AdamW's" for arm in _CLAIMED]
    lines = [
        f"| parameters | steps | warm-up | {' | '.join(heads)} |",
        f"|---:|---:|---:|{'---:|---:|---:|' * len(_CLAIMED)}",
    ]
    provenance = []
    for name, plan in PUBLISHED_PLANS.items():
        path = DOCS / f"{name}.csv"
        if not path.is_file():
            continue
        results = read_csv(path, plan)
        rows = {row.arm: row for row in arm_results(results, plan)}
        cells = []
        for row in (rows[arm] for arm in _CLAIMED):
            assert row.against_baseline is not None and row.steps_to_baseline is not None
            step_over_baseline = row.cpu_seconds_per_step / rows[BASELINE].cpu_seconds_per_step
            time = row.steps_to_baseline.time_text(step_over_baseline, plan.steps)
            cells += [row.against_baseline.text("+.4f"), row.steps_to_baseline.steps_text(), time]
        parameters = next(r["parameters"] for r in results.values() if r["diverged"] is None)
        lines.append(f"| {parameters / 1e6:.2f}M | {plan.steps} | {plan.warmup:.0%} | {' | '.join(cells)} |")
        provenance += [result["provenance"] for result in results.values()]
    dates = sorted(of["date"] for of in provenance)
    facts = [sorted({of[key] for of in provenance}) for key in ("cpu", "torch", "deepspeed")]
    cpu, torch, deepspeed = (" or ".join(values) for values in facts)
    source = (
        "Final validation loss minus AdamW's at the best of its own rates (nats per token; runs of the same seed, ± "
        "one standard error over seeds), and what it takes to end at AdamW's loss. "
        f"From `docs/compare/*.csv` by `benchmarks/compare/summary.py`: one core of {cpu}, torch {torch}, "
        f"DeepSpeed {deepspeed}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    )
    return "\n".join([*lines, "", source])


def write() -> None:
    """Replace the table in the pages that show it."""
    for page in PAGES:
        write_between(ROOT / page, NAME, table())
