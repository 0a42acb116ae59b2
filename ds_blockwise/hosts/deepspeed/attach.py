# SPDX-License-Identifier: Apache-2.0
"""Tells the optimizer of an engine what lies in the tensors that it steps: tags, splits, process groups."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast
from weakref import WeakSet

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.bwc import bwc_tensor_model_parallel_group
from torch import nn

from ds_blockwise.blocks.spec import BlockSpec
from ds_blockwise.hosts.deepspeed.autotp import check_splits, with_empty_shards
from ds_blockwise.hosts.deepspeed.checks import (
    check_clipping,
    check_sequence_parallel,
    tensor_parallel_mpu,
)
from ds_blockwise.hosts.deepspeed.monitor import connect
from ds_blockwise.hosts.deepspeed.partitions import or_world, stepped_tensors
from ds_blockwise.hosts.deepspeed.pipeline import is_staged, names_in, tied_copies
from ds_blockwise.hosts.deepspeed.refusals import check_config
from ds_blockwise.hosts.pipeline_stages import TiedCopy, check_rules, check_tied, rules_matched
from ds_blockwise.hosts.stepped_tensors import Stepped, check_agreement
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.parallel.agree import if_many, raise_together
from ds_blockwise.parallel.reduce import ReductionGroups
from ds_blockwise.tagging.tag import tag_with_settings

logger = logging.getLogger(__name__)

_TAGGED_HERE: WeakSet[nn.Module] = WeakSet()


def attach(engine: Any) -> None:
    """Tell an engine's optimizer what lies in the tensors that it steps; ``deepspeed.initialize`` calls this.

    A collective over all ranks. Call it yourself only if an engine was built by code that replaced the hook.

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
    stepped: list[Stepped] = []
    matched: list[bool] = []
    tied: list[TiedCopy] = []
    tp_group: dist.ProcessGroup | None = None
    failure: Exception | None = None
    try:
        check_config(engine, type(optimizer).__name__)
        check_sequence_parallel(engine)
        matched = rules_matched(names_in(engine), optimizer.block_settings)
        specs = _specs(engine, optimizer)
        tp_group = _tp_group(engine, specs)
        stepped = list(stepped_tensors(engine, optimizer))
    except Exception as error:  # a rank that fails alone would leave the others waiting: all hear of it, all raise
        failure = error
    raise_together(failure)
    stepped = with_empty_shards(stepped, list(specs), tp_group)
    try:
        _bind(optimizer, stepped, tp_group)
        connect(engine, optimizer)
        tied = tied_copies(engine, optimizer, stepped)
    except Exception as error:  # all ranks hear of it and raise, as above
        failure = error
    raise_together(failure)
    check_rules(matched, optimizer.block_settings)
    check_tied(tied)
    peers = if_many(or_world(engine.seq_data_parallel_group))
    check_agreement(optimizer, stepped, peers, tp_group, "JSON")
    # Not at the top: whichever of our modules is imported first brings DeepSpeed in, and that imports this one.
    from ds_blockwise.hosts.deepspeed.checkpoint.load import guard

    guard(engine)
    if engine.optimizer is optimizer:
        # DeepSpeed's wrappers skip a step with NaN on all ranks; without a wrapper nobody looks
        device = torch.device(get_accelerator().current_device_name())
        everyone = or_world(None)  # the other stages of a pipeline must skip it too
        optimizer.skip_non_finite(ReductionGroups(if_many(everyone), None, device))
    if engine.zero_round_robin_gradients() and engine.global_rank == 0:
        logger.warning(
            "round_robin_gradients: training is exact, but DeepSpeed %s mixes up parameters when it converts such a "
            "run to a universal checkpoint. Resume with the same number of ranks, or set it to false.",
            deepspeed.__version__,
        )


def _bind(optimizer: BlockwiseOptimizer, stepped: list[Stepped], tp_group: dist.ProcessGroup | None) -> None:
    device = torch.device(get_accelerator().current_device_name())
    for item in stepped:
        groups = ReductionGroups(if_many(item.dp_group), tp_group, device)
        if item.tensor is None:
            optimizer.bind_absent(item.placements, groups, device)
        else:
            optimizer.bind(item.tensor, item.placements, groups)


# --------------------------------------------------------------------------- parameters


def _specs(engine: Any, optimizer: BlockwiseOptimizer) -> dict[nn.Parameter, BlockSpec]:
    module = engine.module
    params = [p for p in module.parameters() if p.requires_grad]
    tagged = [p for p in params if hasattr(p, "block_spec")]
    if not tagged or module in _TAGGED_HERE:
        tag_with_settings(module, optimizer.block_settings, engine.param_names, is_stage=is_staged(engine))
        _TAGGED_HERE.add(module)
    elif len(tagged) < len(params):
        missing = next(engine.param_names.get(p) for p in params if not hasattr(p, "block_spec"))
        raise ValueError(
            f"parameter {missing!r} is not tagged although others are. Call tag_parameters(model) after the last "
            f"change to the model, or not at all (deepspeed.initialize does it)."
        )
    else:
        for param in params:
            cast("Any", param).block_spec = optimizer.spec_of(cast("Any", param).block_spec)
    return {p: cast("Any", p).block_spec for p in params}


# ---------------------------------------------------------------------- process groups


def _tp_group(engine: Any, specs: Mapping[nn.Parameter, BlockSpec]) -> dist.ProcessGroup | None:
    shards = {p: s for p in specs if (s := cast("Any", p).block_shard) is not None}
    # the *tensor* parallel group: a pipeline grid's "model parallel" group spans the stages as well
    mpu = tensor_parallel_mpu(engine)
    group = None if mpu is None else if_many(bwc_tensor_model_parallel_group(mpu))
    size = 1 if group is None else dist.get_world_size(group)
    check_clipping(engine, size)
    if size > 1 and not shards:
        raise ValueError(
            f"the tensor-parallel size is {size}, but no parameter is known to be split. For a Megatron-core model "
            f'import megatron_patch before deepspeed.initialize; with "tensor_parallel": {{"autotp_size": {size}}} '
            f"DeepSpeed must know the model's layers, or its partition_config match them; other tensor-parallel layers "
            f"need a ds_blockwise.tagging.module_reader.ModuleReader."
        )
    if size > 1:
        check_splits(engine.module, engine.param_names, engine.zero_optimization_stage())
    for param, shard in shards.items():
        if len(shard.chunks) != size:
            raise ValueError(
                f"parameter {specs[param].fqn!r} is split over {len(shard.chunks)} tensor-parallel ranks, but the mpu "
                f"given to deepspeed.initialize has {size}. Pass mpu=megatron_patch.mpu_adapter()."
            )
    return group
