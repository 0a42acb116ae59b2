# SPDX-License-Identifier: Apache-2.0
"""Where ``fused_step`` would step in another way than Megatron-core does, or nobody knows: refused before anything."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn

from megatron_patch.guard import MEGATRON_VERSION, SUPPORTED, TOO_NEW, release_of
from megatron_patch.wrappers import Wrapper

_SETTINGS = (
    ("overlap_param_gather_with_optimizer_step", "one optimizer's weights are sent while the next one steps"),
    ("optimizer_cuda_graph", "a captured step would keep the clipping factor of the step in which it was captured"),
    ("reuse_grad_buf_for_mxfp8_param_ag", "weights are written where gradients lie, in FP8"),
    ("fp8_param_gather", "the model's weights are FP8, which the kernels do not write"),
    ("fp4_param_gather", "the model's weights are FP4, which the kernels do not write"),
)
_READ = (torch.float32, torch.bfloat16)


def check_can_fuse(wrapper: Wrapper) -> None:
    """Check that a wrapper steps in the way that `FusedDistributedOptimizer` knows.

    Args:
        wrapper: one that `convert_` converts.

    Raises:
        ValueError: it does not, with what it does and the way out.
    """
    problem = next(_problems(wrapper), None)
    if problem is not None:
        raise ValueError(f"fused_step=True {problem}. Leave fused_step out (--blockwise-fused-step).")


def _problems(wrapper: Wrapper) -> Iterator[str]:
    if not isinstance(wrapper, DistributedOptimizer):
        yield (
            f"with {type(wrapper).__name__}: only DistributedOptimizer is supported. Set "
            f"use_distributed_optimizer=True (--use-distributed-optimizer), without layer-wise optimizers"
        )
        return
    if release_of(MEGATRON_VERSION) >= TOO_NEW:
        yield f"with megatron-core {MEGATRON_VERSION}, whose step nobody has read; known are those of {SUPPORTED}"
    for name, why in _SETTINGS:
        if getattr(wrapper.config, name, False) or getattr(wrapper.ddp_config, name, False):
            yield f"with {name}=True: {why}. Set it to False"
    instances = getattr(wrapper.ddp_config, "num_distributed_optimizer_instances", 1)
    if instances > 1:
        yield f"with num_distributed_optimizer_instances={instances}, which was not compared. Set it to 1"
    if wrapper.is_stub_optimizer:
        return
    for buffer in wrapper.buffers:
        # a loss scale makes Megatron-core cast gradients to fp32 before it looks at them
        if buffer.grad_dtype not in _READ and wrapper.grad_scaler is None:
            yield f"with gradients in {buffer.grad_dtype}: the kernels read fp32 and bf16"
        for param in buffer.param_index_map:
            if type(param) is not nn.Parameter:
                yield f"with a {type(param).__name__} among the parameters: the kernels write bf16, fp16 and fp32"
            if getattr(param, "grad_norm_group", None) is not None:
                yield f"with grad_norm_group={param.grad_norm_group!r}: such parameters are clipped by another norm"
