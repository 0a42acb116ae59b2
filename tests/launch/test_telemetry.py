# SPDX-License-Identifier: Apache-2.0
"""The main job with telemetry and measured multipliers: curves, a figure, and a resume in the middle of the ramp."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="the main job needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="the main job needs the extra 'megatron'")

from ds_blockwise.runs.check import check_run_file
from ds_blockwise.runs.engine_json import compose
from ds_blockwise.runs.metrics import read_metric
from ds_blockwise.runs.run_file import load_run
from tests.helpers.launch.job_server import jobs
from tests.helpers.launch.project import assert_same_checkpoint, prepare_project, write_json

STEPS, STOP = 24, 15  # measured at step 10, ramped in until step 20
MEASURED = {"preset": "paper", "auto": {"ramp": 0.4, "not_before": 1}, "head": 2}
SETTINGS = {"lr_multipliers": MEASURED, "telemetry": {"interval": 3}}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prepared = prepare_project(tmp_path_factory.mktemp("project"))
    write_json(prepared, "auto", **SETTINGS)
    return prepared


def _run(project: Path, output: str, *arguments: str) -> Path:
    log = project / "logs" / f"{output}{len(arguments)}"
    job = jobs().start(
        log,
        *("--run", str(project / "run.yaml"), "--deepspeed-config", str(project / "auto.json")),
        *("--set", f"output={project / output}", "--set", f"training.steps={STEPS}", *arguments),
    )
    job.succeed()
    return project / output / "auto"


def test_curves_figure_and_bitwise_resume(project: Path) -> None:
    whole = _run(project, "whole")
    rows = list(read_metric(whole, "blockwise/lr_multiplier/qk").items())
    assert [step for step, _ in rows] == list(range(3, STEPS + 1, 3))
    assert {value for step, value in rows if step <= 10} == {1.0}
    ramp = [value for step, value in rows if step >= 12]
    assert ramp == sorted(ramp)
    assert 1 < ramp[0] < ramp[-1]
    assert ramp[-1] == ramp[-2]  # steps 21 and 24
    assert set(read_metric(whole, "blockwise/lr_multiplier/head").values()) == {2.0}
    assert (whole / "telemetry.png").stat().st_size > 30_000
    _run(project, "parts", "--stop-at-step", str(STOP))
    parts = _run(project, "parts", "--resume")
    assert_same_checkpoint(*(f / "checkpoints" / f"step_{STEPS:07d}" for f in (whole, parts)))


def test_the_run_file_says_how_long_the_run_is(project: Path) -> None:
    path = write_json(project, "long", **SETTINGS)
    run, problems = load_run(project / "run.yaml", deepspeed_file=path)
    assert run is not None
    config = compose(run, problems)
    assert config["optimizer"]["params"]["lr_multipliers"] == {
        "preset": "paper",
        "auto": {"ramp": 0.4, "not_before": 1, "total_num_steps": 6},
        "head": 2,
    }
    _, checked = check_run_file(project / "run.yaml", deepspeed_file=path)
    assert "measures and ramps until step 12, but the run has 6 steps" in "\n".join(checked.lines)
    said = json.loads(path.read_text(encoding="utf-8"))
    said["optimizer"]["params"]["lr_multipliers"]["auto"]["total_num_steps"] = 100
    path.write_text(json.dumps(said), encoding="utf-8")
    run, problems = load_run(project / "run.yaml", deepspeed_file=path)
    assert run is not None
    compose(run, problems)
    text = "\n".join(problems.lines)
    assert "optimizer.params.lr_multipliers.auto.total_num_steps" in text
    assert "set training.steps in" in text
