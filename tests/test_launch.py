# SPDX-License-Identifier: Apache-2.0
"""The main job, run by the DeepSpeed launcher on two processes: files, resume, parallelism, errors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="the main job needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="the main job needs the extra 'megatron'")

from launch_project import LAUNCH, ROOT, load, make_project, token_files

START_S = 240.0  # a launcher start takes 15 s on two idle cores


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = make_project(tmp_path_factory.mktemp("project"))
    run, problems = load(project)
    assert run is not None, problems
    token_files.prepare(run.data, run.shape.vocab_size, run.file)
    return project


def _train(project: Path, output: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        str(Path(sys.executable).with_name("deepspeed")),
        *("--num_gpus", "2", "--master_port", str(port)),
        str(LAUNCH / "pretrain_llama.py"),
        *("--run", str(project / "run.yaml"), "--set", f"output={project / output}", *arguments),
    ]
    # The launcher passes its environment on; a rank left in it would be believed.
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return subprocess.run(command, capture_output=True, text=True, timeout=START_S, env=env, cwd=project, check=False)


def _finished(project: Path, output: str, *arguments: str, json_name: str = "mini") -> tuple[Path, dict[str, Any]]:
    done = _train(project, output, *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    folder = project / output / json_name
    return folder, json.loads((folder / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole_run(prepared: Path) -> tuple[Path, dict[str, Any]]:
    """Six steps of the main job without a break, on two data-parallel ranks."""
    return _finished(prepared, "whole")


def test_run_leaves_the_promised_files_and_figures(whole_run: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = whole_run
    assert (folder / "loss.png").stat().st_size > 10_000
    assert (folder / "checkpoints" / "latest").read_text(encoding="utf-8") == "step_0000006"
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    rows = (folder / "csv" / "loss_validation.csv").read_text(encoding="utf-8").splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["0", "4", "6"]
    assert float(rows[-1].split(",")[1]) == summary["final_validation_loss"]
    assert summary["completed"] is True
    assert summary["optimizer"] == "BlockwiseAdamMini"
    assert summary["tokens"] == 6 * 8 * 32
    assert summary["tokens_per_second"] > 0
    assert summary["final_validation_loss"] < summary["initial_validation_loss"] - 0.1
    # Rows of 48 numbers share one second moment: 4 + 4/48 bytes, a little less for whole heads.
    assert 4.0 < summary["optimizer_state_bytes_per_parameter"] < 4.1
    assert summary["adamw_state_bytes_per_parameter"] == 8.0


def test_resumed_run_is_bitwise_the_uninterrupted_one(prepared: Path, whole_run: tuple[Path, dict[str, Any]]) -> None:
    """Weights, optimizer state, schedule and curves: stopping between two log points, too."""
    folder, stopped = _finished(prepared, "parts", "--stop-at-step", "3")
    assert stopped["completed"] is False
    assert stopped["steps"] == 3
    _, resumed = _finished(prepared, "parts", "--resume")
    whole_folder, whole = whole_run
    for key in ("steps", "final_validation_loss", "final_train_loss", "config_sha256"):
        assert resumed[key] == whole[key], key
    for name in ("mp_rank_00_model_states.pt", *(f"zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in (0, 1))):
        one, two = (
            torch.load(f / "checkpoints" / "step_0000006" / name, weights_only=False) for f in (whole_folder, folder)
        )
        part = "module" if name.startswith("mp_rank") else "optimizer_state_dict"
        _assert_same(one[part], two[part], f"{name}: {part}")


def _assert_same(one: Any, two: Any, where: str) -> None:
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            _assert_same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for index, (first, second) in enumerate(zip(one, two, strict=True)):
            _assert_same(first, second, f"{where}[{index}]")
    elif isinstance(one, int | float | str | None):
        assert one == two, where


def test_tensor_parallel_run_follows_the_data_parallel_one(
    prepared: Path, whole_run: tuple[Path, dict[str, Any]]
) -> None:
    """Two tensor-parallel ranks hold one copy: same weights, same data, so the same losses."""
    folder, split = _finished(prepared, "tensor", "--set", "parallel.tensor=2")
    _, whole = whole_run
    assert split["tensor_parallel"] == 2
    assert split["data_parallel"] == 1
    # fp32 sums in another order: 1e-6 relative in the forward pass, more after six updates
    # because Adam divides small gradients by their own size.
    assert split["initial_validation_loss"] == pytest.approx(whole["initial_validation_loss"], rel=1e-6)
    assert split["final_validation_loss"] == pytest.approx(whole["final_validation_loss"], rel=1e-5)
    one, two = (
        torch.load(folder / "checkpoints" / "step_0000006" / f"mp_rank_{rank:02d}_model_states.pt", weights_only=False)
        for rank in (0, 1)
    )
    norms = [name for name in one["module"] if name.endswith("layernorm.weight")]
    assert len(norms) == 5  # two in each layer and the last
    for name in norms:
        assert torch.equal(one["module"][name], two["module"][name]), name
        assert not torch.equal(one["module"][name], torch.ones(48)), f"{name} was not trained"


def test_adamw_by_its_json(prepared: Path) -> None:
    config = str(ROOT / "configs" / "deepspeed" / "adamw.json")
    _, summary = _finished(prepared, "other", "--deepspeed-config", config, json_name="adamw")
    assert summary["optimizer"] == "AdamW"
    assert summary["optimizer_state_bytes_per_parameter"] == pytest.approx(8.0, abs=0.01)
    assert summary["final_validation_loss"] < summary["initial_validation_loss"] - 0.1


def test_wrong_configuration_ends_every_rank_before_training(prepared: Path) -> None:
    """Problems of the files and of the folders come together, from both ranks, without a hang."""
    done = _train(
        prepared,
        "wrong",
        *("--resume", "--set", f"data.directory={prepared / 'nothing'}"),
    )
    assert done.returncode != 0
    for fragment in ("2 problems", "data.directory", "prepare_data.py --run", "--resume"):
        assert fragment in done.stderr
    for rank in (0, 1):
        assert f"[rank{rank}]: ValueError" in done.stderr
    assert not (prepared / "wrong" / "mini" / "checkpoints").exists()


def test_resume_under_another_run_is_refused(prepared: Path, whole_run: tuple[Path, dict[str, Any]]) -> None:
    """Another seed or length means another data order: the result would be no run of its own."""
    done = _train(prepared, "whole", "--resume", "--set", "training.seed=6", "--set", "training.steps=8")
    assert done.returncode != 0
    for fragment in ("2 problems", "seed = 6: allowed: 5", "steps = 8: allowed: 6", "set it back"):
        assert fragment in done.stderr
    assert (whole_run[0] / "summary.json").is_file()


def test_earlier_run_is_not_overwritten_by_accident(prepared: Path, whole_run: tuple[Path, dict[str, Any]]) -> None:
    done = _train(prepared, "whole")
    assert done.returncode != 0
    assert "--overwrite" in done.stderr
    assert (whole_run[0] / "summary.json").is_file()
