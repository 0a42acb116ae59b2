# SPDX-License-Identifier: Apache-2.0
"""Whether DeepSpeed's files fit an engine, found out before its load changes the first weight.

DeepSpeed copies the model's weights first and meets a missing entry, another shape or another optimizer later. What it
will read is read here, with its tensors mapped, and compared with the engine. DeepSpeed 0.19.8: ``runtime/engine.py``
4395-4785, and ``load_state_dict`` of each wrapper.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from ds_blockwise.checkpoint.manifest import CheckpointError
from ds_blockwise.checkpoint.state_dicts import check_second_moments
from ds_blockwise.checkpoint.typed_data import typed
from ds_blockwise.hosts.deepspeed.checkpoint.optimizer_files import OptimizerFile, load_optimizer_file, unpartitioned
from ds_blockwise.hosts.deepspeed.checkpoint.tag_folder import ModelFile, load_file, load_model_file
from ds_blockwise.hosts.deepspeed.engine import Engine, LoadOptions, is_partitioned, is_wrapped, offload_device
from ds_blockwise.hosts.deepspeed.releases import alignment_paddings
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.state_dict import to_load
from ds_blockwise.values import is_finite

_SHOWN = 8  # names in one line of an error


def model_file(engine: Engine, folder: Path, *, trust: bool) -> tuple[Path, ModelFile]:
    """The file of the model's weights that DeepSpeed will read on this rank, and its contents.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = model_path(engine, folder)
    return path, load_model_file(path, trust=trust)


def model_path(engine: Engine, folder: Path) -> Path:
    """Where the file of the model's weights lies that DeepSpeed will read on this rank.

    Raises:
        CheckpointError: there is none.
    """
    names = engine._get_all_ckpt_names(str(folder.parent), folder.name)
    if not names:
        raise CheckpointError(f"{folder} has no *model_states.pt of this rank")
    # as SDLoaderBase.load chooses
    size, rank = int(engine.mp_world_size), int(getattr(engine, "checkpoint_mp_rank", 0))
    at = rank * len(names) // max(1, size)
    if engine.pipeline_parallelism and size != len(names):
        at = 0
    return Path(names[min(at, len(names) - 1)])


def misfits(engine: Engine, path: Path, model: ModelFile, options: LoadOptions, *, trust: bool) -> list[str]:
    """What of DeepSpeed's files does not fit this rank of an engine, a line each; nothing is changed.

    Args:
        engine: the engine.
        path: the file of the model's weights, in its tag folder.
        model: its contents.
        options: what will be loaded.
        trust: see `load_file`.

    Raises:
        CheckpointError: an optimizer file is damaged.
    """
    moments = options["load_optimizer_states"] and not options["load_module_only"]
    found = []
    if options["custom_load_fn"] is None:
        found += _module_misfits(engine, path, model, strict=options["load_module_strict"])
    found += _frozen_misfits(engine, path, model)
    if engine.zero_optimization():
        if moments or engine.zero_optimization_partition_weights():
            found += _layout_misfits(engine, path, model, by_name=options["load_module_strict"], ranks=moments)
        if moments and not found and offload_device(engine) != "nvme":
            name = Path(engine._get_zero_ckpt_name(str(path.parent.parent), path.parent.name))
            found += _wrapper_misfits(engine, name, load_optimizer_file(name, trust=trust))
    elif moments and not engine.has_moe_layers:
        found += _wrapper_misfits(engine, path, unpartitioned(path, model))
    return found


# ----------------------------------------------------------------------------------- the model


def _module_misfits(engine: Engine, path: Path, model: ModelFile, *, strict: bool) -> list[str]:
    """Let the module take the saved weights in, its own replaced by ones without memory."""
    saved = model["module"]
    if saved is None:
        if not engine.pipeline_parallelism:
            return [f"{path.name} has no weights: it was saved by a pipeline"]
        return []  # the layers' files; their shapes are those of the optimizer's partitions
    # experts are in files of their own
    strict = strict and not engine.has_moe_layers
    with _without_memory(engine.module), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*meta parameter")
        try:
            engine.module.load_state_dict(saved, strict=strict)
        except Exception as error:  # the module's own, and that of whatever hooks it has
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return [f"{path.name}: {line}" for line in lines[1 : _SHOWN + 1] or lines or [type(error).__name__]]
    return []


@contextmanager
def _without_memory(module: nn.Module) -> Iterator[None]:
    """Replace every parameter and buffer by one of its shape on the meta device, into which nothing can be copied."""
    replaced: list[tuple[MutableMapping[str, Any], str, torch.Tensor]] = []
    made: dict[int, torch.Tensor] = {}
    for owner in module.modules():
        tables: tuple[MutableMapping[str, Any], ...] = (owner._parameters, owner._buffers)
        replaced += [(table, name, t) for table in tables for name, t in table.items() if t is not None]
    try:
        for table, name, tensor in replaced:  # a tied one by one
            table[name] = made.setdefault(id(tensor), _meta_of(tensor))
        yield
    finally:
        for table, name, tensor in replaced:
            table[name] = tensor


def _meta_of(tensor: torch.Tensor) -> torch.Tensor:
    shape = (0,) if is_partitioned(tensor) else tuple(tensor.shape)  # DeepSpeed cuts them before it loads
    made = torch.empty(shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def _frozen_misfits(engine: Engine, path: Path, model: ModelFile) -> Iterator[str]:
    fragments = model.get("frozen_param_fragments")
    if fragments is None:
        return
    for param in engine.module.parameters():
        if param.requires_grad or not (held := param.ds_tensor if is_partitioned(param) else param).numel():
            continue
        name = engine.param_names[param]
        if name not in fragments:
            yield f"{path.name}: frozen parameter {name} is not in it"
        elif (there := fragments[name].numel()) != held.numel():
            yield f"{path.name}: frozen parameter {name} has {there} elements there, {held.numel()} here"


def _layout_misfits(engine: Engine, path: Path, model: ModelFile, *, by_name: bool, ranks: bool) -> Iterator[str]:
    """ZeRO's flat tensors hold the trained parameters one after the other: they must be the same in the same order."""
    if ranks and model["dp_world_size"] != int(engine.seq_dp_world_size):
        yield (
            f"{path.name}: it was saved by {model['dp_world_size']} data-parallel ranks, this engine has "
            f"{engine.seq_dp_world_size}"
        )
    listed = model.get("param_shapes")
    if listed is None:
        yield f"{path.name}: it lists no shapes of trained parameters, so it was not saved with ZeRO"
        return
    saved = [{name: tuple(shape) for name, shape in group.items()} for group in listed]
    own = [{name: tuple(shape) for name, shape in group.items()} for group in engine._get_zero_param_shapes()]
    fits = saved == own if by_name else [list(s.values()) for s in saved] == [list(o.values()) for o in own]
    if fits and (not by_name or [list(s) for s in saved] == [list(o) for o in own]):
        return
    then, now = ({name: shape for group in groups for name, shape in group.items()} for groups in (saved, own))
    differences = [
        *_names("trained parameters that the checkpoint lacks", [name for name in now if name not in then]),
        *_names("trained parameters that this engine lacks", [name for name in then if name not in now]),
        *[f"{n} has shape {now[n]}, in the checkpoint {then[n]}" for n in now if n in then and now[n] != then[n]],
    ]
    for line in differences[:_SHOWN]:
        yield f"{path.name}: {line}"
    if not differences:
        yield f"{path.name}: its param groups are of {[len(g) for g in saved]} parameters in another order or grouping"


def _names(what: str, names: Sequence[str]) -> list[str]:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{what}: {', '.join(names[:_SHOWN])}{more}"] if names else []


# ------------------------------------------------------------------------------- the optimizer


def _wrapper_misfits(engine: Engine, path: Path, saved: OptimizerFile) -> Iterator[str]:
    wrapper: Any = engine.optimizer
    own: list[torch.Tensor] = []
    needed: tuple[str, ...] = ()
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        own, needed = list(wrapper.fp32_partitioned_groups_flat), ("loss_scaler", "dynamic_loss_scale", "overflow")
    elif isinstance(wrapper, DeepSpeedZeroOptimizer):
        own, needed = list(wrapper.single_partition_of_fp32_groups), ("ds_version",)
        yield from _alignment_misfits(path, saved, alignment_paddings(wrapper))
    elif isinstance(wrapper, BF16_Optimizer):
        own, needed = list(wrapper.fp32_groups_flat_partition), ("ds_version",)
    elif is_wrapped(engine) and hasattr(wrapper, "fp32_groups"):
        own = [master for group in wrapper.fp32_groups for master in group]
        needed = ("dynamic_loss_scale", "cur_scale", "cur_iter")
    yield from (f"{path.name}: it has no {key}" for key in needed if key not in saved.entries)
    yield from _master_misfits(path, own, saved.masters)
    yield from scaler_misfits(path.name, saved.entries)
    if isinstance(engine.basic_optimizer, BlockwiseOptimizer):
        with _full_groups(wrapper):
            try:
                to_load(engine.basic_optimizer, dict(saved.base), torch.device("meta"))
            except ValueError as error:
                yield f"{path.name}: {error}"


def _alignment_misfits(path: Path, saved: OptimizerFile, own: list[list[int]]) -> Iterator[str]:
    aligned = saved.entries.get("param_alignment_paddings")
    try:
        if aligned is not None and typed(aligned, list[list[int]], "param_alignment_paddings") != own:
            yield f"{path.name}: zero_optimization.parameter_alignment was another"
    except ValueError as error:
        yield f"{path.name}: {error}"


def _master_misfits(path: Path, own: Sequence[torch.Tensor], saved: Sequence[torch.Tensor]) -> Iterator[str]:
    if len(own) != len(saved):
        yield f"{path.name}: it has fp32 weights in {len(saved)} tensors, this engine in {len(own)}"
        return
    for index, (mine, theirs) in enumerate(zip(own, saved, strict=True)):
        # ZeRO 1 and 2 leave the padding out, whose place the shapes of the parameters decide
        if theirs.numel() > mine.numel() or (theirs.dim() > 1 and theirs.shape != mine.shape):
            yield f"{path.name}: fp32 weights {index} have {theirs.numel()} elements there, {mine.numel()} here"
        elif not theirs.is_floating_point():
            yield f"{path.name}: fp32 weights {index} are {theirs.dtype}"


def scaler_misfits(name: str, entries: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the loss scale of an optimizer file, a line each.

    Args:
        name: of the file.
        entries: of its state dict.
    """
    scaler = entries.get("loss_scaler")
    if scaler is not None and not isinstance(scaler, (LossScaler, DynamicLossScaler)):
        yield f"{name}: its loss_scaler is a {type(scaler).__name__}"
    held = vars(scaler) if hasattr(scaler, "__dict__") else {}
    for key, value in held.items():
        if not isinstance(value, (int, float, str, torch.dtype, type(None))) or hasattr(type(scaler), key):
            yield f"{name}: {key} of its loss_scaler is a {type(value).__name__}"
    for scale in (each["cur_scale"] for each in (entries, held) if "cur_scale" in each):
        if not isinstance(scale, (int, float)) or not is_finite(scale) or scale <= 0:
            yield f"{name}: its loss scale is {scale!r}, which is not a number above 0"


@contextmanager
def _full_groups(wrapper: Any) -> Iterator[None]:
    """ZeRO-3 keeps the param groups empty between steps, and fills them for a load."""
    if not isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        yield
        return
    wrapper._set_fp32_optimizer_param_groups()
    try:
        yield
    finally:
        wrapper._clear_fp32_optimizer_param_groups()


def starts_anew(engine: Engine, model: ModelFile) -> str | None:
    """See `check_second_moments`, of a universal checkpoint, which keeps nothing of the optimizer's own record.

    Args:
        engine: the engine.
        model: the checkpoint's file of the weights.
    """
    optimizer, own = engine.basic_optimizer, model.get("ds_blockwise")
    if not isinstance(optimizer, BlockwiseOptimizer):
        return None
    wrote, saved = "another optimizer", "gradients"
    if own is not None and own["settings"] is not None:
        wrote, saved = own["settings"].get("optimizer", wrote), own.get("second_moment_of", saved)
    return check_second_moments(optimizer, wrote, saved)


def universal_misfits(engine: Engine, folder: Path, *, whole: bool, trust: bool) -> Iterator[str]:
    """What of a universal checkpoint's parameters does not fit this rank of an engine; nothing is changed.

    Args:
        engine: the engine.
        folder: the tag folder.
        whole: whether a parameter's file has the shape of the engine's (no tensor parallelism).
        trust: see `load_file`.
    """
    if not (folder / "zero" / "optimizer_state.pt").is_file():
        yield f"{folder.name}/zero/optimizer_state.pt is missing"
    for group in engine._get_zero_param_shapes():
        for name, shape in group.items():
            for kind in ("fp32", "exp_avg", "exp_avg_sq"):
                path = folder / "zero" / name / f"{kind}.pt"
                if not path.is_file():
                    yield f"zero/{name}/{kind}.pt is missing"
                    continue
                held = load_file(path, trust=trust)
                value = held.get("param") if isinstance(held, Mapping) else held
                if not isinstance(value, torch.Tensor):
                    yield f"zero/{name}/{kind}.pt holds no tensor"
                # of ZeRO-3 the files are flat
                elif whole and tuple(value.shape) not in (tuple(shape), (math.prod(shape),)):
                    yield f"zero/{name}/{kind}.pt has shape {tuple(value.shape)}, here it is {tuple(shape)}"
