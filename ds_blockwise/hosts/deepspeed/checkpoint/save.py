# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's save_checkpoint, made safe against crashes and full disks.

DeepSpeed writes ``latest`` in place, and a rank whose write fails leaves the others waiting. Here all files go to
``<tag>.<mark>.partial``, a manifest with their sums follows, one rename makes the checkpoint visible, and only then
``latest`` moves. What fails on one rank is raised on all. The engine holds the folder's lock from its first save until
it saves elsewhere or ends.

While DeepSpeed saves, `RecordingEngine` stands in the place of the engine's checkpoint engine. Every file of tensors
goes through its ``save``: model, optimizer and expert files and the layers of a pipeline. That seam cannot carry the
rest (DeepSpeed 0.19.8, ``runtime/engine.py``):

- The engine makes every path from the tag by itself (4906-4909), and NVMe swap files (4941-4949) and the recovery
  scripts (5530-5537) are copied past the checkpoint engine. So the unfinished folder's name is the tag that DeepSpeed
  is given, and no path is rewritten.
- ``commit`` (4958-4959) is no place for the ranks to meet: a rank that raises before it, while it collects a state
  dict or copies a script, never calls it. So the manifest and the rename follow after ``save_checkpoint``.
- ``latest`` is written in place by rank 0 alone, after ``commit`` (4960-4962). So DeepSpeed is told not to write it.
- Client state, rank states and the settings in the manifest do not reach the checkpoint engine.
"""

from __future__ import annotations

import errno
import functools
import io
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, finalize

import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO

from ds_blockwise.atomic_files import own_mark
from ds_blockwise.checkpoint import folder as files
from ds_blockwise.checkpoint.folder_rules.lock import FolderInUseError, hold, let_go
from ds_blockwise.checkpoint.folder_rules.tags import PARTIAL, agreed_tag, has_patterns
from ds_blockwise.checkpoint.given_files import load_torch_file
from ds_blockwise.checkpoint.manifest import CheckpointError, FileFacts, files_in, sums_of, write_manifest
from ds_blockwise.checkpoint.record import KEY, settings_of
from ds_blockwise.hosts.deepspeed.checkpoint.recording import recorded_by
from ds_blockwise.hosts.deepspeed.checkpoint.tag_folder import NOT_OF_THE_USER, OwnEntry
from ds_blockwise.hosts.deepspeed.checkpoint.topology import leads, node_of, tag_validation, topology_of
from ds_blockwise.hosts.deepspeed.checkpoint.universal import universal_checkpoint_info
from ds_blockwise.hosts.deepspeed.engine import Engine
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.parallel.agree import gather, is_first_rank, together

logger = logging.getLogger(__name__)

_WARNED: WeakSet[Engine] = WeakSet()
_HELD: WeakKeyDictionary[Engine, finalize[[Path], Engine]] = WeakKeyDictionary()  # gives back its folder's lock
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SIGHT_S = 5.0  # how long a folder that another rank made may take to appear


def save_checkpoint(
    engine: Engine,
    save_dir: str | Path,
    tag: str | int | None = None,
    client_state: Mapping[str, object] | None = None,
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
    rank_state: object = None,
) -> bool:
    """Save a checkpoint that is either whole or not there; a collective over all ranks.

    Args:
        engine: any ``DeepSpeedEngine``.
        save_dir: the checkpoints folder; made if it is missing.
        tag: name of the checkpoint, by the rule of `folder_rules.tags`; default ``global_step<N>``.
        client_state: what the caller wants back from `load_checkpoint`.
        save_latest: let ``latest`` name this checkpoint afterwards.
        exclude_frozen_parameters: as DeepSpeed's.
        rank_state: plain containers and tensors of this rank alone (random states, say); see `load_rank_state`.

    Returns:
        True.

    Raises:
        CheckpointError: on every rank, with rank, file, cause and free space: something could not be written. The
            unfinished folder is gone; ``latest`` and all other checkpoints are as they were.
        FolderInUseError: on every rank, before anything is written: another job saves in that folder.
        ValueError: on every rank, before anything is written: the tag breaks the rule, or the ranks' tags differ, or it
            is the name of something that is no checkpoint. ``save_dir`` is empty, or ``client_state`` has a key of
            DeepSpeed's own or ``ds_blockwise``.
        TypeError: the tag is neither text nor an integer.
    """
    state = together(lambda: _checked_state(save_dir, client_state))
    own, info = _own_entries(engine)
    state |= {KEY: own} if UNIVERSAL_CHECKPOINT_INFO in state else {KEY: own, **info}
    given = f"global_step{engine.global_steps}" if tag is None else tag
    agreed = agreed_tag(given, tag_validation(engine))
    assert agreed is not None
    original = functools.partial(
        type(engine).save_checkpoint,
        engine,
        str(save_dir),
        client_state=state,
        exclude_frozen_parameters=exclude_frozen_parameters,
    )
    if engine.checkpoint_engine.is_decoupled():
        _warn_decoupled(engine)
        return original(tag=agreed, save_latest=save_latest)
    if is_first_rank() and has_patterns(save_dir):
        logger.warning("DeepSpeed cannot load from a path with * ? [ in it: rename %s before you load", save_dir)
    save = _Save(engine, Path(save_dir), agreed, gather(own_mark())[0])
    save.start()
    with recorded_by(engine, save):
        try:
            original(tag=save.partial.name, save_latest=False)
        except Exception as error:  # reported by `finish` on all ranks
            save.record("DeepSpeed's save_checkpoint", error)
            _join_the_others(engine)
    if rank_state is not None:
        save.write_rank_state(rank_state)
    save.finish(own, save_latest)
    return True


def _checked_state(save_dir: str | Path, client_state: object) -> dict[Any, object]:
    """A copy of the client state, without keys by which it would replace what DeepSpeed saves."""
    files.checkpoints_folder("save_dir", save_dir)
    if not isinstance(client_state, Mapping | None):
        raise ValueError(f"client_state must be a mapping, got a {type(client_state).__name__}")
    state = dict(client_state or {})
    taken = sorted(NOT_OF_THE_USER - {UNIVERSAL_CHECKPOINT_INFO} & state.keys())
    if taken:
        raise ValueError(
            f"client_state has the key {', '.join(map(repr, taken))}, under which the engine's own state is saved and "
            f"which no load gives back. Rename it."
        )
    return state


def _own_entries(engine: Engine) -> tuple[OwnEntry, dict[str, object]]:
    """Our entry of the client state, and the one that DeepSpeed's universal converter needs."""
    optimizer = engine.basic_optimizer
    ours = optimizer if isinstance(optimizer, BlockwiseOptimizer) else None
    # DeepSpeed keeps that key for itself when there are experts
    info = None if engine.has_moe_layers else universal_checkpoint_info(engine)
    entries: dict[str, object] = {} if info is None else {UNIVERSAL_CHECKPOINT_INFO: info}
    own: OwnEntry = {
        "settings": None if ours is None else settings_of(ours),
        "topology": topology_of(engine),
        "added": list(entries),
    }
    if ours is not None:
        own["second_moment_of"] = ours.second_moment_of
    return own, entries


def _warn_decoupled(engine: Engine) -> None:
    if is_first_rank() and engine not in _WARNED:
        _WARNED.add(engine)
        logger.warning(
            "%s writes checkpoints while training goes on: they get no manifest and no protection against a crash or "
            "a full disk. Remove its section from the JSON to have both.",
            type(engine.checkpoint_engine).__name__,
        )


def _join_the_others(engine: Engine) -> None:
    """Enter the collectives that the other ranks wait in, after this rank's save_checkpoint raised.

    It can raise while it collects a state dict or copies scripts and swap files. What follows these on every rank
    (``runtime/engine.py`` 4953-4964) is the gathering of ZeRO-3's small parameters, and a barrier.
    """
    epilogue = getattr(engine.optimizer, "checkpoint_event_epilogue", None)
    if epilogue is not None:
        epilogue()
    dist.barrier()


@dataclass
class _Save:
    """One save under way.

    Attributes:
        engine: the engine that saves.
        folder: the checkpoints folder.
        tag: final name.
        mark: of the unfinished folder; one on all nodes, as DeepSpeed compares the ranks' tags.
        problems: what this rank could not write.
        written: names of the files that this rank wrote, relative to the partial folder.
        known: what is known of some of them since they were written.
        sums: size and digest of the files that this rank sums.
    """

    engine: Engine
    folder: Path
    tag: str
    mark: str
    holds: bool = False
    problems: list[str] = field(default_factory=list)
    written: set[str] = field(default_factory=set)
    known: dict[str, FileFacts] = field(default_factory=dict)
    sums: dict[str, FileFacts] = field(default_factory=dict)

    @property
    def partial(self) -> Path:
        return self.folder / f"{self.tag}.{self.mark}{PARTIAL}"

    @property
    def leads(self) -> bool:
        """Whether this rank makes, renames and removes folders."""
        return leads(self.engine)

    def record(self, what: str, error: Exception) -> None:
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if getattr(error, "errno", None) in _NO_ROOM or (
            isinstance(error, RuntimeError) and "inline_container" in text
        ):
            text = f"not all of it could be written (disk full, quota or limit of file sizes): {text}"
        self.problems.append(f"{what}: {text} ({_free(self.folder)} free)")

    def attempt(self, action: Callable[[], object], what: str) -> None:
        try:
            action()
        except Exception as error:  # reported on all ranks by the next `_raise_if_any`
            self.record(what, error)

    def start(self) -> None:
        """Take the folder and make the unfinished one, before anything is collected or written."""
        refusal: FolderInUseError | ValueError | None = None
        if self.leads:
            try:
                hold(self.folder)
                self.holds = True
                files.start_partial(self.folder, self.tag, self.mark)
            except (FolderInUseError, ValueError) as error:  # raised on all ranks
                refusal = error
            except Exception as error:  # likewise
                self.record(str(self.folder), error)
        said = gather((self.problems, refusal))
        refused = next((error for _, error in said if error is not None), None)
        if refused is not None:
            self._give_back()
            raise type(refused)(str(refused))
        self._raise_if_any([problems for problems, _ in said])
        if not self._in_sight():
            self.problems.append(
                f"{self.partial}, which another rank has made, is not there. All ranks must save into one folder; if "
                f'each node has its own disk, write "checkpoint": {{"use_node_local_storage": true}} into the JSON'
            )
        self._raise_if_any(gather(self.problems))

    def _in_sight(self) -> bool:
        deadline = time.monotonic() + _SIGHT_S
        while not os.path.isdir(self.partial):  # also False where this rank may not look
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def _give_back(self) -> None:
        """Undo `hold`; what an earlier save of this engine holds stays."""
        if self.holds:
            self.holds = False
            let_go(self.folder)

    def _keep(self) -> None:
        """Hold the folder on, and no longer the one that this engine saved into before."""
        if self.holds:
            before = _HELD.pop(self.engine, None)
            _HELD[self.engine] = finalize(self.engine, let_go, self.folder.resolve())
            if before is not None:
                before()

    def wrote(self, path: Path, facts: FileFacts | None = None) -> None:
        if path.is_relative_to(self.partial):
            name = path.relative_to(self.partial).as_posix()
            self.written.add(name)
            self.known.pop(name, None)
            if facts is not None:
                self.known[name] = facts

    def write_rank_state(self, rank_state: object) -> None:
        path = self.partial / _rank_file(dist.get_rank())

        def write() -> None:
            buffer = io.BytesIO()
            torch.save(rank_state, buffer)
            buffer.seek(0)
            load_torch_file(buffer)  # what could not be read back must not be written
            path.write_bytes(buffer.getvalue())
            self.wrote(path)

        self.attempt(write, str(path))

    def finish(self, own: OwnEntry, save_latest: bool) -> None:
        """Sum the files, write the manifest, rename, move ``latest``; or undo all and raise everywhere."""
        said = gather((node_of(self.engine), self.problems, self.written))
        self._raise_if_any([problems for _, problems, _ in said])
        self.attempt(lambda: self._sum([(node, written) for node, _, written in said]), str(self.partial))
        summed = gather((self.problems, self.sums))
        self._raise_if_any([problems for problems, _ in summed])
        if self.leads:
            mine = [sums for (node, _, _), (_, sums) in zip(said, summed, strict=True) if node == node_of(self.engine)]
            self.attempt(lambda: self._publish(own, {k: v for sums in mine for k, v in sums.items()}), str(self.tag))
        self._raise_if_any(gather(self.problems))
        self._keep()
        if save_latest:
            if self.leads:
                self.attempt(lambda: files.write_latest(self.folder, self.tag), str(self.folder / files.LATEST))
            self._raise_if_any(gather(self.problems), complete=True)

    def _sum(self, said: list[tuple[int, set[str]]]) -> None:
        rank = dist.get_rank()
        here = [written if node == said[rank][0] else set() for node, written in said]
        # several ranks may write parts of one file: the first of them sums it, and none knows what became of it
        names = self.written.difference(*here[:rank])
        known = {name: facts for name, facts in self.known.items() if name not in set().union(*here[rank + 1 :])}
        if self.leads:  # files that DeepSpeed wrote by other ways than its checkpoint engine
            names = names | set(files_in(self.partial)).difference(*here)
        self.sums = sums_of(self.partial, sorted(names), known)

    def _publish(self, own: OwnEntry, sums: dict[str, FileFacts]) -> None:
        write_manifest(
            self.partial,
            kind="deepspeed",
            tag=self.tag,
            global_steps=int(self.engine.global_steps),
            topology=own["topology"],
            settings=own["settings"],
            files=sums,
        )
        files.publish(self.partial)

    def _raise_if_any(self, problems: list[list[str]], *, complete: bool = False) -> None:
        lines = [f"rank {rank}: {line}" for rank, found in enumerate(problems) for line in dict.fromkeys(found)]
        if not lines:
            return
        listed = "\n  - ".join(lines)
        if complete:
            raise CheckpointError(
                f"checkpoint {self.tag!r} in {self.folder} is complete, but {files.LATEST!r} still names another:\n"
                f"  - {listed}\nMake room, then write the tag into it."
            )
        if self.leads:
            shutil.rmtree(self.partial, ignore_errors=True)  # a folder that stays is removed by the next save
        self._give_back()
        raise CheckpointError(
            f"checkpoint {self.tag!r} could not be saved in {self.folder}:\n  - {listed}\nIts files were removed; all "
            f"earlier ones and {files.LATEST!r} are as they were. Make room or correct the path, then save again."
        )


def _free(folder: Path) -> str:
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.2f} GB"
    except OSError:  # this is about another error already
        return "unknown space"


def load_rank_state(path: str | Path | None) -> object:
    """What this rank gave to `save_checkpoint` as ``rank_state``; None if the checkpoint has none for it.

    Args:
        path: the path that `load_checkpoint` returned (the tag folder or a file in it); None if it loaded nothing.

    Raises:
        CheckpointError: the file is damaged or holds more than plain containers and tensors.
    """
    if path is None:
        return None
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file = folder / _rank_file(dist.get_rank() if dist.is_initialized() else 0)
    if not file.exists():
        return None
    try:
        rank_state: object = load_torch_file(file)
    except ValueError as error:
        raise CheckpointError(f"{file} {error}") from error
    return rank_state


def _rank_file(rank: int) -> str:
    return f"rank_state_{rank:05d}.pt"
