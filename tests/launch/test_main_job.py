# SPDX-License-Identifier: Apache-2.0
"""The main job on two processes: files, resume, parallelism, errors.

Once through the DeepSpeed launcher, with and without an error; the other runs are forked (`job_server`).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="the main job needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="the main job needs the extra 'megatron'")

from ds_blockwise.checkpoint.folder_rules.lock import holding
from ds_blockwise.runs.metrics import read_metric
from job.interrupt import INTERRUPTED
from tests.helpers.launch.job_server import RUN_S, Job, jobs
from tests.helpers.launch.project import LAUNCH, ROOT, assert_same_checkpoint, prepare_project

OPTIMIZER_FILE = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
START_S = 240.0  # a launcher start takes 15 s on two idle cores


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_project(tmp_path_factory.mktemp("project"))


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


def _start(project: Path, output: str, *arguments: str, prelude: str = "") -> Job:
    log = project / "logs" / f"{output}-{sum(1 for _ in project.glob(f'logs/{output}-*'))}"
    given = ("--run", str(project / "run.yaml"), "--set", f"output={project / output}", *arguments)
    return jobs().start(log, *given, prelude=prelude)


def _finished(project: Path, output: str, *arguments: str, json_name: str = "mini") -> tuple[Path, dict[str, Any]]:
    _start(project, output, *arguments).succeed()
    return _results(project / output / json_name)


def _results(folder: Path) -> tuple[Path, dict[str, Any]]:
    return folder, json.loads((folder / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole_run(prepared: Path) -> tuple[Path, dict[str, Any]]:
    """Six steps of the main job without a break, on two data-parallel ranks."""
    done = _train(prepared, "whole")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return _results(prepared / "whole" / "mini")


@pytest.fixture(scope="module")
def stopped_run(prepared: Path) -> Path:
    """The output folder of the same run, stopped after three steps."""
    folder, summary = _finished(prepared, "parts", "--stop-at-step", "3")
    assert summary["completed"] is False
    assert summary["steps"] == 3
    return folder


def test_run_leaves_the_promised_files_and_figures(whole_run: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = whole_run
    assert (folder / "loss.png").stat().st_size > 10_000
    assert (folder / "checkpoints" / "latest").read_text(encoding="utf-8") == "step_0000006"
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    losses = read_metric(folder, "loss/validation")
    assert list(losses) == [0, 4, 6]
    assert losses[6] == summary["final_validation_loss"]
    assert [path.name for path in folder.rglob("*.csv")] == ["metrics.csv"]
    assert summary["completed"] is True
    assert summary["optimizer"] == "BlockwiseAdamMini"
    assert summary["tokens"] == 6 * 8 * 32
    assert summary["tokens_per_second"] > 0
    assert summary["final_validation_loss"] < summary["initial_validation_loss"] - 0.1
    # Rows of 48 numbers share one second moment: 4 + 4/48 bytes, a little less for whole heads.
    assert 4.0 < summary["optimizer_state_bytes_per_parameter"] < 4.1
    assert summary["adamw_state_bytes_per_parameter"] == 8.0


def test_resumed_run_is_bitwise_the_uninterrupted_one(
    prepared: Path, whole_run: tuple[Path, dict[str, Any]], stopped_run: Path
) -> None:
    """Weights, optimizer state, schedule and curves: stopping between two log points, too."""
    shutil.copytree(stopped_run, prepared / "resumed" / "mini")
    folder, resumed = _finished(prepared, "resumed", "--resume")
    whole_folder, whole = whole_run
    for key in ("steps", "final_validation_loss", "final_train_loss", "config_sha256"):
        assert resumed[key] == whole[key], key
    assert_same_checkpoint(*(f / "checkpoints" / "step_0000006" for f in (whole_folder, folder)))


_CTRL_C = """
import os, signal
from job.trainer import Trainer
inner = Trainer._one_step
def one_step(self):
    inner(self)
    if self.state.step == 1:
        {sent}
Trainer._one_step = one_step
"""


def test_ctrl_c_saves_and_the_run_goes_on_to_the_same_bits(
    prepared: Path, whole_run: tuple[Path, dict[str, Any]]
) -> None:
    """The signal reaches one rank only; all stop after the same step, and say so in a line."""
    sent = "rank == 1 and os.kill(os.getpid(), signal.SIGINT)"
    job = _start(prepared, "interrupted", prelude=_CTRL_C.format(sent=sent))
    assert job.wait(RUN_S) == [INTERRUPTED, INTERRUPTED]
    folder = prepared / "interrupted" / "mini"
    text = job.text()
    assert text.count(f" of 6, saved in {folder / 'checkpoints'}: to go on, start it again with --resume") == 1
    assert "Traceback" not in text
    assert not (folder / "summary.json").exists()
    (saved,) = (path.name for path in (folder / "checkpoints").glob("step_*"))
    assert saved in ("step_0000002", "step_0000003")  # the signal may be seen in the step after it
    _, resumed = _finished(prepared, "interrupted", "--resume")
    whole_folder, whole = whole_run
    assert resumed["final_validation_loss"] == whole["final_validation_loss"]
    assert list(read_metric(folder, "loss/validation")) == [0, 4, 6]
    assert_same_checkpoint(*(f / "checkpoints" / "step_0000006" for f in (whole_folder, folder)))


def test_the_second_ctrl_c_ends_at_once(prepared: Path) -> None:
    """Each rank is in the middle of a step."""
    sent = "[(os.kill(os.getpid(), signal.SIGINT), time.sleep(0.2)) for _ in range(1000)]"
    job = _start(prepared, "twice", prelude="import time\n" + _CTRL_C.format(sent=sent))
    assert job.wait(RUN_S) == [INTERRUPTED, INTERRUPTED]
    assert not list((prepared / "twice" / "mini").glob("checkpoints/step_*"))
    assert job.log(0).count("Ctrl-C: saving a checkpoint after this step") == 1


def test_what_init_writes_trains(prepared: Path) -> None:
    """On the project's small model and text."""
    from ds_blockwise.cli.main import main

    begun = prepared / "begun"
    assert main(["init", str(begun)]) == 0
    shutil.copy(prepared / "model.yaml", begun / "model.yaml")
    changes = {"steps": 3, "warmup_steps": 1, "global_batch_size": 8, "micro_batch_size": 2, "validation_sequences": 7}
    sets = [f"training.{key}={value}" for key, value in changes.items()]
    sets += [f"data.directory={prepared / 'data'}", f"output={begun / 'runs'}"]
    arguments = [word for entry in sets for word in ("--set", entry)]
    jobs().start(prepared / "logs" / "begun", "--run", str(begun / "run.yaml"), *arguments).succeed()
    _, summary = _results(begun / "runs" / "deepspeed")
    assert (summary["completed"], summary["run"]) == (True, "begun")


def test_a_job_that_stops_by_the_clock_goes_on_to_the_same_bits(
    prepared: Path, whole_run: tuple[Path, dict[str, Any]]
) -> None:
    """Its time is over at once, so it comes to the first point of the curve only; all ranks stop there."""
    folder, stopped = _finished(prepared, "clock", "--auto-resume", "--stop-after-minutes", "0")
    assert stopped["completed"] is False
    assert stopped["steps"] == 4
    _, ended = _finished(prepared, "clock", "--auto-resume", "--stop-after-minutes", "60")
    whole_folder, whole = whole_run
    assert ended["completed"] is True
    assert ended["final_validation_loss"] == whole["final_validation_loss"]
    assert_same_checkpoint(*(f / "checkpoints" / "step_0000006" for f in (whole_folder, folder)))


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
    assert done.returncode == 2  # the status that launch/cluster does not repeat
    for fragment in ("2 problems", "data.directory", "prepare_data.py --run", "--resume"):
        assert fragment in done.stderr
    for rank in (0, 1):
        assert f"[rank{rank}]: ValueError" in done.stderr
    assert not (prepared / "wrong" / "mini" / "checkpoints").exists()


def test_resume_under_another_run_is_refused(prepared: Path, whole_run: tuple[Path, dict[str, Any]]) -> None:
    """Another seed or length means another data order: the result would be no run of its own."""
    text = _start(prepared, "whole", "--resume", "--set", "training.seed=6", "--set", "training.steps=8").fail()
    for fragment in ("2 problems", "seed = 6: allowed: 5", "steps = 8: allowed: 6", "set it back"):
        assert fragment in text
    assert (whole_run[0] / "summary.json").is_file()


def test_earlier_run_is_not_overwritten_by_accident(prepared: Path, whole_run: tuple[Path, dict[str, Any]]) -> None:
    assert "--overwrite" in _start(prepared, "whole").fail()
    impatient = "from ds_blockwise.checkpoint.folder_rules import lock\nlock.PATIENCE_S = 0.0"
    with holding(whole_run[0] / "checkpoints"):  # as a job that still runs
        text = _start(prepared, "whole", "--overwrite", prelude=impatient).fail()
    assert text.count(f"{whole_run[0] / 'checkpoints'} is in use: process {os.getpid()} on host ") >= 2, text
    assert (whole_run[0] / "checkpoints" / "step_0000006").is_dir()
    assert (whole_run[0] / "summary.json").is_file()


def test_auto_resume_starts_goes_on_and_is_content_when_done(
    prepared: Path, whole_run: tuple[Path, dict[str, Any]]
) -> None:
    """One command line for a job that a scheduler starts again and again."""
    checkpoints = prepared / "auto" / "mini" / "checkpoints"
    arguments = ("--auto-resume", "--set", "training.checkpoint_interval=1", "--set", "training.keep_checkpoints=2")
    first = _start(prepared, "auto", *arguments, "--stop-at-step", "4").succeed().log(0)
    assert "starting from the beginning" in first
    assert sorted(p.name for p in checkpoints.glob("step_*")) == ["step_0000003", "step_0000004"]
    (checkpoints / "step_0000005.partial").mkdir()
    second = _start(prepared, "auto", *arguments).succeed().log(0)
    assert f"resuming from {checkpoints / 'step_0000004'}, 4 of 6 steps" in second
    assert "step_0000005.partial was removed: a save was stopped before it was complete" in second
    assert_same_checkpoint(checkpoints / "step_0000006", whole_run[0] / "checkpoints" / "step_0000006")
    third = _start(prepared, "auto", *arguments).succeed().log(0)
    assert f"resuming from {checkpoints / 'step_0000006'}, 6 of 6 steps" in third


def test_resume_finds_only_damage(prepared: Path) -> None:
    """Starting again would delete what might be saved by hand."""
    folder = prepared / "broken" / "mini" / "checkpoints" / "step_0000002"
    folder.mkdir(parents=True)
    (folder / "ds_blockwise.json").write_text("{", encoding="utf-8")
    text = _start(prepared, "broken", "--auto-resume").fail()
    assert "step_0000002 in" in text
    assert "restore the files, or delete the folder" in text
    assert folder.is_dir()


def test_a_new_run_begins_with_the_weights_of_another(prepared: Path, whole_run: tuple[Path, dict[str, Any]]) -> None:
    """Continual pre-training: weights and moments of the old run, steps and schedule from 0, warmed up again."""
    source, whole = whole_run
    folder, summary = _finished(
        prepared, "next", "--init-from", str(source / "checkpoints"), "--set", "training.steps=8"
    )
    assert summary["initial_validation_loss"] == whole["final_validation_loss"]
    assert summary["steps"] == 8
    rates = list(read_metric(folder, "lr/base").values())
    assert rates[0] > 3e-4  # after 4 updates, two of them warm-up; the old schedule had ended at 2.5e-5
    last = torch.load(folder / "checkpoints" / "step_0000008" / OPTIMIZER_FILE, weights_only=False)
    state = last["optimizer_state_dict"]["base_optimizer_state"]["state"]
    assert [s["step"] for s in state.values()] == [6 + 8]
    resumed = _start(prepared, "next", "--resume", "--set", "training.steps=8").succeed().log(0)
    assert "resuming with another" not in resumed
    text = _start(prepared, "none", "--init-from", str(prepared / "nowhere")).fail()
    assert "--init-from: FOLDER" in text


def test_a_converted_checkpoint_goes_on_with_another_number_of_ranks(
    prepared: Path, whole_run: tuple[Path, dict[str, Any]], stopped_run: Path
) -> None:
    """DeepSpeed's own files are refused there; the portable form resumes the same run on one rank."""
    from ds_blockwise.cli.main import main

    output = prepared / "alone" / "mini"
    shutil.copytree(stopped_run, output)
    arguments = ("--run", str(prepared / "run.yaml"), "--set", f"output={prepared / 'alone'}", "--resume")
    refused = jobs().start(prepared / "logs" / "refused", *arguments, world_size=1).fail()
    for fragment in ("processes = 1: allowed: 2", "ds-blockwise convert"):
        assert fragment in refused
    shutil.rmtree(output / "checkpoints")
    assert main(["convert", str(stopped_run / "checkpoints"), str(output / "checkpoints")]) == 0
    log = jobs().start(prepared / "logs" / "alone", *arguments, world_size=1).succeed().log(0)
    assert "resuming with another processes: 1 was 2" in log
    _, summary = _results(output)
    _, whole = whole_run
    # another order of the gradients' sums
    assert summary["final_validation_loss"] == pytest.approx(whole["final_validation_loss"], rel=1e-5)
    assert summary["final_train_loss"] == pytest.approx(whole["final_train_loss"], rel=1e-5)
