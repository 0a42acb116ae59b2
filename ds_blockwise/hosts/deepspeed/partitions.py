# SPDX-License-Identifier: Apache-2.0
"""Which elements of which parameters lie in the tensors that DeepSpeed steps, for each of its optimizer wrappers.

Computed from the wrapper's own lists in storage order, never from ``_hp_mapping``, which is wrong with
``round_robin_gradients``. Checked with DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from ds_blockwise.blocks.segment_table import Placement
from ds_blockwise.blocks.tagged_parameter import as_tagged, tags_of
from ds_blockwise.hosts.deepspeed.engine import (
    BF16Optimizer,
    Engine,
    UnfusedOptimizer,
    ZeroStage3,
    ZeroStages1And2,
    is_wrapped,
)
from ds_blockwise.hosts.deepspeed.releases import flat_offsets, offsets_of
from ds_blockwise.hosts.stepped_tensors import Stepped, tagged_placement, window
from ds_blockwise.optimizers.base import BlockwiseOptimizer


def stepped_tensors(engine: Engine, optimizer: BlockwiseOptimizer) -> Iterator[Stepped]:
    """Every tensor that the engine steps on this rank, with the parameters in it, in the engine's order.

    Args:
        engine: with its parameters tagged.
        optimizer: its basic optimizer.

    Raises:
        ValueError: this DeepSpeed wraps the optimizer in a class that is not known here.
    """
    wrapper = engine.optimizer
    if not is_wrapped(engine):
        params = (p for group in optimizer.param_groups for p in group["params"])
        # The wrappers leave out frozen parameters and those without elements; here nothing does. A peer may hold the
        # elements of a tagged one.
        yield from _whole((p, p) for p in params if p.requires_grad and (p.numel() or tags_of(p) is not None))
    elif isinstance(wrapper, DeepSpeedZeroOptimizer):
        yield from _zero_1_and_2(wrapper)
    elif isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        yield from zero_3_tensors(wrapper)
    elif isinstance(wrapper, BF16_Optimizer):
        yield from _bf16_optimizer(wrapper)
    elif isinstance(wrapper, FP16_UnfusedOptimizer):
        yield from _unfused(wrapper)
    else:
        raise ValueError(
            f"DeepSpeed {deepspeed.__version__} wraps the optimizer in {type(wrapper).__name__}, which ds_blockwise "
            f"does not know. Use ZeRO stage 0, 1, 2 or 3 with fp32, bf16 or fp16."
        )


def _whole(pairs: Iterable[tuple[torch.Tensor, nn.Parameter]]) -> Iterator[Stepped]:
    for tensor, param in pairs:
        yield Stepped(tensor, (tagged_placement(param, 0, 0, param.numel(), ()),), None)


def _unfused(wrapper: UnfusedOptimizer) -> Iterator[Stepped]:
    for masters, params in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
        yield from _whole(zip(masters, params, strict=True))


def zero_window(
    params: Sequence[nn.Parameter], offsets: Sequence[int], rank: int, world_size: int, size: int
) -> tuple[Placement, ...]:
    """Placements of one rank's window ``[rank * size, (rank + 1) * size)`` of a group's flat buffer.

    Args:
        params: of the group, in the order of the buffer; tagged.
        offsets: of each in the buffer.
        rank: of the window.
        world_size: number of windows.
        size: elements of a window.

    Returns:
        One for every parameter; with ``numel`` 0 for those of which the window holds nothing.
    """
    low = rank * size
    placements = []
    for param, offset in zip(params, offsets, strict=True):
        start, stop, cuts = window(offset, param.numel(), rank, world_size, size)
        if start < stop:
            placements.append(tagged_placement(param, start - low, start - offset, stop - start, cuts))
        else:
            placements.append(tagged_placement(param, min(max(offset - low, 0), size), 0, 0, cuts))
    return tuple(placements)


def _zero_1_and_2(wrapper: ZeroStages1And2) -> Iterator[Stepped]:
    for index, params in enumerate(wrapper.round_robin_bit16_groups):
        group = or_world(wrapper.real_dp_process_group[index])
        offsets = _zero_1_and_2_offsets(wrapper, index, params)
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        size = int(wrapper.partition_size[index])
        yield Stepped(
            wrapper.single_partition_of_fp32_groups[index],
            zero_window(params, offsets, rank, world_size, size),
            group,
        )


def _zero_1_and_2_offsets(wrapper: ZeroStages1And2, index: int, params: Sequence[nn.Parameter]) -> list[int]:
    offsets = flat_offsets(wrapper, index, params)
    flat = wrapper.bit16_groups_flat[index]
    for param, offset in zip(params, offsets, strict=True):
        # the parameters are views of the flat buffer, so the buffer itself tells whether the offsets are right
        found = (param.data_ptr() - flat.data_ptr()) // flat.element_size()
        if param.numel() and found != offset:
            raise ValueError(
                f"DeepSpeed {deepspeed.__version__} stores parameter {as_tagged(param).block_spec.fqn!r} at offset "
                f"{found} of its flat buffer, not at {offset} as its lists say; ds_blockwise cannot map this version."
            )
    return offsets


def _bf16_optimizer(wrapper: BF16Optimizer) -> Iterator[Stepped]:
    for index, params in enumerate(wrapper.bf16_groups):
        group = or_world(wrapper.real_dp_process_group[index])
        tensor = wrapper.fp32_groups_flat_partition[index]
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        placements = zero_window(params, offsets_of(params), rank, world_size, tensor.numel())
        yield Stepped(tensor, placements, group)


def zero_3_tensors(wrapper: ZeroStage3) -> Iterator[Stepped]:
    """The tensors that a rank steps at ZeRO stage 3: per sub-group, its piece of each parameter one after the other.

    Raises:
        ValueError: the pieces do not make up the tensor, or a sub-group has parameters of several process groups.
    """
    for index, params in enumerate(wrapper.fp16_groups):
        tensor = wrapper.fp32_partitioned_groups_flat[index]
        groups = {getattr(p, "ds_process_group", wrapper.dp_process_group) for p in params}
        if len(groups) != 1:
            raise ValueError(
                f"ZeRO-3 sub-group {index} mixes parameters of {len(groups)} process groups, which cannot be mapped."
            )
        group = or_world(groups.pop())
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


def or_world(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group, or all ranks where DeepSpeed gives none."""
    return dist.group.WORLD if group is None else group  # type: ignore[return-value]
