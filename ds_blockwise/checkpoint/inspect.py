# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint is and holds, in a few lines; and its conversion into the portable form."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_blockwise.checkpoint.folder import LATEST_UNIVERSAL, Checkpoint, open_checkpoint, partial_folders, resolve_tag
from ds_blockwise.checkpoint.manifest import MANIFEST, CheckpointError, verify
from ds_blockwise.checkpoint.portable import INDEX, KINDS, Portable, save_portable

UNIVERSAL = "zero"  # the folder in which DeepSpeed's universal checkpoints keep one folder per parameter
_UNIVERSAL_FILES = ("fp32.pt", "exp_avg.pt", "exp_avg_sq.pt")
CHECKPOINT_HELP = "a checkpoint (tag folder), or a folder of checkpoints, of which the one named by latest is taken"


def convert_checkpoint(
    source: Path, output: Path, *, tag: str | None = None, trust: bool = False
) -> tuple[Path, list[str]]:
    """Write the portable form of a checkpoint that a DeepSpeed engine saved with one of our optimizers.

    Args:
        source: a tag folder or a folder of checkpoints.
        output: folder of checkpoints to write into; made if it is missing. Its ``latest`` names the result.
        tag: which checkpoint of ``source``; default what its ``latest`` says.
        trust: also load files that hold arbitrary Python objects, which can run code.

    Returns:
        The tag folder that was written, and what the user should know about it.

    Raises:
        CheckpointError: files of the source are missing, damaged, or not of one of our optimizers.
        ValueError: the source is of a kind that is not converted, or the output exists.
    """
    checkpoint = _found(source, tag)
    kind = _kind(checkpoint)
    if kind == "portable":
        raise ValueError(f"{checkpoint.folder} is portable already: it loads at any topology as it is.")
    if kind == "universal":
        raise ValueError(
            f"{checkpoint.folder} is a universal checkpoint of DeepSpeed. Convert the checkpoint that it was made from."
        )
    problems = verify(checkpoint.folder)
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise CheckpointError(f"{checkpoint.folder} is damaged, nothing was written:{listed}")
    files = _deepspeed_files().DeepSpeedFiles(checkpoint.folder, trust=trust)
    return save_portable(files, output), [*checkpoint.notes, *files.notes]


def describe_checkpoint(source: Path, *, tag: str | None = None, trust: bool = False) -> dict[str, Any]:
    """What is inside a checkpoint, and what is wrong with it.

    Args:
        source: a tag folder or a folder of checkpoints: DeepSpeed's, portable, or universal.
        tag: which checkpoint of ``source``; default what its ``latest`` says.
        trust: also load files that hold arbitrary Python objects, which can run code.

    Returns:
        ``checkpoint kind global_steps optimizer topology settings parameters elements bytes notes problems``; what is
        not known is None. ``bytes`` is per kind of content.

    Raises:
        CheckpointError: there is no such checkpoint.
        ValueError: the folder holds none.
    """
    checkpoint = _found(source, tag)
    kind = _kind(checkpoint)
    manifest = checkpoint.manifest or {}
    left = partial_folders(checkpoint.folder.parent)
    described: dict[str, Any] = {
        "checkpoint": str(checkpoint.folder),
        "kind": kind,
        "global_steps": checkpoint.global_steps,
        "optimizer": (manifest.get("settings") or {}).get("optimizer"),
        "topology": manifest.get("topology"),
        "settings": manifest.get("settings"),
        "parameters": None,
        "elements": None,
        "bytes": {},
        "notes": [*checkpoint.notes, *(f"{path} was left by a save that did not finish" for path in left)],
        "problems": [],
    }
    if not manifest:
        described["notes"].append(f"no {MANIFEST}: only the sums inside the files themselves could be checked")
    try:
        described["problems"] += verify(checkpoint.folder)
        if not described["problems"]:
            reader = {"portable": _in_portable, "universal": _in_universal, "deepspeed": _in_deepspeed}[kind]
            reader(checkpoint.folder, described, trust)
    except CheckpointError as error:
        described["problems"].append(str(error))
    total = sum(path.stat().st_size for path in checkpoint.folder.rglob("*") if path.is_file())
    described["bytes"] |= {"other": total - sum(described["bytes"].values()), "total": total}
    return described


def _found(source: Path, tag: str | None) -> Checkpoint:
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder. Give {CHECKPOINT_HELP}.")
    if tag is None and _is_checkpoint(source):
        return open_checkpoint(source)
    universal_only = (source / LATEST_UNIVERSAL).is_file() and not (source / "latest").is_file()
    latest = {"latest": LATEST_UNIVERSAL} if universal_only else {}
    checkpoint = resolve_tag(source, tag, **latest)
    if checkpoint is None or not _is_checkpoint(checkpoint.folder):
        raise ValueError(f"there is no checkpoint in {source}. Give {CHECKPOINT_HELP}.")
    return checkpoint


def _is_checkpoint(folder: Path) -> bool:
    marks = (MANIFEST, INDEX, UNIVERSAL)
    return any((folder / mark).exists() for mark in marks) or any(folder.glob("*_model_states.pt"))


def _kind(checkpoint: Checkpoint) -> str:
    if checkpoint.manifest is None and (checkpoint.folder / INDEX).is_file():
        return "portable"
    return "universal" if (checkpoint.folder / UNIVERSAL).is_dir() else checkpoint.kind


def _deepspeed_files() -> Any:
    """The module that reads DeepSpeed's files; what DeepSpeed prints while it is imported goes to stderr."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # files are read on the CPU, whatever the machine has
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return importlib.import_module("ds_blockwise.hosts.deepspeed.checkpoint.read_files")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "deepspeed":
            raise
        raise ImportError("DeepSpeed's checkpoints need deepspeed: pip install 'ds_blockwise[deepspeed]'") from error


def _in_deepspeed(folder: Path, described: dict[str, Any], trust: bool) -> None:
    module = _deepspeed_files()
    try:
        files = module.DeepSpeedFiles(folder, trust=trust)
    except module.NoRecordError as error:
        described["notes"].append(str(error))
        return
    except ValueError as error:  # a kind that is not converted: its files were verified nevertheless
        described["notes"].append(f"its contents were not looked at: {error}")
        return
    described |= {"global_steps": files.origin["global_steps"], "topology": files.origin["topology"]}
    described["bytes"] |= files.content_bytes()
    described["notes"] += files.notes
    _trained(described, files.record)


def _in_portable(folder: Path, described: dict[str, Any], trust: bool) -> None:
    portable = Portable(folder)
    portable.training_state()
    described["problems"] += portable.problems()
    described |= {"global_steps": portable.origin["global_steps"], "topology": portable.origin["topology"]}
    described["bytes"] |= {kind: portable.bytes_of(kind) for kind in KINDS if portable.tensors[kind]}
    _trained(described, portable.record)


def _in_universal(folder: Path, described: dict[str, Any], trust: bool) -> None:
    params = sorted(path for path in (folder / UNIVERSAL).iterdir() if path.is_dir())
    described["parameters"] = len(params)
    for path in params:
        found = [name for name in _UNIVERSAL_FILES if (path / name).is_file()]
        needed = _UNIVERSAL_FILES[:1] if len(found) < 2 else _UNIVERSAL_FILES  # a frozen parameter has no moments
        missing = [name for name in needed if name not in found]
        described["problems"] += [f"{UNIVERSAL}/{path.name}/{name}: missing" for name in missing]
    if not params:
        described["problems"].append(f"{UNIVERSAL}: holds no parameters")
    for name in _UNIVERSAL_FILES:
        described["bytes"][name.removesuffix(".pt")] = sum(
            (path / name).stat().st_size for path in params if (path / name).is_file()
        )


def _trained(described: dict[str, Any], record: Mapping[str, Any]) -> None:
    described |= {"optimizer": record["optimizer"], "settings": record["settings"]}
    described["parameters"] = len(record["parameters"])
    described["elements"] = sum(math.prod(packed["shape"]) for packed in record["parameters"].values())
