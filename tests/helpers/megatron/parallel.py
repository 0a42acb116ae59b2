# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's optimizer stack with experts, multi-token prediction, context parallelism and virtual stages.

Every parameter is drawn, fed and compared by its name in the whole model; what a rank holds of it is cut by the code in
this file. Built on the real groups, DDP, `get_megatron_optimizer` and `convert_`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers import models
from tests.helpers.deepspeed.engine_cases import EPS, FULL_NAME, WEIGHT_DECAY, betas_of
from tests.helpers.megatron import gpt_shards
from tests.helpers.megatron.groups import megatron_groups
from tests.helpers.megatron.models import EXPERTS, LLAMA, SIZES
from tests.helpers.megatron.stack import DTYPES, EMBEDDING, LR, joined_shards, shard_in
from tests.helpers.models import GradientPlan
from tests.helpers.tables.oracle_names import Classes, Classified, Span

# odd hidden size, an odd number of experts on one of two ranks: shards of the distributed optimizer end inside rows
SHAPE: dict[str, Any] = {"hidden_size": 15, "kv_channels": 6, "ffn_hidden_size": 16}
HEADS, GROUPS, HEAD_DIM, VOCAB, EXPERT_COUNT = 4, 2, 6, 24, 6
MOE = {
    **EXPERTS,
    "num_moe_experts": EXPERT_COUNT,
    "moe_ffn_hidden_size": 6,
    "moe_shared_expert_intermediate_size": 8,
    "moe_shared_expert_gate": False,
}


@dataclass(frozen=True)
class Topology:
    """A model and its parallel sizes; the world that they leave over is data-parallel."""

    optimizer: str = "mini"
    wrapper: str = "distributed"  # or "plain"
    dtype: str = "fp32"
    tp: int = 1
    pp: int = 1
    virtual: int = 1  # chunks per rank
    cp: int = 1
    ep: int = 1
    etp: int = 1
    groups: int = GROUPS  # query groups
    layers: int = 1
    experts: bool = False
    mtp: bool = False
    tied: bool = False
    clip: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)  # of convert_


def parallel_of(topology: Topology) -> AbstractContextManager[None]:
    """Megatron-core's process groups for a topology."""
    return megatron_groups(
        tensor_model_parallel_size=topology.tp,
        pipeline_model_parallel_size=topology.pp,
        virtual_pipeline_model_parallel_size=topology.virtual if topology.virtual > 1 else None,
        context_parallel_size=topology.cp,
        expert_model_parallel_size=topology.ep,
        expert_tensor_parallel_size=topology.etp,
    )


def _chunk(topology: Topology, config: Any, vp_stage: int | None) -> nn.Module:
    from megatron.core import parallel_state as groups
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec

    spec = get_gpt_layer_local_spec(EXPERT_COUNT if topology.experts else None, normalization="RMSNorm")
    if topology.cp > 1:
        from tests.helpers.megatron import te_fakes

        # the local attention refuses context parallelism; nothing is computed here, gradients are fed
        spec.submodules.self_attention.submodules.core_attention = te_fakes.TEDotProductAttention
    more: dict[str, Any] = {}
    if topology.mtp:
        more["mtp_block_spec"] = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False, vp_stage=vp_stage)
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=VOCAB,
        max_sequence_length=16,
        pre_process=groups.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=groups.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=topology.tied,
        position_embedding_type="rope",
        vp_stage=vp_stage,
        **more,
    )


def chunks_of(topology: Topology) -> list[nn.Module]:
    """This rank's part of the model, one per virtual stage, in Megatron-core's own weights."""
    from megatron.core.transformer import TransformerConfig

    dtype = DTYPES[topology.dtype]
    kind = MOE if topology.experts else LLAMA
    config = TransformerConfig(
        **{**SIZES, **kind, **SHAPE, "num_query_groups": topology.groups, "num_layers": topology.layers},
        mtp_num_layers=1 if topology.mtp else None,
        tensor_model_parallel_size=topology.tp,
        pipeline_model_parallel_size=topology.pp,
        virtual_pipeline_model_parallel_size=topology.virtual if topology.virtual > 1 else None,
        context_parallel_size=topology.cp,
        expert_model_parallel_size=topology.ep,
        expert_tensor_parallel_size=topology.etp,
        sequence_parallel=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        add_qkv_bias=False,
    )
    vp_stages = range(topology.virtual) if topology.virtual > 1 else [None]
    return [_chunk(topology, config, vp_stage) for vp_stage in vp_stages]


def name_of(model: Any, name: str, ep_rank: int, local_experts: int) -> str:
    """A parameter's name with the numbers that its layer and its expert have in the whole model."""
    parts = gpt_shards.whole_name(model, name).split(".")
    if "local_experts" in parts:
        at = parts.index("local_experts") + 1
        parts[at] = str(int(parts[at]) + ep_rank * local_experts)
    return ".".join(parts)


def cut(name: str, full: Tensor, topology: Topology, tp_rank: int, etp_rank: int) -> Tensor:
    """What a rank holds of an unsharded tensor."""
    if "local_experts" in name:
        return gpt_shards.cut(name, full, etp_rank, topology.etp) if topology.etp > 1 else full
    if topology.tp == 1 or "router" in name or "norm" in name:
        return full
    return gpt_shards.cut(name, full, tp_rank, topology.tp)


def classes_of(shapes: dict[str, tuple[int, ...]], groups: int) -> Classes:
    """Roles and blocks by hand, from the last words of a name."""
    qkv: list[Span] = []
    for _ in range(groups):
        for role, rows, size in (
            ("query", HEADS // groups * HEAD_DIM, HEAD_DIM),
            ("key", HEAD_DIM, HEAD_DIM),
            ("value", HEAD_DIM, 1),
        ):
            at = qkv[-1].end if qkv else 0
            qkv.append(Span(at, at + rows, role, size))
    ends = {
        "word_embeddings.weight": "embedding",
        "output_layer.weight": "output",
        "linear_proj.weight": "attn_out",
        "linear_fc1.weight": "ffn",
        "linear_fc2.weight": "ffn",
        "eh_proj.weight": "ffn",
        "router.weight": "router",
    }
    classes: Classes = {}
    for name, shape in shapes.items():
        if name.endswith("linear_qkv.weight"):
            classes[name] = Classified(tuple(qkv))
        elif "norm" in name:
            classes[name] = Classified((Span(0, shape[0], "norm", 0),))
        else:
            role = next(role for end, role in ends.items() if name.endswith(end))
            classes[name] = Classified((Span(0, shape[0], role, 1),))
    return classes


class ParallelRun:
    """A converted stack on the groups of a topology.

    Attributes:
        params: this rank's parameters by their names in the whole model.
        shapes: unsharded shapes of all parameters of the whole model.
    """

    def __init__(self, topology: Topology, shapes: dict[str, tuple[int, ...]]) -> None:
        from megatron.core import parallel_state as groups

        self.topology, self.shapes = topology, shapes
        self.tp_rank = groups.get_tensor_model_parallel_rank()
        self.etp_rank = groups.get_expert_tensor_parallel_rank()
        self.dp_rank = groups.get_data_parallel_rank(with_context_parallel=True)
        self.dp_size = groups.get_data_parallel_world_size(with_context_parallel=True)
        self.edp_rank = dist.get_rank(groups.get_expert_data_parallel_group())
        self.edp_size = dist.get_world_size(groups.get_expert_data_parallel_group())
        self.stage_rank = groups.get_pipeline_model_parallel_rank()
        ep_rank = groups.get_expert_model_parallel_rank()
        self.models = chunks_of(topology)
        self.params: dict[str, nn.Parameter] = {}
        for model in self.models:
            for name, param in model.named_parameters():
                own = name_of(model, name, ep_rank, EXPERT_COUNT // topology.ep)
                assert own not in self.params, own
                if own in shapes or self.is_copy(own):
                    self.params[own] = param
                else:  # the output layer's own weight in a stage that uses the embedding's: never used, no gradient
                    assert own == "output_layer.weight", own
                    param.data.zero_()
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(self.cut(name, self.start(name)))
        self._wrap()

    def _wrap(self) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
        from megatron.core.transformer.module import Float16Module

        topology, dtype = self.topology, DTYPES[self.topology.dtype]
        distributed = topology.wrapper == "distributed"
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
        self.chunks = [
            DistributedDataParallel(
                m.config,
                ddp,
                m if topology.dtype == "fp32" else Float16Module(m.config, m),
                disable_bucketing=index > 0,
            )
            for index, m in enumerate(self.models)
        ]
        config = OptimizerConfig(
            optimizer="adam",
            lr=LR,
            min_lr=LR,
            weight_decay=WEIGHT_DECAY,
            adam_beta1=betas_of(topology.optimizer)[0],
            adam_beta2=betas_of(topology.optimizer)[1],
            adam_eps=EPS,
            clip_grad=topology.clip,
            bf16=topology.dtype == "bf16",
            params_dtype=dtype,
            use_distributed_optimizer=distributed,
        )
        self.optimizer = get_megatron_optimizer(
            config, self.chunks, config_overrides=get_standard_config_overrides(config)
        )
        self.wrappers = self.optimizer.chained_optimizers

    def convert(self) -> None:
        from megatron_patch import convert_

        convert_(self.optimizer, self.chunks, FULL_NAME[self.topology.optimizer], **self.topology.settings)

    def start(self, name: str) -> Tensor:
        """First value of a whole parameter; a second copy of the embedding starts as the embedding."""
        name = EMBEDDING if self.is_copy(name) else name
        return models.small_weight(name, self.shapes[name]).to(DTYPES[self.topology.dtype]).float()

    def is_copy(self, name: str) -> bool:
        """Whether this is the output layer of a later stage, tied to the first stage's embedding."""
        return self.topology.tied and not self.topology.mtp and name == "output_layer.weight"

    def cut(self, name: str, full: Tensor) -> Tensor:
        return cut(name, full, self.topology, self.tp_rank, self.etp_rank)

    def feed(self, plan: GradientPlan, step: int) -> None:
        """Give every parameter its share of the planned gradients and let Megatron-core average them.

        An expert's gradient on one rank is that of the tokens of all data-parallel ranks that send to it.
        """
        from megatron.core.distributed import finalize_model_grads

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        for name, param in self.params.items():
            key, whole = self._planned(name)
            ranks = self._senders() if "local_experts" in name else [self.dp_rank]
            share = sum(plan.share(key, whole, step, rank) for rank in ranks)
            param.main_grad.copy_(self.cut(name, torch.as_tensor(share)))
        finalize_model_grads(self.chunks)

    def _senders(self) -> list[int]:
        per_rank = self.dp_size // self.edp_size
        return list(range(self.edp_rank * per_rank, (self.edp_rank + 1) * per_rank))

    def _planned(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Key and unsharded shape of what is fed; copies of the embedding have gradients of their own."""
        copy = name == EMBEDDING and self.topology.pp > 1 and self.stage_rank > 0
        shape = self.shapes[EMBEDDING if self.is_copy(name) else name]
        return ("the copy" if copy or self.is_copy(name) else name), shape

    def mean(self, plan: GradientPlan, name: str, step: int) -> Tensor:
        """The gradient that the optimizer must see for a whole parameter."""
        gradient = plan.mean(name, self.shapes[name], step)
        if name == EMBEDDING and self.topology.pp > 1 and (self.topology.tied or self.topology.mtp):
            gradient = gradient + plan.mean("the copy", self.shapes[name], step)
        return gradient

    def _holds(self, wrapper: Any, param: nn.Parameter) -> bool:
        if self.topology.wrapper == "distributed":
            return any(param in buffer.param_index_map for buffer in wrapper.buffers)
        main = getattr(param, "main_param", None)
        return any(t is param or t is main for group in wrapper.param_groups for t in group["params"])

    @torch.no_grad()
    def masters(self) -> dict[str, Tensor]:
        """{name: fp32 weight that this rank's data-parallel peers hold together}."""
        return {name: self._master(param) for name, param in self.params.items()}

    def _master(self, param: nn.Parameter) -> Tensor:
        wrapper = next(wrapper for wrapper in self.wrappers if self._holds(wrapper, param))
        if self.topology.wrapper == "plain":
            tensor = param if self.topology.dtype == "fp32" else param.main_param
            return tensor.detach().clone()
        return joined_shards(wrapper, param, shard_in(wrapper, param))


def whole_shapes(topology: Topology) -> dict[str, tuple[int, ...]]:
    """Unsharded shapes of the whole model, from Megatron-core itself at size 1 of everything."""
    kept = ("layers", "experts", "mtp", "tied", "groups")
    alone = Topology(**{name: getattr(topology, name) for name in kept})
    with parallel_of(alone):
        (model,) = chunks_of(alone)
        return {name: tuple(param.shape) for name, param in model.named_parameters()}
