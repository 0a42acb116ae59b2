# SPDX-License-Identifier: Apache-2.0
"""`make test-hosts`: the main job on two hosts with their own networks, through `launch/cluster` and the launchers.

Needs root. The hosts are namespaces of this machine, see `two_hosts`.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="the main job needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="the main job needs the extra 'megatron'")

from tests.helpers.launch.job_server import jobs
from tests.helpers.launch.project import ROOT, assert_same_checkpoint, prepare_project
from tests.helpers.launch.two_hosts import TestHost, environment, missing, two_hosts

CLUSTER = ROOT / "launch" / "cluster"
START_S = 240.0  # a start of the launcher on both hosts; 15 s on two idle cores
SILENCE_S = 8.0
ENDS_S = 240.0  # a hang: the launcher ends its ranks, ssh gives a lost host up after 30 s
STEPS = 40

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(bool(missing()), reason=f"two hosts cannot be made here: {missing() or '-'}"),
    pytest.mark.timeout(1200),
]


@dataclass
class Pair:
    """Both hosts and the project on their common file system."""

    one: TestHost
    two: TestHost
    project: Path

    def start(self, host: TestHost, script: str, *arguments: str, log: str, **env: str) -> subprocess.Popen[bytes]:
        command = host.enter("bash", str(CLUSTER / script), str(self.project / "run.yaml"), *arguments)
        (self.project / "logs").mkdir(exist_ok=True)
        with (self.project / "logs" / log).open("wb") as file:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(HOSTFILE=str(self.project / "hostfile"), LAUNCH_SILENCE_SECONDS=f"{SILENCE_S}", **env),
                cwd=self.project,
            )

    def train(self, output: str, log: str, **env: str) -> subprocess.Popen[bytes]:
        return self.start(self.one, "ssh.sh", *_arguments(self.project, output), log=log, **env)

    def text(self, log: str) -> str:
        return (self.project / "logs" / log).read_text(encoding="utf-8", errors="replace")

    def finish(self, process: subprocess.Popen[bytes], log: str) -> str:
        assert process.wait(START_S) == 0, self.text(log)[-6000:]
        return self.text(log)

    def checkpoint(self, output: str, step: int) -> Path:
        return self.project / output / "mini" / "checkpoints" / f"step_{step:07d}"

    def wait_until(self, seen: Callable[[], bool], process: subprocess.Popen[bytes], log: str) -> None:
        deadline = time.monotonic() + START_S
        while not seen():
            assert process.poll() is None, self.text(log)[-6000:]
            assert time.monotonic() < deadline, self.text(log)[-6000:]
            time.sleep(0.005)


def _arguments(project: Path, output: str) -> list[str]:
    settings = {
        "output": str(project / output),
        "training.steps": str(STEPS),
        "training.checkpoint_interval": "1",
        "training.validation_interval": "100",
    }
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    project = prepare_project(tmp_path_factory.mktemp("hosts"))
    with two_hosts(project) as (one, two):
        yield Pair(one, two, project)


@pytest.fixture(autouse=True)
def _tidy(pair: Pair) -> Iterator[None]:
    """A test that failed leaves neither ranks nor a cut line to the next."""
    yield
    for host in (pair.one, pair.two):
        host.kill_ranks()
    pair.two.connect()


@pytest.fixture(scope="module")
def one_host(pair: Pair) -> Path:
    """The last checkpoint of two ranks on one host."""
    arguments = ("--run", str(pair.project / "run.yaml"), "--auto-resume", *_arguments(pair.project, "one"))
    jobs().start(pair.project / "logs" / "one", *arguments).succeed()
    return pair.checkpoint("one", STEPS)


def test_two_hosts_give_the_bits_of_one(pair: Pair, one_host: Path) -> None:
    """Weights, moments and loss curves: two ranks add two numbers, in whatever order."""
    text = pair.finish(pair.train("two", "two"), "two")
    assert_same_checkpoint(pair.checkpoint("two", STEPS), one_host)
    assert "starting from the beginning" in text
    for name in ("node1: ", "node2: "):  # pdsh names the host of each line
        assert name in text


def _cut(pair: Pair, output: str, strike: Callable[[], None], says: str) -> None:
    """Strike in the middle of training, and wait until the host was named and everything has ended here."""
    log = f"{output}-cut"
    process = pair.train(output, log)
    # the one before it is complete: a folder gets its name a moment before `latest` does
    pair.wait_until(pair.checkpoint(output, 6).is_dir, process, log)
    before = time.monotonic()
    strike()
    try:
        pair.wait_until(lambda: says in pair.text(log), process, log)
        named = time.monotonic() - before
        status = process.wait(ENDS_S)
    finally:
        process.kill()
    took = time.monotonic() - before
    print(f"the host was named {named:.1f} s after the strike, everything had ended after {took:.1f} s")
    assert status not in (0, 2), pair.text(log)[-6000:]
    assert not pair.checkpoint(output, STEPS).exists(), "the job was over before the strike"


def _resumes(pair: Pair, output: str, one_host: Path) -> None:
    text = pair.finish(pair.train(output, f"{output}-again"), f"{output}-again")
    found = re.search(r"resuming from \S*step_(\d+), (\d+) of", text)
    assert found and int(found[1]) >= 5, text[-4000:]
    assert_same_checkpoint(pair.checkpoint(output, STEPS), one_host)


def test_a_host_that_is_cut_off_is_named_and_the_restart_resumes(pair: Pair, one_host: Path) -> None:
    """Link down: no connection is closed. The survivor names the host, both sides end, and nothing is lost."""
    says = f"node1: no sign of life from host node2 (rank 1) for {SILENCE_S:.0f} s"
    _cut(pair, "cut", pair.two.cut_off, says)
    deadline = time.monotonic() + ENDS_S
    while pair.one.ranks() + pair.two.ranks() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert pair.one.ranks() + pair.two.ranks() == []  # the other side hears nothing of host 1, and ends as well
    pair.two.connect()
    _resumes(pair, "cut", one_host)


def test_a_host_whose_processes_are_killed_is_named_and_the_restart_resumes(pair: Pair, one_host: Path) -> None:
    # gloo's error, not a missed heartbeat
    _cut(pair, "killed", pair.two.kill_ranks, "the connection to host node2 (rank 1) was lost")
    _resumes(pair, "killed", one_host)


def test_the_launcher_restarts_by_itself(pair: Pair, one_host: Path) -> None:
    """One command line from start to end, with the host of rank 0 killed in between."""
    process = pair.train("again", "again", MAX_RESTARTS="2")
    pair.wait_until(pair.checkpoint("again", 5).is_dir, process, "again")
    for rank in pair.one.ranks():
        if any(argument.startswith("--local_rank") for argument in rank.cmdline()):
            rank.kill()
    text = pair.finish(process, "again")
    assert "restart 1 of 2 in 1 s, from its last complete checkpoint" in text
    assert "restart 2 of 2" not in text
    assert_same_checkpoint(pair.checkpoint("again", STEPS), one_host)


def _preflight(pair: Pair, log: str, **env: str) -> tuple[int, str]:
    process = pair.start(
        pair.one, "ssh.sh", log=log, PROGRAM=str(ROOT / "launch" / "preflight.py"), LAUNCH_JOIN_SECONDS="20", **env
    )
    return process.wait(START_S), pair.text(log)


def test_a_host_with_another_file_is_named(pair: Pair) -> None:
    other = pair.project / "other.yaml"
    model = pair.project / "model.yaml"
    other.write_text(model.read_text(encoding="utf-8") + "# edited here only\n", encoding="utf-8")
    pair.two.run("mount", "--bind", str(other), str(model))
    try:
        status, text = _preflight(pair, "other-file")
    finally:
        pair.two.run("umount", str(model))
    assert status == 2, text
    assert f"model file {model} differs: " in text
    assert "on node1 (rank 0); " in text
    assert "on node2 (rank 1): give every host the same file" in text
    assert "the job refused to start (see above): no restart" in text
    status, text = _preflight(pair, "same-file")
    assert status == 0, text
    assert "pre-flight check passed" in text
    assert "node1 (rank 0), node2 (rank 1)" in text


def test_a_host_that_is_down_at_the_start_is_named(pair: Pair) -> None:
    pair.two.cut_off()
    status, text = _preflight(pair, "down")
    assert status not in (0, 2), text
    assert "1 of 2 ranks have not come up within 20 s (LAUNCH_JOIN_SECONDS): node2 (rank 1)" in text, text


@pytest.mark.parametrize("script", ["no_ssh.sh", "torchrun.sh"])
def test_started_on_each_host_without_ssh(pair: Pair, script: str, one_host: Path) -> None:
    """The whole job again, bit for bit, with a launcher started by hand on each host."""
    output = script.removesuffix(".sh")
    processes = [
        pair.start(
            host,
            script,
            *_arguments(pair.project, output),
            log=f"{output}-{rank}",
            NODE_RANK=str(rank),
            NODES="2",
            MASTER_ADDR="node1",
        )
        for rank, host in enumerate((pair.one, pair.two))
    ]
    for rank, process in enumerate(processes):
        pair.finish(process, f"{output}-{rank}")
    assert_same_checkpoint(pair.checkpoint(output, STEPS), one_host)
