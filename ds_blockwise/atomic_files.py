# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, and their digests."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_CHUNK = 1 << 22  # bytes


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


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

    A process that is killed in between leaves ``<name>.<process id>.partial`` behind: two processes that write the same
    file never write into each other's.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
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
