# SPDX-License-Identifier: Apache-2.0
"""What stands in the place of a checkpoint engine while DeepSpeed saves or loads.

In a save failures are noted and not raised. Files that DeepSpeed's usual checkpoint engine writes in torch's zip format
are summed while they are written. It hands its ``path`` to ``torch.save`` (DeepSpeed 0.19.8,
``torch_checkpoint_engine.py`` 33-36), which takes a file as well.

In a load tensors are mapped. DeepSpeed copies them to where they belong (0.19.8 reads a file of weights twice for that,
``state_dict_factory.py`` 97 and 170), so no copy of a file is needed in memory, and what was read to verify it is not
read again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeGuard

from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from ds_blockwise.atomic_files import SummedFile
from ds_blockwise.checkpoint.manifest import FileFacts
from ds_blockwise.hosts.deepspeed.checkpoint.tag_folder import load_file
from ds_blockwise.hosts.deepspeed.engine import CheckpointEngine, Engine


class Notes(Protocol):
    """Takes notes of one save."""

    def attempt(self, action: Callable[[], object], what: str) -> None:
        """Do something; what it raises is noted under that name."""

    def wrote(self, path: Path, facts: FileFacts | None = None) -> None:
        """A file was written; ``facts`` if it was summed meanwhile."""


@contextmanager
def recorded_by(engine: Engine, notes: Notes) -> Iterator[None]:
    """The engine's checkpoint engine is a `RecordingEngine`."""
    own = engine.checkpoint_engine
    engine.checkpoint_engine = RecordingEngine(own, notes)
    try:
        yield
    finally:
        engine.checkpoint_engine = own


@contextmanager
def files_mapped(engine: Engine, *, trust: bool) -> Iterator[None]:
    """DeepSpeed's usual checkpoint engine loads a file with its tensors mapped; another one loads as it does.

    Args:
        engine: whatever takes what it loads must copy it: parameters, the wrapper, the basic optimizer.
        trust: see `load_file`.
    """
    own = engine.checkpoint_engine
    if type(own) is not TorchCheckpointEngine:
        yield
        return

    def load(path: str, map_location: object = None) -> object:
        return load_file(Path(path), trust=trust)  # on the CPU, where DeepSpeed asks for all of them

    vars(own)["load"] = load
    try:
        yield
    finally:
        del vars(own)["load"]


class RecordingEngine:
    """Stands in for a checkpoint engine during one save: what fails is noted and not raised.

    A rank that raised alone would leave the others waiting in DeepSpeed's next collective.

    Args:
        own: the checkpoint engine that writes; everything that is not below is its.
        notes: of the save.
    """

    def __init__(self, own: CheckpointEngine, notes: Notes) -> None:
        self._own = own
        self._notes = notes

    def __getattr__(self, name: str) -> object:
        return getattr(self._own, name)

    def create(self, info: object) -> None:
        """A save begins."""
        self._notes.attempt(lambda: self._own.create(info), "DeepSpeed's checkpoint engine")

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder."""
        self._notes.attempt(lambda: self._own.makedirs(path, exist_ok=exist_ok), path)

    def save(self, state_dict: dict[str, object], path: str) -> None:
        """Write one file."""
        if "num_experts" not in state_dict:  # the universal converter does not read files of experts
            _drop_empty(state_dict.get("module"))

        def write() -> None:
            facts = None
            own = self._own
            if _writes_into_files(own):
                facts = _summed(functools.partial(own.save, state_dict), path)
            else:
                own.save(state_dict, path)
            if Path(path).is_file():  # not every rank's checkpoint engine writes
                self._notes.wrote(Path(path), facts)

        self._notes.attempt(write, path)

    def commit(self, info: object) -> None:
        """All files of this rank are saved."""
        self._notes.attempt(lambda: self._own.commit(info), "DeepSpeed's checkpoint engine")

    def is_decoupled(self) -> bool:
        """False: a decoupled checkpoint engine is left alone."""
        return False


class _WritesIntoFiles(Protocol):
    def save(self, state_dict: dict[str, object], path: SummedFile) -> object: ...


def _writes_into_files(engine: object) -> TypeGuard[_WritesIntoFiles]:
    """Whether it is DeepSpeed's usual one, with the format that torch writes by a file's `write` alone."""
    return type(engine) is TorchCheckpointEngine and bool(getattr(engine, "zipfile_serialization", False))


def _summed(save: Callable[[SummedFile], object], path: str) -> FileFacts:
    file = SummedFile(path)
    try:
        save(file)
    except BaseException:
        file.abandon()
        raise
    return {"bytes": file.size, "sum": file.close()}


def _drop_empty(module: object) -> None:
    """Remove the entries of a model's state dict that are None.

    Megatron-core's layers save ``_extra_state = None`` (and do not miss it); DeepSpeed's universal converter asks each
    entry of the state dict for ``.float()``.
    """
    if isinstance(module, dict):
        for key in [key for key, value in module.items() if value is None]:
            del module[key]
