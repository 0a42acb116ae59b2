# SPDX-License-Identifier: Apache-2.0
"""bf16 against fp32: pairs of one seed, and the words follow from the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("deepspeed", reason="trials are runs of the main job, which needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="trials are runs of the main job, which needs the extra 'megatron'")

from benchmarks.compare import report
from benchmarks.compare.questions import precision
from benchmarks.compare.trials import BASELINE, FULL
from benchmarks.provenance import between
from tests.benchmarks.formula import FormulaTrials


def _trained(gain):
    trials = FormulaTrials(lambda t: 3.5 + 0.02 * t.seed - (0 if t.arm == BASELINE else gain + 0.001 * t.seed))
    precision.train(trials)
    return trials.results


@pytest.mark.parametrize(
    ("gain", "words"), [(0.3, "bf16 is a reason"), (0.1, "not decided"), (-0.2, "bf16 is not the reason: it adds")]
)
def test_the_words_follow_from_pairs_of_one_seed(gain, words):
    fp32 = _trained(0.1)
    assert f"**{words}" in precision.table(_trained(gain), fp32)
    assert precision.differences(fp32) == pytest.approx({seed: -0.1 - 0.001 * seed for seed in (2, 3, 4, 5)})


def test_a_seed_without_its_pair_is_left_out():
    results = _trained(0.1)
    adamw, _ = precision.sides()
    del results[replace(adamw, seed=3)]
    assert list(precision.differences(results)) == [2, 4, 5]
    assert precision.table({}, results) == ""


def test_the_page_shows_what_is_in_the_csv():
    page = report.COMPARISONS.read_text(encoding="utf-8")
    if not precision.ASKED.csv.is_file():
        assert between(page, precision.ASKED.name).strip() == "Not run yet."
        return
    for _, mark, text in precision.tables():
        assert between(page, mark) == text
    assert precision.differences(report.read_csv(precision.ASKED.csv, FULL))
