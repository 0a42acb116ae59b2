# SPDX-License-Identifier: Apache-2.0
"""`make compare` with real trials of two steps: run, stopped and resumed, shared, taken over from elsewhere."""

from __future__ import annotations

import csv
import fcntl
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="trials are runs of the main job, which needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="trials are runs of the main job, which needs the extra 'megatron'")
pytest.importorskip("torchao", reason="one of the compared optimizers is torchao's")

import benchmarks.compare.one_trial  # noqa: F401 - takes seconds, which would count against the first deadline
from benchmarks.compare import report
from benchmarks.compare import run as comparison
from benchmarks.compare.trials import ARMS, BASELINE, COMPARED, Plan
from tests.helpers.distributed import HANG_S
from tests.helpers.launch.project import prepare_project

pytestmark = pytest.mark.spawns  # in benchmarks.compare.run


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_project(tmp_path_factory.mktemp("compare"))


def _trained(
    project: Path, folder: Path, deadline: float, arms: list[str], steps: int = 2, finished: Path | None = None
):
    plan = Plan(steps, grid=1, seeds=1, lengths=(), widen=0, refine=0, ablations=(), arms=tuple(arms))
    overrides = ["training.log_interval=1", "parallel.tensor=1", "cluster.gpus_per_node=1"]
    with comparison.Trials(folder, project / "run.yaml", 2, deadline, overrides=overrides, finished=finished) as trials:
        comparison.train_all(trials, plan)
        return trials.results, report.write(trials.results, trials.run.name, plan, folder, published=False)


def test_real_trials_end_in_a_table_and_are_not_trained_twice(project, tmp_path, monkeypatch):
    """Through the main job; the second time everything is there. 8-bit AdamW is compiled for a minute: see below."""
    monkeypatch.chdir(project)
    arms = [arm for arm in (*COMPARED, "soap", "blockwise_lion") if arm != "adamw_8bit"]
    for deadline in (time.monotonic() + 600.0, 0.0):  # the second time nothing may begin
        results, text = _trained(project, tmp_path, deadline, arms)
    for arm in arms:
        assert f"| {ARMS[arm].label} | " in text
    bytes_of = {t.arm: r["optimizer_state_bytes_per_parameter"] for t, r in results.items()}
    assert bytes_of["blockwise_adamw"] == 8.0
    assert bytes_of["adamw"] == pytest.approx(8.0, abs=0.01), "torch counts steps in tensors"
    assert bytes_of["adam_mini"] < bytes_of["muon"] < 8.0
    assert bytes_of["soap"] > 8.0, "two moments, and matrices in lists"
    assert bytes_of["blockwise_lion"] == 4.0
    assert all(figure.stat().st_size > 10_000 for figure in tmp_path.glob("*.png"))
    assert len(list(tmp_path.glob("*.png"))) == 2
    (changed,) = [t for t in results if t.arm == BASELINE]
    result = tmp_path / changed.name / "result.json"
    result.write_text(result.read_text(encoding="utf-8").replace("0.004", "0.005"), encoding="utf-8")
    with pytest.raises(comparison.Stopped, match="1 runs of 'learning rates' are left"):
        _trained(project, tmp_path, 0.0, arms)


def test_a_trial_that_the_clock_stops_goes_on_from_its_checkpoint(project, tmp_path, monkeypatch):
    """Slices of a lent machine: the same loss as in one go, and every part's time is counted."""
    monkeypatch.chdir(project)
    whole, _ = _trained(project, tmp_path / "whole", time.monotonic() + 600.0, [BASELINE], steps=200)
    with pytest.raises(comparison.Stopped, match="1 runs"):
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
        """Once it is waited for the other process ends: its result is there before its lock is gone."""
        deadline = time.monotonic() + HANG_S
        while not _is_waited_for(lock) and time.monotonic() < deadline:
            time.sleep(0.1)
        waited.append(_is_waited_for(lock))
        shutil.copytree(tmp_path / "one" / trial.name, tmp_path / "two" / trial.name)
        (tmp_path / "two" / trial.name / "log").write_text("of the other process", encoding="utf-8")
        os.close(lock)

    waited: list[bool] = []
    other = threading.Thread(target=finish)
    other.start()
    again, _ = _trained(project, tmp_path / "two", time.monotonic() + 600.0, [BASELINE])
    other.join()
    assert waited == [True]
    assert again[trial]["cpu_seconds"] == result["cpu_seconds"], "trained again"
    assert (tmp_path / "two" / trial.name / "log").read_text(encoding="utf-8") == "of the other process"


def _is_waited_for(lock: int) -> bool:
    """Whether a process stands in line for a lock; Linux lists it behind an arrow, proc(5)."""
    with open("/proc/locks", encoding="ascii") as file:
        return any("->" in line and f":{os.fstat(lock).st_ino} " in line for line in file)


def test_results_of_another_machine_count_if_nothing_that_decides_them_differs(project, tmp_path, monkeypatch):
    """From a CSV, into an empty folder: no run begins; other lengths are other runs; figures need no curves."""
    monkeypatch.chdir(project)
    there, here, path = tmp_path / "there", tmp_path / "here", tmp_path / "trials.csv"
    results, text = _trained(project, there, time.monotonic() + 600.0, [BASELINE])
    report.write_csv(results, path)
    here.mkdir()
    again, same = _trained(project, here, 0.0, [BASELINE], finished=path)
    assert {t: r["final_validation_loss"] for t, r in again.items()} == pytest.approx(
        {t: r["final_validation_loss"] for t, r in results.items()}, abs=1e-5
    )
    assert same == text.replace(str(there), str(here))
    assert {figure.name for figure in here.glob("*.png")} == {figure.name for figure in there.glob("*.png")}
    with pytest.raises(comparison.Stopped, match="1 runs"):
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
    assert text == same
    assert len(list(here.glob("*.png"))) == 2


@pytest.mark.slow
def test_8_bit_states_are_counted_as_they_are_stored(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    results, _ = _trained(project, tmp_path, time.monotonic() + 600.0, [BASELINE, "adamw_8bit"])
    bytes_of = {t.arm: r["optimizer_state_bytes_per_parameter"] for t, r in results.items()}
    assert 2.0 < bytes_of["adamw_8bit"] < 4.0
