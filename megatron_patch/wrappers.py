# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's optimizers: what this package uses of them, and which of them it can convert.

Each one wraps a torch optimizer, the inner optimizer. The wrapper averages and clips gradients, scales losses and
writes checkpoints, the inner optimizer steps. The protocols list every attribute that is read: `check_version` looks
for each, so a version of Megatron-core that renamed one is refused and never half converted. Checked with 0.16 to 0.19.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import nn

from megatron_patch.guard import MEGATRON_VERSION, SUPPORTED

WRAPPERS = (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer)


class Config(Protocol):
    """What is read of every ``OptimizerConfig``; settings that are not in every version are looked up by name."""

    optimizer: str


class Wrapper(Protocol):
    """What is used of every optimizer of Megatron-core."""

    optimizer: torch.optim.Optimizer  # None in a stub
    config: Config
    init_state_fn: Callable[..., None]
    is_stub_optimizer: bool  # every parameter of it is frozen


class Float16Wrapper(Wrapper, Protocol):
    """``Float16OptimizerWithFloat16Params``: it steps fp32 copies of 16-bit parameters; lists are by param group."""

    float16_groups: Sequence[Sequence[nn.Parameter]]
    fp32_from_float16_groups: Sequence[Sequence[torch.Tensor]]
    fp32_from_fp32_groups: Sequence[Sequence[nn.Parameter]]


class Bucket(Protocol):
    """A part of a buffer; each data-parallel rank steps an equal part of it."""

    offset: int
    grad_data: torch.Tensor
    param_data: torch.Tensor


class Buffer(Protocol):
    """Parameters of one dtype in a flat tensor."""

    param_index_map: Mapping[nn.Parameter, tuple[int, int, int]]  # start, end, index of the bucket
    buckets: Sequence[Bucket]
    grad_dtype: torch.dtype


class Range(Protocol):
    """Elements from ``start`` to ``end`` of a flattened tensor."""

    start: int
    end: int


class DistributedWrapper(Wrapper, Protocol):
    """``DistributedOptimizer``: it steps one contiguous part of each parameter (a shard); lists are by param group."""

    buffers: Sequence[Buffer]
    data_parallel_group: dist.ProcessGroup
    ddp_config: object
    model_param_group_index_map: MutableMapping[nn.Parameter, tuple[int, int]]  # param group, place in it
    model_param_gbuf_map: Mapping[nn.Parameter, tuple[int, object, int]]  # index of the buffer, dtypes, bucket
    model_float16_groups: Sequence[Sequence[nn.Parameter]]
    model_fp32_groups: Sequence[Sequence[nn.Parameter]]
    shard_fp32_from_float16_groups: Sequence[Sequence[torch.Tensor]]
    shard_fp32_groups: Sequence[Sequence[torch.Tensor]]

    def _get_model_param_range_map(self, param: nn.Parameter) -> Mapping[str, Range]:
        """The elements of a parameter that this rank steps: in it under ``param``, in their bucket under
        ``gbuf_world_in_bucket``."""


_ATTRIBUTES: dict[type, tuple[type, ...]] = {
    FP32Optimizer: (Wrapper,),
    Float16OptimizerWithFloat16Params: (Wrapper, Float16Wrapper),
    DistributedOptimizer: (Wrapper, DistributedWrapper),
}
# What the classes of `checkpoint` override or call
_LOADS_AND_SAVES = ("state_dict", "sharded_state_dict", "load_state_dict")
_METHODS: dict[type, tuple[str, ...]] = {
    FP32Optimizer: (*_LOADS_AND_SAVES, "_filter_and_reorder_param_groups"),
    Float16OptimizerWithFloat16Params: (*_LOADS_AND_SAVES, "_filter_and_reorder_param_groups"),
    DistributedOptimizer: (
        *_LOADS_AND_SAVES,
        "load_parameter_state_from_dp_zero",
        "sharded_param_state_fully_reshardable",
        "_get_main_param_and_optimizer_states",
        "_set_main_param_and_optimizer_states",
        "_get_model_param_range_map",
    ),
}


def wrappers_in(optimizer: object) -> list[Wrapper]:
    """The optimizers that step parameters, in the order in which a `ChainedOptimizer` steps them.

    Raises:
        TypeError: something in the chain is of an unknown class.
    """
    if isinstance(optimizer, ChainedOptimizer):
        return [wrapper for part in optimizer.chained_optimizers for wrapper in wrappers_in(part)]
    # the very classes: what `convert_` makes are subclasses of them
    if isinstance(optimizer, WRAPPERS) and type(optimizer) in WRAPPERS:
        return [optimizer]
    raise TypeError(
        f"cannot convert a {type(optimizer).__name__}. Supported: {', '.join(cls.__name__ for cls in WRAPPERS)}, "
        f"chained in any way. Give convert_ what get_megatron_optimizer returned, once, before anything else wraps it."
    )


def check_version(wrapper: Wrapper) -> None:
    """Check that a wrapper has every attribute and method that the conversion relies on.

    Raises:
        ImportError: this version of Megatron-core lacks some of them.
    """
    kind = type(wrapper)
    missing = [name for name in _METHODS[kind] if not hasattr(kind, name)]
    if not wrapper.is_stub_optimizer:
        attributes = [name for protocol in _ATTRIBUTES[kind] for name in protocol.__annotations__]
        missing += [name for name in attributes if not hasattr(wrapper, name)]
    if missing:
        raise ImportError(
            f"{kind.__name__} of megatron-core {MEGATRON_VERSION} has no {', '.join(missing)}; ds_blockwise supports "
            f"{SUPPORTED}. Install such a version: pip install 'megatron-core{SUPPORTED}'"
        )


def check_settings(wrapper: Wrapper) -> None:
    """Check that our optimizers can do what a wrapper was configured to do.

    Raises:
        ValueError: a setting that is not supported, with the way out.
    """
    if getattr(getattr(wrapper, "ddp_config", None), "use_megatron_fsdp", False):
        raise ValueError(
            "use_megatron_fsdp=True (--use-megatron-fsdp) keeps parameters as DTensors, which ds_blockwise cannot map. "
            "Use the distributed optimizer instead: use_distributed_optimizer=True without FSDP."
        )
    config = wrapper.config
    for name, value, why in (
        ("use_precision_aware_optimizer", True, "keeps moments and master weights in Transformer Engine's own formats"),
        ("optimizer_cpu_offload", True, "steps copies of the parameters on the CPU through a HybridDeviceOptimizer"),
        ("decoupled_weight_decay", False, "asks for Adam with L2 regularisation; weight decay is decoupled here"),
    ):
        if getattr(config, name, not value) == value:
            raise ValueError(f"{name}={value} {why}. Set it to {not value}.")
    if config.optimizer != "adam":
        raise ValueError(
            f"optimizer={config.optimizer!r}: only 'adam' can be converted. Set optimizer='adam' (--optimizer adam); "
            f"convert_ replaces it by the optimizer that you name there."
        )
    if not wrapper.is_stub_optimizer:
        _check_inner(type(wrapper).__name__, wrapper.optimizer)


def _check_inner(wrapper: str, inner: torch.optim.Optimizer) -> None:
    if not (isinstance(inner, torch.optim.AdamW) or type(inner).__name__ == "FusedAdam"):
        raise ValueError(
            f"{wrapper} steps with {type(inner).__name__}; only torch's AdamW and the FusedAdam of Transformer Engine "
            f"or NVIDIA apex can be replaced. Set optimizer='adam' (--optimizer adam) and let get_megatron_optimizer "
            f"choose the class."
        )
    if any(inner.state.values()):
        raise ValueError(
            f"{wrapper} already holds optimizer state. Call convert_ right after get_megatron_optimizer, and load the "
            f"checkpoint afterwards: AdamW's state is taken over then."
        )
