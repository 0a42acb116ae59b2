# SPDX-License-Identifier: Apache-2.0
"""Run a function on several processes with gloo, and bring every failure home.

Rendezvous is a file store in a temporary directory, so no test picks a port. Two entries: ``run_distributed`` for one
function on new interpreters, ``run_cases`` for many cases on processes that are forked from one that has imported the
hosts (importing DeepSpeed and Megatron-core costs more than a case does).
"""

from __future__ import annotations

import datetime
import faulthandler
import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import BaseContext, ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from tests.helpers import ROOT

START = -1  # stands for the index of a case in what a rank reports when it is ready
HANG_S = 300.0  # a start or a case takes seconds, a minute on a very busy machine: only a hang lasts as long
GRACE_S = 60.0  # how long the other ranks may still work after one rank has failed
LOG_TAIL = 4000  # characters of each rank's output that are worth showing


@dataclass(frozen=True)
class RankContext:
    """What a worker gets first: who it is and a directory that all ranks share."""

    rank: int
    world_size: int
    tmp_path: Path

    def barrier(self) -> None:
        torch.distributed.barrier()


class DistributedError(AssertionError):
    """A rank failed, died or ran past the time limit; the text has rank and traceback."""


@dataclass
class _Outcome:
    """Result of one case on one rank."""

    value: Any = None
    error: str | None = None


Worker = Callable[..., Any]
Outcome = Callable[[str], str | None]


def run_distributed(worker: Worker, world_size: int, *args: Any, timeout: float = HANG_S) -> list:
    """Call ``worker(context, *args)`` on every rank; return the values in the order of ranks.

    Args:
        worker: A module-level function (the processes are spawned and import it by name).
        world_size: Number of processes.
        *args: Passed through pickle.
        timeout: Seconds for the worker itself; the start of the processes has its own limit.

    Raises:
        DistributedError: A rank raised, died, or the time was up. All ranks are gone by then.
    """
    (outcomes,) = _run_fleet(mp.get_context("spawn"), worker, world_size, [("worker", args)], timeout)
    _raise_if_failed(outcomes)
    return [outcome.value for outcome in outcomes]


def run_cases(
    worker: Worker, world_size: int, cases: Mapping[str, Any], *, case_timeout: float = HANG_S
) -> dict[str, str | None]:
    """Run ``worker(context, case)`` for every case on the same processes, which have the hosts imported.

    A case in which only some ranks fail leaves the others inside a collective; then the processes
    are replaced and the remaining cases go on, so one failure never hides the next case.

    Returns:
        Case name -> ``None`` when all ranks passed, else the text of what went wrong.
    """
    results: dict[str, str | None] = {}
    pending = list(cases.items())
    while pending:
        fleet = [(name, (case,)) for name, case in pending]
        finished = _run_fleet(fork_server(), worker, world_size, fleet, case_timeout)
        for (name, _), outcomes in zip(pending, finished, strict=False):
            results[name] = _failure_text(outcomes)
        pending = [(name, case) for name, case in pending if name not in results]
    return results


def fleet_outcome(
    request: pytest.FixtureRequest,
    worker: Worker,
    cases: Mapping[str, tuple[int, Any]],
    per_spawn: int = 40,
) -> Outcome:
    """Failure text (or None) of a case by name, for a module-scoped fixture.

    ``cases`` maps a name to (world size, case). The first question about a case runs it with its neighbours: those of
    its world size that this session selected (tests whose parameter ``name`` is a key of ``cases``), ``per_spawn`` of
    them on the same processes. gloo's groups are never freed, so cases that make many slow down all that follow them.
    """
    selected = {
        item.callspec.params.get("name")
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }

    def names(world_size: int) -> list[str]:
        return [n for n, (size, _) in cases.items() if n in selected and size == world_size]

    @cache
    def fleet(world_size: int, part: int) -> dict[str, str | None]:
        chosen = names(world_size)[part * per_spawn : (part + 1) * per_spawn]
        return run_cases(worker, world_size, {n: cases[n][1] for n in chosen})

    def outcome(name: str) -> str | None:
        world_size = cases[name][0]
        return fleet(world_size, names(world_size).index(name) // per_spawn)[name]

    return outcome


def passes(outcome: Outcome, name: str) -> None:
    """Fail the calling test with what every rank reported."""
    failure = outcome(name)
    if failure is not None:
        pytest.fail(f"{name}\n{failure}", pytrace=False)


def _failure_text(outcomes: list[_Outcome]) -> str | None:
    failed = [(rank, o.error) for rank, o in enumerate(outcomes) if o.error is not None]
    if not failed:
        return None
    return "\n".join(f"--- rank {rank} of {len(outcomes)} ---\n{error}" for rank, error in failed)


def _raise_if_failed(outcomes: list[_Outcome]) -> None:
    text = _failure_text(outcomes)
    if text is not None:
        raise DistributedError(text)


# ------------------------------------------------------------------------------------ parent side


@cache
def fork_server() -> ForkServerContext:
    """Starts the process that has the hosts in memory; a rank that is forked from it starts in a second, not in ten.

    It has one thread. A process that is forked from the one that runs the tests can wait for ever: for a lock that
    another thread held at that moment, or for the end of a thread that it does not have.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.preload_hosts"])
    with pytest.MonkeyPatch.context() as patch:
        # a process of its own, which has to find the tests, and the hosts where this one does; and its accelerator
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        forkserver.ensure_running()
    return context


def _run_fleet(
    context: BaseContext, worker: Worker, world_size: int, cases: list[tuple[str, tuple]], timeout: float
) -> list[list[_Outcome]]:
    """Outcomes of the first n >= 1 cases; fewer than given if the processes had to be ended."""
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        directory = Path(name)
        processes = [
            context.Process(target=_child_main, args=(rank, world_size, name, worker, cases), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            started, complete = _collect(directory, processes, START, HANG_S)
            if not complete:
                return [started]
            finished: list[list[_Outcome]] = []
            for index in range(len(cases)):
                outcomes, complete = _collect(directory, processes, index, timeout)
                finished.append(outcomes)
                if not complete:
                    break
            return finished
        finally:
            _end(processes)


def _collect(directory: Path, processes: list[mp.Process], index: int, limit: float) -> tuple[list[_Outcome], bool]:
    """Wait for one case on all ranks; complete is False if the processes can't go on."""
    deadline = time.monotonic() + limit
    missing = set(range(len(processes)))
    outcomes = [_Outcome() for _ in processes]
    reason = f"still running after {limit:.0f} s"
    while missing:
        dead = {rank for rank in missing if not processes[rank].is_alive()}
        for rank in sorted(missing):
            path = _outcome_path(directory, index, rank)
            if path.exists():
                outcomes[rank] = pickle.loads(path.read_bytes())
                missing.discard(rank)
                if outcomes[rank].error is not None:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                    reason = f"still running {GRACE_S:.0f} s after another rank had failed"
        dead &= missing
        if dead:
            for rank in dead:
                outcomes[rank].error = f"process died, exit code {processes[rank].exitcode}"
                outcomes[rank].error += _log_tail(directory, rank)
            missing -= dead
            deadline = min(deadline, time.monotonic() + GRACE_S)
            reason = f"still running {GRACE_S:.0f} s after another rank had died"
        if missing and time.monotonic() > deadline:
            for rank in missing:
                os.kill(processes[rank].pid or 0, signal.SIGUSR1)  # dumps its stack to its log
            time.sleep(0.5)
            for rank in missing:
                outcomes[rank].error = reason + _log_tail(directory, rank)
            return outcomes, False
        time.sleep(0.003)
    return outcomes, all(p.is_alive() or p.exitcode == 0 for p in processes)


def _end(processes: list[mp.Process]) -> None:
    for process in processes:
        process.join(timeout=0.5)
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def _outcome_path(directory: Path, index: int, rank: int) -> Path:
    return directory / f"case{index}.rank{rank}"


def _log_tail(directory: Path, rank: int) -> str:
    path = directory / f"log.rank{rank}"
    text = path.read_text(errors="replace") if path.exists() else ""
    return f"\n... end of its output:\n{text[-LOG_TAIL:]}"


# ------------------------------------------------------------------------------------- child side


def _child_main(rank: int, world_size: int, name: str, worker: Worker, cases: list[tuple[str, tuple]]) -> None:
    directory = Path(name)
    log = open(directory / f"log.rank{rank}", "w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, file=log)
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    os.environ.update({key: str(value) for key, value in environment.items()})
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no name resolution needed
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(str(directory / "store"), world_size),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(minutes=10),  # the parent's limits are the ones that count
    )
    context = RankContext(rank, world_size, directory)
    _write(_outcome_path(directory, START, rank), _Outcome())
    for index, (_, args) in enumerate(cases):
        outcome = _Outcome()
        try:
            outcome.value = worker(context, *args)
        except Exception:  # not hidden: the parent fails the test with the traceback; the other cases go on
            outcome.error = traceback.format_exc()
        _write(_outcome_path(directory, index, rank), outcome)
        gc.collect()  # engines hold hooks in reference cycles; they must not meet the next case
        gc.freeze()  # imported hosts are a million objects; the next collection need not see them
        paths = [_outcome_path(directory, index, other) for other in range(world_size)]
        while not all(path.exists() for path in paths):
            time.sleep(0.003)
    # A clean shutdown of the group can wait for peers that were killed; nothing is left to save.
    os._exit(0)


def _write(path: Path, outcome: _Outcome) -> None:
    partial = path.with_suffix(path.suffix + ".part")
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(path)  # the parent must never read half a file
