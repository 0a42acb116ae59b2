# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's state API (``safe_get_full_optimizer_state`` and its like) and ``offload_states`` for our optimizers.

DeepSpeed looks for state in the shape of its flat partitions, at the offsets of ``_hp_mapping`` (ZeRO 1 and 2) or of
ZeRO-3's own pieces. That is wrong for one second moment per block, for ``round_robin_gradients`` and, where ZeRO-3 sets
a parameter whose pieces are padded, on the last rank. Where a key is missing, only ranks that hold elements raise, and
the others wait. So the methods that the API calls are replaced, on the objects of one engine: each parameter's, or
those of ZeRO-3's wrapper. Checked with DeepSpeed 0.19.8.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from deepspeed.runtime.zero.offload_states import offload_adam_states
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from ds_blockwise.blocks.segment_table import Placement
from ds_blockwise.blocks.tagged_parameter import as_tagged
from ds_blockwise.hosts.deepspeed.engine import (
    BF16Optimizer,
    Engine,
    Wrapper,
    ZeroStage3,
    ZeroStages1And2,
    is_partitioned,
)
from ds_blockwise.kernels.base import wide_dtype
from ds_blockwise.kernels.bindings import Binding
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.parameter_state import (
    has_state,
    is_set_together,
    is_settable,
    read_state,
    state_keys,
    write_state,
)
from ds_blockwise.optimizers.second_moment import mark_settled, unsettled
from ds_blockwise.parallel.agree import any_rank

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
    "offload_states",
)


def show_state(engine: Engine, optimizer: BlockwiseOptimizer, params: Iterable[nn.Parameter]) -> None:
    """Let DeepSpeed's state API show and set what an optimizer of ours keeps, and ``offload_states`` move it.

    Args:
        engine: a ``DeepSpeedEngine``; only this object, its wrapper and ``params`` are changed.
        optimizer: its basic optimizer, with every tensor bound.
        params: the trained parameters, tagged.
    """
    wrapper, states = engine.optimizer, _States(optimizer, params)
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        methods = _Stage3Methods(wrapper, states)
        for name in _ON_THE_WRAPPER:
            setattr(wrapper, name, getattr(methods, name))
        return
    _put_on_parameters(wrapper, states)
    engine.destroy = functools.partial(_destroy, engine, states)
    if isinstance(wrapper, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        wrapper._link_all_hp_params = functools.partial(_link_again, wrapper, states)
    if isinstance(wrapper, DeepSpeedZeroOptimizer):
        wrapper.offload_states = _keeping_form(optimizer, type(wrapper).offload_states, wrapper)
        wrapper.reload_states = _keeping_form(optimizer, type(wrapper).reload_states, wrapper)


# ------------------------------------------------------------------------------------------- reading and setting


@dataclass(frozen=True)
class _Part:
    """What a rank holds of a parameter.

    Attributes:
        name: of the parameter.
        tensor: stepped tensor in which it lies.
        index: its place among that tensor's placements.
        shape: of the whole (tensor-parallel local) parameter.
    """

    name: str
    tensor: torch.Tensor
    index: int
    shape: torch.Size


class _States:
    """State of the parameters of one engine, one value per element.

    As DeepSpeed's own, each method is to be called by all ranks that share the parameter.
    """

    def __init__(self, optimizer: BlockwiseOptimizer, params: Iterable[nn.Parameter]) -> None:
        places = {
            placement.spec.fqn: (binding.tensor, index)
            for binding in optimizer.bindings()
            for index, placement in enumerate(binding.table.placements)
        }
        self.optimizer = optimizer
        self.parts: dict[nn.Parameter, _Part] = {}
        for param in params:
            name = as_tagged(param).block_spec.fqn
            if name in places:
                shape = param.ds_shape if is_partitioned(param) else param.shape
                self.parts[param] = _Part(name, *places[name], shape)

    def full(self, param: nn.Parameter, key: str | None = None) -> torch.Tensor:
        """The whole parameter's state, or its fp32 weight without a key; a collective over its data-parallel ranks."""
        self._check_key(key)
        part, (binding, placement) = self.parts[param], self._bound(param)
        known = key is None or has_state(self.optimizer, binding)
        numel, start = math.prod(part.shape), placement.param_start
        # one more element, by which a rank that has nothing to show tells the others
        whole = torch.zeros(numel + 1, dtype=wide_dtype(part.tensor.dtype), device=self._device(binding))
        whole[numel] = not known
        if known:
            whole[start : start + placement.numel] = self._own(param, key)
        if binding.groups.dp_group is not None:
            dist.all_reduce(whole, group=binding.groups.dp_group)
        if whole[numel]:
            raise ValueError(_no_state(part.name))
        return whole[:numel].view(part.shape)

    def piece(self, param: nn.Parameter, key: str, numel: int) -> torch.Tensor:
        """The state of this rank's piece of a parameter, as many elements as ZeRO-3 pads it to."""
        self._check_key(key)
        binding, placement = self._bound(param)
        if not has_state(self.optimizer, binding):
            raise ValueError(_no_state(self.parts[param].name))
        padded = torch.zeros(numel, dtype=wide_dtype(binding.tensor.dtype), device=self._device(binding))
        padded[: placement.numel] = self._own(param, key)
        return padded

    def set_full(self, param: nn.Parameter, value: torch.Tensor, key: str | None = None) -> None:
        """Set the whole parameter's state, or its fp32 weight without a key, from the same value on every rank."""
        _, placement = self._bound(param)
        self._set(param, value, key, math.prod(self.parts[param].shape), placement.param_start)

    def set_piece(self, param: nn.Parameter, value: torch.Tensor, key: str | None, numel: int) -> None:
        """Set the state of this rank's piece of a parameter, or its fp32 weight; of ``numel`` with ZeRO-3's padding."""
        self._set(param, value, key, numel, 0)

    def _set(self, param: nn.Parameter, value: torch.Tensor, key: str | None, numel: int, start: int) -> None:
        self._check_key(key, to_be_set=True)
        part, (binding, placement) = self.parts[param], self._bound(param)
        problem = None
        if key is not None and not has_state(self.optimizer, binding):
            problem = _no_state(part.name)
        elif not isinstance(value, torch.Tensor) or value.numel() != numel:
            problem = (
                f"the value for {key or 'the weight'} of parameter {part.name!r} must be a tensor of {numel} elements, "
                f"got {f'one of shape {tuple(value.shape)}' if isinstance(value, torch.Tensor) else repr(value)}."
            )
        if key is not None and is_set_together(self.optimizer, key):
            somewhere = any_rank(problem is not None, [binding.groups], self._device(binding))
            if somewhere and problem is None:
                problem = f"{key} of parameter {part.name!r} was not set: another rank's error says why."
        if problem is not None:
            raise ValueError(problem)
        own = value.detach().reshape(-1).narrow(0, start, placement.numel)
        if key is None:
            self._own(param, None).copy_(own)
        else:
            write_state(self.optimizer, binding, part.index, key, own)

    def device(self, param: nn.Parameter, key: str) -> torch.device:
        """Where this rank keeps the state."""
        self._check_key(key)
        binding, _ = self._bound(param)
        if not has_state(self.optimizer, binding):
            raise ValueError(_no_state(self.parts[param].name))
        return read_state(self.optimizer, binding, self.parts[param].index, key).device

    def _own(self, param: nn.Parameter, key: str | None) -> torch.Tensor:
        """This rank's elements: of the fp32 weight a view, of the state as `read_state`."""
        binding, placement = self._bound(param)
        if key is not None:
            return read_state(self.optimizer, binding, self.parts[param].index, key)
        return binding.tensor.detach().view(-1).narrow(0, placement.flat_start, placement.numel)

    def _bound(self, param: nn.Parameter) -> tuple[Binding, Placement]:
        part = self.parts[param]
        binding = self.optimizer.bindings().of(part.tensor)
        assert binding is not None, "a tensor stays bound"
        return binding, binding.table.placements[part.index]

    def _device(self, binding: Binding) -> torch.device:
        return binding.groups.device or binding.tensor.device

    def _check_key(self, key: str | None, *, to_be_set: bool = False) -> None:
        keys = state_keys(self.optimizer)
        if key is not None and key not in keys:
            raise ValueError(
                f"{type(self.optimizer).__name__} keeps {', '.join(map(repr, keys))} of a parameter, but no {key!r}. "
                f"Ask for one of these."
            )
        if key is not None and to_be_set and not is_settable(key):
            raise ValueError(
                f"{key!r} counts the updates of all parameters that are stepped together, so it cannot be set for one. "
                f"It changes when a checkpoint is loaded."
            )


def _no_state(name: str) -> str:
    return (
        f"there is no optimizer state of parameter {name!r} yet. It begins with the first engine.step() that is not "
        f"skipped, or with a checkpoint that is loaded with its optimizer states."
    )


# ------------------------------------------------------------------------------------------- where DeepSpeed looks


class _Stage3Methods:
    """What the API calls on ZeRO-3's wrapper. Frozen parameters, and state on NVMe, stay DeepSpeed's own."""

    def __init__(self, wrapper: ZeroStage3, states: _States) -> None:
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

    def offload_states(
        self,
        include: Collection[OffloadStateTypeEnum] | None = None,
        device: OffloadDeviceEnum = OffloadDeviceEnum.cpu,
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """DeepSpeed moves weights and moments of its FusedAdam only, though nothing in it depends on that."""
        wanted = set(OffloadStateTypeEnum if include is None else include)
        done, wrapper = self._wrapper.offloaded_states, self._wrapper
        moments, weights = OffloadStateTypeEnum.optim_states, OffloadStateTypeEnum.hp_params
        if weights in wanted - done:
            wrapper.hp_params_pin_buffers = [_on_host(t, pin_memory) for t in wrapper.fp32_partitioned_groups_flat]
            for tensor, copy in zip(wrapper.fp32_partitioned_groups_flat, wrapper.hp_params_pin_buffers, strict=True):
                tensor.data = copy
            done.add(weights)
        if moments in wanted - done:
            offload_adam_states(self._states.optimizer, device.value, pin_memory=pin_memory, non_blocking=non_blocking)
            done.add(moments)
        self._own.offload_states(wrapper, wanted - {moments, weights}, device, pin_memory, non_blocking)

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


def _on_host(tensor: torch.Tensor, pin_memory: bool) -> torch.Tensor:
    copy = tensor.data.to("cpu", copy=True)
    return get_accelerator().pin_memory(copy) if pin_memory else copy


class _ParameterMethod:
    """A method that the API calls on a parameter; a pickled model leaves the engine's state behind."""

    def __init__(self, call: Callable[..., torch.Tensor | None]) -> None:
        self._call = call

    def __call__(self, *args: object, **options: object) -> torch.Tensor | None:
        return self._call(*args, **options)

    def __reduce__(self) -> tuple[type[_ParameterMethod], tuple[Callable[..., None]]]:
        return _ParameterMethod, (_nothing,)


def _nothing(*_args: object, **_options: object) -> None:
    """What there is to show or set without an engine."""


def _put_on_parameters(wrapper: Wrapper, states: _States) -> None:
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
            setattr(param, name, _ParameterMethod(method))


def _refuse_gradient(*_args: object) -> None:
    raise ValueError(
        f"DeepSpeed {deepspeed.__version__} mixes up gradients of different parameters under round_robin_gradients, "
        f'with any optimizer. Set "round_robin_gradients": false to see or set them. Weights and moments are right.'
    )


def _link_again(wrapper: ZeroStages1And2 | BF16Optimizer, states: _States) -> None:
    """Do what the wrapper's own method does at a load and after ``reload_states``; it puts DeepSpeed's methods back."""
    type(wrapper)._link_all_hp_params(wrapper)
    _put_on_parameters(wrapper, states)


def _destroy(engine: Engine, states: _States) -> None:
    """As the engine's own; and its model's parameters forget it, so that its state can be freed."""
    for param in states.parts:
        for name in _ON_A_PARAMETER:
            vars(param).pop(name, None)
    states.parts.clear()
    type(engine).destroy(engine)


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
