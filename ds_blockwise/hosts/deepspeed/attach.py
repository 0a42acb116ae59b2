# SPDX-License-Identifier: Apache-2.0
"""Tells the optimizer of an engine what lies in the tensors that it steps: tags, splits, process groups."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.bwc import bwc_tensor_model_parallel_group
from torch import nn

from ds_blockwise.blocks.tagged_parameter import as_tagged
from ds_blockwise.hosts.deepspeed.autotp import check_marks, check_splits, with_empty_shards
from ds_blockwise.hosts.deepspeed.checkpoint.load import guard
from ds_blockwise.hosts.deepspeed.checks import (
    check_clipping,
    check_config,
    check_sequence_parallel,
    refuse_empty_in_forward,
)
from ds_blockwise.hosts.deepspeed.engine import Engine, ZeroStep, is_wrapped, tensor_parallel_mpu
from ds_blockwise.hosts.deepspeed.fused_step.zero_1_and_2 import check_known, fuse_step
from ds_blockwise.hosts.deepspeed.monitor import connect
from ds_blockwise.hosts.deepspeed.never_stepped import refuse_when_trained, trains_nothing
from ds_blockwise.hosts.deepspeed.partitions import or_world, stepped_tensors
from ds_blockwise.hosts.deepspeed.pipeline import is_staged, names_in, tied_copies
from ds_blockwise.hosts.deepspeed.releases import cut_off_autograd
from ds_blockwise.hosts.deepspeed.state_api.show import show_state
from ds_blockwise.hosts.model_tags import tag_for
from ds_blockwise.hosts.pipeline_stages import TiedCopy, check_rules, check_tied, rules_matched
from ds_blockwise.hosts.stepped_tensors import Stepped, check_agreement
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.parallel.agree import first_error, gather, if_many, together
from ds_blockwise.parallel.reduce import ReductionGroups
from ds_blockwise.tagging.module_reader import is_split

logger = logging.getLogger(__name__)


def attach(engine: Engine) -> None:
    """Tell an engine's optimizer what lies in the tensors that it steps; ``deepspeed.initialize`` calls this.

    A collective over all ranks. Call it yourself only if an engine was built by code that replaced the hook.

    The model is tagged anew, with this engine's names and settings, whatever engines tagged it before; the user's own
    ``tag_parameters`` stays. What an earlier engine was told stays as it is. Nothing is tagged where nothing is
    trained. If the model is in evaluation mode the engine may never be stepped (a reference or reward model that shares
    the JSON): a model that cannot be tagged is then refused by the first backward, step or checkpoint only.

    Args:
        engine: a ``DeepSpeedEngine`` whose basic optimizer is one of ours.

    Raises:
        ValueError: on every rank, if any rank finds an unsupported setting, an unknown parameter, a layout that
            differs from its peers', or a tied weight that another pipeline stage would step otherwise.
    """
    optimizer = engine.basic_optimizer
    if not isinstance(optimizer, BlockwiseOptimizer):
        raise ValueError(
            f"the engine's optimizer is {type(optimizer).__name__}, not one of "
            f"{', '.join(OPTIMIZERS)}. Under CPU offload Accelerate replaces a client optimizer by "
            f'DeepSpeedCPUAdam; name ours in the JSON\'s "optimizer" instead.'
        )
    together(lambda: _check(engine, optimizer))
    if trains_nothing(engine):
        guard(engine)
        return
    params = _tagged_together(engine, optimizer)
    if params is None:
        return
    found = together(lambda: _read(engine, optimizer, params))
    stepped = with_empty_shards(found.stepped, found.params, found.tp_group)
    tied = together(lambda: _bind(engine, optimizer, stepped, found.tp_group))
    check_rules(found.rules_matched, optimizer.block_settings)
    check_tied(tied)
    peers = if_many(or_world(engine.seq_data_parallel_group))
    check_agreement(optimizer, stepped, peers, found.tp_group, "JSON")
    guard(engine)
    show_state(engine, optimizer, found.params)
    if optimizer.fused_step:
        together(lambda: fuse_step(cast(ZeroStep, engine.optimizer), optimizer))
    if not is_wrapped(engine):
        # DeepSpeed's wrappers skip a step with NaN on all ranks; without a wrapper nobody looks
        everyone = or_world(None)  # the other stages of a pipeline must skip it too
        optimizer.skip_non_finite(ReductionGroups(if_many(everyone), None, _device()))
    if engine.zero_round_robin_gradients() and engine.global_rank == 0:
        logger.warning(
            "round_robin_gradients: training is exact, but DeepSpeed %s mixes up parameters when it converts such a "
            "run to a universal checkpoint. Resume with the same number of ranks, or set it to false.",
            deepspeed.__version__,
        )


@dataclass(frozen=True)
class _Found:
    """What this rank finds in an engine.

    Attributes:
        params: the trained parameters, tagged.
        stepped: the tensors that DeepSpeed steps.
        tp_group: tensor-parallel ranks; None if there is one.
        rules_matched: per rule, whether it matches a parameter of this rank's model.
    """

    params: list[nn.Parameter]
    stepped: list[Stepped]
    tp_group: dist.ProcessGroup | None
    rules_matched: list[bool]


def _check(engine: Engine, optimizer: BlockwiseOptimizer) -> None:
    """Refuse what cannot work, whatever the model is."""
    check_config(engine, type(optimizer).__name__)
    check_marks(engine.module, deepspeed.__version__)
    check_sequence_parallel(engine)
    if optimizer.fused_step:
        check_known(engine)
    refuse_empty_in_forward(engine)


def _tagged_together(engine: Engine, optimizer: BlockwiseOptimizer) -> list[nn.Parameter] | None:
    """Tag the model; None, on every rank, if that failed on one and the engine may never be stepped."""
    params: list[nn.Parameter] = []
    failure: ValueError | None = None
    try:
        models = [(engine.module, engine.param_names)]
        params = tag_for(optimizer, models, is_stage=is_staged(engine), what_tags="deepspeed.initialize", place="json")
    except ValueError as error:  # a mistake in the model or in the settings; all ranks hear of it
        failure = error
    message = first_error(None if failure is None else str(failure))
    if message is None:
        return params
    if any(gather(bool(engine.module.training))):
        advice = "If this engine is never stepped, call model.eval() before deepspeed.initialize."
        raise ValueError(f"{message}\n{advice}") from failure
    refuse_when_trained(engine, optimizer, message)
    return None


def _read(engine: Engine, optimizer: BlockwiseOptimizer, params: list[nn.Parameter]) -> _Found:
    """Look up what the wrapper steps."""
    matched = rules_matched(names_in(engine), optimizer.block_settings)
    tp_group = _tp_group(engine, params)
    return _Found(params, list(stepped_tensors(engine, optimizer)), tp_group, matched)


def _bind(
    engine: Engine, optimizer: BlockwiseOptimizer, stepped: Sequence[Stepped], tp_group: dist.ProcessGroup | None
) -> list[TiedCopy]:
    """Bind the tensors, connect the telemetry, and describe this rank's copies of tied weights."""
    device = _device()
    cut_off_autograd(engine)
    for item in stepped:
        groups = ReductionGroups(if_many(item.dp_group), tp_group, device)
        if item.tensor is None:
            optimizer.bind_absent(item.placements, groups, device)
        else:
            optimizer.bind(item.tensor, item.placements, groups)
    connect(engine, optimizer)
    return tied_copies(engine, optimizer, stepped)


def _device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def _tp_group(engine: Engine, params: Sequence[nn.Parameter]) -> dist.ProcessGroup | None:
    tagged = [as_tagged(param) for param in params]
    shards = [(t.block_spec, t.block_shard) for t in tagged if t.block_shard is not None]
    # the *tensor* parallel group: a pipeline grid's "model parallel" group spans the stages as well
    mpu = tensor_parallel_mpu(engine)
    group = None if mpu is None else if_many(bwc_tensor_model_parallel_group(mpu))
    size = 1 if group is None else dist.get_world_size(group)
    check_clipping(engine, size)
    if size > 1 and not shards and not is_split(engine.module):
        raise ValueError(
            f"the tensor-parallel size is {size}, but no parameter is known to be split. For a Megatron-core model "
            f'import megatron_patch before deepspeed.initialize; with "tensor_parallel": {{"autotp_size": {size}}} '
            f"DeepSpeed must know the model's layers, or its partition_config match them; other tensor-parallel layers "
            f"need a ds_blockwise.tagging.module_reader.ModuleReader."
        )
    if size > 1:
        check_splits(engine.module, engine.param_names, engine.zero_optimization_stage())
    for spec, shard in shards:
        if len(shard.chunks) != size:
            raise ValueError(
                f"parameter {spec.fqn!r} is split over {len(shard.chunks)} tensor-parallel ranks, but the mpu "
                f"given to deepspeed.initialize has {size}. Pass mpu=megatron_patch.mpu_adapter()."
            )
    return group
