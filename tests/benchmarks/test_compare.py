# SPDX-License-Identifier: Apache-2.0
"""`make compare`: what is trained follows from results, the statistics are right, and real trials end in a table."""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import pytest

pytest.importorskip("deepspeed", reason="trials are runs of the main job, which needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="trials are runs of the main job, which needs the extra 'megatron'")
pytest.importorskip("torchao", reason="one of the compared optimizers is torchao's")

from benchmarks.compare import report
from benchmarks.compare import run as comparison
from benchmarks.compare.ablations import ADAMW, MINI, OUR_MINI, OURS, ablations, confirmation
from benchmarks.compare.results import DIVERGED, Estimate, StepsTo, arm_results, steps_to
from benchmarks.compare.trials import (
    ARMS,
    BASELINE,
    COMPARED,
    FULL,
    LARGER,
    PATIENT,
    PUBLISHED_PLANS,
    QUICK,
    Plan,
    Setup,
    Trial,
)
from ds_blockwise.runs.model_shape import GPTShape
from tests.helpers.benchmark_runs import FakeTrials
from tests.helpers.launch.project import ROOT

PLAN = Plan(steps=100, grid=3, seeds=3, lengths=(0.5,), widen=2, refine=0, ablations="all")


def _bowl(best, floor):
    """Final loss of an arm: a parabola in log2 of the rate, better with more steps, another constant for each seed."""

    def loss(trial):
        distance = math.log2(trial.lr / best[trial.arm])
        return floor[trial.arm] + 0.1 * distance**2 + 0.01 * trial.seed - 0.2 * math.log2(trial.steps / PLAN.steps)

    return loss


SHAPE = GPTShape.load(ROOT / "configs/model/tiny.yaml")
BEST = dict(zip(COMPARED, (1.6e-2, 5e-4, 4e-3, 2.5e-4, 8e-3, 4e-3, 8e-3, 8e-3), strict=True))
FLOOR = dict(zip(COMPARED, (3.5, 3.45, 3.6, 3.5, 3.4, 3.52, 3.53, 3.54), strict=True))


def test_a_grid_grows_until_its_best_is_inside():
    trials = FakeTrials(_bowl(BEST, FLOOR))
    found = comparison.sweep(trials, PLAN)
    assert found == BEST
    rates = sorted(t.lr for t in trials.results if t.arm == BASELINE)
    assert rates[-1] == 3.2e-2, "the best rate was never shown to have a worse one above it"


def test_a_best_rate_between_two_points_is_looked_for_on_the_better_side():
    """A parabola whose minimum is at 2.9e-3: 4e-3 is best of the factors of 2, and 2e-3 its better neighbour."""
    between = {**BEST, BASELINE: 2.9e-3}
    trials = FakeTrials(_bowl(between, FLOOR))
    found = comparison.sweep(trials, dataclasses.replace(PLAN, refine=1))
    assert found == {**BEST, BASELINE: 2.8e-3}
    rates = sorted(t.lr for t in trials.results if t.arm == BASELINE)
    assert rates == [2e-3, 2.8e-3, 4e-3, 8e-3]


def test_a_grid_grows_no_further_than_it_may():
    trials = FakeTrials(_bowl(BEST, FLOOR))
    narrow = dataclasses.replace(PLAN, widen=0)
    assert comparison.sweep(trials, narrow)[BASELINE] == 8e-3
    assert len(trials.results) == 3 * len(COMPARED)


def test_shorter_runs_only_of_what_beats_the_baseline():
    trials = FakeTrials(_bowl(BEST, FLOOR))
    comparison.train_all(trials, PLAN)
    shorter = {t.arm for t in trials.results if t.steps == 50}
    assert shorter == {"blockwise_adamw", "muon"}
    assert {t.seed for t in trials.results if t.steps == 50} == {1, 2, 3}
    plain = [t for t in trials.results if not t.change]
    assert {round(t.warmup * t.steps) for t in plain} == {5}, "the warm-up does not shrink with the run"


def test_the_table_says_what_the_formula_does():
    trials = FakeTrials(_bowl(BEST, FLOOR))
    comparison.train_all(trials, PLAN)
    rows = {row.arm: row for row in arm_results(trials.results, PLAN)}
    assert {arm: row.lr for arm, row in rows.items()} == BEST
    for arm, row in rows.items():
        assert row.loss.mean == pytest.approx(FLOOR[arm] + 0.02)
        assert row.loss.error == pytest.approx(0.01 / math.sqrt(3))
        assert row.cpu_seconds_per_step == pytest.approx(0.5)
        if arm != BASELINE:
            assert row.against_baseline.mean == pytest.approx(FLOOR[arm] - FLOOR[BASELINE])
            assert row.against_baseline.error == pytest.approx(0.0, abs=1e-12), "seeds are compared in pairs"
    # 0.05 better at 100 steps and 0.2 for each factor of 2: the baseline's loss after 100 / 2^(1/4) steps
    assert rows["blockwise_adamw"].steps_to_baseline.steps_text() == "84"
    assert rows["muon"].steps_to_baseline.steps_text() == "71"
    assert rows["adamw_8bit"].steps_to_baseline.steps_text() == "not within 100"
    text = report.table(list(rows.values()), trials.results, PLAN)
    assert f"| {ARMS['muon'].label} | 0.008 | 3.4200 ± 0.0058 | -0.1000 ± 0.0000 | 71 | 0.71 | 0.500 | 8.00 |" in text
    assert (
        f"| {ARMS['adamw_8bit'].label} | 0.004 | 3.5400 ± 0.0058 | +0.0200 ± 0.0000 | not within 100 |  | 0.500" in text
    )


def test_a_tie_takes_about_as_many_steps_and_is_not_trained_again():
    """Differences of one seed to another that are larger than the mean difference: no claim either way."""
    bowl = _bowl(BEST, {**FLOOR, "adamw_8bit": FLOOR[BASELINE] - 0.001})
    noise = {1: 0.01, 2: -0.01, 3: 0.0}
    trials = FakeTrials(lambda t: bowl(t) + (noise[t.seed] if t.arm == "adamw_8bit" else 0.0))
    comparison.train_all(trials, PLAN)
    rows = {row.arm: row for row in arm_results(trials.results, PLAN)}
    assert rows["adamw_8bit"].against_baseline.mean == pytest.approx(-0.001)
    assert rows["adamw_8bit"].steps_to_baseline.steps_text() == "about 100"
    assert not [t for t in trials.results if t.arm == "adamw_8bit" and t.steps < PLAN.steps]


def test_time_to_the_loss_is_relative_to_the_baseline():
    """A step that takes longer eats what fewer steps gain; a bound on steps is one on time."""
    said = [StepsTo(600, words) for words in ("", "about", "fewer than", "not within")]
    texts = [(steps.steps_text(), steps.time_text(1.2, 800)) for steps in said]
    assert texts == [
        ("600", "0.90"),
        ("about 600", "about 0.90"),
        ("fewer than 600", "less than 0.90"),
        ("not within 600", ""),
    ]


@pytest.mark.parametrize(
    ("values", "sign"),
    [([0.1], 1), ([-0.1], -1), ([0.0], 0), ([0.1, 0.2], 1), ([-0.1, 0.2], 0), ([math.inf, 0.1, 0.1], 1)],
)
def test_a_difference_has_a_sign_beyond_two_standard_errors(values, sign):
    assert Estimate.of(values).sign == sign


def test_the_larger_model_is_trained_in_bf16_with_its_own_rates_and_few_ablations():
    trials = FakeTrials(_bowl(BEST, FLOOR))
    comparison.train_all(trials, LARGER)
    assert {t.arm for t in trials.results} == set(LARGER.arms)
    assert LARGER.learning_rates(BASELINE) == (2e-3, 4e-3, 8e-3)
    assert {t.change for t in trials.results} == {"", "published-cuts", "uniform-norm", "wsd"}
    trial = next(iter(trials.results))
    setups = [Setup(SHAPE, {"tokenizer": {"sha256": "x"}, "splits": {}}, bf16) for bf16 in (False, True)]
    fp32, bf16 = (setup.settings(trial) for setup in setups)
    assert {**fp32, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}} == bf16
    assert setups[0].digest(trial) != setups[1].digest(trial)
    for name in PUBLISHED_PLANS:
        assert (ROOT / f"configs/run/{name}.yaml").is_file()


def test_a_longer_warm_up_is_that_of_every_run(tmp_path):
    trials = FakeTrials(_bowl(BEST, FLOOR))
    comparison.train_all(trials, PATIENT)
    assert {round(t.warmup * t.steps) for t in trials.results} == {160}
    assert {t.steps for t in trials.results} == {600, 800}, "steps to the same loss want a shorter length"
    assert {t.change for t in trials.results} == {"", "uniform-norm", "wsd"}
    report.write_csv(trials.results, tmp_path / "trials.csv")
    assert set(report.read_csv(tmp_path / "trials.csv", PATIENT)) == set(trials.results)


def test_a_length_counts_when_all_seeds_have_it():
    """A comparison that is stopped in between would give the mean of one seed beside the mean of three."""
    trials = FakeTrials(_bowl(BEST, FLOOR))
    comparison.train_all(trials, PLAN)
    few = {t: r for t, r in trials.results.items() if t.steps == PLAN.steps or t.seed == 1}
    rows = {row.arm: row for row in arm_results(few, PLAN)}
    assert rows["muon"].steps_to_baseline.steps_text() == "fewer than 100"
    assert rows["adamw_8bit"].steps_to_baseline.steps_text() == "not within 100"


@pytest.mark.parametrize("option", ["--publish", "--from-published"])
@pytest.mark.parametrize(
    "other", [["--quick", "--steps", "100"], ["--steps", "100"], ["--set", "training.seed=3"], ["--no-ablations"]]
)
def test_only_a_plan_that_the_pages_show_is_published(option, other, monkeypatch, capsys):
    """Asked for and ignored, or worse: another comparison in the place of this one."""
    monkeypatch.setattr(sys, "argv", ["run.py", option, *other])
    with pytest.raises(SystemExit):
        comparison.main()
    assert f"{option} is for the plan" in capsys.readouterr().err


def test_nothing_published_to_go_on_from_is_an_error(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(report, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", "--from-published"])
    with pytest.raises(SystemExit):
        comparison.main()
    assert "there is no docs/compare/compare.csv yet" in capsys.readouterr().err


def test_a_rate_that_diverges_is_never_the_best_and_is_written_down(tmp_path):
    bowl = _bowl(BEST, FLOOR)
    trials = FakeTrials(lambda trial: math.inf if trial.lr > 6e-3 else bowl(trial))
    found = comparison.sweep(trials, PLAN)
    assert found[BASELINE] == 4e-3
    report.write_csv(trials.results, tmp_path / "trials.csv")
    lines = (tmp_path / "trials.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + len(trials.results)
    assert sum(f",{DIVERGED}," in line for line in lines) == sum(t.lr > 6e-3 for t in trials.results)


@pytest.mark.parametrize("plan", [FULL, QUICK], ids=["full", "quick"])
def test_trials_have_names_of_their_own_and_settings_that_differ(plan):
    trials = [
        Trial(arm, lr, seed, plan.steps) for arm in COMPARED for lr in plan.learning_rates(arm) for seed in (1, 2)
    ]
    changes = [trial for ablation in ablations(BEST, FULL) for trial in ablation.trials(plan)]
    assert len(changes) > 30
    trials = list(dict.fromkeys([*trials, *changes]))
    assert len({t.name for t in trials}) == len(trials)
    facts = {json.dumps([t.settings(SHAPE), t.seed, t.steps, t.warmup], sort_keys=True) for t in trials}
    # a change to the default would be compared with itself
    assert len(facts) == len(trials)


@pytest.mark.parametrize("change", [{}, {"lr_multipliers": {"norm": 8.0}}])
def test_blockwise_arms_say_their_unit_and_published_runs_still_count(change):
    """Their rates are those of the norms; results from before there were presets did not name it."""
    setup = Setup(SHAPE, {"tokenizer": {"sha256": "t"}, "splits": {}}, bf16=False)
    trial = Trial(OURS, 5e-4, 1, PLAN.steps, "changed" if change else "", change)
    named = change.get("lr_multipliers", {})
    assert setup.settings(trial)["optimizer"]["params"]["lr_multipliers"] == {"preset": "paper", **named}
    written = json.loads(setup.digest(trial))["settings"]["optimizer"]["params"]
    assert written.get("lr_multipliers") == (named or None)
    of_mini = json.loads(setup.digest(Trial(MINI, 5e-4, 1, PLAN.steps)))["settings"]["optimizer"]["params"]
    assert of_mini["lr_multipliers"] == dict.fromkeys(("emb", "head", "qk", "ffn", "vo", "norm", "other"), 1)


def test_the_whole_comparison_takes_the_time_that_it_says():
    """At 115 s for a run of 800 steps on each of two cores, with one grid in two that grows once."""
    trials = FakeTrials(_bowl(BEST, FLOOR))
    comparison.train_all(trials, FULL)
    steps = sum(t.steps for t in trials.results)
    assert 3.25 < steps / 800 * 230 / 2 / 3600 < 3.75


def test_steps_to_a_loss_count_runs_of_the_same_warmup_and_seeds():
    """A run of another warm-up at the same rate is another arm's business; so is a seed that has no whole run."""
    whole = [Trial(OURS, 1e-3, seed, 800, warmup=0.05) for seed in (1, 2)]
    baseline = [Trial(BASELINE, 4e-3, seed, 800, warmup=0.2) for seed in (1, 2)]
    losses = {trial: 3.3 for trial in whole} | {trial: 3.5 for trial in baseline}
    for share in (0.05, 0.1):  # as large a share, or as many steps
        short = {Trial(OURS, 1e-3, seed, 400, warmup=share): 3.7 for seed in (1, 2)}
        others = {Trial(OURS, 1e-3, 3, 400, warmup=share): 9.0, Trial(OURS, 1e-3, 1, 400, warmup=0.2): 9.0}
        results = {trial: {"final_validation_loss": loss} for trial, loss in (losses | short | others).items()}
        found = steps_to(results, FULL, whole, baseline)
        assert found is not None and found.steps_text() == str(round(400 * 2**0.5))


def test_cpu_time_of_another_day_is_not_compared():
    """The same machine may be half as fast on another day."""
    trials = FakeTrials(_bowl(BEST, FLOOR))
    comparison.train_all(trials, PLAN)
    for trial, result in trials.results.items():
        if trial.arm == OURS:
            result["provenance"] = result["provenance"] | {"date": "another"}
    text = report.table(arm_results(trials.results, PLAN), trials.results, PLAN)
    cells = {line.split(" | ")[0]: line.split(" | ")[5:7] for line in text.splitlines() if line.startswith("| ")}
    assert cells[f"| {ARMS[OURS].label}"] == ["", ""]
    assert "" not in cells[f"| {ARMS[OUR_MINI].label}"]
    assert "left out where it was measured on another day" in text


def test_ablations_need_only_the_arms_that_were_trained():
    few = {BASELINE: 4e-3, MINI: 4e-3}
    found = ablations(few, FULL)
    assert {a.arm for a in found} == {BASELINE, MINI}
    assert all(math.isfinite(a.lr) for a in found)


def test_what_looks_good_with_one_seed_is_trained_with_the_others():
    """The best cut of an arm always, any other change if it gains enough; not what loses."""
    asked = ablations(BEST, FULL)
    gains = {(MINI, "qk-rows"): 0.05, (OUR_MINI, "value-whole"): 0.01, (ADAMW, "wsd"): 0.04, (ADAMW, "linear"): 0.02}

    def loss(trial):
        change = 0.0 if not trial.change else -0.1 if trial.change == "head-1" else -0.01
        return 3.5 - gains.get((trial.arm, trial.change), change)

    losses = {trial: loss(trial) for a in asked for trial in a.trials(PLAN)}
    losses |= {trial: loss(trial) for arm, lr in BEST.items() for trial in [Trial(arm, lr, 1, PLAN.steps)]}
    found = {(t.arm, t.change, t.seed) for t in confirmation(PLAN, asked, losses, (MINI, OUR_MINI))}
    expected = ((MINI, "qk-rows"), (OUR_MINI, "value-whole"), (ADAMW, "wsd"))
    assert found == {(arm, change, seed) for arm, change in expected for seed in (2, 3)}


def test_ablations_are_compared_with_the_same_seeds_and_what_is_missing_is_counted():
    bowl = _bowl(BEST, FLOOR)
    gains = {"norm-elements": -0.03, "wsd": 0.02}
    trials = FakeTrials(lambda t: math.inf if t.change == "linear" else bowl(t) + gains.get(t.change, 0.0))
    comparison.train_all(trials, PLAN)
    assert trials.compared
    rates = comparison.sweep(trials, PLAN)
    text = report.ablation_table(trials.results, PLAN, rates)
    # the parabola: 0.4 above the best at four times its rate, which the sweep has not
    words = "multipliers measured from step 300 on, the output layer's too; 4x the best base rate"
    measured = f"| {ARMS[OURS].label} | {words} | 0.016 |"  # 8 times 0.002, the rate of the norms
    assert f"{measured} 3.8600 (one seed) | +0.4000 (one seed), to the best rate |" in text
    label = ARMS[MINI].label
    norms = "one second moment for each element of a norm"
    assert f"| {label} | {norms} | 0.004 | 3.5900 ± 0.0058 | -0.0300 ± 0.0000 |" in text
    assert (
        f"| {ARMS[ADAMW].label} | warm-up, stable, decay instead of cosine | 0.016 | 3.5300 (one seed) | +0.0200"
        in text
    )
    assert f"| {ARMS[ADAMW].label} | linear decay instead of cosine | 0.016 | diverged |  |" in text
    assert "not trained yet" not in text
    without = {t: r for t, r in trials.results.items() if t.change != "wsd"}
    text = report.ablation_table(without, PLAN, rates)
    assert f"2 of {len(ablations(rates, PLAN))} are not trained yet: warm-up, stable, decay instead of cosine." in text


def test_finished_ablations_count_although_the_time_is_up_before(monkeypatch):
    """Published with `--publish`, a CSV would lose what an earlier one had."""
    whole = FakeTrials(_bowl(BEST, FLOOR))
    comparison.train_all(whole, PLAN)
    stopped = FakeTrials(_bowl(BEST, FLOOR))
    train = stopped.train

    def find(trials):
        found = {trial: whole.results[trial] for trial in trials if trial.change}
        stopped.results |= found
        return [trial for trial in trials if trial not in found]

    def until_shorter_runs(trials, title):
        if title == "shorter runs":
            raise comparison.Stopped(title)
        train(trials, title)

    monkeypatch.setattr(stopped, "find", find)
    monkeypatch.setattr(stopped, "train", until_shorter_runs)
    with pytest.raises(comparison.Stopped):
        comparison.train_all(stopped, PLAN)
    changed = {trial for trial in whole.results if trial.change}
    assert changed == {trial for trial in stopped.results if trial.change}
    assert not stopped.compared


def test_tables_are_the_same_from_the_csv(tmp_path):
    """The tests of the pages read the CSV, and every number of a table must follow from it."""
    bowl = _bowl(BEST, FLOOR)
    trials = FakeTrials(lambda trial: math.inf if trial.lr > 6e-2 else bowl(trial))
    comparison.train_all(trials, PLAN)
    report.write_csv(trials.results, tmp_path / "trials.csv")
    read = report.read_csv(tmp_path / "trials.csv", PLAN)
    for trial, result in trials.results.items():
        (found,) = (r for t, r in read.items() if t.name == trial.name)
        ended = result["diverged"] is None
        assert found["final_validation_loss"] == (pytest.approx(result["final_validation_loss"]) if ended else None)
        assert found["curve"] == [(step, pytest.approx(loss)) for step, loss in result["curve"] if ended]
    shown = []
    for results in (read, trials.results):
        rows = arm_results(results, PLAN)
        rates = {row.arm: row.lr for row in rows}
        shown.append((report.table(rows, results, PLAN), report.ablation_table(results, PLAN, rates)))
    assert shown[0] == shown[1]
