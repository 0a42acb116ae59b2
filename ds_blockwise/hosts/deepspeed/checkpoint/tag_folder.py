# SPDX-License-Identifier: Apache-2.0
"""The files of one checkpoint that a DeepSpeed engine saved: which there are, and loading them without running code.

Knows names and top-level keys, not what lies in the optimizer's state. DeepSpeed 0.19.8, ``runtime/engine.py``
4300-4340 and 5356-5520.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ds_blockwise.checkpoint.manifest import CheckpointError

logger = logging.getLogger(__name__)

# What DeepSpeed's own files hold besides tensors and plain containers: enums and plain attribute holders.
HARMLESS = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_OTHER = re.compile(r"(?:(layer_(?!\d+_expert_))|layer_|expp_rank_|expert_).*\.pt")


class ModelFile(TypedDict, total=False):
    """What DeepSpeed writes into ``*_model_states.pt`` and is read here; the user's client state lies beside it."""

    module: dict[str, torch.Tensor]  # None for a pipeline, which is refused
    buffer_names: list[str]
    optimizer: dict[str, Any]
    frozen_param_shapes: dict[str, torch.Size]
    frozen_param_fragments: dict[str, torch.Tensor]
    lr_scheduler: dict[str, object] | None
    global_steps: int
    global_samples: int
    skipped_steps: int
    dp_world_size: int
    mp_world_size: int
    ds_config: dict[str, dict[str, Any]]
    checkpoint_parallel_dimensions: dict[str, int]


def load_file(path: Path, *, trust: bool) -> Any:
    """Load one of DeepSpeed's files on the CPU, its tensors mapped and not read.

    Args:
        path: a file that ``torch.save`` wrote.
        trust: also load files that hold arbitrary Python objects, which can run code.

    Returns:
        A dict; `ModelFile` if it is a model file.

    Raises:
        CheckpointError: the file is damaged, or needs ``trust``.
    """
    try:
        with torch.serialization.safe_globals(list(HARMLESS)):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=not trust)
    except pickle.UnpicklingError as error:
        needed = foreign_globals(path)
        if not needed:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        raise CheckpointError(
            f"{path} holds Python objects ({', '.join(needed)}), and loading those can run code. If you trust whoever "
            f"wrote it, add --trust."
        ) from error
    except Exception as error:  # torch raises anything from KeyError to OSError for a damaged file
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def foreign_globals(file: Path | BinaryIO) -> list[str]:
    """Names of the classes and functions that a file (or a path) needs and `HARMLESS` does not list."""
    own = {f"{c.__module__}.{c.__qualname__}" for c in HARMLESS}
    try:
        return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - own)
    except Exception as error:
        # The caller is raising an error about this file already, or has just pickled it; a file too damaged to be
        # listed (torch raises anything then) must not replace that error by this one.
        logger.debug("the objects in %s cannot be listed: %s", file, error)
        return []


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
            key: load_file(path, trust=trust) for key, path in self.model_paths.items()
        }
        self.first = self.models[min(self.models)]
        self._refuse_unread_kinds()
        self.dp, self.tp = int(self.first["dp_world_size"]), int(self.first["mp_world_size"])
        self._check_complete()

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the run that saved it."""
        if not self.optim_paths:
            return 0
        return 3 if self._partitions_models else int(self._config.get("zero_optimization", {}).get("stage", 1))

    @property
    def topology(self) -> dict[str, int | str]:
        """Ranks, ZeRO stage and dtype as the files say."""
        enabled = [name for name in ("bf16", "fp16") if self._config.get(name, {}).get("enabled") is True]
        return {
            "world_size": self.dp * self.tp,
            "dp": self.dp,
            "tp": self.tp,
            "pp": 1,
            "zero_stage": self.zero_stage,
            "dtype": enabled[0] if enabled else "fp32",
        }

    @property
    def _config(self) -> Mapping[str, Mapping[str, Any]]:
        return self.first.get("ds_config") or {}

    @property
    def _partitions_models(self) -> bool:
        return any(path.name.startswith("zero") for path in self.model_paths.values())

    def _refuse_unread_kinds(self) -> None:
        pipeline = self.first.get("checkpoint_parallel_dimensions", {}).get("pp_degree", 1) > 1
        if self.first.get("module") is None or pipeline:
            raise ValueError(_not_read(f"{self.folder} was saved by a pipeline-parallel engine"))

    def _check_complete(self) -> None:
        every = {(mp, dp) for mp in range(self.tp) for dp in range(self.dp)}
        models = every if self._partitions_models else {(mp, 0) for mp in range(self.tp)}
        missing = [
            f"{kind} states of tensor-parallel rank {mp}, data-parallel rank {dp}"
            for kind, needed, found in (("model", models, self.model_paths), ("optimizer", every, self.optim_paths))
            for mp, dp in sorted(needed - set(found) if found else ())
        ]
        if missing:
            raise CheckpointError(f"{self.folder} lacks the {'; the '.join(missing)} (of {self.tp} x {self.dp} ranks)")


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
            raise ValueError(_not_read(f"{path} is a file of a {kind}"))
    if not models:
        raise CheckpointError(f"{folder} has no *_model_states.pt: it is not a checkpoint of a DeepSpeed engine")
    return models, optims


def _not_read(what: str) -> str:
    return (
        f"{what}; only data-parallel, tensor-parallel and ZeRO checkpoints are read. Resume it at the topology that "
        f"saved it."
    )
