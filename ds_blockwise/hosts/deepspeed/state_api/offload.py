# SPDX-License-Identifier: Apache-2.0
"""``engine.offload_states`` and ``reload_states`` for our optimizers. Checked with DeepSpeed 0.19.8."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from deepspeed.runtime.zero.offload_states import offload_adam_states

from ds_blockwise.hosts.deepspeed.engine import ZeroStage3, ZeroStages1And2
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.second_moment import mark_settled, unsettled


def move_at_stage_3(wrapper: ZeroStage3, optimizer: BlockwiseOptimizer) -> None:
    """Let ZeRO-3 move weights and moments, which it does for its FusedAdam only, though nothing in it needs that.

    Args:
        wrapper: only this object is changed; its own method moves the rest, and its own ``reload_states`` all.
        optimizer: that it steps.
    """

    def offload_states(
        include: Collection[OffloadStateTypeEnum] | None = None,
        device: OffloadDeviceEnum = OffloadDeviceEnum.cpu,
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        wanted, done = set(OffloadStateTypeEnum if include is None else include), wrapper.offloaded_states
        moments, weights = OffloadStateTypeEnum.optim_states, OffloadStateTypeEnum.hp_params
        if weights in wanted - done:
            wrapper.hp_params_pin_buffers = [_on_host(t, pin_memory) for t in wrapper.fp32_partitioned_groups_flat]
            for tensor, copy in zip(wrapper.fp32_partitioned_groups_flat, wrapper.hp_params_pin_buffers, strict=True):
                tensor.data = copy
            done.add(weights)
        if moments in wanted - done:
            offload_adam_states(optimizer, device.value, pin_memory=pin_memory, non_blocking=non_blocking)
            done.add(moments)
        type(wrapper).offload_states(wrapper, wanted - {moments, weights}, device, pin_memory, non_blocking)

    wrapper.offload_states = offload_states


def move_at_stages_1_and_2(wrapper: ZeroStages1And2, optimizer: BlockwiseOptimizer) -> None:
    """Let second moments keep their form when ZeRO 1 or 2 moves them.

    Args:
        wrapper: only this object is changed.
        optimizer: that it steps.
    """
    wrapper.offload_states = _keeping_form(optimizer, type(wrapper).offload_states, wrapper)
    wrapper.reload_states = _keeping_form(optimizer, type(wrapper).reload_states, wrapper)


def _on_host(tensor: torch.Tensor, pin_memory: bool) -> torch.Tensor:
    copy = tensor.data.to("cpu", copy=True)
    return get_accelerator().pin_memory(copy) if pin_memory else copy


def _keeping_form(
    optimizer: BlockwiseOptimizer, move: Callable[..., None], wrapper: ZeroStages1And2
) -> Callable[..., None]:
    """``offload_states`` or ``reload_states`` of ZeRO 1 and 2, which put copies in the place of the state's tensors.

    A copy has lost the mark of `second_moment.per_block`, so that its values could be taken for one per element.
    """

    @functools.wraps(move)
    def moved(*args: object, **options: object) -> None:
        bindings = list(optimizer.bindings())
        foreign = {id(b) for b in unsettled(optimizer.state, bindings)}
        move(wrapper, *args, **options)
        if optimizer.shares_second_moment:
            mark_settled(optimizer.state, [b for b in bindings if id(b) not in foreign])

    return moved
