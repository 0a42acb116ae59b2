# SPDX-License-Identifier: Apache-2.0
"""Runs the main job many times: imports the hosts once, then forks the ranks of each run.

A start through the launcher takes 15 s on two cores, a fork two. The forked ranks are the real program: its own
`main`, its own exit, its own process groups. Only the rendezvous differs (a file, not a port).

As a script this is the server: it reads one JSON line per run and answers with the pids. `Jobs` is its client.
"""

from __future__ import annotations

import atexit
import datetime
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

START_S = 180.0  # imports on a busy machine
RUN_S = 240.0  # a whole run; three seconds on two idle cores
LOG_TAIL = 3000


@dataclass
class Job:
    """One run of the main job.

    Attributes:
        folder: holds each rank's log and exit status.
        pids: by rank.
        arguments: its command line.
    """

    folder: Path
    pids: list[int]
    arguments: list[str]
    started: float = field(default_factory=time.monotonic)

    def status(self, rank: int) -> int | None:
        """Exit status of a rank (negative: the signal that ended it); None while it runs."""
        try:
            return int((self.folder / f"exit.{rank}").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def log(self, rank: int) -> str:
        return (self.folder / f"log.{rank}").read_text(encoding="utf-8", errors="replace")

    def text(self) -> str:
        return "".join(self.log(rank) for rank in range(len(self.pids)))

    def running(self) -> list[int]:
        return [rank for rank in range(len(self.pids)) if self.status(rank) is None]

    def kill(self, rank: int) -> None:
        """End one rank without a chance to clean up; nothing if it has ended."""
        if self.status(rank) is None:
            os.kill(self.pids[rank], 9)

    def wait(self, limit: float) -> list[int]:
        """Statuses of all ranks.

        Raises:
            AssertionError: a rank was still running after ``limit`` seconds; all are dead then.
        """
        deadline = time.monotonic() + limit
        while (left := self.running()) and time.monotonic() < deadline:
            time.sleep(0.005)
        for rank in left:
            self.kill(rank)
        assert not left, f"ranks {left} still running after {limit:.0f} s: {self.arguments}\n{self.tails()}"
        return [status for rank in range(len(self.pids)) if (status := self.status(rank)) is not None]

    def succeed(self, limit: float = RUN_S) -> Job:
        """Wait for a run that must end well."""
        statuses = self.wait(limit)
        assert not any(statuses), f"exit statuses {statuses}: {self.arguments}\n{self.tails()}"
        return self

    def fail(self, limit: float = RUN_S) -> str:
        """Wait for a run that must end with an error on every rank; what all ranks wrote."""
        statuses = self.wait(limit)
        assert all(status > 0 for status in statuses), f"exit statuses {statuses}: {self.arguments}\n{self.tails()}"
        return self.text()

    def tails(self) -> str:
        return "\n".join(f"--- rank {r} ---\n{self.log(r)[-LOG_TAIL:]}" for r in range(len(self.pids)))


class Jobs:
    """Client of the server; starts it with the first run."""

    def __init__(self) -> None:
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.launch.job_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        atexit.register(self._server.kill)
        self._answer(START_S)

    def start(self, folder: Path, *arguments: str, world_size: int = 2, prelude: str = "") -> Job:
        """Start the ranks of one run.

        Args:
            folder: for logs; made.
            *arguments: command line of `pretrain_llama.py`.
            world_size: number of ranks.
            prelude: Python that each rank executes first, with ``rank`` defined.
        """
        folder.mkdir(parents=True)
        for rank in range(world_size):
            (folder / f"log.{rank}").touch()  # the reader may be faster than the fork
        request = {"folder": str(folder), "arguments": arguments, "world_size": world_size, "prelude": prelude}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Job(folder, self._answer(30.0), list(arguments))

    def _answer(self, limit: float) -> Any:
        assert self._server.stdout is not None
        ready, _, _ = select.select([self._server.stdout], [], [], limit)
        assert ready, f"the server of the main job gave no answer in {limit:.0f} s"
        line = self._server.stdout.readline()
        assert line, "the server of the main job has ended; see its error output above"
        return json.loads(line)


@cache
def jobs() -> Jobs:
    """The server of this test session."""
    return Jobs()


# ---------------------------------------------------------------------------- server side


def _serve() -> None:
    import torch

    torch.set_num_threads(1)  # a process with more threads must not be forked
    import torch.utils.tensorboard

    import pretrain_llama

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps("ready"), file=answers, flush=True)
    running: dict[int, Path] = {}
    while True:
        ready, _, _ = select.select([0], [], [], 0.005 if running else None)
        _reap(running)
        if not ready:
            continue
        line = _read_line()
        if not line:
            return
        request = json.loads(line)
        pids = []
        for rank in range(request["world_size"]):
            pid = os.fork()
            if pid == 0:
                answers.close()
                _be_rank(rank, request)
                pretrain_llama.main(request["arguments"])
                return
            pids.append(pid)
            running[pid] = Path(request["folder"]) / f"exit.{rank}"
        print(json.dumps(pids), file=answers, flush=True)


def _read_line() -> bytes:
    # unbuffered: what a buffer held would be invisible to select
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 1)
        if not piece:
            return b""
        line += piece
    return line


def _reap(running: dict[int, Path]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        running.pop(pid).write_text(str(os.waitstatus_to_exitcode(status)), encoding="utf-8")


def _be_rank(rank: int, request: dict[str, Any]) -> None:
    import torch

    folder = Path(request["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(folder / f"log.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    size = request["world_size"]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    exec(request["prelude"], {"rank": rank})
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(str(folder / "store"), size),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(minutes=10),
    )


if __name__ == "__main__":
    _serve()
