# SPDX-License-Identifier: Apache-2.0
"""The main job with `BlockwiseLR`: telemetry of one run becomes the schedule of the next, which resumes exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="the main job needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="the main job needs the extra 'megatron'")

from ds_blockwise.cli.main import main
from ds_blockwise.optimizers.schedules.table import read_table
from ds_blockwise.runs.metrics import read_metric
from tests.helpers.launch.job_server import jobs
from tests.helpers.launch.project import assert_same_checkpoint, prepare_project, write_json

STEPS, STOP, WARMUP, FLOOR = 12, 7, 2, 1e-5


def _run(project: Path, config: Path, output: str, *arguments: str) -> Path:
    job = jobs().start(
        project / "logs" / f"{config.stem}-{output}{len(arguments)}",
        *("--run", str(project / "run.yaml"), "--deepspeed-config", str(config)),
        *("--set", f"output={project / output}", "--set", f"training.steps={STEPS}"),
        *("--set", "training.log_interval=1", *arguments),
    )
    job.succeed()
    return project / output / config.stem


def test_a_run_follows_the_schedule_that_another_runs_gradients_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = prepare_project(tmp_path)
    first = _run(project, write_json(project, "first", telemetry={"interval": 1}), "whole")
    table = project / "refined.csv"
    assert main(["schedule", "refine", str(first), "--skip", str(WARMUP), "--output", str(table)]) == 0
    printed = capsys.readouterr().out
    assert f"{STEPS - WARMUP} gradient norms, of updates {WARMUP + 1} to {STEPS}" in printed
    path = write_json(project, "second")
    config = json.loads(path.read_text())
    config["scheduler"] = json.loads("{" + printed[printed.index('"scheduler"') :] + "}")["scheduler"]
    config["scheduler"]["params"]["min_lr"] = FLOOR
    path.write_text(json.dumps(config))
    peak = config["optimizer"]["params"]["lr"]
    second = _run(project, path, "whole")
    rates = read_metric(second, "lr/base")  # after an update: the next one's
    heights = [read_table(table).at((step - WARMUP) / (STEPS - WARMUP)) for step in range(WARMUP, STEPS)]
    expected = [peak / WARMUP, *(FLOOR + height * (peak - FLOOR) for height in heights), FLOOR]
    assert list(rates) == list(range(1, STEPS + 1))
    assert list(rates.values()) == pytest.approx(expected, rel=1e-12)
    _run(project, path, "parts", "--stop-at-step", str(STOP))
    parts = _run(project, path, "parts", "--resume")
    assert_same_checkpoint(*(folder / "checkpoints" / f"step_{STEPS:07d}" for folder in (second, parts)))
