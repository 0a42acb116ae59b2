# SPDX-License-Identifier: Apache-2.0
"""`ds-blockwise schedule refine`: from a run's gradient norms to a table that a schedule follows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from ds_blockwise.cli.main import main
from ds_blockwise.optimizers.registry import SCHEDULES
from ds_blockwise.optimizers.schedules.refine import refine
from ds_blockwise.optimizers.schedules.table import read_table
from ds_blockwise.runs.metrics import METRICS_CSV, MetricsFile

NORMS = {step: 2.0 + math.cos(step / 60) for step in range(10, 301, 10)}


def main_job(folder: Path, norms: dict[int, float]) -> Path:
    file = MetricsFile(folder / METRICS_CSV)
    for step, value in norms.items():
        kinds = {f"blockwise/grad_norm/{kind}": value for kind in ("emb", "ffn")}
        file.write_events([(name, number, step) for name, number in {"loss/train": 3.0, **kinds}.items()])
    return folder


def trainer(folder: Path, norms: dict[int, float]) -> Path:
    history = [{"step": step, "grad_norm": value, "loss": 3.0} for step, value in norms.items()]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*history, {"step": 300, "eval_loss": 2.0}]}))
    return folder


@pytest.mark.parametrize("run", [main_job, trainer])
def test_a_run_becomes_the_schedule_that_the_printed_json_follows(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["schedule", "refine", str(run(tmp_path, NORMS)), "--output", "refined.csv"]) == 0
    printed = capsys.readouterr().out
    assert "30 gradient norms, of updates 10 to 300" in printed
    expected = refine(NORMS)
    assert read_table("refined.csv") == expected
    section = json.loads("{" + printed[printed.index('"scheduler"') :] + "}")["scheduler"]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = SCHEDULES[section["type"]](optimizer, **section["params"], total_num_steps=len(NORMS) - 1)
    for factor in expected.factors:
        assert schedule.get_last_lr() == pytest.approx([factor])
        schedule.step()


def test_the_options_reach_the_refinement(tmp_path, capsys):
    folder = main_job(tmp_path, NORMS)
    command = ["schedule", "refine", str(folder), "--metric", "blockwise/grad_norm/ffn", "--norm", "l1"]
    assert main([*command, "--tau", "0.2", "--skip", "50"]) == 0
    (tmp_path / "printed.csv").write_text(capsys.readouterr().out)
    expected = refine({step: value for step, value in NORMS.items() if step > 50}, norm="l1", tau=0.2)
    assert read_table(tmp_path / "printed.csv") == expected != refine(NORMS, norm="l1", tau=0.2)


@pytest.mark.parametrize(
    ("make", "more", "words"),
    [
        (lambda folder: folder, [], ["is no folder with metrics.csv", "trainer_state.json"]),
        (lambda folder: MetricsFile(folder / METRICS_CSV), [], ["has no gradient norms", '"telemetry": {"interval"']),
        (lambda folder: main_job(folder, NORMS), ["--metric", "loss/trian"], ["did you mean 'loss/train'"]),
        (lambda folder: main_job(folder, {1: 1.0}), [], ["too few gradient norms", ": 1, at least 10"]),
        (lambda folder: main_job(folder, NORMS), ["--skip", "-1"], ["--skip must be an integer >= 0"]),
        (lambda folder: main_job(folder, NORMS), ["--tau", "2"], ["tau must be >= 0 and < 1"]),
        (lambda folder: trainer(folder, {}), [], ["has no grad_norm", "logging_steps"]),
        (lambda folder: (folder / "trainer_state.json").write_text("[]"), [], ["is not what Trainer writes"]),
    ],
)
def test_what_gives_no_schedule_is_explained(make, more, words, tmp_path, capsys):
    make(tmp_path)
    assert main(["schedule", "refine", str(tmp_path), *more]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
