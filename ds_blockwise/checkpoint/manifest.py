# SPDX-License-Identifier: Apache-2.0
"""The manifest of a checkpoint: every file in it with its size and a sum, and what must fit to load it.

A checkpoint that another program wrote has no manifest. Then only the sums inside torch's own zip files are checked.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias, TypedDict, TypeVar

from ds_blockwise.atomic_files import SUMS, replace_text, sum_of, sync
from ds_blockwise.checkpoint.given_files import read_json, why_not_inside, why_not_readable
from ds_blockwise.checkpoint.record_types import Settings
from ds_blockwise.checkpoint.typed_data import typed

FORMAT = 2
"""Format 1 had ``"sha256": digits`` in place of ``"sum": "sha256:digits"``; it is read too."""
MANIFEST = "ds_blockwise.json"
KINDS = ("deepspeed", "portable")
_OWN_SUM = "manifest_sha256"  # of the manifest's other entries: a changed bit in it must not go unnoticed
_REQUIRED = ("format", "kind", "tag", "global_steps", "topology", "settings", "files")
_T = TypeVar("_T")
_ANOTHER = "Restore the file from a copy, or load another checkpoint by its tag."


Topology: TypeAlias = Mapping[str, int | str]
"""Numbers of ranks, ZeRO stage, precision and what else must fit for files to be loaded as they are."""


class FileFacts(TypedDict):
    """What a manifest says about one file: its size in bytes, and a sum of its contents as `sum_of` gives it."""

    bytes: int
    sum: str


class Manifest(TypedDict):
    """A manifest as it is read from its file.

    Attributes:
        format: `FORMAT` of the version that wrote it.
        kind: ``deepspeed`` or ``portable``.
        tag: name of the tag folder.
        global_steps: optimizer steps before it was saved.
        topology: of the run that saved it.
        settings: of the optimizer; None if it is not one of ours.
        files: every file but the manifest, by its name relative to the tag folder, with forward slashes.
    """

    format: int
    kind: str
    tag: str
    global_steps: int
    topology: Topology
    settings: Settings | None
    files: dict[str, FileFacts]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the text names the files, the cause and what to do."""


class ReplacedError(CheckpointError):
    """A save replaced or removed the checkpoint while it was read: what was read may be of two versions."""


class NoRecordError(CheckpointError):
    """The checkpoint was not saved by one of our optimizers."""


class NotReadError(ValueError):
    """A kind of checkpoint whose contents are not read (a pipeline's, one with experts); the text says which."""


def read_version(folder: Path) -> tuple[Manifest | None, str]:
    """The manifest of a tag folder, and what tells this version from the next one of that tag.

    Returns:
        The manifest or None, and its sum; without a manifest, the number of the folder on its file system.

    Raises:
        CheckpointError: the manifest is damaged.
        ReplacedError: a save is replacing the folder at this moment.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        return manifest, _digest(manifest)
    try:
        found = folder.stat()
    except FileNotFoundError as error:
        raise _replaced(folder) from error
    if (folder / MANIFEST).exists():  # it was not there between two renames of a save
        raise _replaced(folder)
    return None, f"{found.st_dev}:{found.st_ino}"


def check_version(folder: Path, version: str) -> None:
    """Raise if a tag folder is no longer of the version that it was.

    Raises:
        ReplacedError: it was replaced or removed.
    """
    try:
        _, now = read_version(folder)
    except CheckpointError as error:
        raise _replaced(folder) from error
    if now != version:
        raise _replaced(folder)


@contextmanager
def of_one_version(folder: Path, version: str) -> Iterator[None]:
    """What is read in here is of that version of a tag folder; an error that a replacement caused says so.

    Raises:
        ReplacedError: the folder was replaced or removed.
    """
    try:
        yield
    except (CheckpointError, OSError):
        check_version(folder, version)
        raise
    check_version(folder, version)


def _replaced(folder: Path) -> ReplacedError:
    return ReplacedError(
        f"{folder} is being replaced or removed by a job that saves there. Read it when that save is over, or read "
        f"another checkpoint by its tag."
    )


def once_more(read: Callable[[], _T]) -> _T:
    """What ``read`` returns; it is called again if a save replaced the checkpoint meanwhile.

    Raises:
        ReplacedError: it was replaced the second time too.
    """
    try:
        return read()
    except ReplacedError:
        return read()


def sums_of(folder: Path, names: Iterable[str], known: Mapping[str, FileFacts] | None = None) -> dict[str, FileFacts]:
    """Sizes and sums of files as a manifest lists them; the files are on the disk when this returns.

    Args:
        folder: a tag folder.
        names: relative to it, with forward slashes.
        known: of files that were summed while they were written; these are not read again.

    Raises:
        OSError: a file cannot be read, or has not the size that is known of it.
    """
    sums: dict[str, FileFacts] = {}
    for name in names:
        path = folder / name
        sync(path)
        size = path.stat().st_size
        found = (known or {}).get(name)
        if found is not None and found["bytes"] != size:
            raise OSError(f"{path} has {size} bytes, {found['bytes']} were written")
        sums[name] = found or {"bytes": size, "sum": sum_of(path)}
    return sums


def tensor_files_in(folder: Path) -> list[str]:
    """Those of `files_in` that hold tensors; DeepSpeed and we look for more of them than a manifest may list."""
    return [name for name in files_in(folder) if name.endswith((".pt", ".safetensors"))]


def files_in(folder: Path) -> list[str]:
    """Names of all files below a tag folder but the manifest, relative to it, with forward slashes, sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def write_manifest(
    folder: Path,
    *,
    kind: str,
    tag: str,
    global_steps: int,
    topology: Topology,
    settings: Mapping[str, object] | None,
    files: Mapping[str, FileFacts],
) -> None:
    """Describe a checkpoint in its own folder; the last thing written before `publish`.

    Args:
        folder: the folder that holds the files, usually ``<tag>.partial``.
        kind: ``deepspeed`` or ``portable``.
        tag: final name of the folder.
        global_steps: optimizer steps so far.
        topology: numbers of ranks and what else must fit for the files to be loaded as they are.
        settings: of the optimizer; None if it is not one of ours.
        files: what `sums_of` returned for all of them.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    described = {
        "format": FORMAT,
        "kind": kind,
        "tag": tag,
        "global_steps": global_steps,
        "topology": dict(topology),
        "settings": None if settings is None else dict(settings),
        "files": {name: dict(files[name]) for name in sorted(files)},
    }
    manifest = json.loads(json.dumps(described))  # what a reader will see, so that the sum is of that
    manifest[_OWN_SUM] = _digest(manifest)
    replace_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a tag folder, or None if it has none.

    Raises:
        CheckpointError: it is damaged, or of a later format.
    """
    path = folder / MANIFEST
    try:
        said = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. {_ANOTHER}") from error
    if not isinstance(said, dict) or not all(key in said for key in _REQUIRED):
        raise CheckpointError(f"{path} is not a whole manifest: it must have {', '.join(_REQUIRED)}. {_ANOTHER}")
    if said["format"] not in (1, FORMAT):
        raise CheckpointError(
            f"{path} is of format {said['format']!r}; this version of ds_blockwise reads formats 1 and {FORMAT}. "
            f"Install the version that wrote it or a later one."
        )
    if not _has_own_sum(said):
        raise CheckpointError(f"{path} has changed since it was written (its own sum differs). {_ANOTHER}")
    if said["format"] == 1:
        _name_the_sums(said["files"])
    try:
        manifest = typed(said, Manifest, MANIFEST)
    except ValueError as error:
        raise CheckpointError(f"{path} is not a manifest that ds_blockwise wrote: {error}. {_ANOTHER}") from error
    if manifest["kind"] not in KINDS:
        raise CheckpointError(f"{path} has the kind {manifest['kind']!r}, allowed are {', '.join(KINDS)}. {_ANOTHER}")
    return manifest


def _name_the_sums(files: object) -> None:
    """Bring the files of a manifest of format 1 into today's form; what is none stays as it is, and is refused."""
    for facts in files.values() if isinstance(files, dict) else ():
        if isinstance(facts, dict) and "sha256" in facts:
            facts["sum"] = f"sha256:{facts.pop('sha256')}"


def _has_own_sum(manifest: Mapping[str, object]) -> bool:
    try:
        return _digest(manifest) == manifest.get(_OWN_SUM)
    except RecursionError:  # nested more deeply than anything that we wrote
        return False


def _digest(manifest: Mapping[str, object]) -> str:
    rest = {key: value for key, value in manifest.items() if key != _OWN_SUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def listed_files(folder: Path) -> list[str]:
    """Names of the files that `verify` looks at, the largest first: deal them out to share the work.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        sizes = {name: facts["bytes"] for name, facts in manifest["files"].items()}
    else:
        sizes = {name: (folder / name).stat().st_size for name in tensor_files_in(folder)}
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def verify(
    folder: Path, names: Iterable[str] | None = None, *, contents: bool = True, version: str | None = None
) -> list[str]:
    """Compare the files of a tag folder with its manifest.

    Without a manifest the sums inside torch's own (zip) files are checked instead; which files there should be is then
    not known.

    Args:
        folder: the tag folder.
        names: the files to look at; default all.
        contents: whether to read them; False compares names and sizes only.
        version: that it must be (`read_version`); default the one that is found.

    Returns:
        A line for each missing, cut or changed file, beginning with its name; empty if all is well.

    Raises:
        CheckpointError: the manifest itself is damaged.
        ReplacedError: a save replaced or removed the checkpoint meanwhile.
    """
    manifest, found = read_version(folder)
    problems = []
    with of_one_version(folder, version or found):
        if manifest is not None:
            problems += _listing_problems(folder, manifest)
        for name in listed_files(folder) if names is None else names:
            problem = (
                _structural_problem(folder, name, contents)
                if manifest is None
                else _listed_problem(folder, name, manifest["files"].get(name), contents)
            )
            if problem is not None:
                problems.append(f"{name}: {problem}")
    return problems


def _listing_problems(folder: Path, manifest: Manifest) -> list[str]:
    """What the list of files says by itself: one without tensors is no checkpoint, and no file may be added."""
    listed = manifest["files"]
    if not any(name.endswith((".pt", ".safetensors")) for name in listed):
        return [f"{MANIFEST}: lists no file with tensors, so it is not the manifest of a whole checkpoint"]
    added = [name for name in tensor_files_in(folder) if name not in listed]
    return [f"{name}: not listed in {MANIFEST}, it was put there later" for name in added]


def _listed_problem(folder: Path, name: str, facts: FileFacts | None, contents: bool) -> str | None:
    if facts is None:
        return f"not listed in {MANIFEST}"
    path = folder / name
    problem = why_not_inside(folder, name) or why_not_readable(path)
    if problem is not None:
        return problem
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            return f"{size} bytes instead of {facts['bytes']}, it was cut or overwritten"
        return _changed(path, facts["sum"]) if contents else None
    except OSError as error:
        return f"cannot be read: {error}"


def _changed(path: Path, written: str) -> str | None:
    name, _, digits = written.partition(":")
    if name not in SUMS:
        known = f"known are {', '.join(SUMS)}"
        return f'its sum is of the kind {name!r}, {known}: pip install xxhash, or load with "verify": "size"'
    found = sum_of(path, name).partition(":")[2]
    return (
        None if found == digits else f"its contents have changed ({name} {found[:12]}..., {digits[:12]}... was written)"
    )


def _structural_problem(folder: Path, name: str, contents: bool) -> str | None:
    path = folder / name
    problem = why_not_inside(folder, name) or why_not_readable(path)
    if problem is not None:
        return problem
    if not _is_zip_file(name):
        return None  # safetensors has no sums
    try:
        if path.stat().st_size == 0:
            return "empty"
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                # a zip file that lost its end, unlike torch's older format, which has no sums to check
                return "cut off" if file.read(2) == b"PK" else None
        if contents:
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    return "compressed, which torch never writes"
                bad = archive.testzip()
            return None if bad is None else f"its part {bad} has changed (CRC-32 differs)"
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, EOFError) as error:
        # the last three: a flipped bit in a header can ask for a password, a compression or a name that cannot be had
        return f"cannot be read: {error}"
    return None


def _is_zip_file(name: str) -> bool:
    return name.endswith(".pt")
