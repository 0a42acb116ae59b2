# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as folders: which ones are complete, which one is the newest, and how a new one is published.

A checkpoints folder holds one folder per tag and ``latest``, a file with the tag to resume from. A checkpoint is
written into ``<tag>.partial``; one rename makes it ``<tag>``, so a folder without that suffix is complete. This
file knows neither tensors nor processes.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from ds_blockwise.atomic_files import replace_text, sync
from ds_blockwise.checkpoint.given_files import read_text
from ds_blockwise.checkpoint.manifest import CheckpointError, Manifest, files_in, read_manifest, verify

LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"
_LONGEST_TAG = 4096  # bytes of the file latest
PARTIAL = ".partial"  # suffix of a checkpoint that is being written
REPLACED = ".replaced"  # suffix of an older one with the same tag, while the new one takes its place


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is complete as far as its file names and sizes tell.

    Attributes:
        folder: the tag folder.
        manifest: what its manifest says; None if another program wrote the checkpoint.
        notes: what the user should know about how it was found, a sentence each.
    """

    folder: Path
    manifest: Manifest | None
    notes: tuple[str, ...] = ()

    @property
    def tag(self) -> str:
        """Name of the tag folder as it is on disk (with ``.replaced`` if that is what was found)."""
        return self.folder.name

    @property
    def kind(self) -> str:
        """``deepspeed`` or ``portable``; a checkpoint without a manifest is DeepSpeed's."""
        return "deepspeed" if self.manifest is None else self.manifest["kind"]

    @property
    def global_steps(self) -> int | None:
        """Optimizer steps before it was saved; None without a manifest."""
        return None if self.manifest is None else self.manifest["global_steps"]


# --------------------------------------------------------------------------- finding them


def open_checkpoint(folder: Path) -> Checkpoint:
    """A tag folder as a `Checkpoint`; its files are not looked at.

    Raises:
        CheckpointError: there is no such folder, or its manifest is damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}. {_complete_ones(folder.parent)}")
    return Checkpoint(folder, read_manifest(folder))


def newest_complete(folder: Path) -> Checkpoint | None:
    """The complete checkpoint with the most steps in a checkpoints folder, or None.

    A checkpoint is complete if it is not being written and every listed file is there with its size. Checkpoints
    without a manifest are taken only if no other is complete, the latest by file time first. They must hold model
    state files, and these must be whole zip files.
    """
    found = [candidate for path in _tag_folders(folder) if (candidate := _complete(path)) is not None]
    return max(found, key=_age, default=None)


def resolve_tag(folder: Path, tag: str | None = None, *, latest: str = LATEST) -> Checkpoint | None:
    """The checkpoint that a tag, or the file ``latest``, names.

    If there is no such file, or it names nothing, the newest complete checkpoint is taken, and a note says so.

    Args:
        folder: a checkpoints folder.
        tag: default what ``latest`` says.
        latest: name of that file.

    Returns:
        None if no tag was asked for and there is nothing at all to load.

    Raises:
        CheckpointError: the tag does not exist, ``latest`` names none and nothing complete is there, or the manifest
            is damaged.
    """
    if tag is not None:
        return _named(folder, tag)
    path = folder / latest
    said = _read_latest(path)
    if said:
        checkpoint = _named_or_none(folder, said)
        if checkpoint is not None:
            return checkpoint
        what = f"{path} names {said!r}, which is not there"
    else:
        what = f"{path} is {'empty' if path.is_file() else 'missing'}"
    newest = newest_complete(folder)
    if newest is not None:
        steps = "" if newest.global_steps is None else f" ({newest.global_steps} steps)"
        note = f"{what}: using the newest complete checkpoint, {newest.folder}{steps}"
        return Checkpoint(newest.folder, newest.manifest, (note,))
    if said:
        raise CheckpointError(f"{what}, and there is no complete checkpoint in {folder}.{_unfinished(folder)}")
    return None


def partial_folders(folder: Path) -> list[Path]:
    """Folders that a save left behind when it was killed: unfinished ones, and replaced ones beside their successor."""
    return [
        path
        for path in _subfolders(folder)
        if path.name.endswith(PARTIAL)
        or (path.name.endswith(REPLACED) and (folder / path.name.removesuffix(REPLACED)).is_dir())
    ]


def _named(folder: Path, tag: str) -> Checkpoint:
    checkpoint = _named_or_none(folder, tag)
    if checkpoint is None:
        raise CheckpointError(f"there is no checkpoint {tag!r} in {folder}. {_complete_ones(folder)}")
    return checkpoint


def _named_or_none(folder: Path, tag: str) -> Checkpoint | None:
    path = folder / tag
    if path.is_dir():
        return open_checkpoint(path)
    older = folder / (tag + REPLACED)
    if not older.is_dir():
        return None
    note = f"{path} is missing: a save was stopped while it replaced that checkpoint; using the older {older}"
    return Checkpoint(older, read_manifest(older), (note,))


def _complete(folder: Path) -> Checkpoint | None:
    try:
        checkpoint = open_checkpoint(folder)
        if checkpoint.manifest is None and not any(name.endswith("model_states.pt") for name in files_in(folder)):
            return None
        return None if verify(folder, contents=False) else checkpoint
    except (CheckpointError, OSError):
        return None  # an error if the user named this tag; here it is only not a candidate


def _age(checkpoint: Checkpoint) -> tuple[bool, int, float]:
    time = max((path.stat().st_mtime for path in checkpoint.folder.iterdir()), default=0.0)
    return checkpoint.manifest is not None, checkpoint.global_steps or 0, time


def _tag_folders(folder: Path) -> list[Path]:
    left = partial_folders(folder)
    return [path for path in _subfolders(folder) if path not in left]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _complete_ones(folder: Path) -> str:
    found = [path.name for path in _tag_folders(folder) if _complete(path) is not None]
    return f"Complete checkpoints there: {', '.join(found) if found else 'none'}."


def _unfinished(folder: Path) -> str:
    left = partial_folders(folder)
    return f" Unfinished: {', '.join(path.name for path in left)}." if left else ""


def _read_latest(path: Path) -> str:
    try:
        return read_text(path, _LONGEST_TAG).strip()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Write the tag to load into it.") from error


# -------------------------------------------------------------------------- writing them


def start_partial(folder: Path, tag: str) -> Path:
    """Make an empty ``<tag>.partial``, tidying up what an earlier save of the same tag left.

    Raises:
        OSError: the folder cannot be made.
    """
    _restore_replaced(folder / tag)
    partial = folder / (tag + PARTIAL)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path) -> Path:
    """Give a finished ``<tag>.partial`` its name; an older checkpoint of that tag is deleted afterwards.

    Raises:
        OSError: it cannot be renamed.
    """
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    older = final.with_name(final.name + REPLACED)
    sync(partial)
    if final.exists():
        if older.exists():
            shutil.rmtree(older)
        final.rename(older)
    partial.rename(final)
    sync(final.parent)
    if older.exists():
        shutil.rmtree(older)
    return final


def write_latest(folder: Path, tag: str, name: str = LATEST) -> None:
    """Let ``latest`` name a tag; a reader sees the old text or the new one, never a part.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    replace_text(folder / name, tag)


def remove_unfinished(folder: Path) -> list[str]:
    """Delete what a killed save left behind and put back a checkpoint that it had moved aside.

    No save may be under way in that folder.

    Returns:
        A sentence for each folder that was touched.
    """
    notes = []
    for path in _subfolders(folder):
        if path.name.endswith(REPLACED) and _restore_replaced(path.with_name(path.name.removesuffix(REPLACED))):
            notes.append(f"{path} was put back: a save was stopped while it replaced that checkpoint")
    for path in partial_folders(folder):
        shutil.rmtree(path)
        notes.append(f"{path} was removed: a save was stopped before it was complete")
    return notes


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; one whose deletion is interrupted counts as unfinished, not as damaged."""
    doomed = folder.with_name(folder.name + PARTIAL)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _restore_replaced(final: Path) -> bool:
    older = final.with_name(final.name + REPLACED)
    if final.exists() or not older.is_dir():
        return False
    older.rename(final)
    return True
