# SPDX-License-Identifier: Apache-2.0
"""The real Megatron-core optimizer stack on CPU and gloo: build it, feed it gradients, read its weights back.

Weights are read from each wrapper's own lists, without the code under test.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers import models
from tests.helpers.deepspeed.engine_cases import EPS, FULL_NAME, WEIGHT_DECAY, betas_of
from tests.helpers.megatron.gpt_shards import cut, full_shapes, gpt, parallel, whole_name
from tests.helpers.models import GradientPlan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# AdamW's unit: multipliers are at most 1.25, and smaller updates would drown in the rounding of fp32 weights
LR, INIT_LR, MIN_LR, WARMUP, TOTAL = 0.16, 0.04, 0.016, 2, 9  # of the schedule, in steps
DECOUPLED_LR = 0.24
# for Megatron-core's registry
NAMES = {"adamw": "blockwise_adamw", "mini": "blockwise_adam_mini", "lion": "blockwise_lion", "muon": "blockwise_muon"}
LOSS_SCALE = 2.0**6
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Stack:
    """What to build; the world that tensor and pipeline parallelism leave over is data-parallel."""

    optimizer: str = "mini"
    wrapper: str = "distributed"  # or "plain": FP32Optimizer, Float16OptimizerWithFloat16Params; or "layerwise"
    dtype: str = "fp32"
    shape: str = "gqa"
    tp: int = 1
    pp: int = 1
    tied: bool = False
    clip: float = 0.0
    bucket_size: int | None = None
    decoupled: bool = False
    mixed: bool = False  # some norms stay fp32 in a 16-bit model
    loss_scale: bool = False
    fp32_grads: bool = False  # the buffer of gradients, of a 16-bit model
    settings: dict[str, Any] = field(default_factory=dict)  # of convert_
    config: dict[str, Any] = field(default_factory=dict)  # of OptimizerConfig
    ddp: dict[str, Any] = field(default_factory=dict)  # of DistributedDataParallelConfig
    stock: bool = False  # do not convert
    by_name: bool = False  # let get_megatron_optimizer build ours


def stack_shims() -> None:
    """Let Megatron-core's DDP and optimizers run without CUDA; first thing in a worker, which it changes for good."""
    import megatron_patch

    megatron_patch.cpu_shims()
    if getattr(torch.Tensor.type, "is_shim", False):
        return
    original = torch.Tensor.type

    def cuda_type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The wrappers compare ``param.type()`` with names of CUDA types."""
        found = original(self, *args, **kwargs)
        return found if args or kwargs else found.replace("torch.", "torch.cuda.")

    cuda_type.is_shim = True  # type: ignore[attr-defined]
    torch.Tensor.type = cuda_type  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    torch.cuda.synchronize = lambda *args: None  # type: ignore[assignment]
    # 0.18 looks up the stream on which gradients are averaged, and uses it with several streams only
    torch.cuda.current_stream = lambda *args: None  # type: ignore[assignment, return-value]
    for name in ("tensor", "zeros", "empty", "ones", "full"):
        setattr(torch, name, _on_the_cpu(getattr(torch, name)))


def _on_the_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def made(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return made


def lr_after(updates: int, peak: float = LR) -> float:
    """Megatron's schedule after so many scheduler steps: linear warm-up, then a cosine."""
    if updates <= WARMUP:
        return INIT_LR + (peak - INIT_LR) * updates / WARMUP
    progress = (updates - WARMUP) / (TOTAL - WARMUP)
    return MIN_LR + (peak - MIN_LR) * 0.5 * (1 + math.cos(math.pi * progress))


class Run:
    """A built stack with its chunk, its optimizer and its scheduler.

    Attributes:
        zeros: how many zeros the optimizer counted in the gradients of the last step; None if it did not.
    """

    zeros: float | None = None

    def __init__(self, stack: Stack) -> None:
        from megatron.core import parallel_state as groups
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
        from megatron.core.transformer.module import Float16Module

        self.stack, dtype = stack, DTYPES[stack.dtype]
        self.tp_rank = groups.get_tensor_model_parallel_rank()
        self.dp_rank = groups.get_data_parallel_rank()
        self.dp_group = groups.get_data_parallel_group()
        self.shapes = full_shapes(stack.shape, tied=stack.tied)
        self.model = gpt(stack.shape, dtype, tied=stack.tied)
        self.params = {whole_name(self.model, n): p for n, p in self.model.named_parameters()}
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(self.cut(name, self.start(name)))
        inside = self.model if stack.dtype == "fp32" else Float16Module(self.model.config, self.model)
        if stack.mixed:
            for name, param in self.params.items():
                if "pre_mlp_layernorm" in name:
                    param.data = param.data.float()
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=stack.wrapper == "distributed",
            # sums of scaled gradients, or of the two copies of an embedding, have more bits than bf16
            grad_reduce_in_fp32=stack.fp32_grads or stack.loss_scale or stack.pp > 1,
            bucket_size=stack.bucket_size,
            overlap_grad_reduce=stack.bucket_size is not None,  # otherwise the bucket size is ignored
            **stack.ddp,
        )
        self.chunk = DistributedDataParallel(self.model.config, ddp, inside)
        config = OptimizerConfig(
            optimizer=NAMES[stack.optimizer] if stack.by_name else "adam",
            lr=LR,
            min_lr=MIN_LR,
            decoupled_lr=DECOUPLED_LR if stack.decoupled else None,
            weight_decay=WEIGHT_DECAY,
            adam_beta1=betas_of(stack.optimizer)[0],
            adam_beta2=betas_of(stack.optimizer)[1],
            adam_eps=EPS,
            clip_grad=stack.clip,
            bf16=stack.dtype == "bf16",
            fp16=stack.dtype == "fp16",
            params_dtype=dtype,
            initial_loss_scale=LOSS_SCALE,
            loss_scale=LOSS_SCALE if stack.loss_scale and stack.dtype != "fp16" else None,
            use_distributed_optimizer=stack.wrapper == "distributed",
            **stack.config,
        )
        config.blockwise = stack.settings
        config.bf16 = stack.dtype == "bf16" and stack.wrapper != "layerwise"  # which adds its own 16-bit wrappers
        self.optimizer = get_megatron_optimizer(
            config, [self.chunk], config_overrides=get_standard_config_overrides(config)
        )
        config.bf16 = stack.dtype == "bf16"
        if stack.wrapper == "layerwise":
            self.optimizer = _layer_wise(self.optimizer.chained_optimizers, config)
        self.wrapper = self.optimizer.chained_optimizers[0]
        if not (stack.stock or stack.by_name):
            self.convert()
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=INIT_LR,
            max_lr=LR,
            min_lr=MIN_LR,
            lr_warmup_steps=WARMUP,
            lr_decay_steps=TOTAL,
            lr_decay_style="cosine",
            start_wd=WEIGHT_DECAY,
            end_wd=WEIGHT_DECAY,
            wd_incr_steps=1,
            wd_incr_style="constant",
        )

    def convert(self) -> None:
        from megatron_patch import convert_

        assert convert_(self.optimizer, [self.chunk], FULL_NAME[self.stack.optimizer], **self.stack.settings) is (
            self.optimizer
        )

    def start(self, name: str) -> Tensor:
        """First value of a whole parameter; the tied copy of the last stage starts as the embedding."""
        name = EMBEDDING if self.is_copy(name) else name
        return models.small_weight(name, self.shapes[name]).to(DTYPES[self.stack.dtype]).float()

    def is_copy(self, name: str) -> bool:
        return self.stack.tied and name == "output_layer.weight"

    def cut(self, name: str, full: Tensor) -> Tensor:
        return cut(name, full, self.tp_rank, self.stack.tp) if self.stack.tp > 1 else full

    def feed(self, plan: GradientPlan, step: int, *, poison: float | None = None) -> None:
        """Give every parameter its share of the planned gradients and let Megatron-core average them."""
        from megatron.core.distributed import finalize_model_grads

        scale = float(self.optimizer.get_loss_scale())
        self.chunk.zero_grad_buffer()
        for name, param in self.params.items():
            shape = self.shapes[EMBEDDING if self.is_copy(name) else name]
            share = self.cut(name, plan.share(name, shape, step, self.dp_rank)) * scale
            if poison is not None:
                share.view(-1)[3] = poison
            param.main_grad.copy_(share)
        if self.chunk.ddp_config.overlap_grad_reduce:
            self.chunk.start_grad_sync()
        finalize_model_grads([self.chunk])

    def mean(self, plan: GradientPlan, name: str, step: int) -> Tensor:
        """The gradient that the optimizer must see for a whole parameter."""
        gradient = plan.mean(name, self.shapes[name], step)
        if self.stack.tied and self.stack.pp > 1 and name == EMBEDDING:
            gradient = gradient + plan.mean("output_layer.weight", self.shapes[name], step)
        return gradient

    def step(self) -> tuple[bool, float | None]:
        """One step of the optimizer and, if it was made, of the schedule: as Megatron-LM's training loop does."""
        done, norm, self.zeros = self.optimizer.step()
        if done:
            self.scheduler.step(increment=1)
        return done, norm

    @torch.no_grad()
    def masters(self) -> dict[str, Tensor]:
        """{name: fp32 weight of this tensor-parallel rank}, on every data-parallel rank."""
        return {name: self.gathered(param, self.main(param)) for name, param in self.params.items()}

    def main(self, param: nn.Parameter) -> Tensor | None:
        """The tensor that is stepped for a model parameter; None if other ranks hold all of it."""
        if self.stack.wrapper == "distributed":
            return shard_in(self.wrapper, param)
        if self.stack.dtype != "fp32":
            return getattr(param, "main_param", None)
        stepped = [tensor for group in self.wrapper.optimizer.param_groups for tensor in group["params"]]
        return param if any(tensor is param for tensor in stepped) else None

    def gathered(self, param: nn.Parameter, part: Tensor | None) -> Tensor:
        """A whole tensor-parallel shard from what the data-parallel ranks hold of it."""
        if self.stack.wrapper == "plain":
            assert part is not None
            return part.detach().reshape(param.shape).clone()
        if self.stack.wrapper == "distributed":
            return joined_shards(self.wrapper, param, part)
        return _joined(param, part, 0, self.dp_group)

    def state(self, key: str) -> dict[str, Tensor]:
        """{name: ``exp_avg`` or ``exp_avg_sq`` of this tensor-parallel rank, one value per element}."""
        found = {}
        for name, param in self.params.items():
            tensor = self.main(param)
            part = None
            if tensor is not None and self.stack.stock:
                part = self.wrapper.optimizer.state[tensor][key]
            elif tensor is not None:
                part = self.wrapper.optimizer.per_element_state(tensor)[key]
            found[name] = self.gathered(param, part)
        return found


def shard_in(wrapper: Any, param: nn.Parameter) -> Tensor | None:
    """What this rank's `DistributedOptimizer` steps of a model parameter; None if other ranks step all of it."""
    lists = [
        *zip(wrapper.model_float16_groups, wrapper.shard_fp32_from_float16_groups, strict=True),
        *zip(wrapper.model_fp32_groups, wrapper.shard_fp32_groups, strict=True),
    ]
    found = [s for params, shards in lists for p, s in zip(params, shards, strict=True) if p is param]
    return found[0] if found else None


def joined_shards(wrapper: Any, param: nn.Parameter, part: Tensor | None) -> Tensor:
    """A whole tensor of a parameter's shape from ``part``, of this rank's shard, and the parts of the other ranks."""
    start = 0 if part is None else wrapper._get_model_param_range_map(param)["param"].start
    return _joined(param, part, start, wrapper.data_parallel_group)


def _joined(param: nn.Parameter, part: Tensor | None, start: int, group: dist.ProcessGroup) -> Tensor:
    whole = torch.zeros(param.numel())
    if part is not None:
        whole[start : start + part.numel()] = part.detach().view(-1)
    dist.all_reduce(whole, group=group)
    return whole.view(param.shape)


def assert_equal_copies(own: Tensor) -> None:
    """This rank's copy of the embedding has the same bits as those on the other pipeline stages that hold one."""
    from megatron.core import parallel_state

    group = parallel_state.get_embedding_group(check_initialized=False)
    own = own.float().contiguous()
    copies = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(copies, own, group=group)
    assert len(copies) > 1, "there is nothing to compare with"
    assert all(torch.equal(copy, own) for copy in copies), "the copies of the embedding drifted apart"


def _layer_wise(wrappers: list[Any], config: Any) -> Any:
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    # it makes its own 16-bit wrappers, since 0.18 around bare optimizers only
    parts = [wrapper.optimizer for wrapper in wrappers] if config.bf16 else wrappers
    optimizer = LayerWiseDistributedOptimizer(parts, config, groups, [wrapper.init_state_fn for wrapper in wrappers])
    optimizer.allgather_params = optimizer.broadcast_params  # gloo gathers tensors of one size only
    return optimizer


@contextmanager
def open_stack(stack: Stack) -> Iterator[Run]:
    """A `Run` on process groups of its sizes."""
    with parallel(stack.tp, stack.pp):
        yield Run(stack)
