# SPDX-License-Identifier: Apache-2.0
"""One job writes in a folder: who is refused, who is not, and what a kill leaves."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from ds_blockwise.checkpoint.folder_rules import lock
from ds_blockwise.checkpoint.folder_rules.lock import LOCK, FolderInUseError, hold, holding, is_exclusive, let_go
from tests.helpers.distributed import fork_server


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.0)


@contextmanager
def other_process(work: Callable[[Connection, Path], None], folder: Path) -> Iterator[tuple[BaseProcess, Connection]]:
    """A process with that work, and a connection to it."""
    ours, theirs = fork_server().Pipe()
    process = fork_server().Process(target=work, args=(theirs, folder))
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()


def hold_and_say_so(connection: Connection, folder: Path) -> None:
    hold(folder)
    connection.send("held")
    connection.recv()
    let_go(folder)
    connection.send("gone")
    connection.recv()


def hold_and_fork(connection: Connection, folder: Path) -> None:
    hold(folder)
    child = os.fork()
    if child == 0:
        let_go(folder)  # not the child's: nothing happens
        signal.pause()
    connection.send(child)
    connection.recv()


def test_the_second_job_is_refused_by_name_until_the_first_has_ended(tmp_path: Path) -> None:
    with other_process(hold_and_say_so, tmp_path) as (process, connection):
        assert connection.recv() == "held"
        with pytest.raises(FolderInUseError, match=f"is in use: process {process.pid} on host ") as caught:
            hold(tmp_path)
        assert "Give this job a folder of its own" in str(caught.value)
        assert "UTC (its command: " in str(caught.value)
        assert not is_exclusive(tmp_path)
        connection.send("go")
        assert connection.recv() == "gone"
        with holding(tmp_path):
            assert is_exclusive(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_job_does_not_lock_out_its_successor(tmp_path: Path) -> None:
    with other_process(hold_and_say_so, tmp_path) as (process, connection):
        assert connection.recv() == "held"
        process.kill()
        process.join()
        assert (tmp_path / LOCK).is_file()
        with holding(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text(encoding="utf-8"))["pid"] == str(os.getpid())


def test_a_job_that_is_being_killed_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 60.0)
    with other_process(hold_and_say_so, tmp_path) as (process, connection):
        assert connection.recv() == "held"
        threading.Timer(0.2, process.kill).start()
        with holding(tmp_path):
            assert is_exclusive(tmp_path)


def test_a_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A worker of a DataLoader that outlives its killed parent for a while."""
    with other_process(hold_and_fork, tmp_path) as (process, connection):
        child = connection.recv()
        try:
            process.kill()
            process.join()
            with holding(tmp_path):
                assert is_exclusive(tmp_path)
        finally:
            os.kill(child, signal.SIGKILL)


def test_it_is_held_as_often_as_it_was_taken(tmp_path: Path) -> None:
    """Two engines of one process may save into one folder."""
    hold(tmp_path / "a")
    hold(tmp_path / "b" / ".." / "a")
    let_go(tmp_path / "a")
    assert is_exclusive(tmp_path / "a")
    let_go(tmp_path / "a")
    assert not is_exclusive(tmp_path / "a")
    let_go(tmp_path / "a")
    assert list((tmp_path / "a").iterdir()) == []


def test_a_lock_file_that_was_deleted_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with holding(folder):
        (folder / LOCK).unlink()
        folder.rmdir()
        with holding(folder):
            assert (folder / LOCK).is_file()
        assert is_exclusive(folder)
    assert list(folder.iterdir()) == []


def test_it_is_never_written_through_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / LOCK).symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        hold(tmp_path / "folder")
    assert precious.read_text(encoding="utf-8") == "precious"


def test_whoever_may_write_in_the_folder_may_lock_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o770)
    with holding(tmp_path):
        assert stat.S_IMODE((tmp_path / LOCK).stat().st_mode) == 0o660


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 9000, '{"host": 1}', "\0" * 5000])
def test_a_lock_file_with_anything_in_it(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_NAME_S", 0.0)
    (tmp_path / LOCK).write_text(text, encoding="utf-8")
    with (tmp_path / LOCK).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(FolderInUseError, match="another process writes checkpoints there"):
            hold(tmp_path)
    with holding(tmp_path):
        assert is_exclusive(tmp_path)


# ------------------------------------------------------------------ file systems without locks


@pytest.fixture
def _no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("_no_locks")
def test_without_locks_a_running_process_of_this_host_is_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with other_process(hold_and_say_so, tmp_path) as (process, connection):
        assert connection.recv() == "held"
        with pytest.raises(FolderInUseError, match=f"process {process.pid} on host"):
            hold(tmp_path)
        process.kill()
        process.join()
        with holding(tmp_path):
            assert not is_exclusive(tmp_path)
    assert "has no locks (No locks available)" in caplog.text


@pytest.mark.usefixtures("_no_locks")
def test_without_locks_the_job_of_another_host_that_began_last_has_the_folder(tmp_path: Path) -> None:
    with holding(tmp_path):
        record = json.loads((tmp_path / LOCK).read_text(encoding="utf-8"))
        record |= {"host": "elsewhere", "pid": "12", "token": "theirs", "command": "train.py\x1b[2J"}
        (tmp_path / LOCK).write_text(json.dumps(record), encoding="utf-8")
        with pytest.raises(FolderInUseError, match="was taken from this job: process 12 on host elsewhere") as caught:
            hold(tmp_path)
        assert str(caught.value).isprintable()
    assert (tmp_path / LOCK).is_file()  # theirs
    with holding(tmp_path):
        pass
