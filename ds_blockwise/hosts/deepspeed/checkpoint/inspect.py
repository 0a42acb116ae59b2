# SPDX-License-Identifier: Apache-2.0
"""Description of a checkpoint of any kind, and its conversion into the portable form."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch

from ds_blockwise.checkpoint.folder import (
    LATEST,
    LATEST_UNIVERSAL,
    Checkpoint,
    open_checkpoint,
    partial_folders,
    resolve_tag,
)
from ds_blockwise.checkpoint.folder_rules.lock import LOCK
from ds_blockwise.checkpoint.given_files import why_not_inside, why_not_readable
from ds_blockwise.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    NoRecordError,
    NotReadError,
    ReplacedError,
    Topology,
    check_version,
    of_one_version,
    once_more,
    tensor_files_in,
    verify,
)
from ds_blockwise.checkpoint.portable import Portable, save_portable
from ds_blockwise.checkpoint.portable_index import INDEX, KINDS
from ds_blockwise.checkpoint.portable_types import Origin
from ds_blockwise.checkpoint.record_types import PortableRecord, Settings
from ds_blockwise.checkpoint.state_dicts import bad_values

if TYPE_CHECKING:
    from ds_blockwise.hosts.deepspeed.checkpoint.read_files import DeepSpeedFiles

CHECKPOINT_HELP = "a checkpoint (tag folder), or a folder of checkpoints, of which the one named by latest is taken"
_TRAINER_STATE = "trainer_state.json"
_UNIVERSAL = "zero"  # the folder in which DeepSpeed's universal checkpoints keep one folder per parameter
_UNIVERSAL_FILES = ("fp32.pt", "exp_avg.pt", "exp_avg_sq.pt")


class CheckpointDescription(TypedDict):
    """What `describe_checkpoint` finds; None where something is not known.

    Attributes:
        checkpoint: the tag folder.
        kind: ``deepspeed``, ``portable`` or ``universal``; ``unknown`` if its manifest is damaged.
        global_steps: optimizer steps before it was saved.
        optimizer: class name of the optimizer.
        topology: of the run that saved it; for a portable checkpoint, of the run that it was made from.
        settings: of the optimizer.
        parameters: number of trained parameters; of a universal checkpoint, of all.
        elements: of all trained parameters.
        bytes: per kind of content, ``other`` and ``total`` included.
        notes: what is worth knowing, a sentence each.
        problems: what is missing, damaged or unreadable, a line each; empty if the checkpoint is sound.
    """

    checkpoint: str
    kind: str
    global_steps: int | None
    optimizer: str | None
    topology: Topology | None
    settings: Settings | None
    parameters: int | None
    elements: int | None
    bytes: dict[str, int]
    notes: list[str]
    problems: list[str]


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
        FolderInUseError: another job saves in the output.
        ReplacedError: a save replaced the source while it was read; what was written is removed.
        ValueError: the source is of a kind that is not converted, or the output exists.
    """
    checkpoint, problems = once_more(lambda: _verified(source, tag))
    kind = _kind(checkpoint)
    if kind == "portable":
        raise ValueError(f"{checkpoint.folder} is portable already: it loads at any topology as it is.")
    if kind == "universal":
        raise ValueError(
            f"{checkpoint.folder} is a universal checkpoint of DeepSpeed. Convert the checkpoint that it was made from."
        )
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise CheckpointError(f"{checkpoint.folder} is damaged, nothing was written:{listed}")
    with of_one_version(checkpoint.folder, checkpoint.version):
        files = _open_deepspeed(checkpoint.folder, trust)
        written = save_portable(files, output, unchanged=lambda: check_version(checkpoint.folder, checkpoint.version))
    return written, [*checkpoint.notes, *files.notes, *_copy_neighbours(checkpoint.folder.parent, output)]


def _verified(source: Path, tag: str | None) -> tuple[Checkpoint, list[str]]:
    """A checkpoint and what is wrong with its files, both of one version."""
    checkpoint = _found(source, tag)
    return checkpoint, verify(checkpoint.folder, version=checkpoint.version)


def _copy_neighbours(source: Path, output: Path) -> list[str]:
    """Copy what Hugging Face's Trainer keeps beside the tag folder and needs to resume.

    Its state, the schedule's if that is not DeepSpeed's, random states, the configuration, the tokenizer.
    """
    if not (source / _TRAINER_STATE).is_file():
        return []
    ours = {LATEST, LATEST_UNIVERSAL, LOCK}
    names = sorted(p.name for p in source.iterdir() if p.name not in ours and why_not_readable(p) is None)
    copied = [name for name in names if not (output / name).exists() and why_not_inside(source, name) is None]
    for name in copied:
        shutil.copy2(source / name, output / name)
    return [f"{len(copied)} files of Hugging Face's Trainer were copied from {source} ({_TRAINER_STATE} and others)"]


def describe_checkpoint(source: Path, *, tag: str | None = None, trust: bool = False) -> CheckpointDescription:
    """What is inside a checkpoint, and what is wrong with it.

    Args:
        source: a tag folder or a folder of checkpoints: DeepSpeed's, portable, or universal.
        tag: which checkpoint of ``source``; default what its ``latest`` says.
        trust: also load files that hold arbitrary Python objects, which can run code.

    Raises:
        CheckpointError: there is no such checkpoint.
        ReplacedError: a save replaced it while it was read, twice.
        ValueError: the folder holds none.
    """
    return once_more(lambda: _describe(source, tag, trust))


def _describe(source: Path, tag: str | None, trust: bool) -> CheckpointDescription:
    try:
        checkpoint = _found(source, tag)
    except ReplacedError:
        raise
    except CheckpointError as error:
        damaged = source if tag is None else source / tag
        if not (damaged / MANIFEST).exists():
            raise
        return _nothing_but(damaged, str(error))
    manifest = checkpoint.manifest
    settings = None if manifest is None else manifest["settings"]
    left = partial_folders(checkpoint.folder.parent)
    described = _nothing_but(checkpoint.folder)
    described["kind"], described["global_steps"] = _kind(checkpoint), checkpoint.global_steps
    described["optimizer"] = None if settings is None else settings.get("optimizer")
    described["topology"] = None if manifest is None else manifest["topology"]
    described["settings"] = settings
    unfinished = (f"{path} was left by a save that did not finish, or is being written" for path in left)
    described["notes"] = [*checkpoint.notes, *unfinished]
    if manifest is None:
        described["notes"].append(f"no {MANIFEST}: only the sums inside the files themselves could be checked")
    with of_one_version(checkpoint.folder, checkpoint.version):
        damaged_files = verify(checkpoint.folder)
        try:
            _look_inside(checkpoint.folder, described, trust)
        except CheckpointError as error:
            described["problems"].append(str(error))
        # what follows from a damaged file says no more
        inside = [p for p in described["problems"] if not any(_is_about(line, p) for line in damaged_files)]
        described["problems"] = damaged_files + inside
        total = sum(path.stat().st_size for path in checkpoint.folder.rglob("*") if path.is_file())
    described["bytes"] |= {"other": total - sum(described["bytes"].values()), "total": total}
    return described


def _nothing_but(folder: Path, *problems: str) -> CheckpointDescription:
    """The description of a checkpoint of which nothing is known yet."""
    return {
        "checkpoint": str(folder),
        "kind": "unknown",
        "global_steps": None,
        "optimizer": None,
        "topology": None,
        "settings": None,
        "parameters": None,
        "elements": None,
        "bytes": {},
        "notes": [],
        "problems": list(problems),
    }


def _is_about(line: str, error: str) -> bool:
    """Whether an error names the file that a line of `verify` is about."""
    return line.partition(": ")[0] in error


def _found(source: Path, tag: str | None) -> Checkpoint:
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder. Give {CHECKPOINT_HELP}.")
    source = source.resolve() if source.name in ("", "..") else source  # its name becomes a tag
    if tag is None and _is_checkpoint(source):
        return open_checkpoint(source)
    universal_only = (source / LATEST_UNIVERSAL).is_file() and not (source / LATEST).is_file()
    checkpoint = resolve_tag(source, tag, latest=LATEST_UNIVERSAL if universal_only else LATEST)
    if checkpoint is None or not _is_checkpoint(checkpoint.folder):
        raise ValueError(f"there is no checkpoint in {source}. Give {CHECKPOINT_HELP}.")
    return checkpoint


def _is_checkpoint(folder: Path) -> bool:
    marks = (MANIFEST, INDEX, _UNIVERSAL)
    return any((folder / mark).exists() for mark in marks) or any(folder.glob("*_model_states.pt"))


def _kind(checkpoint: Checkpoint) -> str:
    if checkpoint.manifest is None and (checkpoint.folder / INDEX).is_file():
        return "portable"
    return "universal" if (checkpoint.folder / _UNIVERSAL).is_dir() else checkpoint.kind


def _open_deepspeed(folder: Path, trust: bool) -> DeepSpeedFiles:
    """The files of DeepSpeed's checkpoint. What DeepSpeed prints while it is imported goes to stderr.

    The other kinds of checkpoints are read without DeepSpeed, so it is imported here.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # files are read on the CPU, whatever the machine has
    try:
        with contextlib.redirect_stdout(sys.stderr):
            from ds_blockwise.hosts.deepspeed.checkpoint.read_files import DeepSpeedFiles
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "deepspeed":
            raise
        raise ImportError("DeepSpeed's checkpoints need deepspeed: pip install 'ds_blockwise[deepspeed]'") from error
    return DeepSpeedFiles(folder, trust=trust)


def _look_inside(folder: Path, described: CheckpointDescription, trust: bool) -> None:
    if described["kind"] == "portable":
        _in_portable(folder, described)
    elif described["kind"] == "universal":
        _in_universal(folder, described, trust)
    else:
        _in_deepspeed(folder, described, trust)


def _in_deepspeed(folder: Path, described: CheckpointDescription, trust: bool) -> None:
    try:
        files = _open_deepspeed(folder, trust)
    except NoRecordError as error:
        described["notes"].append(str(error))
        described["problems"] += _bad_files(folder, trust)
        return
    except NotReadError as error:
        described["notes"].append(f"its contents were only looked at for NaN: {error}")
        described["problems"] += _bad_files(folder, trust)
        return
    described["bytes"] |= files.content_bytes()
    described["notes"] += files.notes
    described["problems"] += files.bad_values()
    _add_facts(described, files.origin, files.record)


def _bad_files(folder: Path, trust: bool) -> list[str]:
    """Tensors with values that no sound run has, in files whose contents are known by their keys alone."""
    from ds_blockwise.hosts.deepspeed.checkpoint.tag_folder import load_file

    found = []
    for name in tensor_files_in(folder):
        try:
            loaded = load_file(folder / name, trust=trust)
        except CheckpointError as error:
            found.append(str(error))
            continue
        parts = loaded if isinstance(loaded, Mapping) else {}
        for part in ("module", "optimizer", "optimizer_state_dict"):
            for where, kind, tensor in _tensors_in(parts.get(part), part, "weights"):
                problem = bad_values("buffers" if part == "module" else kind, tensor)
                if problem is not None:
                    found.append(f"{name}: {where} {problem}")
    return found


def _tensors_in(value: object, where: str, kind: str) -> Iterator[tuple[str, str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield where, kind, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors_in(item, f"{where}[{key!r}]", "exp_avg_sq" if key == "exp_avg_sq" else kind)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors_in(item, f"{where}[{index}]", kind)


def _in_portable(folder: Path, described: CheckpointDescription) -> None:
    portable = Portable(folder)
    try:
        portable.training_state()
    except CheckpointError as error:
        described["problems"].append(str(error))
    described["problems"] += portable.problems(values=True)
    described["bytes"] |= {kind: portable.bytes_of(kind) for kind in KINDS if portable.tensors[kind]}
    _add_facts(described, portable.origin, portable.record)


def _in_universal(folder: Path, described: CheckpointDescription, trust: bool) -> None:
    params = sorted(path for path in (folder / _UNIVERSAL).iterdir() if path.is_dir())
    described["parameters"] = len(params)
    for path in params:
        found = [name for name in _UNIVERSAL_FILES if (path / name).is_file()]
        needed = _UNIVERSAL_FILES[:1] if len(found) < 2 else _UNIVERSAL_FILES  # a frozen parameter has no moments
        missing = [name for name in needed if name not in found]
        described["problems"] += [f"{_UNIVERSAL}/{path.name}/{name}: missing" for name in missing]
        for name in found:
            described["problems"] += _in_universal_file(path, name, trust)
    if not params:
        described["problems"].append(f"{_UNIVERSAL}: holds no parameters")
    for name in _UNIVERSAL_FILES:
        described["bytes"][name.removesuffix(".pt")] = sum(
            (path / name).stat().st_size for path in params if (path / name).is_file()
        )


def _in_universal_file(parameter: Path, name: str, trust: bool) -> list[str]:
    from ds_blockwise.hosts.deepspeed.checkpoint.tag_folder import load_file

    where = f"{_UNIVERSAL}/{parameter.name}/{name}"
    try:
        loaded = load_file(parameter / name, trust=trust)
    except CheckpointError as error:
        return [f"{where}: {error}"]
    value = loaded.get("param") if isinstance(loaded, Mapping) else loaded
    if not isinstance(value, torch.Tensor):
        return [f"{where}: holds no tensor"]
    problem = bad_values(name.removesuffix(".pt"), value)
    return [] if problem is None else [f"{where}: {problem}"]


def _add_facts(described: CheckpointDescription, origin: Origin, record: PortableRecord) -> None:
    described["global_steps"], described["topology"] = origin["global_steps"], origin["topology"]
    described["optimizer"], described["settings"] = record["optimizer"], record["settings"]
    described["parameters"] = len(record["parameters"])
    described["elements"] = sum(math.prod(packed["shape"]) for packed in record["parameters"].values())
