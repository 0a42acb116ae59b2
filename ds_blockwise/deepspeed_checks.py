# SPDX-License-Identifier: Apache-2.0
"""Settings of a DeepSpeed JSON under which the optimizers would be wrong or silently replaced; each is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ds_blockwise.optimizer import built_from_ours


def check_config(engine: Any, optimizer: str) -> None:
    """Refuse what cannot work, before the optimizer is built.

    Args:
        engine: a ``DeepSpeedEngine`` with its configuration read.
        optimizer: class name of ours.

    Raises:
        ValueError: every refused setting with its reason, in one message.
    """
    problems = list(_problems(engine, optimizer))
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"{optimizer} does not support this DeepSpeed configuration:\n{listed}")


def check_client(client: object) -> None:
    """Refuse a client optimizer that took the place of one of ours on its way to ``deepspeed.initialize``.

    Accelerate does that under optimizer offload: it builds DeepSpeedCPUAdam from the groups of whatever it was given.

    Args:
        client: what ``deepspeed.initialize`` was given as ``optimizer``.

    Raises:
        ValueError: it was built from the param groups of one of ours.
    """
    name = built_from_ours(client) if isinstance(client, torch.optim.Optimizer) else None
    if name is not None:
        raise ValueError(
            f"{name} was replaced by {type(client).__name__} before DeepSpeed saw it: plain Adam would train, without "
            f"block types and with AdamW's memory. Accelerate and HF Trainer do this to every client optimizer when "
            f'"offload_optimizer" is set. Either set "zero_force_ds_cpu_optimizer": false in the DeepSpeed JSON and go '
            f'on passing {name}, or name it there, "optimizer": {{"type": "{name}", ...}}, and pass Accelerate\'s '
            f"DummyOptim(model.parameters()) (HF Trainer: nothing)."
        )


def check_model(model: nn.Module) -> None:
    """Refuse what DeepSpeed cannot train with any optimizer, before it fails on it.

    Args:
        model: as given to ``deepspeed.initialize``.

    Raises:
        ValueError: the model's experts are split over ranks by Megatron-core.
    """
    experts = [
        name
        for name, param in model.named_parameters()
        # DeepSpeed's own experts have a group_name beside it
        if not getattr(param, "allreduce", True) and not hasattr(param, "group_name")
    ]
    if experts:
        raise ValueError(
            f"expert parallelism of Megatron-core: {experts[0]!r} and {len(experts) - 1} more parameters hold other "
            f"experts on other ranks, and DeepSpeed knows no groups for them. Set expert_model_parallel_size to 1, or "
            f"train with Megatron-core's own optimizer and megatron_patch.convert_."
        )


def _problems(engine: Any, optimizer: str) -> Iterator[str]:
    mini = optimizer == "BlockwiseAdamMini"
    offload = engine.zero_offload_optimizer()
    if getattr(engine, "zenflow", None):
        yield (
            '"zenflow": it updates selected columns with an AdamW of its own and stores weights transposed. Remove '
            '"zenflow" from "zero_optimization".'
        )
    if engine.super_offload():
        yield (
            '"super_offload": it steps the offloaded parameters with DeepSpeedCPUAdam and never calls ours. Set '
            '"super_offload": false.'
        )
    if engine.pipeline_parallelism and engine.zero_optimization_stage() > 1:
        yield (
            f'"zero_optimization": {{"stage": {int(engine.zero_optimization_stage())}}} with a PipelineModule: '
            f'DeepSpeed\'s pipeline engine works with ZeRO stage 0 and 1 only. Set "stage": 1.'
        )
    if offload is not None and getattr(offload, "ratio", 1.0) < 1.0:
        yield (
            f'"offload_optimizer": {{"ratio": {offload.ratio}}}: partial offload works with DeepSpeedCPUAdam only. Set '
            f'"ratio": 1.0.'
        )
    if mini and offload is not None and str(getattr(offload.device, "value", offload.device)) == "nvme":
        yield (
            '"offload_optimizer": {"device": "nvme"}: the swapper needs state in the shape of the parameters, and one '
            'second moment per block is not. Use "device": "cpu".'
        )
    for name, on in (
        ("bf16_master_weights_and_grads", engine.bf16_master_weights_and_gradients()),
        ("fp16_master_weights_and_grads", engine.fp16_master_weights_and_gradients()),
    ):
        if on:
            yield f'"{name}": the master weights are updated in fp32. Set it to false.'
    if engine.zero_elastic_checkpoint():
        yield (
            '"elastic_checkpoint": it cuts state tensors by the padding of the parameters and cannot be loaded. Set it '
            "to false; use universal checkpoints to change the number of ranks."
        )
    if mini and not engine.zero_compute_grad_norm() and _autocast_fp16(engine):
        yield (
            '"compute_grad_norm": false with fp16 torch_autocast: the gradient scaler then skips steps rank by rank, '
            "and the others would wait for ever. Set it to true."
        )


def _autocast_fp16(engine: Any) -> bool:
    enabled = getattr(engine, "torch_autocast_enabled", None)
    if enabled is None or not enabled():
        return False
    return "float16" in str(engine.torch_autocast_dtype()).replace("bfloat16", "")
