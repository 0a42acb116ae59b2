# SPDX-License-Identifier: Apache-2.0
"""`make compare`: what is trained follows from results, the statistics are right, and real trials end in a table."""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import json
import math
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed", reason="trials are runs of the main job, which needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="trials are runs of the main job, which needs the extra 'megatron'")
pytest.importorskip("torchao", reason="one of the compared optimizers is torchao's")

from launch_project import ROOT, prepare_project

sys.path.insert(0, str(ROOT / "benchmarks"))

import compare_job  # noqa: F401 - takes seconds, which would count against the first deadline
import compare_optimizers
import compare_peers
import compare_report
from compare_ablations import ADAMW, MINI, OUR_MINI, OURS, ablations, confirmation
from compare_trials import ARMS, BASELINE, FULL, LARGER, PATIENT, PUBLISHED_PLANS, QUICK, Plan, Setup, Trial

PLAN = Plan(steps=100, grid=3, seeds=3, lengths=(0.5,), widen=2, refine=0, ablations="all")


class FakeTrials:
    """Answers trials from a formula instead of training them."""

    def __init__(self, loss_of):
        self.results = {}
        self.titles = []
        self.compared = False
        self._loss_of = loss_of

    def find(self, trials):
        return [trial for trial in trials if trial not in self.results]

    def train(self, trials, title):
        self.titles.append(title)
        for trial in trials:
            loss = self._loss_of(trial)
            self.results[trial] = {
                "diverged": None if math.isfinite(loss) else "inf",
                "final_validation_loss": loss if math.isfinite(loss) else None,
                "optimizer_state_bytes_per_parameter": 8.0,
                "cpu_seconds": 0.5 * trial.steps,
                "parameters": 1000,
                "tokens": 10 * trial.steps,
                "curve": [(0, 7.0), (trial.steps // 2, 5.0), (trial.steps, loss)],
                "fingerprint": trial.name,
                "provenance": dict.fromkeys(compare_report.PROVENANCE, "x"),
            }


def _bowl(best, floor):
    """Final loss of an arm: a parabola in log2 of the rate, better with more steps, another constant for each seed."""

    def loss(trial):
        distance = math.log2(trial.lr / best[trial.arm])
        return floor[trial.arm] + 0.1 * distance**2 + 0.01 * trial.seed - 0.2 * math.log2(trial.steps / PLAN.steps)

    return loss


BEST = dict(zip(ARMS, (1.6e-2, 5e-4, 4e-3, 2.5e-4, 8e-3, 4e-3), strict=True))
FLOOR = dict(zip(ARMS, (3.5, 3.45, 3.6, 3.5, 3.4, 3.52), strict=True))


def test_a_grid_grows_until_its_best_is_inside():
    trials = FakeTrials(_bowl(BEST, FLOOR))
    found = compare_optimizers.sweep(trials, PLAN)
    assert found == BEST
    rates = sorted(t.lr for t in trials.results if t.arm == BASELINE)
    assert rates[-1] == 3.2e-2, "the best rate was never shown to have a worse one above it"


def test_a_best_rate_between_two_points_is_looked_for_on_the_better_side():
    """A parabola whose minimum is at 2.9e-3: 4e-3 is best of the factors of 2, and 2e-3 its better neighbour."""
    between = {**BEST, BASELINE: 2.9e-3}
    trials = FakeTrials(_bowl(between, FLOOR))
    found = compare_optimizers.sweep(trials, dataclasses.replace(PLAN, refine=1))
    assert found == {**BEST, BASELINE: 2.8e-3}
    rates = sorted(t.lr for t in trials.results if t.arm == BASELINE)
    assert rates == [2e-3, 2.8e-3, 4e-3, 8e-3]


def test_a_grid_grows_no_further_than_it_may():
    trials = FakeTrials(_bowl(BEST, FLOOR))
    narrow = dataclasses.replace(PLAN, widen=0)
    assert compare_optimizers.sweep(trials, narrow)[BASELINE] == 8e-3
    assert len(trials.results) == 3 * len(ARMS)


def test_shorter_runs_only_of_what_beats_the_baseline():
    trials = FakeTrials(_bowl(BEST, FLOOR))
    compare_optimizers.train_all(trials, PLAN)
    shorter = {t.arm for t in trials.results if t.steps == 50}
    assert shorter == {"blockwise_adamw", "muon"}
    assert {t.seed for t in trials.results if t.steps == 50} == {1, 2, 3}
    plain = [t for t in trials.results if not t.change]
    assert {round(t.warmup * t.steps) for t in plain} == {5}, "the warm-up does not shrink with the run"


def test_the_table_says_what_the_formula_does():
    trials = FakeTrials(_bowl(BEST, FLOOR))
    compare_optimizers.train_all(trials, PLAN)
    rows = {row.arm: row for row in compare_report.arm_results(trials.results, PLAN)}
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
    text = compare_report.table(list(rows.values()), trials.results, PLAN)
    assert "| Muon + AdamW (torch) | 0.008 | 3.4200 ± 0.0058 | -0.1000 ± 0.0000 | 71 | 0.71 | 0.500 | 8.00 |" in text
    assert (
        f"| {ARMS['adamw_8bit'].label} | 0.004 | 3.5400 ± 0.0058 | +0.0200 ± 0.0000 | not within 100 |  | 0.500" in text
    )


def test_a_tie_takes_about_as_many_steps_and_is_not_trained_again():
    """Differences of one seed to another that are larger than the mean difference: no claim either way."""
    bowl = _bowl(BEST, {**FLOOR, "adamw_8bit": FLOOR[BASELINE] - 0.001})
    noise = {1: 0.01, 2: -0.01, 3: 0.0}
    trials = FakeTrials(lambda t: bowl(t) + (noise[t.seed] if t.arm == "adamw_8bit" else 0.0))
    compare_optimizers.train_all(trials, PLAN)
    rows = {row.arm: row for row in compare_report.arm_results(trials.results, PLAN)}
    assert rows["adamw_8bit"].against_baseline.mean == pytest.approx(-0.001)
    assert rows["adamw_8bit"].steps_to_baseline.steps_text() == "about 100"
    assert not [t for t in trials.results if t.arm == "adamw_8bit" and t.steps < PLAN.steps]


def test_time_to_the_loss_is_relative_to_the_baseline():
    """A step that takes longer eats what fewer steps gain; a bound on steps is one on time."""
    said = [compare_report.StepsTo(600, words) for words in ("", "about", "fewer than", "not within")]
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
    assert compare_report.Estimate.of(values).sign == sign


def test_the_larger_model_is_trained_in_bf16_with_its_own_rates_and_few_ablations():
    trials = FakeTrials(_bowl(BEST, FLOOR))
    compare_optimizers.train_all(trials, LARGER)
    assert {t.arm for t in trials.results} == set(LARGER.arms)
    assert LARGER.learning_rates(BASELINE) == (2e-3, 4e-3, 8e-3)
    assert {t.change for t in trials.results} == {"", "published-cuts", "uniform-norm", "wsd"}
    trial = next(iter(trials.results))
    setups = [Setup(2048, {"tokenizer": {"sha256": "x"}, "splits": {}}, bf16) for bf16 in (False, True)]
    fp32, bf16 = (setup.settings(trial) for setup in setups)
    assert {**fp32, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}} == bf16
    assert setups[0].digest(trial) != setups[1].digest(trial)
    for name in PUBLISHED_PLANS:
        assert (ROOT / f"configs/run/{name}.yaml").is_file()


def test_a_longer_warm_up_is_that_of_every_run(tmp_path):
    trials = FakeTrials(_bowl(BEST, FLOOR))
    compare_optimizers.train_all(trials, PATIENT)
    assert {round(t.warmup * t.steps) for t in trials.results} == {160}
    assert {t.steps for t in trials.results} == {600, 800}, "steps to the same loss want a shorter length"
    assert {t.change for t in trials.results} == {"", "uniform-norm", "wsd"}
    compare_report.write_csv(trials.results, tmp_path / "trials.csv")
    assert set(compare_report.read_csv(tmp_path / "trials.csv", PATIENT)) == set(trials.results)


def test_a_length_counts_when_all_seeds_have_it():
    """A comparison that is stopped in between would give the mean of one seed beside the mean of three."""
    trials = FakeTrials(_bowl(BEST, FLOOR))
    compare_optimizers.train_all(trials, PLAN)
    few = {t: r for t, r in trials.results.items() if t.steps == PLAN.steps or t.seed == 1}
    rows = {row.arm: row for row in compare_report.arm_results(few, PLAN)}
    assert rows["muon"].steps_to_baseline.steps_text() == "fewer than 100"
    assert rows["adamw_8bit"].steps_to_baseline.steps_text() == "not within 100"


@pytest.mark.parametrize("option", ["--publish", "--from-published"])
@pytest.mark.parametrize("other", [["--quick"], ["--steps", "100"], ["--set", "training.seed=3"], ["--no-ablations"]])
def test_only_the_plan_that_the_readme_shows_is_published(option, other, monkeypatch, capsys):
    """Asked for and ignored, or worse: another comparison in the place of this one."""
    monkeypatch.setattr(sys, "argv", ["compare_optimizers.py", option, *other])
    with pytest.raises(SystemExit):
        compare_optimizers.main()
    assert f"{option} is for the plan" in capsys.readouterr().err


def test_nothing_published_to_go_on_from_is_an_error(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(compare_report, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare_optimizers.py", "--from-published"])
    with pytest.raises(SystemExit):
        compare_optimizers.main()
    assert "there is no docs/compare/compare.csv yet" in capsys.readouterr().err


def test_a_rate_that_diverges_is_never_the_best_and_is_written_down(tmp_path):
    bowl = _bowl(BEST, FLOOR)
    trials = FakeTrials(lambda trial: math.inf if trial.lr > 6e-3 else bowl(trial))
    found = compare_optimizers.sweep(trials, PLAN)
    assert found[BASELINE] == 4e-3
    compare_report.write_csv(trials.results, tmp_path / "trials.csv")
    lines = (tmp_path / "trials.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + len(trials.results)
    assert sum(f",{compare_report.DIVERGED}," in line for line in lines) == sum(t.lr > 6e-3 for t in trials.results)


@pytest.mark.parametrize("plan", [FULL, QUICK], ids=["full", "quick"])
def test_trials_have_names_of_their_own_and_settings_that_differ(plan):
    trials = [Trial(arm, lr, seed, plan.steps) for arm in ARMS for lr in plan.learning_rates(arm) for seed in (1, 2)]
    changes = [trial for ablation in ablations(BEST, FULL) for trial in ablation.trials(plan)]
    assert len(changes) > 30
    trials = list(dict.fromkeys([*trials, *changes]))
    assert len({t.name for t in trials}) == len(trials)
    facts = {json.dumps([t.settings(2048), t.seed, t.steps, t.warmup], sort_keys=True) for t in trials}
    # a change to the default would be compared with itself
    assert len(facts) == len(trials)


def test_the_whole_comparison_fits_three_hours_of_two_cores():
    """At 115 s for a run of 800 steps on each of two cores, with one grid in two that grows once."""
    trials = FakeTrials(_bowl(BEST, FLOOR))
    compare_optimizers.train_all(trials, FULL)
    steps = sum(t.steps for t in trials.results)
    assert steps / 800 * 230 / 2 < 3 * 3600


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
    compare_optimizers.train_all(trials, PLAN)
    assert trials.compared
    rates = compare_optimizers.sweep(trials, PLAN)
    text = compare_report.ablation_table(trials.results, PLAN, rates)
    # the parabola: 0.4 above the best at four times its rate, which the sweep has not
    words = "multipliers measured from step 300 on, the output layer's too; 4x the best base rate"
    measured = f"| {ARMS[OURS].label} | {words} | 0.002 |"
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
    text = compare_report.ablation_table(without, PLAN, rates)
    assert f"2 of {len(ablations(rates, PLAN))} are not trained yet: warm-up, stable, decay instead of cosine." in text


def test_finished_ablations_count_although_the_time_is_up_before(monkeypatch):
    """Published with `--publish`, a CSV would lose what an earlier one had."""
    whole = FakeTrials(_bowl(BEST, FLOOR))
    compare_optimizers.train_all(whole, PLAN)
    stopped = FakeTrials(_bowl(BEST, FLOOR))
    train = stopped.train

    def find(trials):
        found = {trial: whole.results[trial] for trial in trials if trial.change}
        stopped.results |= found
        return [trial for trial in trials if trial not in found]

    def until_shorter_runs(trials, title):
        if title == "shorter runs":
            raise compare_optimizers.Stopped(title)
        train(trials, title)

    monkeypatch.setattr(stopped, "find", find)
    monkeypatch.setattr(stopped, "train", until_shorter_runs)
    with pytest.raises(compare_optimizers.Stopped):
        compare_optimizers.train_all(stopped, PLAN)
    changed = {trial for trial in whole.results if trial.change}
    assert changed == {trial for trial in stopped.results if trial.change}
    assert not stopped.compared


def test_tables_are_the_same_from_the_csv(tmp_path):
    """The tests of README.md read the CSV, and every number of its table must follow from it."""
    bowl = _bowl(BEST, FLOOR)
    trials = FakeTrials(lambda trial: math.inf if trial.lr > 6e-2 else bowl(trial))
    compare_optimizers.train_all(trials, PLAN)
    compare_report.write_csv(trials.results, tmp_path / "trials.csv")
    read = compare_report.read_csv(tmp_path / "trials.csv", PLAN)
    for trial, result in trials.results.items():
        (found,) = (r for t, r in read.items() if t.name == trial.name)
        ended = result["diverged"] is None
        assert found["final_validation_loss"] == (pytest.approx(result["final_validation_loss"]) if ended else None)
        assert found["curve"] == [(step, pytest.approx(loss)) for step, loss in result["curve"] if ended]
    shown = []
    for results in (read, trials.results):
        rows = compare_report.arm_results(results, PLAN)
        rates = {row.arm: row.lr for row in rows}
        shown.append((compare_report.table(rows, results, PLAN), compare_report.ablation_table(results, PLAN, rates)))
    assert shown[0] == shown[1]


def test_muon_steps_hidden_matrices_and_adamw_the_rest():
    """Against both of torch's optimizers, each with its own parameters."""
    torch.manual_seed(3)
    shapes = [(20, 8), (8, 8), (24, 8), (8,), (20, 8)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    both = compare_peers.MuonAndAdamW(ours, lr=1e-2, vocab_size=20)
    muon = torch.optim.Muon(theirs[1:3], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [theirs[0], *theirs[3:]]
    adamw = torch.optim.AdamW(rest, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for group in (*both.param_groups, *muon.param_groups, *adamw.param_groups):
            group["lr"] = 1e-2 / (step + 1)
        both.step()
        muon.step()
        adamw.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(ValueError, match="vocab_size = 21"):
        compare_peers.MuonAndAdamW(ours, lr=1e-2, vocab_size=21)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_project(tmp_path_factory.mktemp("compare"))


def _trained(
    project: Path, folder: Path, deadline: float, arms: list[str], steps: int = 2, finished: Path | None = None
):
    plan = Plan(steps, grid=1, seeds=1, lengths=(), widen=0, refine=0, ablations=(), arms=tuple(arms))
    overrides = ["training.log_interval=1", "parallel.tensor=1", "cluster.gpus_per_node=1"]
    with compare_optimizers.Trials(
        folder, project / "run.yaml", 2, deadline, overrides=overrides, finished=finished
    ) as trials:
        compare_optimizers.train_all(trials, plan)
        return trials.results, compare_report.write(trials.results, trials.run, plan, folder, published=False)


def test_real_trials_end_in_a_table_and_are_not_trained_twice(project, tmp_path, monkeypatch):
    """Through the main job; the second time everything is there. 8-bit AdamW is compiled for a minute: see below."""
    monkeypatch.chdir(project)
    arms = [arm for arm in ARMS if arm != "adamw_8bit"]
    for deadline in (time.monotonic() + 600.0, 0.0):  # the second time nothing may begin
        results, text = _trained(project, tmp_path, deadline, arms)
    for arm in arms:
        assert f"| {ARMS[arm].label} | " in text
    bytes_of = {t.arm: r["optimizer_state_bytes_per_parameter"] for t, r in results.items()}
    assert bytes_of["blockwise_adamw"] == 8.0
    assert bytes_of["adamw"] == pytest.approx(8.0, abs=0.01), "torch counts steps in tensors"
    assert bytes_of["adam_mini"] < bytes_of["muon"] < 8.0
    assert all(figure.stat().st_size > 10_000 for figure in tmp_path.glob("*.png"))
    assert len(list(tmp_path.glob("*.png"))) == 2
    (changed,) = [t for t in results if t.arm == BASELINE]
    result = tmp_path / changed.name / "result.json"
    result.write_text(result.read_text(encoding="utf-8").replace("0.004", "0.005"), encoding="utf-8")
    with pytest.raises(compare_optimizers.Stopped, match="1 runs of 'learning rates' are left"):
        _trained(project, tmp_path, 0.0, arms)


def test_a_trial_that_the_clock_stops_goes_on_from_its_checkpoint(project, tmp_path, monkeypatch):
    """Slices of a lent machine: the same loss as in one go, and every part's time is counted."""
    monkeypatch.chdir(project)
    whole, _ = _trained(project, tmp_path / "whole", time.monotonic() + 600.0, [BASELINE], steps=200)
    with pytest.raises(compare_optimizers.Stopped, match="1 runs"):
        _trained(project, tmp_path / "slices", time.monotonic() + 1.0, [BASELINE], steps=200)
    (place,) = (path for path in (tmp_path / "slices").iterdir() if path.is_dir())
    spent = float((place / "cpu_seconds").read_text(encoding="utf-8"))
    assert list((place / "settings" / "checkpoints").glob("step_*"))
    slices, _ = _trained(project, tmp_path / "slices", time.monotonic() + 600.0, [BASELINE], steps=200)
    (one,), (two,) = whole.values(), slices.values()
    assert one["final_validation_loss"] == two["final_validation_loss"]
    assert one["curve"] == two["curve"]
    assert two["cpu_seconds"] > spent > 0


def test_a_trial_that_another_process_is_training_is_waited_for(project, tmp_path, monkeypatch):
    """Two processes in one folder would write into each other's logs and checkpoints."""
    monkeypatch.chdir(project)
    results, _ = _trained(project, tmp_path / "one", time.monotonic() + 600.0, [BASELINE])
    ((trial, result),) = results.items()
    (tmp_path / "two").mkdir()
    lock = os.open(tmp_path / "two" / f"{trial.name}.lock", os.O_WRONLY | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)

    def finish() -> None:
        """The other process ends: its result is there before its lock is gone."""
        shutil.copytree(tmp_path / "one" / trial.name, tmp_path / "two" / trial.name)
        (tmp_path / "two" / trial.name / "log").write_text("of the other process", encoding="utf-8")
        os.close(lock)

    other = threading.Timer(12.0, finish)
    other.start()
    again, _ = _trained(project, tmp_path / "two", time.monotonic() + 600.0, [BASELINE])
    other.join()
    assert again[trial]["cpu_seconds"] == result["cpu_seconds"], "trained again"
    assert (tmp_path / "two" / trial.name / "log").read_text(encoding="utf-8") == "of the other process"


def test_results_of_another_machine_count_if_nothing_that_decides_them_differs(project, tmp_path, monkeypatch):
    """From a CSV, into an empty folder: no run begins; other lengths are other runs; figures want curves."""
    monkeypatch.chdir(project)
    there, here, path = tmp_path / "there", tmp_path / "here", tmp_path / "trials.csv"
    results, text = _trained(project, there, time.monotonic() + 600.0, [BASELINE])
    compare_report.write_csv(results, path)
    here.mkdir()
    again, same = _trained(project, here, 0.0, [BASELINE], finished=path)
    assert {t: r["final_validation_loss"] for t, r in again.items()} == pytest.approx(
        {t: r["final_validation_loss"] for t, r in results.items()}, abs=1e-5
    )
    assert same == text.replace(str(there), str(here))
    assert {figure.name for figure in here.glob("*.png")} == {figure.name for figure in there.glob("*.png")}
    with pytest.raises(compare_optimizers.Stopped, match="1 runs"):
        _trained(project, here, 0.0, [BASELINE], steps=3, finished=path)
    for figure in here.glob("*.png"):
        figure.unlink()
    with open(path, newline="", encoding="utf-8") as file:
        rows = [{**row, "curve": ""} for row in csv.DictReader(file)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    _, text = _trained(project, here, 0.0, [BASELINE], finished=path)
    assert "is as it was: the CSV has no curves of its runs" in text
    assert len(list(here.glob("*.png"))) == 1


@pytest.mark.slow
def test_8_bit_states_are_counted_as_they_are_stored(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    results, _ = _trained(project, tmp_path, time.monotonic() + 600.0, [BASELINE, "adamw_8bit"])
    bytes_of = {t.arm: r["optimizer_state_bytes_per_parameter"] for t, r in results.items()}
    assert 2.0 < bytes_of["adamw_8bit"] < 4.0
