# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed: registration, refusals, and the map from the wrappers' flat tensors to parameters.

The only file that knows DeepSpeed's private attributes. The map is computed from each wrapper's own lists in
storage order, never from ``_hp_mapping``, which is wrong with ``round_robin_gradients``. Checked with DeepSpeed 0.19.8.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any, cast
from weakref import WeakSet

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.bwc import bwc_tensor_model_parallel_group
from torch import nn

from ds_blockwise.adam_mini import BlockwiseAdamMini
from ds_blockwise.adamw import BlockwiseAdamW
from ds_blockwise.blocks import BlockSpec
from ds_blockwise.deepspeed_autotp import check_splits, with_empty_shards
from ds_blockwise.deepspeed_checks import (
    check_client,
    check_clipping,
    check_config,
    check_experts,
    check_model,
    check_sequence_parallel,
    tensor_parallel_mpu,
)
from ds_blockwise.deepspeed_pipeline import is_staged, names_in, tied_copies
from ds_blockwise.deepspeed_telemetry import connect
from ds_blockwise.hosting import Stepped, check_agreement, if_many, raise_together, tagged_placement, window
from ds_blockwise.optimizer import BlockwiseOptimizer
from ds_blockwise.reduce import ReductionGroups
from ds_blockwise.schedules import SCHEDULES
from ds_blockwise.stages import TiedCopy, check_rules, check_tied, rules_matched
from ds_blockwise.table import Placement, whole_placement
from ds_blockwise.tagging import tag_with_policy

logger = logging.getLogger(__name__)

OPTIMIZERS: tuple[type[BlockwiseOptimizer], ...] = (BlockwiseAdamW, BlockwiseAdamMini)
_HOOK = "_configure_optimizer"
_EARLY_HOOK = "_configure_distributed_model"  # where DeepSpeed first looks at the parameters
_TAGGED_HERE: WeakSet[nn.Module] = WeakSet()


def register() -> None:
    """Make the optimizers and schedules available by name in a DeepSpeed JSON; called by ``import ds_blockwise``.

    Idempotent. Adds names to ``torch.optim`` and ``deepspeed.runtime.lr_schedules``, the classes to ZeRO's list of
    supported optimizers, and hooks around two methods of the engine; without the second one, only the reason of a
    refusal would be lost.

    Raises:
        ImportError: this DeepSpeed has no such method.
    """
    for optimizer in OPTIMIZERS:
        setattr(torch.optim, optimizer.__name__, optimizer)
        if optimizer not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
            zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(optimizer)
    for schedule in SCHEDULES:
        setattr(lr_schedules, schedule.__name__, schedule)
    original = getattr(DeepSpeedEngine, _HOOK, None)
    if original is None:
        raise ImportError(
            f"DeepSpeed {deepspeed.__version__} has no DeepSpeedEngine.{_HOOK}; ds_blockwise was tested with 0.19.8. "
            f"Install a supported version."
        )
    if getattr(original, "calls_ds_blockwise", False):
        return

    early = getattr(DeepSpeedEngine, _EARLY_HOOK, None)
    if early is not None:

        @functools.wraps(early)
        def check_and_configure(self: Any, model: nn.Module) -> None:
            named = self.optimizer_name() in [optimizer.__name__ for optimizer in OPTIMIZERS]
            if named or isinstance(self.client_optimizer, BlockwiseOptimizer):
                check_model(model)
            early(self, model)

        setattr(DeepSpeedEngine, _EARLY_HOOK, check_and_configure)

    @functools.wraps(original)
    def configure_and_attach(self: Any, client_optimizer: Any, model_parameters: Any) -> None:
        names = [optimizer.__name__ for optimizer in OPTIMIZERS]
        if isinstance(client_optimizer, BlockwiseOptimizer):
            check_config(self, type(client_optimizer).__name__)
            check_experts(self, client_optimizer.param_groups if self.zero_optimization() else None)
        elif client_optimizer is None and self.optimizer_name() in names:
            check_config(self, self.optimizer_name())
            check_experts(self, model_parameters)
        else:
            check_client(client_optimizer)
        original(self, client_optimizer, model_parameters)
        if isinstance(self.basic_optimizer, BlockwiseOptimizer):
            attach(self)

    cast("Any", configure_and_attach).calls_ds_blockwise = True
    setattr(DeepSpeedEngine, _HOOK, configure_and_attach)


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
            f"{', '.join(o.__name__ for o in OPTIMIZERS)}. Under CPU offload Accelerate replaces a client optimizer by "
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
        matched = rules_matched(names_in(engine), optimizer.policy)
        specs = _specs(engine, optimizer)
        tp_group = _tp_group(engine, specs)
        stepped = list(_stepped_tensors(engine, optimizer))
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
    check_rules(matched, optimizer.policy)
    check_tied(tied)
    peers = if_many(_or_world(engine.seq_data_parallel_group))
    check_agreement(optimizer, stepped, peers, tp_group, "JSON")
    # Not at the top: whichever of our modules is imported first brings DeepSpeed in, and that imports this one.
    from ds_blockwise.deepspeed_checkpoint import guard

    guard(engine)
    if engine.optimizer is optimizer:
        # DeepSpeed's wrappers skip a step with NaN on all ranks; without a wrapper nobody looks
        device = torch.device(get_accelerator().current_device_name())
        everyone = _or_world(None)  # the other stages of a pipeline must skip it too
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
        tag_with_policy(module, optimizer.policy, engine.param_names, is_stage=is_staged(engine))
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


# ------------------------------------------------------------------- wrappers' flat tensors


def _stepped_tensors(engine: Any, optimizer: BlockwiseOptimizer) -> Iterator[Stepped]:
    wrapper = engine.optimizer
    if wrapper is optimizer:
        yield from _whole((p, p) for group in optimizer.param_groups for p in group["params"])
    elif isinstance(wrapper, DeepSpeedZeroOptimizer):
        yield from _zero_1_and_2(wrapper)
    elif isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        yield from _zero_3(wrapper)
    elif isinstance(wrapper, BF16_Optimizer):
        yield from _bf16_optimizer(wrapper)
    elif isinstance(wrapper, FP16_UnfusedOptimizer):
        yield from _whole(
            (master, param)
            for masters, params in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
            for master, param in zip(masters, params, strict=True)
        )
    else:
        raise ValueError(
            f"DeepSpeed {deepspeed.__version__} wraps the optimizer in {type(wrapper).__name__}, which ds_blockwise "
            f"does not know. Use ZeRO stage 0, 1, 2 or 3 with fp32, bf16 or fp16."
        )


def _whole(pairs: Any) -> Iterator[Stepped]:
    for tensor, param in pairs:
        placement = whole_placement(param.block_spec, param.block_shard)
        yield Stepped(tensor, (placement,), None)


def _window(
    params: list[nn.Parameter], offsets: list[int], rank: int, world_size: int, size: int
) -> tuple[Placement, ...]:
    """Placements of one rank's window ``[rank * size, (rank + 1) * size)`` of a group's flat buffer."""
    low = rank * size
    placements = []
    for param, offset in zip(params, offsets, strict=True):
        start, stop, cuts = window(offset, param.numel(), rank, world_size, size)
        if start < stop:
            placements.append(tagged_placement(param, start - low, start - offset, stop - start, cuts))
        else:
            placements.append(tagged_placement(param, min(max(offset - low, 0), size), 0, 0, cuts))
    return tuple(placements)


def _zero_1_and_2(wrapper: Any) -> Iterator[Stepped]:
    for index, params in enumerate(wrapper.round_robin_bit16_groups):
        group = _or_world(wrapper.real_dp_process_group[index])
        offsets = _zero_1_and_2_offsets(wrapper, index, params)
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        size = int(wrapper.partition_size[index])
        yield Stepped(
            wrapper.single_partition_of_fp32_groups[index],
            _window(params, offsets, rank, world_size, size),
            group,
        )


def _zero_1_and_2_offsets(wrapper: Any, index: int, params: list[nn.Parameter]) -> list[int]:
    known = getattr(wrapper, "round_robin_bit16_offsets", None)
    offsets = _cumulative(params) if known is None else [int(o) for o in known[index]]
    flat = wrapper.bit16_groups_flat[index]
    for param, offset in zip(params, offsets, strict=True):
        # the parameters are views of the flat buffer, so the buffer itself tells whether the offsets are right
        found = (param.data_ptr() - flat.data_ptr()) // flat.element_size()
        if param.numel() and found != offset:
            raise ValueError(
                f"DeepSpeed {deepspeed.__version__} stores parameter {cast('Any', param).block_spec.fqn!r} at offset "
                f"{found} of its flat buffer, not at {offset} as its lists say; ds_blockwise cannot map this version."
            )
    return offsets


def _bf16_optimizer(wrapper: Any) -> Iterator[Stepped]:
    for index, params in enumerate(wrapper.bf16_groups):
        group = _or_world(wrapper.real_dp_process_group[index])
        tensor = wrapper.fp32_groups_flat_partition[index]
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        placements = _window(params, _cumulative(params), rank, world_size, tensor.numel())
        yield Stepped(tensor, placements, group)


def _zero_3(wrapper: Any) -> Iterator[Stepped]:
    for index, params in enumerate(wrapper.fp16_groups):
        tensor = wrapper.fp32_partitioned_groups_flat[index]
        groups = {getattr(p, "ds_process_group", wrapper.dp_process_group) for p in params}
        if len(groups) != 1:
            raise ValueError(
                f"ZeRO-3 sub-group {index} mixes parameters of {len(groups)} process groups, which cannot be mapped."
            )
        group = _or_world(groups.pop())
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        placements, offset = [], 0
        for param in params:
            piece, numel = param.partition_numel(), param.ds_numel
            start = min(rank * piece, numel)
            cuts = tuple(k * piece for k in range(1, world_size) if k * piece < numel)
            held = min(piece, numel - start)
            placements.append(tagged_placement(param, offset, start if held else 0, held, cuts))
            offset += piece
        if offset != tensor.numel():
            raise ValueError(
                f"ZeRO-3 sub-group {index} has {tensor.numel()} elements but its parameters' partitions {offset}. "
                f"NVMe offload is not supported; otherwise this DeepSpeed ({deepspeed.__version__}) stores them in a "
                f"way that ds_blockwise does not know."
            )
        yield Stepped(tensor, tuple(placements), group)


def _cumulative(params: list[nn.Parameter]) -> list[int]:
    offsets, at = [], 0
    for param in params:
        offsets.append(at)
        at += param.numel()
    return offsets


# ---------------------------------------------------------------------- process groups


def _or_world(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    return dist.group.WORLD if group is None else group  # type: ignore[return-value]


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
            f"need a ds_blockwise.readers.ModuleReader."
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


register()
