# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's state API (``safe_get_full_optimizer_state`` and its like) for our optimizers.

DeepSpeed looks for state in the shape of its flat partitions, at the offsets of ``_hp_mapping`` (ZeRO 1 and 2) or of
ZeRO-3's own pieces. That is wrong for one second moment per block, for ``round_robin_gradients`` and, where ZeRO-3 sets
a parameter whose pieces are padded, on the last rank. Where a key is missing, only ranks that hold elements raise, and
the others wait. So the methods that the API calls are replaced, on the objects of one engine: each parameter's, or
those of ZeRO-3's wrapper. Checked with DeepSpeed 0.19.8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from ds_blockwise.hosts.deepspeed.engine import (
    BF16Optimizer,
    Engine,
    Wrapper,
    ZeroStage3,
    ZeroStages1And2,
    is_partitioned,
)
from ds_blockwise.hosts.deepspeed.state_api.offload import move_at_stage_3, move_at_stages_1_and_2
from ds_blockwise.hosts.parameter_states import ParameterStates
from ds_blockwise.optimizers.base import BlockwiseOptimizer

_ON_A_PARAMETER = (  # what the API looks for on a parameter outside ZeRO-3
    "_hp_mapping",
    "get_full_hp_param",
    "set_full_hp_param",
    "get_full_hp_grad",
    "set_full_hp_grad",
)
_ON_THE_WRAPPER = (  # what it calls on ZeRO-3's wrapper
    "get_full_hp_param",
    "set_full_hp_param",
    "get_local_fp32_param",
    "set_local_hp_param",
    "get_hp_param_device",
    "set_fp32_grad_for_param",
    "update_fp32_grad_for_param_vectorized",
)


def show_state(engine: Engine, optimizer: BlockwiseOptimizer, params: Iterable[nn.Parameter]) -> None:
    """Let DeepSpeed's state API show and set what an optimizer of ours keeps, and ``offload_states`` move it.

    Args:
        engine: a ``DeepSpeedEngine``; only this object, its wrapper and ``params`` are changed.
        optimizer: its basic optimizer, with every tensor bound.
        params: the trained parameters, tagged.
    """
    shapes = {param: param.ds_shape if is_partitioned(param) else param.shape for param in params}
    wrapper, states = engine.optimizer, ParameterStates(optimizer, shapes)
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        methods = _Stage3Methods(wrapper, states)
        for name in _ON_THE_WRAPPER:
            setattr(wrapper, name, getattr(methods, name))
        move_at_stage_3(wrapper, optimizer)
        return
    _put_on_parameters(wrapper, states)
    engine.destroy = functools.partial(_destroy, engine, states)
    if isinstance(wrapper, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        wrapper._link_all_hp_params = functools.partial(_link_again, wrapper, states)
    if isinstance(wrapper, DeepSpeedZeroOptimizer):
        move_at_stages_1_and_2(wrapper, optimizer)


class _Stage3Methods:
    """What the API calls on ZeRO-3's wrapper. Frozen parameters, and state on NVMe, stay DeepSpeed's own."""

    def __init__(self, wrapper: ZeroStage3, states: ParameterStates) -> None:
        self._wrapper, self._own, self._states = wrapper, type(wrapper), states

    def get_full_hp_param(self, param: nn.Parameter, optim_state_key: str | None = None) -> torch.Tensor | None:
        if optim_state_key is None or not self._is_ours(param):
            return self._own.get_full_hp_param(self._wrapper, param, optim_state_key)
        return self._states.full(param, optim_state_key)

    def set_full_hp_param(self, value: torch.Tensor, param: nn.Parameter, optim_state_key: str | None = None) -> None:
        if not self._is_ours(param):
            return self._own.set_full_hp_param(self._wrapper, value, param, optim_state_key)
        return self._states.set_full(param, value, optim_state_key)

    def get_local_fp32_param(self, param: nn.Parameter, optim_state_key: str | None = None) -> torch.Tensor | None:
        if optim_state_key is None or not self._is_ours(param):
            return self._own.get_local_fp32_param(self._wrapper, param, optim_state_key)
        return self._states.piece(param, optim_state_key, _piece_numel(param))

    def set_local_hp_param(self, value: torch.Tensor, param: nn.Parameter, optim_state_key: str | None = None) -> None:
        if not self._is_ours(param):
            return self._own.set_local_hp_param(self._wrapper, value, param, optim_state_key)
        return self._states.set_piece(param, value, optim_state_key, _piece_numel(param))

    def get_hp_param_device(self, param: nn.Parameter, optim_state_key: str | None = None) -> torch.device | None:
        if optim_state_key is None or not self._is_ours(param):
            return self._own.get_hp_param_device(self._wrapper, param, optim_state_key)
        return self._states.device(param, optim_state_key)

    def set_fp32_grad_for_param(self, value: torch.Tensor, param: nn.Parameter) -> None:
        self._own.set_fp32_grad_for_param(self._wrapper, _padded(value, param), param)

    def update_fp32_grad_for_param_vectorized(
        self, update_func: Callable[[torch.Tensor, nn.Parameter], torch.Tensor], param_list: Sequence[nn.Parameter]
    ) -> None:
        def padded(gradient: torch.Tensor, param: nn.Parameter) -> torch.Tensor:
            return _padded(update_func(gradient, param), param)

        self._own.update_fp32_grad_for_param_vectorized(self._wrapper, padded, param_list)

    def _is_ours(self, param: nn.Parameter) -> bool:
        return param in self._states.parts and not self._wrapper.swap_optimizer


def _piece_numel(param: nn.Parameter) -> int:
    return param.partition_numel() if is_partitioned(param) else param.numel()


def _padded(value: torch.Tensor, param: nn.Parameter) -> torch.Tensor:
    """A whole gradient in as many elements as all ranks' pieces have; DeepSpeed's last rank fails on fewer."""
    if not is_partitioned(param):
        return value
    if value.numel() != param.ds_numel:
        raise ValueError(
            f"the gradient of a parameter of shape {tuple(param.ds_shape)} must have {param.ds_numel} elements, got "
            f"one of shape {tuple(value.shape)}."
        )
    whole = param.partition_numel() * dist.get_world_size(param.ds_process_group)
    return nn.functional.pad(value.reshape(-1), (0, whole - param.ds_numel))


class _ParameterMethod:
    """A method that the API calls on a parameter; a pickled model leaves the engine's state behind."""

    def __init__(self, call: Callable[..., torch.Tensor | None], of: ParameterStates | None = None) -> None:
        self._call, self.of = call, of

    def __call__(self, *args: object, **options: object) -> torch.Tensor | None:
        return self._call(*args, **options)

    def __reduce__(self) -> tuple[type[_ParameterMethod], tuple[Callable[..., None]]]:
        return _ParameterMethod, (_nothing,)


def _nothing(*_args: object, **_options: object) -> None:
    """What there is to show or set without an engine."""


def _put_on_parameters(wrapper: Wrapper, states: ParameterStates) -> None:
    is_linked = isinstance(wrapper, (DeepSpeedZeroOptimizer, BF16_Optimizer))
    for param in states.parts:
        methods: dict[str, Callable[..., torch.Tensor | None]] = {
            "get_full_hp_param": functools.partial(states.full, param),
            "set_full_hp_param": functools.partial(states.set_full, param),
        }
        if not is_linked:
            # DeepSpeed links nothing at ZeRO stage 0, and the API asks parameters with this attribute only
            vars(param).setdefault("_hp_mapping", None)
            methods |= {"get_full_hp_grad": _nothing, "set_full_hp_grad": _nothing}
        elif getattr(wrapper, "round_robin_gradients", False):
            methods |= {"get_full_hp_grad": _refuse_gradient, "set_full_hp_grad": _refuse_gradient}
        for name, method in methods.items():
            setattr(param, name, _ParameterMethod(method, states))


def _refuse_gradient(*_args: object) -> None:
    raise ValueError(
        f"DeepSpeed {deepspeed.__version__} mixes up gradients of different parameters under round_robin_gradients, "
        f'with any optimizer. Set "round_robin_gradients": false to see or set them. Weights and moments are right.'
    )


def _link_again(wrapper: ZeroStages1And2 | BF16Optimizer, states: ParameterStates) -> None:
    """Do what the wrapper's own method does at a load and after ``reload_states``; it puts DeepSpeed's methods back."""
    type(wrapper)._link_all_hp_params(wrapper)
    _put_on_parameters(wrapper, states)


def _destroy(engine: Engine, states: ParameterStates) -> None:
    """As the engine's own; and its model's parameters forget it, so that its state can be freed."""
    for param in states.parts:
        shown = vars(param).get("get_full_hp_param")
        # another engine over the model may have come since
        if isinstance(shown, _ParameterMethod) and shown.of is states:
            for name in _ON_A_PARAMETER:
                vars(param).pop(name, None)
    states.parts.clear()
    type(engine).destroy(engine)
