# SPDX-License-Identifier: Apache-2.0
"""What a portable checkpoint is made from, and what its ``portable.json`` and ``training_state.pt`` hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypedDict

import torch

from ds_blockwise.checkpoint.manifest import Topology
from ds_blockwise.checkpoint.record_types import PortableRecord

COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # attributes of an engine, and nothing else of it
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # attributes of a loss scaler


class Origin(TypedDict):
    """The checkpoint that a portable one was made from."""

    tag: str
    global_steps: int
    topology: Topology


class TrainedParameter(TypedDict):
    """A trained parameter: the updates that its state has seen, and the index of its param group."""

    step: int
    group: int


class StoredTensor(TypedDict):
    """Where a tensor is: name of the safetensors file, unsharded shape, dtype without ``torch.``."""

    file: str
    shape: list[int]
    dtype: str


class PortableIndex(TypedDict):
    """``portable.json``. ``tensors`` has an entry for each kind of tensor, by the parameter's or buffer's name."""

    format: int
    record: PortableRecord
    parameters: dict[str, TrainedParameter]
    param_groups: list[dict[str, object]]
    origin: Origin
    tensors: dict[str, dict[str, StoredTensor]]


class TrainingState(TypedDict):
    """``training_state.pt``: plain containers and tensors only.

    Attributes:
        lr_scheduler: what the schedule's ``state_dict()`` returned; None if there was no schedule.
        counters: steps and samples so far, by the names of the engine's attributes (`COUNTERS`).
        loss_scale: of fp16 training, by the names of the loss scaler's attributes (`LOSS_SCALE`); empty without it.
        client_state: what the user gave to ``save_checkpoint``.
    """

    lr_scheduler: dict[str, object] | None
    counters: dict[str, int]
    loss_scale: dict[str, object]
    client_state: dict[Any, object]


class Source(Protocol):
    """What a portable checkpoint is made from; tensors are asked for one at a time."""

    @property
    def record(self) -> PortableRecord:
        """The optimizer's record."""
        ...

    @property
    def steps(self) -> Mapping[str, int]:
        """Per trained parameter, the updates that its state has seen."""
        ...

    @property
    def group_of(self) -> Mapping[str, int]:
        """Per trained parameter, the index of its param group."""
        ...

    @property
    def param_groups(self) -> Sequence[Mapping[str, object]]:
        """The groups' hyper-parameters, as JSON holds them."""
        ...

    @property
    def origin(self) -> Origin:
        """Tag, step and topology."""
        ...

    @property
    def training_state(self) -> TrainingState:
        """Schedule, counters, loss scale and client state."""
        ...

    def names(self, kind: str) -> Iterable[str]:
        """Names of the tensors of one of `portable.KINDS`."""
        ...

    def tensor(self, kind: str, name: str) -> torch.Tensor:
        """One tensor in unsharded form."""
        ...
