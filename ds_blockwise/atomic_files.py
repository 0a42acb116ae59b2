# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, and their digests."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class _Sum(Protocol):
    def update(self, data: memoryview | bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


SUMS: dict[str, Callable[[], _Sum]] = {"sha256": hashlib.sha256}
"""What a file can be summed by, by the name that stands before a sum."""

try:
    from xxhash import xxh3_128
except ImportError:
    SUM = "sha256"
else:
    SUM = "xxh3_128"
    SUMS[SUM] = xxh3_128

_CHUNK = 1 << 22  # bytes
_FLUSHED_AT_ONCE = 1 << 26  # bytes
_MADE_BY = re.compile(r"(?P<name>.+)\.(?P<host>\w{1,24})-(?P<pid>[0-9]{1,10})-[0-9a-f]{8}", re.ASCII | re.DOTALL)


def this_host() -> str:
    """Name of this machine as far as a file's name can hold it."""
    return re.sub(r"\W", "_", socket.gethostname(), flags=re.ASCII)[:24] or "host"


def own_mark() -> str:
    """Text that no other process puts into the name of a temporary file: host, process id, and chance."""
    return f"{this_host()}-{os.getpid()}-{secrets.token_hex(4)}"


@dataclass(frozen=True)
class Marked:
    """A name with an `own_mark`, taken apart.

    Attributes:
        name: what stands before the mark.
        host: of the process that made the name; None if it has no mark.
        pid: of that process.
    """

    name: str
    host: str | None = None
    pid: int | None = None

    @property
    def may_be_in_use(self) -> bool:
        """False if the process that made it has surely ended, or is this one; True if that cannot be known."""
        if self.host is None or self.pid is None:
            return False
        if self.host != this_host():
            return True
        return self.pid != os.getpid() and _is_running(self.pid)


def marked(name: str) -> Marked:
    """Take a name apart that may end in an `own_mark`."""
    found = _MADE_BY.fullmatch(name)
    return Marked(name) if found is None else Marked(found["name"], found["host"], int(found["pid"]))


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def read_small_text(path: Path, limit: int) -> str:
    """The text of a file that should be small.

    Args:
        path: a regular file; a pipe or a device, which may never end, is an error.
        limit: bytes that it may have.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read, is no regular file, or is larger.
        UnicodeDecodeError: it is not UTF-8.
    """
    if path.is_dir():
        raise OSError("it is a folder")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else to open a pipe waits for a writer
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is not a regular file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(f"it has more than {limit} bytes")
    return content.decode("utf-8")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    return sum_of(path, "sha256").partition(":")[2]


def sum_of(path: Path, name: str | None = None) -> str:
    """A sum of a file's contents that shows damage, ``<name>:<hexadecimal digits>``.

    Args:
        path: the file.
        name: one of `SUMS`; default the fastest, `SUM`: XXH3 with 128 bits, as fast as memory and no protection
            against a forger, or SHA-256 where the package xxhash is missing.

    Raises:
        OSError: the file cannot be read.
    """
    name = name or SUM
    found = SUMS[name]()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return f"{name}:{found.hexdigest()}"


def replace_file(partial: Path, final: Path) -> None:
    """Give a finished file its name once its bytes are on the disk: a name means a whole file, after a power cut too.

    Args:
        partial: the file, closed, on the same file system as ``final``.
        final: its name; a file of that name is replaced.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    sync(partial)
    partial.replace(final)
    sync(final.parent)


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new one, never a part.

    A process that is killed in between leaves ``<name>.<own mark>.partial`` behind: two processes that write the same
    file, on two hosts too, never write into each other's.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    partial = path.with_name(f"{path.name}.{own_mark()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        replace_file(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SummedFile:
    """A file that is summed while it is written, and on its way to the disk before it is closed.

    `write` never raises, because what calls it may be C++ that cannot bear it. The first failure is raised when the
    file is closed, and nothing is written after it.

    Args:
        path: the file; one of that name is replaced.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, path: str | Path) -> None:
        self._file = open(path, "wb")
        self._sum = SUMS[SUM]()
        self._beside = ThreadPoolExecutor(1)
        self._flush: Future[None] | None = None
        self._not_flushed = 0
        self._failure: OSError | None = None
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        """Write and sum; returns when both are done, so the memory may be used again."""
        view = memoryview(data)
        if self._failure is None:
            with self._noting():
                self._file.write(view)
                self._begin_to_flush(view.nbytes)
            self._sum.update(view)
            self.size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Nothing: `close` brings out what is held back."""

    def abandon(self) -> None:
        """Close the file after an error of whoever writes."""
        self._beside.shutdown()
        with contextlib.suppress(OSError):  # the error that is being raised says more
            self._file.close()

    def close(self) -> str:
        """Close the file.

        Returns:
            The sum of what was written, as `sum_of` gives it.

        Raises:
            OSError: not all of it could be written.
        """
        self._beside.shutdown()
        with self._noting():
            self._file.close()
        if self._failure is not None:
            raise self._failure
        return f"{SUM}:{self._sum.hexdigest()}"

    def _begin_to_flush(self, written: int) -> None:
        """Let a thread bring much to the disk at once, so that little is left to wait for at the end."""
        self._not_flushed += written
        if self._not_flushed >= _FLUSHED_AT_ONCE and (self._flush is None or self._flush.done()):
            self._not_flushed = 0
            self._file.flush()
            self._flush = self._beside.submit(self._bring_to_the_disk)

    def _bring_to_the_disk(self) -> None:
        with self._noting():
            os.fdatasync(self._file.fileno())

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._failure = self._failure or error
