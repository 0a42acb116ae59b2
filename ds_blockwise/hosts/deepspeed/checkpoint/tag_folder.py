# SPDX-License-Identifier: Apache-2.0
"""The files of one checkpoint that a DeepSpeed engine saved: which there are, and loading them without running code.

Knows names and top-level keys, not what lies in the optimizer's state. DeepSpeed 0.19.8, ``runtime/engine.py``
4300-4340 and 5356-5520.
"""

from __future__ import annotations

import argparse
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PosixPath
from typing import Any, TypedDict

import numpy as np
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ds_blockwise.checkpoint.given_files import load_torch_file
from ds_blockwise.checkpoint.manifest import CheckpointError, NotReadError, Topology
from ds_blockwise.checkpoint.record import KEY
from ds_blockwise.checkpoint.record_types import Settings
from ds_blockwise.checkpoint.typed_data import typed

_SCALAR, _REBUILD = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
# by the names in files of numpy 1 and 2
_NUMPY_FUNCTIONS = {
    function: [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core")]
    for function, name in ((_SCALAR, "scalar"), (_REBUILD, "_reconstruct"))
}
# What DeepSpeed's own files and the usual client states hold besides tensors and plain containers: enums, attribute
# holders, paths, numpy's numbers and arrays. Making one of them and setting its attributes does nothing else.
HARMLESS = (
    *(LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address),
    *(argparse.Namespace, types.SimpleNamespace, PosixPath),
    *(np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdSU")),
    *((function, name) for function, names in _NUMPY_FUNCTIONS.items() for name in names),
)
# keys of a model file that are DeepSpeed's, and ours; everything else is the user's client_state
DEEPSPEED_KEYS = frozenset(
    "module buffer_names optimizer param_shapes frozen_param_shapes shared_params frozen_param_fragments lr_scheduler "
    "data_sampler random_ltd skipped_steps global_steps global_samples dp_world_size mp_world_size ds_config "
    "ds_version checkpoint_parallel_dimensions universal_checkpoint_info num_experts".split()
)
NOT_OF_THE_USER = DEEPSPEED_KEYS | {KEY}
_ANOTHER = "Restore it from a copy, or load another checkpoint."
_MOST_RANKS = 1 << 20
_SHOWN = 8  # missing files in one error
HOW_TO_TRUST = 'write "checkpoint": {"trust": true} into the DeepSpeed JSON'

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_OTHER = re.compile(r"(?:(layer_(?!\d+_expert_))|layer_|expp_rank_|expert_).*\.pt")


class _OwnEntry(TypedDict, total=False):
    """``second_moment_of``: see `SecondMomentOf`; missing where an earlier version wrote it: those of gradients."""

    second_moment_of: str


class OwnEntry(_OwnEntry):
    """What `save_checkpoint` adds to the client state under ``ds_blockwise``.

    Attributes:
        settings: of the optimizer, if it is one of ours.
        topology: of the run.
        added: other keys that were added to the client state.
    """

    settings: Settings | None
    topology: Topology
    added: list[str]


class _Required(TypedDict):
    module: dict[str, Any] | None  # None for a pipeline; not only tensors
    lr_scheduler: dict[str, Any] | None
    global_steps: int
    skipped_steps: int
    dp_world_size: int
    mp_world_size: int


class ModelFile(_Required, total=False):
    """What DeepSpeed writes into ``*_model_states.pt`` and is read here; the user's client state lies beside it."""

    buffer_names: list[str] | None
    optimizer: dict[str, Any] | None
    param_shapes: list[dict[str, Sequence[int]]] | None
    frozen_param_shapes: dict[str, Sequence[int]] | None
    frozen_param_fragments: dict[str, torch.Tensor] | None
    global_samples: float  # with sequence parallelism DeepSpeed divides by its size
    ds_config: dict[str, Any]
    checkpoint_parallel_dimensions: dict[str, int] | None
    ds_blockwise: OwnEntry


def load_model_file(path: Path, *, trust: bool) -> ModelFile:
    """One ``*_model_states.pt``; as `load_file`, and CheckpointError if DeepSpeed's own entries are not in it."""
    loaded = load_file(path, trust=trust)
    try:
        return typed(loaded, ModelFile, path.name)
    except ValueError as error:
        raise CheckpointError(f"{path} is not a file that DeepSpeed wrote: {error}. {_ANOTHER}") from error


def load_file(path: Path, *, trust: bool) -> Any:
    """Load one of DeepSpeed's files on the CPU, its tensors mapped and not read.

    Args:
        path: a file that ``torch.save`` wrote.
        trust: also load files that hold arbitrary Python objects, which can run code.

    Returns:
        A dict, if DeepSpeed wrote it.

    Raises:
        CheckpointError: the file is damaged, or needs ``trust``.
    """
    how = f"{HOW_TO_TRUST}; for ds-blockwise add --trust"
    try:
        return load_torch_file(path, harmless=HARMLESS, trust=trust, how_to_trust=how)
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from error


def that_run_code(folder: Path, names: Iterable[str]) -> list[str]:
    """What is wrong with files that hold Python objects, or cannot be read, a line each, beginning with the name.

    DeepSpeed loads its files whatever they hold; a file that is not in this list can do nothing then.

    Args:
        folder: the tag folder.
        names: of files in it; those that are not ``torch.save``'s are passed over.
    """
    found = []
    for name in names:
        if name.endswith(".pt"):
            try:
                load_file(folder / name, trust=False)
            except CheckpointError as error:
                found.append(str(error).removeprefix(f"{folder}/"))
    return found


class TagFolder:
    """One tag folder with its model files loaded (their tensors mapped).

    Args:
        folder: the tag folder.
        trust: see `load_file`.

    Attributes:
        models: per (tensor-parallel rank, data-parallel rank) the contents of its model file.
        model_paths: their paths; one per tensor-parallel rank unless ZeRO-3 wrote them.
        optim_paths: paths of the optimizer files; empty without ZeRO.
        first: the contents of the first model file.
        dp: data-parallel size.
        tp: tensor-parallel size.

    Raises:
        CheckpointError: files are missing or damaged.
        ValueError: a kind of checkpoint that is not read (pipeline, experts), with the reason.
    """

    def __init__(self, folder: Path, *, trust: bool = False) -> None:
        self.folder = Path(folder)
        self.model_paths, self.optim_paths = _find_files(self.folder)
        self.models: dict[tuple[int, int], ModelFile] = {
            key: load_model_file(path, trust=trust) for key, path in self.model_paths.items()
        }
        self.first = self.models[min(self.models)]
        self._refuse_unread_kinds()
        self.dp, self.tp = self.first["dp_world_size"], self.first["mp_world_size"]
        self._check_complete()

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the run that saved it."""
        if not self.optim_paths:
            return 0
        stage = self._section("zero_optimization").get("stage", 1)
        return 3 if self._partitions_models else stage if isinstance(stage, int) else 1

    @property
    def topology(self) -> dict[str, int | str]:
        """Ranks, ZeRO stage and dtype as the files say."""
        enabled = [name for name in ("bf16", "fp16") if self._section(name).get("enabled") is True]
        return {
            "world_size": self.dp * self.tp,
            "dp": self.dp,
            "tp": self.tp,
            "pp": 1,
            "zero_stage": self.zero_stage,
            "dtype": enabled[0] if enabled else "fp32",
        }

    def _section(self, name: str) -> Mapping[str, object]:
        """A section of the DeepSpeed JSON that the run had; empty if it had none."""
        section = self.first.get("ds_config", {}).get(name)
        return section if isinstance(section, Mapping) else {}

    @property
    def _partitions_models(self) -> bool:
        return any(path.name.startswith("zero") for path in self.model_paths.values())

    def _refuse_unread_kinds(self) -> None:
        pipeline = (self.first.get("checkpoint_parallel_dimensions") or {}).get("pp_degree", 1) > 1
        if self.first.get("module") is None or pipeline:
            raise NotReadError(_not_read(f"{self.folder} was saved by a pipeline-parallel engine"))

    def _check_complete(self) -> None:
        if not 0 < self.tp * self.dp <= _MOST_RANKS:
            raise CheckpointError(f"{self.folder} says that {self.tp} x {self.dp} ranks saved it. {_ANOTHER}")
        every = {(mp, dp) for mp in range(self.tp) for dp in range(self.dp)}
        models = every if self._partitions_models else {(mp, 0) for mp in range(self.tp)}
        missing = [
            f"{kind} states of tensor-parallel rank {mp}, data-parallel rank {dp}"
            for kind, needed, found in (("model", models, self.model_paths), ("optimizer", every, self.optim_paths))
            for mp, dp in sorted(needed - set(found) if found else ())
        ]
        if missing:
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            listed = "; the ".join(missing[:_SHOWN])
            raise CheckpointError(f"{self.folder} lacks the {listed}{more} (of {self.tp} x {self.dp} ranks)")


def take_own_entry(client_state: dict[str, object] | None) -> dict[str, Any]:
    """Remove what `save_checkpoint` added to a client state and return our part of it."""
    saved = None if client_state is None else client_state.pop(KEY, None)
    if client_state is None or not isinstance(saved, dict):
        return {}
    for key in saved.get("added", ()):
        client_state.pop(key, None)
    return saved


def universal_misfit(folder: Path, *, partitions_weights: bool, tp: int, round_robin: bool) -> str | None:
    """Why DeepSpeed cannot load a universal checkpoint into an engine; None if nothing speaks against it.

    Args:
        folder: its tag folder.
        partitions_weights: whether the engine is at ZeRO stage 3.
        tp: the engine's tensor-parallel size; 1 under DeepSpeed's own AutoTP, which describes its shards itself.
        round_robin: whether the engine is at ZeRO stage 1 or 2 with ``round_robin_gradients``.
    """
    by_stage_3 = any(folder.glob("zero_pp_rank_*_model_states.pt"))
    if by_stage_3 != partitions_weights:
        saved, own = ("ZeRO-3", "ZeRO-1 or 2") if by_stage_3 else ("ZeRO-1 or 2", "ZeRO-3")
        reason = f"it was saved at {saved} and this engine is at {own}, between which DeepSpeed cannot move one"
    elif partitions_weights and tp > 1:
        reason = f"at ZeRO-3 DeepSpeed cannot cut it for tensor-parallel size {tp} (zero/stage3.py, 3781)"
    elif round_robin:
        reason = "with round_robin_gradients DeepSpeed puts its values into other parameters (set it to false)"
    else:
        return None
    return (
        f"universal checkpoint {folder} does not fit: {reason}. Make a portable checkpoint of the one that it was made "
        f"from, which loads anywhere: ds-blockwise convert SOURCE OUTPUT. Nothing was loaded."
    )


def _find_files(folder: Path) -> tuple[dict[tuple[int, int], Path], dict[tuple[int, int], Path]]:
    models: dict[tuple[int, int], Path] = {}
    optims: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("*.pt")):
        if found := _MODEL.fullmatch(path.name):
            models[int(found[2]), int(found[1] or 0)] = path
        elif found := _OPTIM.fullmatch(path.name):
            optims[int(found[2]), int(found[1])] = path
        elif found := _OTHER.fullmatch(path.name):
            kind = "pipeline-parallel run (PipelineModule)" if found[1] else "run with experts (DeepSpeed's MoE)"
            raise NotReadError(_not_read(f"{path} is a file of a {kind}"))
    if not models:
        raise CheckpointError(f"{folder} has no *_model_states.pt: it is not a checkpoint of a DeepSpeed engine")
    return models, optims


def _not_read(what: str) -> str:
    return (
        f"{what}; only data-parallel, tensor-parallel and ZeRO checkpoints are read. Resume it at the topology that "
        f"saved it."
    )
