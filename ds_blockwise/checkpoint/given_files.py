# SPDX-License-Identifier: Apache-2.0
"""Reading files that others may have written: regular ones only, of a sensible size, and without running code.

A checkpoint may come from anywhere. A pipe, a device, a link out of its folder or a pickle that calls something is
refused by name. `load_torch_file` is the only place of this project that calls ``torch.load``.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import re
import stat
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch

from ds_blockwise.atomic_files import read_small_text

logger = logging.getLogger(__name__)

LARGEST_TEXT = 1 << 28
"""Bytes of a text file that is read: an index of a million tensors has half of it."""


def why_not_readable(path: Path) -> str | None:
    """Why a file may not be opened, or None: only regular files are read, a link to one counts."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return f"{kinds.get(stat.S_IFMT(mode), 'a socket')}, not a file"


def why_not_inside(folder: Path, name: object) -> str | None:
    """Why a name that a checkpoint's file gives may not be opened, or None: it must lie in the checkpoint's folder.

    Args:
        folder: the checkpoint.
        name: what should be a path relative to it, with forward slashes.
    """
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return "not the name of a file"
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "a path out of the checkpoint"
    try:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            return "a link out of the checkpoint; put a copy of the file there"
    except (OSError, RuntimeError) as error:  # the latter: links in a circle
        return f"cannot be read: {error}"
    return None


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read, is no regular file, or too large.
        ValueError: it is not JSON.
    """
    try:
        return json.loads(read_small_text(path, LARGEST_TEXT))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def load_torch_file(
    file: Path | BinaryIO,
    *,
    harmless: Sequence[Any] = (),
    trust: bool = False,
    how_to_trust: str = "",
) -> Any:
    """Load what ``torch.save`` wrote, on the CPU; tensors of a zip file are mapped and not read.

    Args:
        file: its path, or its contents.
        harmless: classes and functions that it may hold besides tensors and plain containers.
        trust: load it whatever it holds, which can run code.
        how_to_trust: what to write to set ``trust``, for the error; empty if that cannot be set.

    Raises:
        ValueError: it holds other objects, which are named, or is damaged, or is not a regular file. The text does not
            name the file.
    """
    if isinstance(file, Path) and (problem := why_not_readable(file)) is not None:
        raise ValueError(problem)
    try:
        mmap = isinstance(file, Path) and zipfile.is_zipfile(file)
        with torch.serialization.safe_globals(list(harmless)):
            return torch.load(file, map_location="cpu", mmap=mmap or None, weights_only=not trust)
    except pickle.UnpicklingError as error:
        # of torch's older format only the first one is known, by the error
        needed = foreign_globals(file, harmless) or re.findall(r"(?:GLOBAL|Unsupported global) (\S+) ", str(error))[:1]
        if not needed:
            raise ValueError(f"cannot be read: {_first_line(error)}") from error
        way_out = f" If you trust whoever wrote it, {how_to_trust}." if how_to_trust else ""
        raise ValueError(
            f"holds Python objects ({', '.join(needed)}), and loading those can run code.{way_out}"
        ) from error
    except Exception as error:  # torch raises anything from KeyError to OSError for a damaged file
        raise ValueError(f"cannot be read: {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    # what torch says before this is how to load it regardless
    text = str(error).rpartition("WeightsUnpickler error: ")[2]
    return (text.strip().splitlines() or [""])[0][:300]


def foreign_globals(file: Path | BinaryIO, harmless: Sequence[Any] = ()) -> list[str]:
    """Names of the classes and functions that a file needs and neither torch nor ``harmless`` allows."""
    named = [entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}" for entry in harmless]
    try:
        if not isinstance(file, Path):
            file.seek(0)
        return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - set(named))
    except Exception as error:
        # The caller is raising an error about this file already, or has just pickled it; a file too damaged to be
        # listed (torch raises anything then) must not replace that error by this one.
        logger.debug("the objects in %s cannot be listed: %s", file, error)
        return []


def pickled(value: object) -> io.BytesIO:
    """What ``torch.save`` writes for a value."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def is_plain(value: object) -> bool:
    """Whether a value surely is tensors and plain containers, which ``weights_only`` loads without a list."""
    if isinstance(value, Mapping):
        return type(value) in (dict, OrderedDict) and all(is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str, torch.Tensor)
