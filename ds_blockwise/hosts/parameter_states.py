# SPDX-License-Identifier: Apache-2.0
"""What an optimizer keeps of a model's parameters, one value per element, gathered from the ranks that hold them.

Knows the optimizers and the tags on parameters, but no host. A host puts it where its debugging tools look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ds_blockwise.blocks.segment_table import Placement
from ds_blockwise.blocks.tagged_parameter import as_tagged
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
from ds_blockwise.parallel.agree import any_rank

_SQUARES = "exp_avg_sq"


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


class ParameterStates:
    """State of parameters by element. Each method is to be called by all ranks that share the parameter.

    Args:
        optimizer: with every tensor bound.
        shapes: of the whole (tensor-parallel local) parameters, tagged.

    Attributes:
        parts: what this rank holds of those that ``optimizer`` steps.
    """

    def __init__(self, optimizer: BlockwiseOptimizer, shapes: Mapping[nn.Parameter, torch.Size]) -> None:
        places = {
            placement.spec.fqn: (binding.tensor, index)
            for binding in optimizer.bindings()
            for index, placement in enumerate(binding.table.placements)
        }
        self.optimizer = optimizer
        self.parts: dict[nn.Parameter, _Part] = {}
        for param, shape in shapes.items():
            name = as_tagged(param).block_spec.fqn
            if name in places:
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
        if key is not None and not has_state(self.optimizer, binding):
            problem: str | None = _no_state(part.name)
        else:
            problem = _misfit(value, f"{key or 'weight'} of parameter {part.name!r}", numel, is_square=key == _SQUARES)
        if key is not None and is_set_together(self.optimizer, key):
            somewhere = any_rank(problem is not None, [binding.groups], self._device(binding))
            if somewhere and problem is None:
                problem = f"{key} of parameter {part.name!r} was not set: another rank's error says why."
        if problem is not None:
            raise ValueError(problem)
        own = value.detach().reshape(-1).narrow(0, start, placement.numel)
        if key is not None:
            write_state(self.optimizer, binding, part.index, key, own)
        elif part.tensor.is_contiguous():
            self._own(param, None).copy_(own)
        else:  # only a parameter that is stepped by itself can be
            part.tensor.detach().copy_(own.view(part.shape))

    def device(self, param: nn.Parameter, key: str) -> torch.device:
        """Where this rank keeps the state."""
        self._check_key(key)
        binding, _ = self._bound(param)
        if not has_state(self.optimizer, binding):
            raise ValueError(_no_state(self.parts[param].name))
        return read_state(self.optimizer, binding, self.parts[param].index, key).device

    def _own(self, param: nn.Parameter, key: str | None) -> torch.Tensor:
        """This rank's elements: of the fp32 weight, a view if it is contiguous; of the state as `read_state`."""
        binding, placement = self._bound(param)
        if key is not None:
            return read_state(self.optimizer, binding, self.parts[param].index, key)
        return binding.tensor.detach().reshape(-1).narrow(0, placement.flat_start, placement.numel)

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


def _misfit(value: object, what: str, numel: int, *, is_square: bool) -> str | None:
    """Why a value cannot be set; None if it can."""
    if not isinstance(value, torch.Tensor):
        return f"{what} must be set to a tensor of {numel} elements, got {type(value).__name__}."
    if value.numel() != numel:
        return f"{what} must be set to a tensor of {numel} elements, got one of shape {tuple(value.shape)}."
    if value.layout != torch.strided or value.is_meta or value.is_complex():
        return (
            f"{what} must be set to a dense tensor of real numbers, got {value.dtype}, {value.layout}, {value.device}."
        )
    if is_square and not bool((value >= 0).all()):
        return f"{what} is a mean of squares, and must be set to values that are not negative and not NaN."
    return None


def _no_state(name: str) -> str:
    return (
        f"there is no optimizer state of parameter {name!r} yet. It begins with the first engine.step() that is not "
        f"skipped, or with a checkpoint that is loaded with its optimizer states."
    )
