# SPDX-License-Identifier: Apache-2.0
"""The main job measures sharpness without a trace in what it trains, and a checkpoint is measured afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="the main job needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="the main job needs the extra 'megatron'")

from ds_blockwise.measure.sharpness_report import read_csv
from ds_blockwise.runs.metrics import read_metric
from tests.helpers.launch.job_server import Job, jobs
from tests.helpers.launch.project import ROOT, assert_same_checkpoint, load, prepare_project

INTERVAL = ("--set", "training.sharpness_interval=4", "--set", "training.sharpness_batches=1")
PROBE = "import pretrain_llama, probe_sharpness; pretrain_llama.main = probe_sharpness.main"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_project(tmp_path_factory.mktemp("project"))


def _start(project: Path, output: str, *arguments: str, prelude: str = "") -> Job:
    log = project / "logs" / f"{output}-{sum(1 for _ in project.glob(f'logs/{output}-*'))}"
    place = ("--run", str(project / "run.yaml"), "--set", f"output={project / output}")
    return jobs().start(log, *place, *arguments, prelude=prelude)


@pytest.fixture(scope="module")
def measured(prepared: Path) -> Path:
    """Six steps, measured after the fourth and the last."""
    _start(prepared, "measured", *INTERVAL).succeed()
    return prepared / "measured" / "mini"


def test_a_measured_run_trains_as_one_that_is_not(prepared: Path, measured: Path) -> None:
    """Weights, optimizer states, schedule and curves, bit for bit; clipping is on in this JSON."""
    _start(prepared, "plain").succeed()
    one, two = (folder / "checkpoints" / "step_0000006" for folder in (prepared / "plain" / "mini", measured))
    assert_same_checkpoint(one, two)
    assert not (prepared / "plain" / "mini" / "sharpness.csv").exists()


def test_a_run_leaves_csv_monitor_and_figures(measured: Path) -> None:
    reports = read_csv(measured / "sharpness.csv")
    assert [(r.step, r.samples, r.tokens) for r in reports] == [(4, 1, 2 * 2 * 32), (6, 1, 2 * 2 * 32)]
    assert set(reports[0].by_type()) == {"emb", "head", "qk", "ffn", "vo", "norm"}
    for name, value in reports[1].by_type().items():
        points = read_metric(measured, f"sharpness/{name}")
        assert list(points) == [4, 6]
        assert points[6] == pytest.approx(value, rel=1e-12)
    for name in ("sharpness.png", "sharpness_blocks.png"):
        assert (measured / name).stat().st_size > 10_000


def test_a_resumed_run_measures_on_and_drops_what_it_does_again(prepared: Path, measured: Path) -> None:
    """A run that was killed after a measurement that no checkpoint knows of must not have it twice."""
    output = prepared / "parts" / "mini"
    _start(prepared, "parts", *INTERVAL, "--stop-at-step", "3").succeed()
    (output / "sharpness.csv").write_bytes((measured / "sharpness.csv").read_bytes())
    _start(prepared, "parts", *INTERVAL, "--resume").succeed()
    assert (output / "sharpness.csv").read_bytes() == (measured / "sharpness.csv").read_bytes()


def test_a_checkpoint_is_measured_as_the_run_was(prepared: Path, measured: Path) -> None:
    """Same batches, same draws, same weights: the same numbers, and nothing of the run is touched."""
    before = sorted((p, p.stat().st_mtime_ns) for p in measured.rglob("*"))
    path = prepared / "probe.csv"
    log = _start(prepared, "measured", *INTERVAL, "--csv", str(path), prelude=PROBE).succeed().log(0)
    assert "step 6: gauss_newton, 1 samples, 128 tokens" in log
    # as text: the standard error of one sample is NaN, which equals nothing
    assert repr(read_csv(path)) == repr(read_csv(measured / "sharpness.csv")[1:])
    assert sorted((p, p.stat().st_mtime_ns) for p in measured.rglob("*")) == before


def test_what_cannot_be_measured_is_refused_before_training(prepared: Path) -> None:
    _, text = load(prepared, "training.sharpness_interval=2", "training.sharpness_batches=2")
    assert "training.sharpness_batches = 2: allowed: 1 to 1: the validation set has 7 sequences" in text
    _, text = load(prepared, "training.sharpness_batches=2")
    assert not text, "nothing is measured, so nothing can be wrong with it"
    adamw = ROOT / "configs" / "deepspeed" / "adamw.json"
    _, text = load(prepared, "training.sharpness_interval=2", "training.sharpness_batches=1", f"deepspeed={adamw}")
    assert "optimizer.type = 'AdamW': allowed: BlockwiseAdamW or " in text and "where sharpness is measured" in text
    text = _start(prepared, "nothing", *INTERVAL, prelude=PROBE).fail()
    assert "a complete checkpoint" in text
    assert "train first, or give --checkpoint" in text
