# SPDX-License-Identifier: Apache-2.0
"""Loads a portable checkpoint into a DeepSpeed engine of any ZeRO stage, data-parallel and tensor-parallel size.

Each rank reads the windows of the parameters that its own stepped tensors hold. Everything is checked on all ranks
before anything is changed. Checked with DeepSpeed 0.19.8.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from ds_blockwise.checkpoint.manifest import CheckpointError
from ds_blockwise.checkpoint.portable import Portable
from ds_blockwise.checkpoint.portable_types import COUNTERS, LOSS_SCALE, TrainingState
from ds_blockwise.checkpoint.record import KEY
from ds_blockwise.checkpoint.state_dicts import check_kind
from ds_blockwise.hosts.deepspeed.checkpoint.schedule import load_schedule
from ds_blockwise.hosts.deepspeed.engine import Engine, Loaded, Wrapper, ZeroStage3, is_partitioned, whole_numel
from ds_blockwise.kernels.base import wide_dtype
from ds_blockwise.kernels.bindings import Binding
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.optimizers.second_moment import start_matrices_anew
from ds_blockwise.parallel.agree import first_error, is_first_rank, together
from ds_blockwise.values import is_finite

logger = logging.getLogger(__name__)

_SHOWN = 8  # names in one line of an error


def load_portable(
    engine: Engine,
    folder: Path,
    *,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: object = None,
) -> Loaded:
    """Fill an engine from a portable checkpoint; a collective over all ranks.

    fp32 weights, moments, step counts, frozen parameters, buffers, counters, loss scale and schedule are loaded;
    multipliers, rules, granularity and the groups' hyper-parameters stay the engine's own. Second moments of another
    optimizer or granularity become means over the engine's blocks, or one value per element for `BlockwiseAdamW`.

    Args:
        engine: a ``DeepSpeedEngine`` whose optimizer is one of ours.
        folder: the portable checkpoint.
        load_module_strict: refuse a checkpoint with parameters that the model lacks.
        load_optimizer_states: load moments and step counts.
        load_lr_scheduler_states: load the schedule's position.
        load_module_only: load weights and buffers, nothing else.
        custom_load_fn: DeepSpeed's argument of that name; must be None.

    Returns:
        The folder and the saved ``client_state``, which holds the settings of the source under ``ds_blockwise``.

    Raises:
        ValueError: on every rank, before anything is changed: the model or the engine does not fit.
        CheckpointError: on every rank: files cannot be read. If this happens after the checks, weights may be
            partly replaced, which the message says.
    """
    folder = Path(folder)
    moments = load_optimizer_states and not load_module_only
    optimizer = _ours(engine, custom_load_fn)
    portable, training_state = _opened(folder)
    problems = together(lambda: _problems(engine, optimizer, portable, strict=load_module_strict, moments=moments))
    _raise_everywhere(problems, ValueError)
    started_anew = check_kind(optimizer, portable.record) if moments else None
    optimizer.report_changes(None, started_anew)
    counters = {key: training_state["counters"].get(key, 0) for key in COUNTERS}
    if load_lr_scheduler_states and not load_module_only:
        updates = max(0, counters["global_steps"] - counters["skipped_steps"])
        load_schedule(engine, training_state["lr_scheduler"], updates)
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        engine.optimizer.checkpoint_event_prologue()
    damage = None
    try:
        for binding in optimizer.bindings():
            _fill(optimizer, binding, portable, moments)
            if started_anew is not None:
                start_matrices_anew(optimizer.state, [binding])
        _fill_fixed(engine, portable)
    except Exception as error:  # whatever one rank meets while reading, all must hear of it before the next collective
        damage = (
            f"{type(error).__name__}: {error}. The weights of this engine are partly replaced: build it again before "
            f"you load another checkpoint."
        )
    _raise_everywhere(damage, CheckpointError)
    _refresh(engine.optimizer, optimizer)
    if not load_module_only:
        for name, value in counters.items():  # these three, whatever else the file names
            setattr(engine, name, value)
        _load_loss_scale(engine.optimizer, training_state["loss_scale"])
    if moments:
        optimizer.settle()
    saved = {
        "settings": portable.record["settings"],
        "topology": portable.origin["topology"],
        "no_schedule": training_state["lr_scheduler"] is None,
    }
    return str(folder), {**training_state["client_state"], KEY: saved}


def _raise_everywhere(problem: str | None, kind: type[Exception]) -> None:
    message = first_error(problem)
    if message is not None:
        raise kind(message)


def _ours(engine: Engine, custom_load_fn: object) -> BlockwiseOptimizer:
    """The engine's optimizer; raises on every rank if a portable checkpoint cannot be loaded into it."""
    optimizer = engine.basic_optimizer
    custom = "custom_load_fn has no meaning for a portable checkpoint, which is not a module's state dict."
    if isinstance(optimizer, BlockwiseOptimizer):
        _raise_everywhere(None if custom_load_fn is None else custom, ValueError)
        return optimizer
    problem = (
        f"a portable checkpoint loads into {', '.join(OPTIMIZERS)}, but this engine's optimizer is "
        f'{type(optimizer).__name__}. Name one of ours in the JSON\'s "optimizer".'
    )
    _raise_everywhere(problem, ValueError)
    raise ValueError(problem)


def _opened(folder: Path) -> tuple[Portable, TrainingState]:
    """The checkpoint and its training state, opened on every rank or on none."""
    failure: CheckpointError | ImportError | None = None
    try:
        portable = Portable(folder)
        training_state = portable.training_state()
    except (CheckpointError, ImportError) as error:  # a rank that raised alone would leave the others waiting
        failure = error
    _raise_everywhere(None if failure is None else str(failure), CheckpointError)
    return portable, training_state


def _problems(
    engine: Engine, optimizer: BlockwiseOptimizer, portable: Portable, *, strict: bool, moments: bool
) -> str | None:
    """Everything that does not fit, in one message; None if all does."""
    lines = portable.problems()
    if moments:
        try:
            check_kind(optimizer, portable.record)
        except ValueError as error:
            lines.append(str(error))
    weights, untrained = portable.tensors["weights"], portable.tensors["frozen"]
    specs = {p.spec.fqn: p.spec for b in optimizer.bindings() for p in b.table.placements}
    missing = [name for name in specs if name not in weights and name not in untrained]
    if missing:
        lines.append(f"trained parameters that the checkpoint lacks: {_few(missing)}")
    for name, spec in specs.items():
        stored = weights.get(name) or untrained.get(name)
        if stored is not None and stored.shape != tuple(spec.shape):
            lines.append(f"{name} has shape {tuple(spec.shape)}, in the checkpoint {stored.shape}")
    without = [name for name in specs if name in untrained and name not in weights]
    if moments and without:
        lines.append(
            f"parameters that were frozen, so that there are no moments of them: {_few(without)} "
            f"(load_optimizer_states=False loads the weights alone)"
        )
    frozen = dict(_frozen(engine))
    for name, param in frozen.items():
        stored = untrained.get(name) or weights.get(name)
        shape = tuple(getattr(param, "ds_shape", param.shape))
        if stored is None:
            lines.append(f"frozen parameter {name} is not in the checkpoint")
        elif stored.shape != shape:
            lines.append(
                f"frozen parameter {name} has shape {shape}, in the checkpoint {stored.shape} (a frozen parameter that "
                f"is split over tensor-parallel ranks cannot be loaded)"
            )
    for name, buffer in _buffers(engine):
        stored = portable.tensors["buffers"].get(name)
        if stored is not None and stored.shape != tuple(buffer.shape):
            lines.append(f"buffer {name} has shape {tuple(buffer.shape)}, in the checkpoint {stored.shape}")
    extra = [name for name in (*weights, *untrained) if name not in specs and name not in frozen]
    if strict and extra:
        lines.append(f"parameters that the model lacks: {_few(extra)} (load_module_strict=False ignores them)")
    if not lines:
        return None
    listed = "".join(f"\n  - {line}" for line in lines[: 2 * _SHOWN])
    more = f"\n  - and {len(lines) - 2 * _SHOWN} more" if len(lines) > 2 * _SHOWN else ""
    return f"{portable.folder} does not fit this engine's model; nothing was loaded:{listed}{more}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _frozen(engine: Engine) -> Iterator[tuple[str, nn.Parameter]]:
    for param in engine.module.parameters():
        if not param.requires_grad and whole_numel(param):
            yield engine.param_names[param], param


def _buffers(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    named = dict(engine.module.named_buffers())
    yield from ((name, named[name]) for name in engine._get_buffer_names() if name in named)


def _fill(optimizer: BlockwiseOptimizer, binding: Binding, portable: Portable, moments: bool) -> None:
    """Master weights and, if asked for, moments of one stepped tensor; padding is left as it is."""
    tensor = binding.tensor
    flat = tensor.data.contiguous().view(-1)
    _read_into(flat, "weights", binding, portable)
    if not tensor.is_contiguous():
        tensor.data.copy_(flat.view(tensor.shape))
    if not moments:
        return
    steps = {p.spec.fqn: portable.parameters[p.spec.fqn]["step"] for p in binding.table.placements}
    step = max(steps.values(), default=0)
    behind = [name for name, own in steps.items() if own != step]
    if behind and is_first_rank():
        logger.warning(
            "parameters whose state has seen fewer updates go on with the step count of their flat partition (%d): %s",
            step,
            _few(behind),
        )
    optimizer.state.pop(tensor, None)
    if not step:
        return  # saved before the first update
    wide = wide_dtype(tensor.dtype)
    exp_avg = torch.zeros(tensor.numel(), dtype=torch.bfloat16 if optimizer.momentum_dtype == "bf16" else wide)
    _read_into(exp_avg, "exp_avg", binding, portable)
    optimizer.state[tensor] = {"step": step, "exp_avg": exp_avg.view(tensor.shape).to(tensor.device)}
    if optimizer.second_moment == "none":
        return
    exp_avg_sq = torch.zeros(tensor.numel(), dtype=wide)
    _read_into(exp_avg_sq, "exp_avg_sq", binding, portable)
    # one second moment per element; the optimizer's settle() makes them one per block, over all ranks
    optimizer.state[tensor]["exp_avg_sq"] = exp_avg_sq.view(tensor.shape).to(tensor.device)


def _read_into(flat: torch.Tensor, kind: str, binding: Binding, portable: Portable) -> None:
    for p in binding.table.placements:
        if p.numel:
            stored = kind if p.spec.fqn in portable.tensors[kind] else "frozen"  # weights of a parameter unfrozen since
            window = portable.window(stored, p.spec.fqn, p.shard, p.param_start, p.numel)
            flat.narrow(0, p.flat_start, p.numel).copy_(window)


def _fill_fixed(engine: Engine, portable: Portable) -> None:
    """Frozen parameters (from trained ones, if they were trained then) and buffers."""
    for name, param in _frozen(engine):
        whole = portable.tensor("frozen" if name in portable.tensors["frozen"] else "weights", name)
        if not is_partitioned(param):
            param.data.copy_(whole)
            continue
        piece, group = param.ds_tensor, param.ds_process_group
        start = min(piece.numel() * dist.get_rank(group), whole.numel())
        held = min(piece.numel(), whole.numel() - start)
        piece.data.view(-1).narrow(0, 0, held).copy_(whole.reshape(-1).narrow(0, start, held))
    for name, buffer in _buffers(engine):
        if name in portable.tensors["buffers"]:
            buffer.data.copy_(portable.tensor("buffers", name))


def _refresh(wrapper: object, optimizer: BlockwiseOptimizer) -> None:
    """Round the new master weights into the weights that the model computes with; a collective."""
    if isinstance(wrapper, FP16_UnfusedOptimizer):
        for halves, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for half, master in zip(halves, masters, strict=True):
                half.data.copy_(master.data)
    elif isinstance(wrapper, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        wrapper.update_lp_params()
        # DeepSpeed's views of the old moments are let go of after the next step
        wrapper._hp_optimizer_states_linked = False
    elif isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        _refresh_stage_3(wrapper)
    elif wrapper is not optimizer:
        raise ValueError(f"{type(wrapper).__name__} is a wrapper that ds_blockwise does not know")


def _refresh_stage_3(wrapper: ZeroStage3) -> None:
    groups = zip(
        wrapper.fp16_partitioned_groups_flat,
        wrapper.fp32_partitioned_groups_flat,
        wrapper.fp16_partitioned_groups,
        strict=True,
    )
    for half, master, params in groups:
        if master.numel():
            half.data.copy_(master.data)
        for param, value in zip(params, wrapper.unflatten(half, params), strict=True):
            param.data = value.data
    wrapper.checkpoint_event_epilogue()  # gathers the small parameters that every rank keeps whole


def _load_loss_scale(wrapper: Wrapper, saved: Mapping[str, object]) -> None:
    own = getattr(wrapper, "loss_scale_config", None) or getattr(wrapper, "loss_scaler", None)
    dynamic = own is not None and (getattr(own, "dynamic", False) or getattr(own, "dynamic_loss_scale", False))
    for name in LOSS_SCALE if dynamic else ():
        value = saved.get(name)
        sound = isinstance(value, (int, float)) and is_finite(value) and (name != "cur_scale" or value > 0)
        if hasattr(own, name) and sound:
            setattr(own, name, value)
