# SPDX-License-Identifier: Apache-2.0
"""What stands in the place of a checkpoint engine while DeepSpeed saves: failures are noted and not raised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ds_blockwise.hosts.deepspeed.engine import CheckpointEngine, Engine


class Notes(Protocol):
    """Takes notes of one save."""

    def attempt(self, action: Callable[[], object], what: str) -> None:
        """Do something; what it raises is noted under that name."""

    def wrote(self, path: Path) -> None:
        """A file was written."""


@contextmanager
def recorded_by(engine: Engine, notes: Notes) -> Iterator[None]:
    """The engine's checkpoint engine is a `RecordingEngine`."""
    own = engine.checkpoint_engine
    engine.checkpoint_engine = RecordingEngine(own, notes)
    try:
        yield
    finally:
        engine.checkpoint_engine = own


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
            self._own.save(state_dict, path)
            if Path(path).is_file():  # not every rank's checkpoint engine writes
                self._notes.wrote(Path(path))

        self._notes.attempt(write, path)

    def commit(self, info: object) -> None:
        """All files of this rank are saved."""
        self._notes.attempt(lambda: self._own.commit(info), "DeepSpeed's checkpoint engine")

    def is_decoupled(self) -> bool:
        """False: a decoupled checkpoint engine is left alone."""
        return False


def _drop_empty(module: object) -> None:
    """Remove the entries of a model's state dict that are None.

    Megatron-core's layers save ``_extra_state = None`` (and do not miss it); DeepSpeed's universal converter asks each
    entry of the state dict for ``.float()``.
    """
    if isinstance(module, dict):
        for key in [key for key, value in module.items() if value is None]:
            del module[key]
