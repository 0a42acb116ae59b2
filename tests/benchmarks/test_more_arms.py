# SPDX-License-Identifier: Apache-2.0
"""More optimizers beside AdamW: each has its own sweep and warm-ups, and seeds that chose nothing judge."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

pytest.importorskip("deepspeed", reason="trials are runs of the main job, which needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="trials are runs of the main job, which needs the extra 'megatron'")

from benchmarks.compare import report
from benchmarks.compare.questions import more_arms
from benchmarks.compare.trials import ARMS, BASELINE, COMMON, FULL, MORE, Setup
from benchmarks.provenance import ROOT, between
from ds_blockwise.runs.model_shape import GPTShape
from tests.benchmarks.formula import FormulaTrials

SETUP = Setup(GPTShape.load(ROOT / "configs/model/tiny.yaml"), {"tokenizer": {"sha256": "t"}, "splits": {}}, bf16=False)
OPTIMUM = {"soap": (8e-3, 0.2), "lion": (2.5e-4, 0.05)}


def _loss(trial):
    lr, warmup = OPTIMUM.get(trial.arm, (2e-3, 0.2))
    own = 0.0 if trial.arm == BASELINE else 0.1 * math.log2(trial.lr / lr) ** 2 + 0.3 * (trial.warmup != warmup)
    # the seed that chooses flatters everybody: a mean that counts it would be another one
    return 3.5 + 0.02 * trial.seed + own - (trial.arm == "soap") * 0.01 - (trial.seed == 1 and own > 0)


def test_every_arm_has_its_best_rate_and_warmup_and_other_seeds_judge():
    trials = FormulaTrials(_loss)
    more_arms.train(trials)
    for arm, best in OPTIMUM.items():
        chosen = more_arms.ASKED.chosen(trials.results, (arm,))
        assert chosen.steps == FULL.steps
        tried = {(t.lr, t.warmup) for t in trials.results if t.arm == arm}
        assert best in tried and {warmup for _, warmup in tried} == {0.2, 0.05}
    lines = more_arms.table(trials.results).splitlines()
    assert lines[2].startswith(f"| {ARMS[BASELINE].label} |")
    rows = {line.split("|")[1].strip(): line for line in lines[3:] if line.startswith("|")}
    assert rows.keys() == {ARMS[arm].label for arm in MORE.arms}
    assert "3.5600 ± 0.0115 (3 seeds)" in lines[2], "seeds 2 to 4"


def test_an_arm_without_all_seeds_is_left_out():
    trials = FormulaTrials(_loss)
    more_arms.train(trials)
    missing = replace(more_arms.ASKED.chosen(trials.results, ("soap",)), seed=3)
    del trials.results[missing]
    assert ARMS["soap"].label not in more_arms.table(trials.results)
    assert more_arms.table({t: r for t, r in trials.results.items() if t.arm == BASELINE}) == ""


@pytest.mark.parametrize("arm", ["lion", "blockwise_lion"])
def test_lion_decays_as_much_as_adamw_at_its_lower_rates(arm):
    """A rate a fifth of AdamW's with five times its decay."""
    params = SETUP.settings(MORE.plain(arm, 1e-3, 1))["optimizer"]["params"]
    assert params["weight_decay"] == 5 * COMMON["weight_decay"] and params["betas"] == [0.9, 0.99]


def test_the_page_shows_what_is_in_the_csv():
    page = report.COMPARISONS.read_text(encoding="utf-8")
    if not more_arms.ASKED.csv.is_file():
        assert between(page, more_arms.ASKED.name).strip() == "Not run yet."
        return
    for _, mark, text in more_arms.tables(more_arms.ASKED.read()):
        assert between(page, mark) == text
