# SPDX-License-Identifier: Apache-2.0
"""The comparison at AdamW's own rate: its runs are AdamW's JSON with another `type`, and its table is right."""

from __future__ import annotations

import csv

import pytest

pytest.importorskip("deepspeed", reason="trials are runs of the main job, which needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="trials are runs of the main job, which needs the extra 'megatron'")

from benchmarks.compare import report
from benchmarks.compare.ablations import OUR_MINI, OURS
from benchmarks.compare.questions import same_rate
from benchmarks.compare.trials import PAPER, Setup
from benchmarks.provenance import PROVENANCE, ROOT, between
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.runs.model_shape import GPTShape

SETUP = Setup(GPTShape.load(ROOT / "configs/model/tiny.yaml"), {"tokenizer": {"sha256": "t"}, "splits": {}}, bf16=False)


@pytest.mark.parametrize("arm", same_rate.CHANGED)
@pytest.mark.parametrize("lr", same_rate.RATES)
def test_only_the_type_differs(arm, lr):
    """A rate or a minimum of its own would answer another question."""
    adamw, ours = SETUP.settings(same_rate.baseline(lr, 1)), SETUP.settings(same_rate.changed(arm, lr, 1))
    params = [adamw.pop("optimizer")["params"], ours.pop("optimizer")["params"]]
    assert adamw == ours and ours["scheduler"]["params"]["min_lr"] == pytest.approx(lr / 20)
    params[0].pop("torch_adam")
    assert BlockSettings.parse(params[1].pop("lr_multipliers")).is_default
    params[1].pop("granularity", None)  # the default, spelt out
    assert params[0] == params[1]


def test_a_run_in_another_unit_is_another_run():
    """Results in the paper's unit must not count as results at AdamW's rate."""
    changed = same_rate.changed(OURS, 2e-3, 1)
    other = type(changed)(OURS, 2e-3, 1, changed.steps, "adamw-json", {"lr_multipliers": PAPER}, changed.scheduler)
    assert SETUP.fingerprint(changed) != SETUP.fingerprint(other)
    assert len({trial.name for trial in same_rate.trials()}) == 27


def test_the_table_compares_runs_of_one_seed():
    """Differences are paired by seed, and a mean above AdamW's is said to be above."""
    losses = {same_rate.baseline(lr, seed): 3.0 + 0.1 * seed for lr in same_rate.RATES for seed in (1, 2, 3)}
    gains = {OURS: (0.01, 0.02, 0.03), OUR_MINI: (-0.01, 0.0, -0.02)}
    for lr in same_rate.RATES:
        for arm, of_arm in gains.items():
            for seed, gain in zip((1, 2, 3), of_arm, strict=True):
                losses[same_rate.changed(arm, lr, seed)] = 3.0 + 0.1 * seed - gain
    results = {
        trial: {
            "final_validation_loss": loss,
            "diverged": None,
            "parameters": 1000,
            "tokens": 8000,
            "provenance": dict.fromkeys(PROVENANCE, "x"),
        }
        for trial, loss in losses.items()
    }
    whole = same_rate.table(results)
    rows = [line for line in whole.splitlines() if line.startswith("| 0.0")]
    assert len(rows) == 9 and " 3 seeds;" in whole
    assert rows[:3] == [
        "| 0.002 | AdamW (torch) | 3.2000 ± 0.0577 | | |",
        "| 0.002 | Blockwise AdamW | 3.1800 ± 0.0520 | -0.0200 ± 0.0058 | yes |",
        "| 0.002 | Blockwise Adam-mini | 3.2100 ± 0.0608 | +0.0100 ± 0.0058 | no, within two standard errors |",
    ]
    # a seed that one rate lacks is in no row: means over other seeds would stand beside each other
    del results[same_rate.changed(OURS, same_rate.RATES[2], 3)]
    fewer = same_rate.table(results)
    assert "| 0.002 | AdamW (torch) | 3.1500 ± 0.0500 | | |" in fewer and " 2 seeds;" in fewer


def test_the_page_shows_what_is_in_the_csv():
    """Every number in the table follows from a file that the script wrote."""
    path = report.DOCS / "same_rate.csv"
    with open(path, newline="", encoding="utf-8") as file:
        rows = {(r["arm"], r["change"], r["base_lr"], r["seed"]): r["fingerprint"] for r in csv.DictReader(file)}
    finished = report.finished_in(path)
    results = {
        trial: finished[rows[key]]
        for trial in same_rate.trials()
        if (key := (trial.arm, trial.change, f"{trial.lr:g}", str(trial.seed))) in rows
    }
    assert len(results) == len(rows)
    assert between(report.COMPARISONS.read_text(encoding="utf-8"), same_rate.MARK) == same_rate.table(results)
