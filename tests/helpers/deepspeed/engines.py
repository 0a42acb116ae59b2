# SPDX-License-Identifier: Apache-2.0
"""Build real DeepSpeed engines, feed them gradients, read their fp32 weights back as full tensors.

Weights are read from each wrapper's own flat lists. ``param._hp_mapping`` is never used: upstream
fills it in the wrong order under round_robin_gradients.
"""

from __future__ import annotations

import copy
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers.models import Feed, GradientPlan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def prepare_deepspeed() -> None:
    """Import DeepSpeed for the CPU, also on a machine with a GPU; first thing in a worker.

    Its shared-memory collectives are left out: a test must not compile anything.
    """
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    import deepspeed
    from deepspeed.utils import logger

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel("WARNING")


def engine_config(
    optimizer: str, *, stage: int = 0, dtype: str = "fp32", gas: int = 1, **changes: Any
) -> dict[str, Any]:
    """A DeepSpeed JSON; ``zero`` and ``params`` in ``changes`` are merged, the rest replaces."""
    params = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": 0.0,  # DeepSpeed's default of 1.0 would rescale what is fed
        "optimizer": {"type": optimizer, "params": params | changes.pop("params", {})},
        "zero_optimization": {"stage": stage} | changes.pop("zero", {}),
    }
    if stage == 0:
        del config["zero_optimization"]
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    return config | changes


@contextmanager
def open_engine(
    config: dict[str, Any],
    build: Callable[[], nn.Module],
    *,
    groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
    mpu: Any = None,
    feed: bool = True,
    client: Callable[[nn.Module], object] | None = None,
) -> Iterator[SimpleNamespace]:
    """An initialised engine with its feed and names; every global trace is removed afterwards.

    ``client`` makes what a user gives as ``optimizer``.
    """
    import deepspeed

    model = build()
    names = {id(p): name for name, p in model.named_parameters()}
    feeder = Feed(model) if feed else None
    trainable = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups(model) if groups else trainable,
        config=copy.deepcopy(config),  # DeepSpeed 0.18 takes keys out of it
        mpu=mpu,
        **({} if client is None else {"optimizer": client(model)}),
    )
    try:
        yield SimpleNamespace(engine=engine, model=model, names=names, feed=feeder)
    finally:
        engine.destroy()
        forget_groups()
        del engine, model, feeder, trainable
        gc.collect()


def forget_groups() -> None:
    """Remove what one engine leaves in DeepSpeed's modules: the mpu and the groups derived from it.

    The clone of the world group is kept on purpose, a new one per engine would exhaust gloo's file handles.
    """
    from deepspeed.utils import groups as ds_groups

    ds_groups.mpu = None
    ds_groups._MODEL_PARALLEL_GROUP = None
    ds_groups._TENSOR_MODEL_PARALLEL_GROUP = None
    ds_groups._DATA_PARALLEL_GROUP = None


def true_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole (tensor-parallel local) parameter, also when ZeRO-3 holds it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def feed_step(run: SimpleNamespace, plan: GradientPlan, step: int, dp_rank: int, **spoil: Any):
    """One optimizer step's forward, backward and step() calls on the planned gradients.

    ``spoil={"poison": value}`` puts the value into one element; ``absent`` names parameters
    that take no part in the loss; ``cut`` maps (name, full gradient) to this rank's slice and
    ``shapes`` then gives the full shapes.
    """
    cut = spoil.get("cut", lambda name, gradient: gradient)
    shapes = spoil.get("shapes") or {n: true_shape(p) for n, p in run.model.named_parameters()}
    for micro in range(plan.micro_batches):
        index = dp_rank * plan.micro_batches + micro
        run.feed.gradients = {
            name: cut(name, plan.share(name, shape, step, index))
            for name, shape in shapes.items()
            if name not in spoil.get("absent", ())
        }
        if spoil.get("poison") is not None:
            next(iter(run.feed.gradients.values())).view(-1)[3] = spoil["poison"]
        run.engine.backward(run.engine())
        run.engine.step()


# ------------------------------------------------------------------------------ reading weights


def masters(run: SimpleNamespace) -> dict[str, Tensor]:
    """{name: full fp32 weight} of everything that is trained, on every data-parallel rank."""
    wrapper = run.engine.optimizer
    reader = _READERS[type(wrapper).__name__ if wrapper in _wrapped(run) else "plain"]
    return {run.names[id(p)]: value.clone() for p, value in reader(run, wrapper)}


def _wrapped(run: SimpleNamespace) -> list[Any]:
    return [] if run.engine.optimizer is run.engine.basic_optimizer else [run.engine.optimizer]


def _plain(run: SimpleNamespace, wrapper: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            yield parameter, parameter.detach()


def _unfused(run: SimpleNamespace, wrapper: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    for halves, fulls in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
        yield from zip(halves, (full.detach() for full in fulls), strict=True)


def _zero12(run: SimpleNamespace, wrapper: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    for i, piece in enumerate(wrapper.single_partition_of_fp32_groups):
        flat = _gather(piece, wrapper.real_dp_process_group[i])
        parameters = wrapper.round_robin_bit16_groups[i]
        offsets = [0, *accumulate(p.numel() for p in parameters)][:-1]
        if hasattr(wrapper, "round_robin_bit16_offsets"):  # there may be gaps from 0.19.7 on
            offsets = wrapper.round_robin_bit16_offsets[i]
        for parameter, offset in zip(parameters, offsets, strict=True):
            yield parameter, flat[offset : offset + parameter.numel()].view(parameter.shape)


def _bf16(run: SimpleNamespace, wrapper: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    for i, piece in enumerate(wrapper.fp32_groups_flat_partition):
        flat = _gather(piece, wrapper.real_dp_process_group[i])
        offset = 0
        for parameter in wrapper.bf16_groups[i]:
            yield parameter, flat[offset : offset + parameter.numel()].view(parameter.shape)
            offset += parameter.numel()


def _zero3(run: SimpleNamespace, wrapper: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    for group, piece in zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()
            local = piece[offset : offset + size]
            full = _gather(local, parameter.ds_process_group)[: parameter.ds_numel]
            yield parameter, full.view(parameter.ds_shape)
            offset += size


_READERS = {
    "plain": _plain,
    "FP16_UnfusedOptimizer": _unfused,
    "DeepSpeedZeroOptimizer": _zero12,
    "BF16_Optimizer": _bf16,
    "DeepSpeedZeroOptimizer_Stage3": _zero3,
}


def _gather(piece: Tensor, group: Any) -> Tensor:
    piece = piece.detach().float().cpu().contiguous()
    parts = [torch.empty_like(piece) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, piece, group=group)
    return torch.cat(parts)


def model_weights(run: SimpleNamespace) -> dict[str, Tensor]:
    """{name: full weight} as the model itself would use it in its next forward."""
    import deepspeed

    parameters = dict(run.model.named_parameters())
    partitioned = [p for p in parameters.values() if hasattr(p, "ds_shape")]
    with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
        return {name: p.detach().clone() for name, p in parameters.items()}


def log(text: str) -> None:
    """Goes to the rank's log, which a failure report shows."""
    sys.stderr.write(text + "\n")
