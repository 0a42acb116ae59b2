# SPDX-License-Identifier: Apache-2.0
"""Ranks that take themselves to be on different hosts: processes with a host name and a real TCP store."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import cloudpickle
import torch

from data import pool
from job import rendezvous

LIMIT_S = 240.0  # a hang; a rank needs less than a second on an idle core, LAUNCH_JOIN_SECONDS is 300


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass
class Ranks:
    """Processes started by `start`, by rank, and what each of them writes."""

    processes: dict[int, BaseProcess]
    logs: dict[int, Path]

    def wait(self) -> dict[int, tuple[int, str]]:
        """Exit status and output of each rank; none may still run after the limit."""
        deadline = time.monotonic() + LIMIT_S
        for process in self.processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in self.processes.items() if process.is_alive()]
        self.kill()
        results = {
            rank: (process.exitcode or 0, self.logs[rank].read_text(encoding="utf-8"))
            for rank, process in self.processes.items()
        }
        assert not hanging, f"ranks {hanging} hang: {results}"
        return results

    def wait_for(self, text: str) -> None:
        """Wait until every rank has written a text."""
        deadline = time.monotonic() + LIMIT_S
        while not all(text in log.read_text(encoding="utf-8") for log in self.logs.values()):
            assert time.monotonic() < deadline, self.wait()
            time.sleep(0.02)

    def kill(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()


def start(
    folder: Path,
    body: Callable[[int], None],
    *,
    world_size: int = 2,
    per_host: int = 1,
    absent: tuple[int, ...] = (),
    env: Mapping[str, str] | None = None,
    env_of: Callable[[int], Mapping[str, str]] = lambda rank: {},
) -> Ranks:
    """Start ranks that run ``body(rank)`` and end as a program of `launch/` does.

    They are forked from a process that has imported `launch/` and done nothing else: what earlier tests left in this
    one (threads, process groups) is not theirs.

    Args:
        folder: for logs.
        body: what each rank does; it travels by value, closures included.
        world_size: what the launcher would say.
        per_host: ranks on each host.
        absent: ranks that do not come up.
        env: more variables.
        env_of: more variables of one rank.
    """
    port = str(free_port())
    context = pool.forkserver()
    ranks = Ranks({}, {})
    for rank in range(world_size):
        if rank in absent:
            continue
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank % per_host),
            "LOCAL_WORLD_SIZE": str(per_host),
            "SLURMD_NODENAME": f"node{rank // per_host + 1}",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": "lo",
        }
        ranks.logs[rank] = folder / f"log.{rank}"
        ranks.logs[rank].touch()
        arguments = (cloudpickle.dumps(body), rank, ranks.logs[rank], variables | dict(env or {}) | dict(env_of(rank)))
        ranks.processes[rank] = context.Process(target=_run, args=arguments)
        ranks.processes[rank].start()
    return ranks


def _run(body: bytes, rank: int, log: Path, env: Mapping[str, str]) -> None:
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)
    os.environ.update(env)
    status = 1
    try:
        rendezvous.exit_status(lambda: cloudpickle.loads(body)(rank))
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:  # shown as an interpreter would show it; the status stays 1
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    os._exit(status)  # a process group of a broken job would wait for its peers here
