# SPDX-License-Identifier: Apache-2.0
"""The main job under kill -9, full disks and damaged files. `make test` runs a part, `make test-faults` all.

Instants are drawn from a printed seed; FAULTS_SEED sets another.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("deepspeed", reason="the main job needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="the main job needs the extra 'megatron'")

from ds_blockwise.checkpoint import folder as files
from tests.helpers.launch.faults import ALONE_S, STEPS, Run, kill_often
from tests.helpers.launch.project import LAUNCH, assert_same_checkpoint, prepare_project, write_json

SEED = int(os.environ.get("FAULTS_SEED", "20"))
# (name, JSON, more arguments): each kill may hit another way of saving
KINDS = {
    "z2": ({}, ()),
    "z3": ({"stage": 3}, ()),
    "z0": ({"stage": 0, "dtype": "bf16", "optimizer": "BlockwiseAdamW"}, ()),
    "tp": ({"stage": 1, "checkpoint_format": "compact"}, ("--set", "parallel.tensor=2")),
    "few": ({"stage": 2, "dtype": "bf16"}, ("--set", "training.keep_checkpoints=2")),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_project(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def runs(project: Path) -> Iterator[Run]:
    """Runs of all kinds in turn."""

    def make() -> Iterator[Run]:
        for number in itertools.count():
            for kind in KINDS:
                yield run_of(project, kind, f"{kind}-{number}")

    yield make()


def run_of(project: Path, kind: str, name: str) -> Run:
    config, arguments = KINDS[kind]
    path = write_json(project, kind, **config)
    return Run(project, name, ("--deepspeed-config", str(path), *arguments), json_name=kind)


@pytest.fixture(scope="module")
def unbroken(project: Path) -> dict[str, Path]:
    """The last checkpoint of an unbroken run of each kind, made when it is asked for."""

    class Unbroken(dict):  # type: ignore[type-arg]
        def __missing__(self, kind: str) -> Path:
            self[kind] = run_of(project, kind, f"whole-{kind}").finish()
            return self[kind]

    return Unbroken()


def check_kills(runs: Iterator[Run], unbroken: dict[str, Path], kills: int, each: int) -> None:
    print(f"seed {SEED}")
    done = kill_often(runs, kills, each, SEED)
    for run in done:
        for line in run.kills:
            print(line)
    print(f"slowest end after a kill: {max(run.slowest for run in done):.1f} s")
    assert sum(len(run.kills) for run in done) >= kills
    for run in done:
        assert_same_checkpoint(run.last, unbroken[run.json_name])


def test_a_few_kills(project: Path, unbroken: dict[str, Path]) -> None:
    """The part of the next test that `make test` runs."""
    check_kills(iter([run_of(project, "few", f"few-kills-{n}") for n in range(9)]), unbroken, kills=3, each=3)


@pytest.mark.faults
def test_twenty_kills_and_the_same_weights_in_the_end(runs: Iterator[Run], unbroken: dict[str, Path]) -> None:
    """kill -9 of one rank or of all, while training or saving: nothing hangs, nothing is lost but the last step."""
    check_kills(runs, unbroken, kills=20, each=4)


@pytest.mark.parametrize("damage", ["bit", *(pytest.param(d, marks=pytest.mark.faults) for d in ("cut", "missing"))])
def test_a_damaged_file_is_named_and_the_folder_left_alone(
    project: Path, unbroken: dict[str, Path], damage: str
) -> None:
    """The job's own way to `--resume`; every kind of file is in test_checkpoint_guard.py."""
    run = run_of(project, "few", f"damage-{damage}")
    shutil.copytree(unbroken["few"].parent.parent, run.checkpoints.parent)
    path = run.last / "rank_state_00001.pt"
    whole = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "bit":
        path.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    text = run.start().fail()
    assert text.count("CheckpointError: checkpoint") == 2, text
    assert f"{path.name}: " in text
    assert "nothing was loaded" in text
    assert sorted(p.name for p in run.checkpoints.iterdir() if p.is_dir()) == [
        f"step_{STEPS - 1:07d}",
        f"step_{STEPS:07d}",
    ]
    files.write_latest(run.checkpoints, f"step_{STEPS - 1:07d}")  # what the message advises
    assert f"{STEPS - 1} of {STEPS} steps" in run.start().succeed().log(0)
    assert_same_checkpoint(run.last, unbroken["few"])


@pytest.mark.parametrize("kind", ["few", pytest.param("z3", marks=pytest.mark.faults)])
def test_a_write_that_fails_on_one_rank_ends_the_job_clearly(
    project: Path, unbroken: dict[str, Path], kind: str
) -> None:
    run = run_of(project, kind, f"limit-{kind}")
    run.start("--stop-at-step", "2").succeed()
    limit = (
        "import resource\nif rank == 1: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))"
    )
    text = run.start(prelude=limit).fail()
    assert text.count("CheckpointError: checkpoint 'step_0000003' could not be saved") == 2, text
    assert re.search(r"rank 1: .*optim_states\.pt: .*disk full, quota or limit.*GB free", text), text
    assert files.partial_folders(run.checkpoints) == []
    run.check_folder()
    assert_same_checkpoint(run.finish(), unbroken[kind])


@pytest.mark.faults
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which needs root")
def test_a_disk_that_is_really_full(project: Path, unbroken: dict[str, Path]) -> None:
    run = run_of(project, "z2", "tmpfs")
    disk = project / "tmpfs"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        print(mounted.stderr)
        pytest.skip(reason="this container may not mount a file system, even as root")
    try:
        text = run.start().fail()
        assert text.count("could not be saved") == 2, text
        assert re.search(r"disk full.*\(0\.00 GB free\)", text), text
        run.check_folder()
        assert (run.checkpoints / "latest").is_file()
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        assert_same_checkpoint(run.finish(), unbroken["z2"])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.faults
def test_the_launcher_ends_when_a_rank_is_killed(project: Path, unbroken: dict[str, Path]) -> None:
    """The real thing once: deepspeed starts the ranks, one dies, and the same command goes on."""
    run = run_of(project, "few", "launcher")
    for attempt in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        deepspeed = [sys.executable, str(Path(sys.executable).with_name("deepspeed"))]
        command = [*deepspeed, "--num_gpus", "2", "--master_port", str(port), str(LAUNCH / "pretrain_llama.py")]
        command += ["--run", str(project / "run.yaml"), "--set", f"output={project / run.name}", "--auto-resume"]
        command += ["--set", f"training.steps={STEPS}", "--set", "training.checkpoint_interval=1"]
        command += ["--set", "training.validation_interval=100", *run.arguments]
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        log = project / "logs" / f"launcher-{attempt}"
        with log.open("w") as file:
            process = subprocess.Popen(command, env=env, cwd=project, stdout=file, stderr=subprocess.STDOUT)
        try:
            if attempt == 1:
                took = _kill_rank(process, run, 1)
                print(f"the launcher ended {took:.1f} s after the kill")
                assert process.returncode != 0
                run.check_folder()
            else:
                assert process.wait(240.0) == 0, log.read_text(encoding="utf-8")[-3000:]
                assert "resuming from" in log.read_text(encoding="utf-8")
        finally:
            process.kill()
    assert_same_checkpoint(run.last, unbroken["few"])


def _kill_rank(process: subprocess.Popen[bytes], run: Run, rank: int) -> float:
    deadline = time.monotonic() + 240.0
    while not (run.checkpoints / "latest").exists():
        assert process.poll() is None, "the job ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for child in psutil.Process(process.pid).children(recursive=True):
        if f"--local_rank={rank}" in child.cmdline():
            child.kill()
    before = time.monotonic()
    process.wait(2 * ALONE_S)
    return time.monotonic() - before
