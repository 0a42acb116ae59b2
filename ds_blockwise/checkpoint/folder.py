# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as folders: which ones are complete, which one is the newest, and how a new one is published.

A checkpoints folder holds one folder per tag and ``latest``, a file with the tag to resume from. A checkpoint is
written into ``<tag>.<mark>.partial``, with a mark that no other process has (`atomic_files.own_mark`); one rename makes
it ``<tag>``, so a folder without that suffix is complete. This file knows neither tensors nor processes.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import logging
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from ds_blockwise.atomic_files import marked, own_mark, read_small_text, replace_text, sync
from ds_blockwise.checkpoint.folder_rules.lock import LOCK, is_exclusive
from ds_blockwise.checkpoint.folder_rules.tags import LATEST, LATEST_UNIVERSAL, PARTIAL, REPLACED, checked_tag
from ds_blockwise.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    ReplacedError,
    files_in,
    once_more,
    read_manifest,
    read_version,
    verify,
)

__all__ = ["LATEST", "LATEST_UNIVERSAL", "PARTIAL", "REPLACED"]  # they are read as this file's own

logger = logging.getLogger(__name__)

_LATEST_BYTES = 4096  # that the file may have; a tag has at most 190
_LOOKS = 5  # for a checkpoint that a save moves aside and replaces at the same moment
_RENAMES = 100  # attempts to publish where another job publishes the same tag


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is complete as far as its file names and sizes tell.

    Attributes:
        folder: the tag folder.
        manifest: what its manifest says; None if another program wrote the checkpoint.
        version: what tells it from the next one of its tag (`manifest.read_version`).
        notes: what the user should know about how it was found, a sentence each.
    """

    folder: Path
    manifest: Manifest | None
    version: str
    notes: tuple[str, ...] = ()

    @property
    def tag(self) -> str:
        """Name of the tag folder as it is on disk (it ends in ``.replaced`` if that is what was found)."""
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


def checkpoints_folder(name: str, given: object) -> Path:
    """The folder that an argument names.

    Raises:
        ValueError: it is empty, or no path.
    """
    if not given or not isinstance(given, (str, os.PathLike)):
        raise ValueError(f"{name} must name a folder, got {given!r}")
    return Path(given)


def open_checkpoint(folder: Path) -> Checkpoint:
    """A tag folder as a `Checkpoint`; its files are not looked at.

    Raises:
        CheckpointError: there is no such folder, or its manifest is damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}. {_complete_ones(folder.parent)}")
    return Checkpoint(folder, *once_more(lambda: read_version(folder)))


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
        ValueError: the tag breaks the rule for tags.
        CheckpointError: the tag does not exist, ``latest`` names none and nothing complete is there, the manifest is
            damaged, or the folder is a checkpoint itself.
    """
    if tag is not None:
        return _named(folder, checked_tag(tag))
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
        return replace(newest, notes=(note,))
    if said:
        raise CheckpointError(f"{what}, and there is no complete checkpoint in {folder}.{_unfinished(folder)}")
    if (folder / MANIFEST).is_file() or any(folder.glob("*model_states.pt")):
        raise CheckpointError(
            f"{folder} is a checkpoint itself, not a folder of checkpoints. Load from {str(folder.parent)!r} with "
            f"tag={folder.name!r}."
        )
    return None


def partial_folders(folder: Path) -> list[Path]:
    """Folders that a save left behind when it was killed: unfinished ones, and replaced ones beside their successor."""
    return [
        path
        for path in _subfolders(folder)
        if (path.name.endswith(PARTIAL) or (path.name.endswith(REPLACED) and (folder / _tag_of(path)).is_dir()))
        and not _is_finished(path)
    ]


def _is_finished(path: Path) -> bool:
    """Whether it is a whole checkpoint of exactly that name; earlier versions allowed such tags."""
    try:
        manifest = read_manifest(path) if path.is_dir() else None
    except CheckpointError:
        return False
    return manifest is not None and manifest["tag"] == path.name


def _tag_of(temporary: Path) -> str:
    """The tag of a folder that is being written or replaced."""
    return marked(temporary.name.removesuffix(PARTIAL).removesuffix(REPLACED)).name


def _of_tag(folder: Path, tag: str, suffix: str) -> list[Path]:
    """What saves of one tag left with that suffix."""
    named = folder.glob(f"{glob.escape(tag)}.*") if folder.is_dir() else ()
    found = sorted(path for path in named if path.name.endswith(suffix) and _tag_of(path) == tag)
    return [path for path in found if not _is_finished(path)]


def _named(folder: Path, tag: str) -> Checkpoint:
    checkpoint = _named_or_none(folder, tag)
    if checkpoint is None:
        raise CheckpointError(f"there is no checkpoint {tag!r} in {folder}. {_complete_ones(folder)}")
    return checkpoint


def _named_or_none(folder: Path, tag: str) -> Checkpoint | None:
    path = folder / tag
    for _ in range(_LOOKS):
        for found in (path, *_of_tag(folder, tag, REPLACED)):
            with contextlib.suppress(ReplacedError):  # look again
                if found.is_dir():
                    note = f"{path} is missing: a save was stopped while it replaced that checkpoint; using the older "
                    return Checkpoint(found, *read_version(found), () if found == path else (f"{note}{found}",))
    return None


def _complete(folder: Path) -> Checkpoint | None:
    try:
        checkpoint = open_checkpoint(folder)
        if checkpoint.manifest is None and not any(name.endswith("model_states.pt") for name in files_in(folder)):
            return None
        return None if once_more(lambda: verify(folder, contents=False)) else checkpoint
    except (CheckpointError, OSError):
        return None  # an error if the user named this tag; here it is only not a candidate


def _age(checkpoint: Checkpoint) -> tuple[bool, int, float]:
    try:
        time = max((path.stat().st_mtime for path in checkpoint.folder.iterdir()), default=0.0)
    except FileNotFoundError:  # it is being replaced
        time = 0.0
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
        said = read_small_text(path, _LATEST_BYTES).strip()
        return said and checked_tag(said)
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        why = str(error).rstrip(".")
        raise CheckpointError(f"{path} names no checkpoint: {why}. Write the tag to load into it.") from error


# -------------------------------------------------------------------------- writing them


def start_partial(folder: Path, tag: str, mark: str | None = None) -> Path:
    """Make an empty folder to write a checkpoint into, tidying up what an earlier save of the same tag left.

    Args:
        folder: the checkpoints folder.
        tag: of the checkpoint, checked.
        mark: default this process's own.

    Raises:
        ValueError: what has the tag's name is no checkpoint, and would be replaced.
        OSError: the folder cannot be made.
    """
    _refuse_to_replace(folder / tag)
    _restore_replaced(folder, tag)
    for left in _of_tag(folder, tag, PARTIAL):
        if _is_abandoned(left):
            _delete(left)
    partial = folder / f"{tag}.{mark or own_mark()}{PARTIAL}"
    partial.mkdir(parents=True)
    return partial


def _refuse_to_replace(final: Path) -> None:
    """A user's own folder or file must not be taken for an older version of the checkpoint."""
    try:
        names = os.listdir(final)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        what = "no folder"
    else:
        if not names or MANIFEST in names or any(name.endswith("states.pt") for name in names):
            return
        what = "a folder, but no checkpoint"
    raise ValueError(f"{final} is there and {what}: it would be replaced. Give another tag, or move it away.")


def _is_abandoned(path: Path) -> bool:
    """Whether no process writes in what a save left; a folder that another host made, only if we hold the lock."""
    return is_exclusive(path.parent) or not marked(path.name.removesuffix(PARTIAL).removesuffix(REPLACED)).may_be_in_use


def publish(partial: Path) -> Path:
    """Give a finished checkpoint its name; an older one of that tag is deleted afterwards.

    Raises:
        OSError: it cannot be renamed.
    """
    final = partial.with_name(_tag_of(partial))
    sync(partial)
    for _ in range(_RENAMES):
        with contextlib.suppress(FileNotFoundError):  # there is none, or another job has just moved it
            final.rename(final.with_name(f"{final.name}.{own_mark()}{REPLACED}"))
        try:
            partial.rename(final)
            break
        except OSError as error:  # without locks another job can have published the same tag in between
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    else:
        raise OSError(f"{final} is replaced again and again by another job")
    sync(final.parent)
    for older in _of_tag(final.parent, final.name, REPLACED):
        if _is_abandoned(older):
            _delete_or_warn(older, final)
    return final


def _delete(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # without locks another job may delete it too
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)


def _delete_or_warn(older: Path, final: Path) -> None:
    """The new checkpoint is complete: that an old one cannot be deleted must not look as if it were not."""
    try:
        with contextlib.suppress(FileNotFoundError):  # without locks another job may delete it too
            remove_checkpoint(older, final.name)
    except OSError as error:
        logger.warning("%s, which was replaced, could not be deleted: %s", older, error)


def write_latest(folder: Path, tag: str, name: str = LATEST) -> None:
    """Let ``latest`` name a tag; a reader sees the old text or the new one, never a part.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    replace_text(folder / name, tag)


def remove_unfinished(folder: Path) -> list[str]:
    """Delete what a killed save left behind and put back a checkpoint that it had moved aside.

    Call it with the folder's lock (`lock.hold`): else what another host may be writing stays.

    Returns:
        A sentence for each folder that was touched.
    """
    notes = []
    for path in _subfolders(folder):
        if path.name.endswith(REPLACED) and _restore_replaced(folder, _tag_of(path)):
            notes.append(f"{path} was put back: a save was stopped while it replaced that checkpoint")
    latest = [path for name in (LATEST, LATEST_UNIVERSAL) for path in _of_tag(folder, name, PARTIAL)]
    for path in (*partial_folders(folder), *latest):
        if _is_abandoned(path):
            _delete(path)
            notes.append(f"{path} was removed: a save was stopped before it was complete")
        else:
            notes.append(f"{path} was left: another process may be writing it")
    return notes


def remove_all(folder: Path) -> None:
    """Delete everything in a checkpoints folder but its lock."""
    for path in folder.iterdir():
        if path.name != LOCK:
            _delete(path)


def remove_checkpoint(folder: Path, tag: str | None = None) -> None:
    """Delete a checkpoint; to a reader it is whole or gone, and if the deletion is interrupted it is unfinished.

    Args:
        folder: the checkpoint.
        tag: default the folder's name.
    """
    doomed = folder.with_name(f"{tag or folder.name}.{own_mark()}{PARTIAL}")
    folder.rename(doomed)
    _delete(doomed)


def _restore_replaced(folder: Path, tag: str) -> bool:
    if os.path.lexists(folder / tag):
        return False
    for older in _of_tag(folder, tag, REPLACED):
        if _is_abandoned(older):
            older.rename(folder / tag)
            return True
    return False
