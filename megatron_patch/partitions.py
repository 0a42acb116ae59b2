# SPDX-License-Identifier: Apache-2.0
"""Which part of which parameter lies in which tensor that Megatron-core's optimizers step, and who shares it.

A `DistributedOptimizer` steps a contiguous part of each parameter (a shard in its own words): data-parallel rank k
steps the k-th of the equal parts that each bucket of a gradient buffer is cut into.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import nn

from ds_blockwise.blocks.segment_table import Placement
from ds_blockwise.hosts.stepped_tensors import Stepped, tagged_placement, window
from ds_blockwise.parallel.agree import if_many
from ds_blockwise.parallel.reduce import ReductionGroups
from megatron_patch.guard import MEGATRON_VERSION, SUPPORTED
from megatron_patch.wrappers import DistributedWrapper, Float16Wrapper, Wrapper


def stepped_by(wrapper: Wrapper) -> list[tuple[nn.Parameter, Stepped]]:
    """Each parameter with the tensor that a wrapper steps for it, in one order on all ranks that share its tensors.

    Args:
        wrapper: not a stub; its model parameters are tagged.

    Raises:
        ValueError: the wrapper stores its shards in another way than this version knows.
    """
    if isinstance(wrapper, DistributedOptimizer):
        return list(_stepped_shards(wrapper))
    param_of = _model_params(wrapper) if isinstance(wrapper, Float16OptimizerWithFloat16Params) else {}
    tensors = [tensor for group in wrapper.optimizer.param_groups for tensor in group["params"]]
    return [(param, _whole(param, tensor)) for tensor in tensors for param in (param_of.get(tensor, tensor),)]


def groups_for(wrapper: Wrapper, param: nn.Parameter, stepped: Stepped) -> ReductionGroups:
    """The process groups over which blocks of a parameter are split.

    Args:
        wrapper: what steps the parameter.
        param: of the model.
        stepped: what holds it, and it alone.

    Raises:
        ValueError: the parameter's split does not fit the tensor-parallel group.
    """
    (placement,) = stepped.placements
    data_parallel = if_many(stepped.dp_group)
    if placement.shard is None:
        return ReductionGroups(data_parallel, None, param.device)
    group = tp_group_of(wrapper, is_expert=not getattr(param, "allreduce", True))
    size = 1 if group is None else dist.get_world_size(group)
    if len(placement.shard.chunks) != size:
        raise ValueError(
            f"parameter {placement.spec.fqn!r} is split over {len(placement.shard.chunks)} ranks, but its "
            f"tensor-parallel group has {size}. Expert tensor parallelism of another size than tensor parallelism is "
            f"not supported: set expert_tensor_parallel_size to tensor_model_parallel_size."
        )
    return ReductionGroups(data_parallel, group, param.device)


def tp_group_of(wrapper: Wrapper, *, is_expert: bool) -> dist.ProcessGroup | None:
    """The ranks that share the tensors of a wrapper through tensor parallelism; None if there is one."""
    if is_expert:
        return if_many(parallel_state.get_expert_tensor_parallel_group())
    own = getattr(wrapper, "tp_group", None)
    return if_many(parallel_state.get_tensor_model_parallel_group() if own is None else own)


def data_peers_of(wrapper: Wrapper, chunk: nn.Module, *, is_expert: bool) -> dist.ProcessGroup | None:
    """The ranks that hold the same tensor-parallel shards as this one, whole or in parts; None if there is one."""
    if isinstance(wrapper, DistributedOptimizer) and not wrapper.is_stub_optimizer:
        return if_many(wrapper.data_parallel_group)
    group = getattr(chunk, "expt_dp_group" if is_expert else "dp_cp_group", None)
    if group is None and is_expert:
        group = parallel_state.get_expert_data_parallel_group()
    if group is None:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return if_many(group)


def point_to_shards(wrapper: DistributedWrapper) -> None:
    """Correct a `DistributedOptimizer`'s map from model parameters to the places of their shards in param groups.

    Upstream numbers them as they lie in the buffers, but lists fp32 shards before those of 16-bit parameters; a group
    that mixes both would read and write other parameters' state. No effect where all agree.
    """
    places = {
        tensor: (index, place)
        for index, group in enumerate(wrapper.optimizer.param_groups)
        for place, tensor in enumerate(group["params"])
    }
    for param, shard in shards_of(wrapper).items():
        wrapper.model_param_group_index_map[param] = places[shard]


def _model_params(wrapper: Float16Wrapper) -> dict[torch.Tensor, nn.Parameter]:
    """The 16-bit parameter of which each fp32 tensor is the master copy."""
    return {
        main: param
        for params, mains in zip(wrapper.float16_groups, wrapper.fp32_from_float16_groups, strict=True)
        for param, main in zip(params, mains, strict=True)
    }


def _whole(param: nn.Parameter, tensor: torch.Tensor) -> Stepped:
    return Stepped(tensor, (tagged_placement(param, 0, 0, param.numel(), ()),), None)


def gradient_of(wrapper: DistributedWrapper, param: nn.Parameter, shard: torch.Tensor) -> torch.Tensor:
    """What ranks have accumulated and averaged for a shard: 1-D, in the dtype of the buffer.

    Args:
        wrapper: what steps the shard.
        param: of the model.
        shard: this rank's of the parameter.
    """
    start = wrapper._get_model_param_range_map(param)["param"].start
    accumulated: torch.Tensor = param.main_grad  # type: ignore[attr-defined]  # of every parameter in a buffer
    return accumulated.view(-1)[start : start + shard.numel()]


def weights_of(wrapper: DistributedWrapper, param: nn.Parameter) -> torch.Tensor:
    """What of the model's weights a rank writes after its step, and then sends: 1-D, in the dtype of the model.

    Args:
        wrapper: what steps a shard of the parameter.
        param: of the model.
    """
    buffer, _, bucket = wrapper.model_param_gbuf_map[param]
    place = wrapper._get_model_param_range_map(param)["gbuf_world_in_bucket"]
    return wrapper.buffers[buffer].buckets[bucket].param_data.view(-1)[place.start : place.end]


def shards_of(wrapper: DistributedWrapper) -> dict[nn.Parameter, torch.Tensor]:
    """This rank's shard of each model parameter of which it steps something."""
    return {
        param: shard
        for model_groups, shard_groups in (
            (wrapper.model_float16_groups, wrapper.shard_fp32_from_float16_groups),
            (wrapper.model_fp32_groups, wrapper.shard_fp32_groups),
        )
        for params, shards in zip(model_groups, shard_groups, strict=True)
        for param, shard in zip(params, shards, strict=True)
    }


def _stepped_shards(wrapper: DistributedWrapper) -> Iterator[tuple[nn.Parameter, Stepped]]:
    """Every parameter of the wrapper's buffers in their order, also those of which other ranks hold all."""
    shards, group = shards_of(wrapper), wrapper.data_parallel_group
    for param, placement in _placements(wrapper):
        shard = shards.pop(param, None)
        start, numel = 0, 0
        if shard is not None:
            start, numel = wrapper._get_model_param_range_map(param)["param"].start, shard.numel()
        if (start, numel) != (placement.param_start, placement.numel):
            raise ValueError(
                f"megatron-core {MEGATRON_VERSION} holds {numel} elements from {start} of parameter "
                f"{placement.spec.fqn!r}, where its buffers say {placement.numel} from {placement.param_start}; "
                f"ds_blockwise, which supports {SUPPORTED}, cannot map this version."
            )
        yield param, Stepped(shard, (placement,), group)
    if shards:
        fqns = [tagged_placement(param, 0, 0, 0, ()).spec.fqn for param in shards]
        raise ValueError(
            f"megatron-core {MEGATRON_VERSION} steps {', '.join(fqns[:3])} outside its buffers; ds_blockwise, which "
            f"supports {SUPPORTED}, cannot map this version."
        )


def _placements(wrapper: DistributedWrapper) -> Iterator[tuple[nn.Parameter, Placement]]:
    """What this rank must hold of each parameter, worked out from the buffers alone."""
    group = wrapper.data_parallel_group
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    for buffer in wrapper.buffers:
        for param, (start, _, bucket_index) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_index]
            offset, size = start - bucket.offset, bucket.grad_data.numel() // world_size
            low, high, cuts = window(offset, param.numel(), rank, world_size, size)
            param_start, numel = (0, 0) if low >= high else (low - offset, high - low)
            yield param, tagged_placement(param, 0, param_start, numel, cuts)
