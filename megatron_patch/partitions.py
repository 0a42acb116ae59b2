# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's optimizer stack: what may be converted, and which parameter lies in which stepped tensor.

The only file that reads the private attributes of Megatron-core's optimizers. Checked with Megatron-core 0.16.1;
other versions are recognised by the names that they have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.package_info import __version__ as MEGATRON_VERSION
from torch import nn

from ds_blockwise.blocks.segment_table import whole_placement
from ds_blockwise.hosts.stepped_tensors import Stepped, tagged_placement, window
from ds_blockwise.parallel.agree import if_many
from ds_blockwise.parallel.reduce import ReductionGroups

TESTED = "0.16.1"
LEAVES = (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer)
_SUPPORTED = f"Supported: {', '.join(leaf.__name__ for leaf in LEAVES)}, chained in any way."

# What the code below and `stored` use, by class. A version that renamed one of these must not be half-converted.
_METHODS = {
    FP32Optimizer: ("state_dict", "sharded_state_dict", "load_state_dict", "_filter_and_reorder_param_groups"),
    Float16OptimizerWithFloat16Params: (
        "state_dict",
        "sharded_state_dict",
        "load_state_dict",
        "_filter_and_reorder_param_groups",
    ),
    DistributedOptimizer: (
        "state_dict",
        "sharded_state_dict",
        "load_state_dict",
        "load_parameter_state_from_dp_zero",
        "sharded_param_state_fully_reshardable",
        "_get_main_param_and_optimizer_states",
        "_set_main_param_and_optimizer_states",
        "_get_model_param_range_map",
    ),
}
_ATTRIBUTES = {
    FP32Optimizer: ("optimizer", "config", "init_state_fn"),
    Float16OptimizerWithFloat16Params: (
        "optimizer",
        "config",
        "init_state_fn",
        "float16_groups",
        "fp32_from_float16_groups",
        "fp32_from_fp32_groups",
    ),
    DistributedOptimizer: (
        "optimizer",
        "config",
        "init_state_fn",
        "buffers",
        "data_parallel_group",
        "ddp_config",
        "model_param_group_index_map",
        "model_float16_groups",
        "model_fp32_groups",
        "shard_fp32_from_float16_groups",
        "shard_fp32_groups",
    ),
}


def leaves_of(optimizer: Any) -> list[Any]:
    """The optimizers that step parameters, in the order in which a `ChainedOptimizer` steps them.

    Raises:
        TypeError: something in the chain is of an unknown class.
    """
    if isinstance(optimizer, ChainedOptimizer):
        return [leaf for part in optimizer.chained_optimizers for leaf in leaves_of(part)]
    if type(optimizer) not in LEAVES:
        raise TypeError(
            f"cannot convert a {type(optimizer).__name__}. {_SUPPORTED} Give convert_ what get_megatron_optimizer "
            f"returned, once, before anything else wraps it."
        )
    return [optimizer]


def check_version(leaf: Any) -> None:
    """Check that a leaf has every attribute that the conversion relies on.

    Raises:
        ImportError: this version of Megatron-core lacks some of them.
    """
    kind = type(leaf)
    missing = [name for name in _METHODS[kind] if not hasattr(kind, name)]
    if not leaf.is_stub_optimizer:
        missing += [name for name in _ATTRIBUTES[kind] if not hasattr(leaf, name)]
    if missing:
        raise ImportError(
            f"{kind.__name__} of megatron-core {MEGATRON_VERSION} has no {', '.join(missing)}; ds_blockwise was tested "
            f"with {TESTED}. Install a supported version."
        )


def check_settings(leaf: Any) -> None:
    """Check that our optimizers can do what a leaf was configured to do.

    Raises:
        ValueError: a setting that is not supported, with the way out.
    """
    config, inner = leaf.config, leaf.optimizer
    ddp_config = getattr(leaf, "ddp_config", None)
    if getattr(ddp_config, "use_megatron_fsdp", False):
        raise ValueError(
            "use_megatron_fsdp=True (--use-megatron-fsdp) keeps parameters as DTensors, which ds_blockwise cannot map. "
            "Use the distributed optimizer instead: use_distributed_optimizer=True without FSDP."
        )
    refused = (
        ("use_precision_aware_optimizer", True, "keeps moments and master weights in Transformer Engine's own formats"),
        ("optimizer_cpu_offload", True, "steps copies of the parameters on the CPU through a HybridDeviceOptimizer"),
        ("decoupled_weight_decay", False, "asks for Adam with L2 regularisation; weight decay is decoupled here"),
    )
    for name, value, why in refused:
        if getattr(config, name, not value) == value:
            raise ValueError(f"{name}={value} {why}. Set it to {not value}.")
    if config.optimizer != "adam":
        raise ValueError(
            f"optimizer={config.optimizer!r}: only 'adam' can be converted. Set optimizer='adam' (--optimizer adam); "
            f"convert_ replaces it by the optimizer that you name there."
        )
    if inner is not None and not (isinstance(inner, torch.optim.AdamW) or type(inner).__name__ == "FusedAdam"):
        raise ValueError(
            f"{type(leaf).__name__} steps with {type(inner).__name__}; only torch's AdamW and the FusedAdam of "
            f"Transformer Engine or NVIDIA apex can be replaced."
        )
    if inner is not None and any(inner.state.values()):
        raise ValueError(
            f"{type(leaf).__name__} already holds optimizer state. Call convert_ right after get_megatron_optimizer, "
            f"and load the checkpoint afterwards: AdamW's state is taken over then."
        )


def stepped_by(leaf: Any) -> list[tuple[nn.Parameter, Stepped]]:
    """What a leaf steps, in an order that is the same on all its data-parallel and tensor-parallel ranks.

    Args:
        leaf: of one of `LEAVES`, not a stub; its model parameters are tagged.

    Raises:
        ValueError: the leaf stores its shards in another way than this version knows.
    """
    if isinstance(leaf, DistributedOptimizer):
        return list(_distributed(leaf))
    if isinstance(leaf, Float16OptimizerWithFloat16Params):
        mains = {
            id(main): param
            for params, group in zip(leaf.float16_groups, leaf.fp32_from_float16_groups, strict=True)
            for param, main in zip(params, group, strict=True)
        }
        return [(p, _whole(p, t)) for t in _tensors(leaf) for p in (mains.get(id(t), t),)]
    return [(tensor, _whole(tensor, tensor)) for tensor in _tensors(leaf)]


def groups_for(leaf: Any, param: nn.Parameter, stepped: Stepped) -> ReductionGroups:
    """The process groups over which blocks of a parameter are split.

    Raises:
        ValueError: the parameter's split does not fit the tensor-parallel group.
    """
    device = param.device
    shard = cast("Any", param).block_shard
    if shard is None:
        return ReductionGroups(if_many(stepped.dp_group), None, device)
    group = tp_group_of(leaf, is_expert=not getattr(param, "allreduce", True))
    size = 1 if group is None else dist.get_world_size(group)
    if len(shard.chunks) != size:
        raise ValueError(
            f"parameter {cast('Any', param).block_spec.fqn!r} is split over {len(shard.chunks)} ranks, but its "
            f"tensor-parallel group has {size}. Expert tensor parallelism of another size than tensor parallelism is "
            f"not supported: set expert_tensor_parallel_size to tensor_model_parallel_size."
        )
    return ReductionGroups(if_many(stepped.dp_group), group, device)


def tp_group_of(leaf: Any, *, is_expert: bool) -> dist.ProcessGroup | None:
    """The ranks that share the tensors of a leaf through tensor parallelism; None if there is one."""
    if is_expert:
        return if_many(parallel_state.get_expert_tensor_parallel_group())
    own = getattr(leaf, "tp_group", None)
    return if_many(parallel_state.get_tensor_model_parallel_group() if own is None else own)


def data_peers_of(leaf: Any, chunk: nn.Module, *, is_expert: bool) -> dist.ProcessGroup | None:
    """The ranks that hold the same tensor-parallel shards as this one, whole or in parts; None if there is one."""
    if isinstance(leaf, DistributedOptimizer) and not leaf.is_stub_optimizer:
        return if_many(cast("Any", leaf).data_parallel_group)
    group = getattr(chunk, "expt_dp_group" if is_expert else "dp_cp_group", None)
    if group is None and is_expert:
        group = parallel_state.get_expert_data_parallel_group()
    if group is None:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return if_many(group)


def point_to_shards(leaf: Any) -> None:
    """Correct a `DistributedOptimizer`'s map from model parameters to the positions of their shards.

    Upstream numbers them as they lie in the buffers, but lists fp32 shards before those of 16-bit parameters; a group
    that mixes both would read and write other parameters' state. No effect where all agree.
    """
    positions = {
        id(tensor): (index, place)
        for index, group in enumerate(leaf.optimizer.param_groups)
        for place, tensor in enumerate(group["params"])
    }
    for param, shard in _shards(leaf).items():
        leaf.model_param_group_index_map[param] = positions[id(shard)]


def _tensors(leaf: Any) -> Iterator[Any]:
    for group in leaf.optimizer.param_groups:
        yield from group["params"]


def _whole(param: nn.Parameter, tensor: torch.Tensor) -> Stepped:
    tagged = cast("Any", param)
    return Stepped(tensor, (whole_placement(tagged.block_spec, tagged.block_shard),), None)


def _shards(leaf: Any) -> dict[nn.Parameter, torch.Tensor]:
    pairs: Sequence[tuple[Any, Any]] = (
        (leaf.model_float16_groups, leaf.shard_fp32_from_float16_groups),
        (leaf.model_fp32_groups, leaf.shard_fp32_groups),
    )
    return {
        param: shard
        for model_groups, shard_groups in pairs
        for params, shards in zip(model_groups, shard_groups, strict=True)
        for param, shard in zip(params, shards, strict=True)
    }


def _distributed(leaf: Any) -> Iterator[tuple[nn.Parameter, Stepped]]:
    """Every parameter of the leaf's buffers in their order, also those of which other ranks hold all."""
    shards, group = _shards(leaf), leaf.data_parallel_group
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    for buffer in leaf.buffers:
        for param, (start, _, bucket_index) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_index]
            offset, size = start - bucket.offset, bucket.grad_data.numel() // world_size
            low, high, cuts = window(offset, param.numel(), rank, world_size, size)
            shard = shards.pop(param, None)
            held = (0, 0) if low >= high else (low - offset, high - low)
            if shard is None:
                found = (0, 0)
            else:
                found = (int(leaf._get_model_param_range_map(param)["param"].start), shard.numel())
            if found != held:
                raise ValueError(
                    f"megatron-core {MEGATRON_VERSION} holds {found[1]} elements from {found[0]} of parameter "
                    f"{param.block_spec.fqn!r}, where its buffers say {held[1]} from {held[0]}; ds_blockwise, tested "
                    f"with {TESTED}, cannot map this version."
                )
            placement = tagged_placement(param, 0, held[0], held[1], cuts)
            yield param, Stepped(shard, (placement,), group)
    if shards:
        fqns = [cast("Any", param).block_spec.fqn for param in shards]
        raise ValueError(
            f"megatron-core {MEGATRON_VERSION} steps {', '.join(fqns[:3])} outside its buffers; ds_blockwise, tested "
            f"with {TESTED}, cannot map this version."
        )
