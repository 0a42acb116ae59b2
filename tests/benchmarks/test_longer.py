# SPDX-License-Identifier: Apache-2.0
"""Longer runs: rates are tried until the best has a worse neighbour on both sides, and other seeds judge."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

pytest.importorskip("deepspeed", reason="trials are runs of the main job, which needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="trials are runs of the main job, which needs the extra 'megatron'")

from benchmarks.compare.questions import half_steps, longer
from benchmarks.compare.trials import BASELINE
from benchmarks.provenance import between
from tests.benchmarks.formula import FormulaTrials

QUESTION = longer.Question(half_steps.SIZES["5m"], 2)


def _formula(optimum, gain=0.0):
    def loss(trial):
        distance = 0.1 * math.log2(trial.lr / optimum) ** 2
        ours = 0.0 if trial.arm == BASELINE else gain + 0.001 * trial.seed
        # the seed that chooses flatters ours: a verdict that counts it would be another one
        flattered = trial.seed == longer.CHOOSING and trial.arm != BASELINE
        return 3.5 + 0.02 * trial.seed + distance - ours - flattered

    return FormulaTrials(loss)


def _adamw(results):
    return sorted(t.lr for t in results if t.arm == BASELINE and t.seed == longer.CHOOSING)


@pytest.mark.parametrize(
    ("optimum", "tried"),
    [
        (2.8e-3, [2e-3, 2.8e-3, 4e-3]),
        (2e-3, [1.4e-3, 2e-3, 2.8e-3]),
        (1.4e-3, [0.99e-3, 1.4e-3, 2e-3, 2.8e-3]),
        (1e-5, [0.99e-3, 1.4e-3, 2e-3, 2.8e-3]),  # no more than the rule allows
        (5.7e-3, [2e-3, 2.8e-3, 4e-3, 5.7e-3]),
    ],
)
def test_rates_grow_towards_the_better_end(optimum, tried):
    trials = _formula(optimum)
    longer.train(trials, QUESTION)
    assert _adamw(trials.results) == pytest.approx(tried)
    assert not any(longer.rates(trials.results, start).missing for start in QUESTION.starts())


@pytest.mark.parametrize(("gain", "word", "shown"), [(0.01, "reached", "-0.0130"), (-0.02, "missed", "+0.0170")])
def test_the_seed_that_chooses_does_not_judge(gain, word, shown):
    trials = _formula(4e-3, gain)
    longer.train(trials, QUESTION)
    table = longer.verdict_table(trials.results, QUESTION)
    assert f"AdamW's loss after 1600 steps in 800: **{word}** ({shown} ± 0.0006, 3 seeds)" in table
    _, ours, peer = (QUESTION.chosen(trials.results, start) for start in QUESTION.starts())
    assert {t.steps for t in (ours, peer)} == {800}
    assert f"{half_steps.ARMS[ours.arm].label} minus" in table
    assert "first seed, 3 or 4 rates a side." in table
    del trials.results[replace(ours, seed=3)]
    assert "Blockwise Muon:" not in longer.verdict_table(trials.results, QUESTION)


def test_nothing_is_shown_before_the_first_verdict():
    assert longer.verdict_table({}, QUESTION) == ""


@pytest.mark.parametrize("plan", longer.PLANS)
def test_a_side_starts_where_the_shorter_runs_ended(plan):
    """Setting, warm-up and rate: what is published, not what somebody remembers."""
    question = longer.Question(half_steps.SIZES[plan], longer.PLANS[plan])
    shorter = question.size.read()
    adamw, ours, peer = question.starts()
    assert replace(adamw, steps=800) == question.size.baseline(shorter)[0]
    assert [replace(t, steps=400) for t in (ours, peer)] == [
        question.size.chosen(shorter, arms) for arms in question.size.sides
    ]
    assert (adamw.steps, ours.steps) == (question.steps, question.steps // 2)


@pytest.mark.parametrize("plan", longer.PLANS)
def test_the_pages_show_what_is_in_the_csv(plan):
    question = longer.Question(half_steps.SIZES[plan], longer.PLANS[plan])
    if not question.csv.is_file():
        return
    shown = list(longer.tables(question.read(), question))
    assert shown, "a file that decides nothing yet is not published"
    for page, mark, text in shown:
        assert between(page.read_text(encoding="utf-8"), mark) == text
