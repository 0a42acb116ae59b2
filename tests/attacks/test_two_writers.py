# SPDX-License-Identifier: Apache-2.0
"""Several processes that save and read in one folder at once: nothing complete is lost, no read is of two versions.

``ATTACK_TIMES`` makes more rounds of it.
"""

from __future__ import annotations

import faulthandler
import json
import random
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from ds_blockwise.checkpoint import folder as files
from ds_blockwise.checkpoint.folder_rules import lock
from ds_blockwise.checkpoint.folder_rules.lock import FolderInUseError, hold, holding, let_go
from ds_blockwise.checkpoint.manifest import (
    CheckpointError,
    ReplacedError,
    files_in,
    of_one_version,
    sums_of,
    verify,
    write_manifest,
)
from tests.helpers.attacks import WAIT_S, Tally, number_of_inputs
from tests.helpers.checkpoint_folders import TOPOLOGY
from tests.helpers.distributed import fork_server

pytestmark = pytest.mark.spawns

FILES = ("a_model_states.pt", "b_model_states.pt", "c_model_states.pt")
SHARED = "best"  # the tag that all write
BEGUN = "begun"  # the first note of a process
STACK = ".stack"

Note = Callable[[str, str], None]


def write(folder: Path, tag: str, version: str) -> None:
    """One save; every file holds the version."""
    partial = files.start_partial(folder, tag)
    for name in FILES:
        (partial / name).write_text(version, encoding="utf-8")
    sums = sums_of(partial, files_in(partial))
    settings = {"version": version}
    write_manifest(partial, kind="deepspeed", tag=tag, global_steps=1, topology=TOPOLOGY, settings=settings, files=sums)
    files.publish(partial)
    files.write_latest(folder, tag)


def read(folder: Path, tag: str | None) -> str | None:
    """One load; what is wrong with it."""
    checkpoint = files.resolve_tag(folder, tag)
    if checkpoint is None:
        return None if tag is None else "no checkpoint"
    with of_one_version(checkpoint.folder, checkpoint.version):
        problems = verify(checkpoint.folder, version=checkpoint.version)
        versions = {(checkpoint.folder / name).read_text(encoding="utf-8") for name in FILES}
    if problems:
        return f"damaged: {problems}"
    return None if len(versions) == 1 else f"of {len(versions)} versions"


def writer(folder: Path, name: str, rounds: int, locks: bool, note: Note) -> None:
    """A job: it begins, saves a few times, ends; one tag of its own in each round, and the shared one."""
    for turn in range(rounds):
        try:
            if locks:
                hold(folder)
            try:
                for tag in (f"{name}_{turn}", SHARED):
                    write(folder, tag, f"{name} {turn}")
                    note("accepted", tag)
            finally:
                if locks:
                    let_go(folder)
        except FolderInUseError as error:
            note("refused" if "process " in str(error) and "command" in str(error) else "silent", str(error))
            time.sleep(0.001)


def reader(folder: Path, seed: int, stop: Any, note: Note) -> None:
    """Reads until the writers have ended."""
    chance = random.Random(seed)
    seen = False
    while not stop.is_set():
        try:
            seen = seen or (folder / SHARED).is_dir()
            problem = read(folder, chance.choice((SHARED, None)))
            note("accepted" if problem is None else "silent", problem or "read")
        except ReplacedError:
            note("refused", "replaced")
        except CheckpointError as error:
            if seen or "there is no checkpoint" not in str(error):
                raise


def act(work: Callable[..., None], notes: Path, patience: float, *arguments: Any) -> None:
    """The body of a process; it notes in a file of its own, as a queue would not survive a kill.

    Should it hang, a second file says where.
    """
    lock.PATIENCE_S = patience
    with notes.open("ab", buffering=0) as file, notes.with_suffix(STACK).open("w", encoding="utf-8") as stack:

        def note(kind: str, text: str) -> None:
            file.write(json.dumps([kind, text]).encode() + b"\n")

        note(BEGUN, "")
        faulthandler.dump_traceback_later(WAIT_S, file=stack)
        try:
            work(*arguments, note)
        except Exception as error:
            note("tracebacks", f"{work.__name__} {arguments[1:2]}: {type(error).__name__}: {error}")


class Fleet:
    """Processes that save and read in one folder, and what they noted."""

    def __init__(self, folder: Path, writers: int, rounds: int, *, locks: bool, patience: float) -> None:
        self.folder, self.rounds, self.locks, self.patience = folder, rounds, locks, patience
        self.notes = folder.parent / "notes"
        self.notes.mkdir()
        self.stop = fork_server().Event()
        self.processes: dict[Path, BaseProcess] = {}
        self.readers = [self.start(reader, seed, self.stop) for seed in range(2)]
        self.writers = [self.start_writer(f"w{n}") for n in range(writers)]

    def start(self, work: Callable[..., None], *arguments: Any) -> BaseProcess:
        notes = self.notes / str(len(self.processes))
        notes.touch()
        notes.with_suffix(STACK).touch()
        process = fork_server().Process(target=act, args=(work, notes, self.patience, self.folder, *arguments))
        process.start()
        self.processes[notes] = process
        return process

    def start_writer(self, name: str) -> BaseProcess:
        return self.start(writer, name, self.rounds, self.locks)

    def kill_when_it_works(self, process: BaseProcess, after: float) -> None:
        """``kill -9``, that many seconds after its first note."""
        (notes,) = (path for path, started in self.processes.items() if started is process)
        deadline = time.monotonic() + 5 * WAIT_S
        while not notes.stat().st_size:
            assert time.monotonic() < deadline, "it does not begin"
            time.sleep(0.001)
        time.sleep(after)
        process.kill()
        process.join()

    def finish(self, what: str) -> Tally:
        """Wait for all, and count what became of the saves and reads."""
        for process in self.writers:
            process.join(5 * WAIT_S)
        self.stop.set()
        for process in self.readers:
            process.join(WAIT_S)
        tally = Tally(f"saves and reads at once in one folder, {what}")
        for notes, process in self.processes.items():
            if process.is_alive():
                process.kill()
                tally.hangs.append(f"{process}\n{notes.with_suffix(STACK).read_text(encoding='utf-8')}")
            for line in notes.read_text(encoding="utf-8").splitlines():
                self._count(tally, *json.loads(line))
        return tally

    def _count(self, tally: Tally, kind: str, text: str) -> None:
        if kind == BEGUN:
            return
        tally.inputs += 1
        if kind in ("accepted", "refused"):
            setattr(tally, kind, getattr(tally, kind) + 1)
        else:
            getattr(tally, kind).append(text)
        if kind == "accepted" and text != "read" and read(self.folder, text) is not None:
            tally.silent.append(f"{text} was saved, and is lost")


def at_rest(folder: Path) -> None:
    """What a job that begins afterwards finds: whole checkpoints, and after its tidying nothing else."""
    with holding(folder):
        files.remove_unfinished(folder)
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    assert SHARED in names
    assert all(verify(folder / name) == [] for name in names)
    assert {path.name for path in folder.iterdir() if not path.is_dir()} == {"latest"}
    assert (folder / "latest").read_text(encoding="utf-8") in names


def test_jobs_that_begin_in_one_folder_are_refused_or_save(tmp_path: Path) -> None:
    """Each takes the folder for one save, so that they meet often."""
    folder = tmp_path / "checkpoints"
    tally = Fleet(folder, 3, number_of_inputs(40), locks=True, patience=0.0).finish("by jobs that meet")
    tally.keep("two_writers")
    assert tally.refused, "they never met"
    at_rest(folder)


def test_jobs_on_hosts_whose_locks_do_not_work(tmp_path: Path) -> None:
    """Both write the same tag and never see each other: still no complete checkpoint is lost, and no save fails."""
    folder = tmp_path / "checkpoints"
    fleet = Fleet(folder, 2, number_of_inputs(40), locks=False, patience=0.0)
    fleet.finish("without locks").keep("two_writers_without_locks")
    at_rest(folder)


def test_jobs_that_are_killed_are_replaced_at_once(tmp_path: Path) -> None:
    """kill -9 at instants from a fixed seed; the next job takes the folder, and what was complete still is."""
    folder = tmp_path / "checkpoints"
    chance = random.Random(16)
    write(folder, SHARED, "first")
    fleet = Fleet(folder, 0, 1000, locks=True, patience=lock.PATIENCE_S)
    for turn in range(number_of_inputs(15)):
        fleet.kill_when_it_works(fleet.start_writer(f"k{turn}"), 0.1 * chance.random())
    fleet.writers = [fleet.start(writer, "last", 3, True)]
    fleet.finish("by jobs that are killed").keep("two_writers_killed")
    at_rest(folder)
    assert read(folder, "last_2") is None
