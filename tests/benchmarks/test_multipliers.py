# SPDX-License-Identifier: Apache-2.0
"""Multipliers from signal-to-noise ratios, additions to `tuned`: what is trained, who wins, and what the page shows."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest

pytest.importorskip("deepspeed", reason="trials are runs of the main job, which needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="trials are runs of the main job, which needs the extra 'megatron'")

from benchmarks.compare import report
from benchmarks.compare.multipliers import candidates, run
from benchmarks.compare.multipliers.candidates import ADDITIONS, AUTO, TUNED
from benchmarks.compare.trials import FULL, Setup
from benchmarks.provenance import ROOT, between, write_csv
from ds_blockwise.blocks.roles import BLOCK_TYPES
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.settings.defaults import ADAMW_RATE, LR_PRESETS
from ds_blockwise.runs.model_shape import GPTShape
from tests.helpers.benchmark_runs import FakeTrials

SETUP = Setup(GPTShape.load(ROOT / "configs/model/tiny.yaml"), {"tokenizer": {"sha256": "t"}, "splits": {}}, bf16=False)
PUBLISHED = candidates.published(report.read_csv(report.DOCS / "compare.csv", FULL))
SNR = {"emb": 0.1, "head": 0.4, "qk": 0.1, "ffn": 0.2, "vo": 0.05, "norm": 0.3}


def _trained(monkeypatch, tmp_path, loss):
    path = tmp_path / "snr.csv"
    write_csv(path, candidates.COLUMNS, _readings(SNR))
    monkeypatch.setattr(run, "READINGS", path)
    trials = FakeTrials(lambda trial: loss(trial) + 0.1 * trial.seed)
    return run.train(trials, PUBLISHED), trials.results


def _readings(snr):
    early, late = candidates.READ_FROM - candidates.SPACING, candidates.READ_FROM
    return [
        {
            **dict.fromkeys(candidates.COLUMNS, "x"),
            **{"step": str(step), "block_type": kind, "momentum_rms": str(momentum), "second_moment": str(second)},
        }
        for kind, ratio in snr.items()
        # two readings with the wanted geometric mean, and one that is too early to count
        for step, momentum, second in ((early, 5.0, 1.0), (late, 2.0, 4 / (2 * ratio)), (late + 10, 1.0, 2 / ratio))
    ]


def test_ratios_leave_the_first_steps_out(tmp_path):
    write_csv(tmp_path / "snr.csv", candidates.COLUMNS, _readings(SNR))
    assert candidates.ratios(tmp_path / "snr.csv") == pytest.approx(SNR)


def test_multipliers_are_powers_around_one():
    """A common factor would be another learning rate, a wrong sign the opposite rule."""
    inverse, direct = (candidates.multipliers(SNR, exponent) for exponent in candidates.EXPONENTS.values())
    assert inverse["vo"] / inverse["ffn"] == pytest.approx(2.0, rel=0.01)
    assert direct["head"] / direct["emb"] == pytest.approx(2.0, rel=0.01)
    for found in (inverse, direct):
        assert math.prod(found[kind] for kind in candidates.MATRICES) == pytest.approx(1.0, rel=0.02)
    assert inverse["norm"] == pytest.approx(1 / direct["norm"], rel=0.01)


def test_published_runs_are_those_of_the_presets():
    """The reference of all additions would be another preset."""
    for trial in PUBLISHED[TUNED]:
        settings = BlockSettings.parse(SETUP.settings(trial)["optimizer"]["params"]["lr_multipliers"])
        found = {
            kind: settings.lr_multipliers.get(kind, LR_PRESETS["paper"][kind]) / ADAMW_RATE for kind in BLOCK_TYPES
        }
        assert found == {**LR_PRESETS["tuned"]}
    assert [[t.seed for t in trials] for trials in PUBLISHED.values()] == [[1, 2, 3]] * 4


@pytest.mark.parametrize("change", ADDITIONS)
def test_an_addition_changes_one_setting_of_tuned(change):
    tuned = PUBLISHED[TUNED][1]
    new, old = (SETUP.settings(t) for t in (candidates.addition(change, tuned), tuned))
    params = copy.deepcopy(old["optimizer"]["params"]) | ADDITIONS[change][1]
    assert new == {**old, "optimizer": {**old["optimizer"], "params": params}} != old
    assert candidates.addition(change, tuned).seed == tuned.seed


def test_the_minimum_is_that_of_the_published_runs():
    """A floor of its own would be another schedule."""
    tuned = SETUP.settings(PUBLISHED[TUNED][0])["scheduler"]
    lr = ADAMW_RATE * PUBLISHED[TUNED][0].lr
    mine = SETUP.settings(candidates.by_snr("snr", SNR, lr, 1))["scheduler"]
    assert mine["type"] == tuned["type"]
    assert mine["params"]["min_lr"] == pytest.approx(tuned["params"]["min_lr"])


@pytest.mark.parametrize(("gain", "verb"), [(0.3, "wins"), (-0.3, "does not win"), (0.0, "does not win")])
def test_the_better_power_is_swept_and_judged_against_auto(monkeypatch, tmp_path, gain, verb):
    best_lr = 2 * PUBLISHED[candidates.ADAMW][0].lr

    def loss(trial):
        if trial.change in candidates.EXPONENTS:
            return 3.5 - gain + 0.1 * abs(math.log2(trial.lr / best_lr)) + 0.5 * (trial.change == "snr")
        return 3.5 + (0.0, 0.01, -0.01)[trial.seed - 1]

    question, results = _trained(monkeypatch, tmp_path, loss)
    tried = {(t.change, round(t.lr / question.lr, 3)) for t in question.tried(results)}
    # at the edge the grid grows
    assert tried == {
        ("snr", 1.0),
        ("snr-inverse", 0.5),
        ("snr-inverse", 1.0),
        ("snr-inverse", 2.0),
        ("snr-inverse", 4.0),
    }
    auto = PUBLISHED[AUTO][0]
    assert (replace(auto, lr=2 * auto.lr) in results) == (gain > 0), "a rival that is ahead is met by a swept one"
    table = run.results_table(question, results)
    assert f"By the rule: SNR to the power -1/2 **{verb}**" in table
    # with a loss that is far above from the first seed on the others are not asked; else they all must be there
    assert (question.by_snr("snr-inverse", best_lr, 3) in results) == (gain >= 0)
    del results[question.by_snr("snr-inverse", best_lr, 3) if gain >= 0 else question.by_snr("snr-inverse", best_lr)]
    del results[question.by_snr("snr-inverse", 2 * best_lr)], results[question.by_snr("snr-inverse", best_lr / 4)]
    assert "No verdict yet" in run.results_table(question, results)


def test_seeds_decide_what_enters_the_preset(monkeypatch, tmp_path):
    """One lucky seed would put a setting into a preset."""
    sure, lucky, small = ADDITIONS

    def loss(trial):
        gains = {sure: (0.02, 0.021, 0.02), lucky: (0.02, -0.02, 0.01), small: (0.004,)}
        return 3.5 - gains.get(trial.change, (0.0,) * 3)[trial.seed - 1]

    question, results = _trained(monkeypatch, tmp_path, loss)
    assert [sum(t.change == change for t in results) for change in ADDITIONS] == [3, 3, 1]
    rows = [line for line in run.additions_table(question, results).splitlines() if line.startswith("| ")][2:]
    assert [row.rsplit("|", 2)[1].strip() for row in rows] == ["yes", "no", "no"]
    assert "-0.0203 ± 0.0003" in rows[0]


def test_the_page_shows_what_is_in_the_files():
    """Every number in the tables follows from files that the script wrote."""
    question, results = run.read(PUBLISHED)
    measured = candidates.measuring(question.lr).name
    assert {trial.name for trial in results} == set(report.named_in(run.OWN)) - {measured}
    page = report.COMPARISONS.read_text(encoding="utf-8")
    tables = dict(run.tables(question, results))
    assert len(tables) == 3
    for mark, text in tables.items():
        assert between(page, mark) == text
