# SPDX-License-Identifier: Apache-2.0
"""One job writes in a folder of checkpoints: a lock that says who it is.

The lock is the kernel's (``flock``) on a file that names its holder. It ends with the process, however that ends, so
no lock is ever stale: what a killed job leaves is a file that nobody has locked. Linux passes ``flock`` on to the
server of an NFS mount, which gives up the lock of a host that crashed when its lease ends (90 seconds as a rule).

Where a file system has no locks, the holder's name alone must do. A process of the same host that still runs is seen.
Between hosts nothing can tell a killed job from one that runs, and a restart must not be locked out: the folder belongs
to whoever began last, and the other one is refused at its next save.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path

from ds_blockwise.atomic_files import this_host
from ds_blockwise.checkpoint.manifest import CheckpointError

logger = logging.getLogger(__name__)

LOCK = ".ds_blockwise.lock"
PATIENCE_S = 10.0
"""How long a lock is waited for: a process that was killed needs seconds to give back gigabytes and its locks."""

_NAME_S = 1.0  # how much longer to wait for the name of a holder that has only just taken it
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_RECORD_BYTES = 4096
_COMMAND_CHARACTERS = 200


class FolderInUseError(CheckpointError):
    """Another process writes checkpoints into that folder; the text names it."""


@dataclass(frozen=True)
class _Holder:
    """Contents of a lock file; all text, as anybody may have written it."""

    host: str
    pid: str
    started: str  # of the process, in the kernel's clock ticks; its number may be another one's later
    since: str
    command: str
    token: str

    def __str__(self) -> str:
        shown = {name: repr(value)[1:-1][:_COMMAND_CHARACTERS] for name, value in asdict(self).items()}
        return (
            f"process {shown['pid']} on host {shown['host']} writes checkpoints there since {shown['since']} (its "
            f"command: {shown['command']})"
        )

    @property
    def runs_here(self) -> bool:
        """Whether it is another process of this host that still runs."""
        other = self.host == this_host() and self.pid != str(os.getpid())
        return other and bool(self.started) and self.started == _started(self.pid)


@dataclass
class _Held:
    """A lock of this process.

    Attributes:
        descriptor: of the lock file.
        token: what it says in the file while the folder is this process's.
        exclusive: whether the kernel holds it; False where the file system has no locks.
        times: how often it was taken.
    """

    descriptor: int
    token: str
    exclusive: bool
    times: int = 0


_held: dict[Path, _Held] = {}


def hold(folder: Path) -> None:
    """Make the folder this process's to write in until `let_go` was called as often; it is made if it is missing.

    Raises:
        FolderInUseError: another process holds it.
        OSError: the folder or the lock file cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    held = _held.get(folder)
    if held is not None and not _is_at(held.descriptor, folder / LOCK):
        # somebody deleted the file or the folder, and a new one may be another's
        os.close(_held.pop(folder).descriptor)
        _held[folder] = replace(_take(folder), times=held.times)
    elif held is not None:
        _check_still_ours(folder, held)
    else:
        _held[folder] = _take(folder)
    _held[folder].times += 1


def let_go(folder: Path) -> None:
    """Give back one `hold`; the last one removes the lock file."""
    folder = folder.resolve()
    held = _held.get(folder)
    if held is None:  # a child of the process that held it
        return
    held.times -= 1
    if held.times > 0:
        return
    del _held[folder]
    holder = _holder_in(held.descriptor)
    with contextlib.suppress(OSError):  # a lock file that stays is nobody's, and harmless
        if _is_at(held.descriptor, folder / LOCK) and holder is not None and holder.token == held.token:
            (folder / LOCK).unlink()
    os.close(held.descriptor)


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """`hold`, then `let_go`."""
    hold(folder)
    try:
        yield
    finally:
        let_go(folder)


def hold_until_exit(folder: Path) -> None:
    """`hold`, for as long as this process lives.

    Raises:
        FolderInUseError: another process holds it.
        OSError: the folder or the lock file cannot be made.
    """
    hold(folder)
    atexit.register(let_go, folder.resolve())


def is_exclusive(folder: Path) -> bool:
    """Whether this process alone writes in the folder: it holds the lock, and the file system has locks."""
    held = _held.get(folder.resolve())
    return held is not None and held.exclusive


def _take(folder: Path) -> _Held:
    path = folder / LOCK
    deadline = time.monotonic() + PATIENCE_S
    while True:
        # never through a link: a folder of a stranger could point it at any file of the user's
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            held = _try_to_take(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise
        if held is not None:
            return held
        holder = _holder_in(descriptor)
        os.close(descriptor)
        if time.monotonic() > deadline + (_NAME_S if holder is None else 0.0):
            who = "another process writes checkpoints there" if holder is None else str(holder)
            raise FolderInUseError(
                f"{folder} is in use: {who}. Two jobs in one folder would replace each other's checkpoints. Give this "
                f"job a folder of its own, or start it when the other one has ended."
            )
        time.sleep(0.05)


def _try_to_take(descriptor: int, path: Path) -> _Held | None:
    """The lock, or None if another process has it or has just removed the file."""
    exclusive = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        exclusive = False
        before = _holder_in(descriptor)
        if before is not None and before.runs_here:
            return None
        logger.warning(
            "the file system of %s has no locks (%s): another job that saves there from another host is only noticed "
            "at the next save. Give each job a folder of its own.",
            path.parent,
            error.strerror,
        )
    if not _is_at(descriptor, path):
        return None
    me = _Holder(
        host=this_host(),
        pid=str(os.getpid()),
        started=_started(str(os.getpid())),
        since=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        command=shlex.join(sys.argv)[:_COMMAND_CHARACTERS],
        token=secrets.token_hex(8),
    )
    _open_to_whoever_may_write(descriptor, path.parent)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(me)).encode(), 0)
    return _Held(descriptor, me.token, exclusive)


def _open_to_whoever_may_write(descriptor: int, folder: Path) -> None:
    """A colleague who may write in the folder has to be able to lock it when this job is over."""
    if os.fstat(descriptor).st_uid == os.geteuid():
        with contextlib.suppress(OSError):  # some file systems know no modes
            os.fchmod(descriptor, folder.stat().st_mode & 0o666 | 0o600)


def _check_still_ours(folder: Path, held: _Held) -> None:
    """Notice a job that took the folder where locks do not work between hosts."""
    holder = _holder_in(held.descriptor)
    if holder is not None and holder.token != held.token:
        raise FolderInUseError(
            f"{folder} was taken from this job: {holder}. Its file system does not lock files between hosts, so the "
            f"job that began last has the folder. Give each job a folder of its own."
        )


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder_in(descriptor: int) -> _Holder | None:
    """What a lock file says; None if nothing that we wrote."""
    try:
        record = json.loads(os.pread(descriptor, _RECORD_BYTES, 0))
        values = {field.name: record[field.name] for field in fields(_Holder)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return _Holder(**values) if all(isinstance(value, str) for value in values.values()) else None


def _started(pid: str) -> str:
    """When a process of this host began, in the kernel's own count; empty if it does not run or that is not known."""
    try:
        text = Path("/proc", str(int(pid)), "stat").read_text(encoding="utf-8", errors="replace")
        state, *rest = text.rpartition(")")[2].split()  # what follows the name, which may hold blanks
        return "" if state in "ZX" else rest[18]
    except (OSError, ValueError, IndexError):
        return ""


def _forget() -> None:
    """In a child that was forked: an open copy of the descriptor would keep the lock after the parent's end."""
    for held in _held.values():
        os.close(held.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
