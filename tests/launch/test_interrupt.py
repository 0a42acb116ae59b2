# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C: the first asks for a stop, the second ends at once, and SIGTERM does what it did."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from job.interrupt import INTERRUPTED, Interrupt
from job.rendezvous import exit_status
from tests.helpers import ROOT
from tests.helpers.launch.job_server import jobs
from tests.helpers.launch.project import LAUNCH, assert_same_checkpoint, make_project
from tests.helpers.launch.stubs import RUN, Bench
from tests.helpers.launch.terminal import hear_interrupts, in_terminal

# Waits in C, with the signals that are given sent to itself, as a rank waits in a collective.
_WAITS = """
import os, signal, sys, threading
from job.interrupt import Interrupt
with Interrupt("saving") as interrupt:
    for number in map(int, sys.argv[2:]):
        os.kill(os.getpid(), number)
        threading.Event().wait(float(sys.argv[1]))
    print("asked" if interrupt.asked else "not asked")
"""


def _sent(wait: float, *numbers: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _WAITS, str(wait), *map(str, map(int, numbers))],
        env=os.environ | {"PYTHONPATH": f"{LAUNCH}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_first_asks_and_the_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interrupt() as interrupt:
        assert not interrupt.asked
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 30
        while not interrupt.asked and time.monotonic() < deadline:
            time.sleep(0.01)
        assert interrupt.asked
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("numbers", "status", "said", "notice"),
    [
        ((), 0, "not asked\n", ""),
        ((signal.SIGINT,), 0, "asked\n", "\nsaving\n"),
        # the launcher's, after the same Ctrl-C
        ((signal.SIGINT, signal.SIGTERM, signal.SIGTERM), 0, "asked\n", "\nsaving\n"),
        # the terminal's, and the same one from a launcher
        ((signal.SIGINT, signal.SIGINT), 0, "asked\n", "\nsaving\n"),
        # the same two, noted by two threads of a busy machine in the other order
        ((signal.SIGTERM, signal.SIGINT), 0, "asked\n", "\nsaving\n"),
    ],
)
def test_what_each_signal_does(numbers: tuple[int, ...], status: int, said: str, notice: str) -> None:
    done = _sent(0.05, *numbers)
    assert (done.returncode, done.stdout, done.stderr) == (status, said, notice)


def test_sigterm_alone_ends_the_process() -> None:
    done = _sent(20, signal.SIGTERM)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "", "")


def test_the_second_ends_at_once() -> None:
    done = _sent(1.5, signal.SIGINT, signal.SIGINT)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "\nsaving\n")


@pytest.mark.parametrize(("rank", "said"), [("0", "\ninterrupted\n"), ("1", "")])
def test_before_training_there_is_nothing_to_save(
    rank: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    ended: list[int] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(os, "_exit", ended.append)
    exit_status(interrupted)
    assert (ended, capsys.readouterr().err) == ([INTERRUPTED], said)


# What the command `deepspeed` starts: a process that ends the ranks, and a rank; each notes the signals that it gets.
BELOW = """\
import signal, subprocess, sys, time
calls, name = sys.argv[1:]
below = subprocess.Popen([sys.executable, "-S", __file__, calls, "rank"]) if name == "launch" else None
def noted(number, frame):
    with open(calls + ".signals", "a") as file:
        file.write(f"{name} {number}\\n")
    if below:
        below.kill()
    sys.exit(1)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, noted)
open(f"{calls}.{name}", "w").close()
below.wait() if below else time.sleep(50)
sys.exit(1)
"""


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGTERM, f"launch {signal.SIGTERM:d}\n"), (signal.SIGINT, f"rank {signal.SIGINT:d}\n")],
)
def test_a_signal_reaches_the_ranks_below_deepspeeds_command(tmp_path: Path, number: int, expected: str) -> None:
    """The command itself dies of SIGTERM and leaves them running; of SIGINT the process between makes SIGTERM."""
    bench = Bench(tmp_path)
    (bench.folder / "below.py").write_text(BELOW, encoding="utf-8")
    below = f"[sys.executable, '-S', {str(bench.folder / 'below.py')!r}, calls, 'launch']"
    bench.stub("deepspeed", body=f"import subprocess\nsys.exit(subprocess.call({below}))\n")
    command = bench.command("local.sh", RUN)
    process = subprocess.Popen(command, env=bench.env, cwd=bench.folder, preexec_fn=hear_interrupts)
    calls = Path(bench.env["CALLS"])
    deadline = time.monotonic() + 30
    while not all(Path(f"{calls}.{name}").exists() for name in ("launch", "rank")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(30) != 0
    assert Path(f"{calls}.signals").read_text(encoding="utf-8") == expected
    assert len(bench.calls("deepspeed")) == 1


STEPS = 150  # the interrupt comes in between


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose tiny run is the tests' small one, and whose set-up is the present environment."""
    if not (Path(sys.prefix) / "pyvenv.cfg").is_file():
        pytest.skip(f"{sys.prefix} is no virtual environment, as `make setup` makes one")
    configs = tmp_path / "configs" / "run"
    configs.mkdir(parents=True)
    make_project(configs)
    run = (configs / "run.yaml").read_text(encoding="utf-8")
    (configs / "tiny.yaml").write_text(run.replace("steps: 6", f"steps: {STEPS}"), encoding="utf-8")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for name in ("launch", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_make_train_goes_on_after_ctrl_c_as_if_there_had_been_none(checkout: Path) -> None:
    """Make, its shell, the launcher and the ranks all get the terminal's Ctrl-C; the result is bitwise the same."""
    pytest.importorskip("deepspeed", reason="the main job needs the extra 'deepspeed'")
    pytest.importorskip("megatron.core", reason="the main job needs the extra 'megatron'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    kept = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "VENV")
    }
    env = kept | {"MASTER_PORT": port, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    train = ["make", "--old-file=setup", "train"]

    status, screen = in_terminal(train, checkout, env, limit=300, ctrl_c_after="step      4  validation loss")
    assert status != 0, screen
    stopped = re.search(
        rf"^stopped at step (\d+) of {STEPS}, saved in \S+: .*\(make train ARGS=--resume\)$", screen, re.M
    )
    assert stopped is not None, screen
    assert 4 <= int(stopped[1]) < STEPS
    assert "Traceback" not in screen and "giving up" not in screen, screen

    status, screen = in_terminal([*train, "ARGS=--resume"], checkout, env, limit=300)
    assert status == 0, screen
    assert f"step_{int(stopped[1]):07d}, {stopped[1]} of {STEPS} steps" in screen
    assert "step      0  validation loss" not in screen

    run = checkout / "configs" / "run" / "tiny.yaml"
    arguments = ("--run", str(run), "--set", f"output={checkout / 'whole'}")
    jobs().start(checkout / "log", *arguments).succeed()
    resumed, whole = (folder / "mini" for folder in (run.parent / "runs", checkout / "whole"))
    losses = [
        json.loads((folder / "summary.json").read_text(encoding="utf-8"))["final_validation_loss"]
        for folder in (resumed, whole)
    ]
    assert losses[0] == losses[1]
    assert_same_checkpoint(*(folder / "checkpoints" / f"step_{STEPS:07d}" for folder in (resumed, whole)))
