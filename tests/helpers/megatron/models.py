# SPDX-License-Identifier: Apache-2.0
"""Small Megatron-core models of every kind of layer, on the current process groups.

The model classes are Megatron-core's own. Where it wants Transformer Engine, the stand-ins of `te_fakes` are passed
through the layer specs, as the real classes would be.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.models.T5 import t5_spec
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.transformer import TransformerConfig, multi_latent_attention
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayerSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn

from tests.helpers.megatron import te_fakes

SIZES: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 12,
    "ffn_hidden_size": 80,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
}
LLAMA = {"normalization": "RMSNorm", "gated_linear_unit": True, "add_bias_linear": False}
EXPERTS = {
    **LLAMA,
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 20,
    "moe_shared_expert_intermediate_size": 24,
    "moe_shared_expert_gate": True,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "allgather",
}
LATENT = {
    **LLAMA,
    "num_query_groups": 4,
    "multi_latent_attention": True,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 12,
    "rope_type": "rope",
}
# 0.19 compares the flag with the spec's norms on latents; it does not know the stand-ins' fused ones
LATENT_WITH_NORMS = {**LATENT, "qk_layernorm": True}
# renamed in 0.17
MTP_LAYER = (
    "mtp_model_layer" if hasattr(MultiTokenPredictionLayerSubmodules, "mtp_model_layer") else "transformer_layer"
)


@contextmanager
def alone():
    """Process groups of one rank, in memory, for models that are built in the test's own process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def gpt(spec: ModuleSpec | None = None, *, spec_settings: Any = None, tied: bool = False, **config: Any) -> nn.Module:
    """A GPT model; ``config`` goes over `SIZES`, the spec is the local one unless given."""
    torch.manual_seed(7)
    cls = MLATransformerConfig if config.get("multi_latent_attention") else TransformerConfig
    settings = cls(
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(), **{**SIZES, **config}
    )
    spec = get_gpt_layer_local_spec(**(spec_settings or {})) if spec is None else spec
    extra = {}
    if config.get("mtp_num_layers"):
        extra["mtp_block_spec"] = get_gpt_mtp_block_spec(settings, spec, use_transformer_engine=False)
    return GPTModel(
        config=settings,
        transformer_layer_spec=spec,
        vocab_size=96,
        max_sequence_length=16,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="learned_absolute" if tied else "rope",
        **extra,
    )


def t5() -> nn.Module:
    """An encoder and a decoder with cross attention, local spec."""
    torch.manual_seed(7)
    config = TransformerConfig(**{**SIZES, "num_query_groups": 4})
    return T5Model(
        config=config,
        encoder_config=config,
        transformer_encoder_layer_spec=t5_spec.get_t5_encoder_with_local_block_spec(1),
        transformer_decoder_layer_spec=t5_spec.get_t5_decoder_with_local_block_spec(1),
        vocab_size=96,
        max_sequence_length=16,
    )


def t5_outputs(model: nn.Module) -> torch.Tensor:
    """Logits of a `t5` for a few tokens."""
    tokens = torch.randint(96, (2, 6))
    allowed = torch.zeros(2, 1, 6, 6, dtype=torch.bool)  # True is what may not be seen
    return model(tokens, tokens, allowed, allowed, allowed)


def bert() -> nn.Module:
    """A BERT with its two heads, local spec."""
    torch.manual_seed(7)
    config = TransformerConfig(**{**SIZES, "num_query_groups": 4})
    return BertModel(
        config=config,
        num_tokentypes=2,
        transformer_layer_spec=bert_layer_local_spec,
        vocab_size=96,
        max_sequence_length=16,
    )


def _layer(attention: ModuleSpec, mlp: ModuleSpec, norm: Any) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _mlp(linear_fc1: Any, linear_fc2: Any) -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=linear_fc2)


def te_spec(experts: bool = False, single: bool = False) -> ModuleSpec:
    """The Transformer Engine layer spec: norms are fused into linear_qkv and into a dense linear_fc1."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=te_fakes.TELayerNormColumnParallelLinear,
            core_attention=te_fakes.TEDotProductAttention,
            linear_proj=te_fakes.TERowParallelLinear,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    dense = _mlp(te_fakes.TELayerNormColumnParallelLinear, te_fakes.TERowParallelLinear)
    if not experts:
        return _layer(attention, ModuleSpec(module=MLP, submodules=dense), IdentityOp)
    grouped = [te_fakes.TEColumnParallelGroupedLinear, te_fakes.TERowParallelGroupedLinear]
    if single:
        grouped = [type(cls.__name__, (cls,), {"single": True}) for cls in grouped]
    shared = _mlp(te_fakes.TEColumnParallelLinear, te_fakes.TERowParallelLinear)
    moe = MoESubmodules(
        experts=ModuleSpec(module=TEGroupedMLP, submodules=_mlp(*grouped)),
        shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=shared),
    )
    layer = _layer(attention, ModuleSpec(module=MoELayer, submodules=moe), IdentityOp)
    layer.submodules.pre_mlp_layernorm = WrappedTorchNorm
    return layer


@contextmanager
def te_symbols():
    """What Megatron-core's latent attention compares the classes of its spec with."""
    names = {"TELinear": te_fakes.TELinear, "TEColumnParallelLinear": te_fakes.TEColumnParallelLinear}
    with mock.patch.multiple(multi_latent_attention, **names):
        yield


def latent_spec(te: bool, norms: bool = True) -> ModuleSpec:
    """Multi-head latent attention: down-projections duplicated (Transformer Engine) or column-parallel (local).

    Without a query latent 0.19 takes no norms on latents, unless they are fused.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    column = te_fakes.TEColumnParallelLinear if te else ColumnParallelLinear
    up = te_fakes.TELayerNormColumnParallelLinear if te else ColumnParallelLinear
    row = te_fakes.TERowParallelLinear if te else RowParallelLinear
    down = te_fakes.TELinear if te else ColumnParallelLinear
    attention = ModuleSpec(
        module=MLASelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=column,
            linear_q_down_proj=down,
            linear_q_up_proj=up,
            linear_kv_down_proj=down,
            linear_kv_up_proj=up,
            core_attention=te_fakes.TEDotProductAttention,
            linear_proj=row,
            q_layernorm=WrappedTorchNorm if norms and not te else IdentityOp,
            kv_layernorm=WrappedTorchNorm if norms and not te else IdentityOp,
        ),
    )
    fc1, fc2 = (te_fakes.TEColumnParallelLinear, row) if te else (ColumnParallelLinear, RowParallelLinear)
    return _layer(attention, ModuleSpec(module=MLP, submodules=_mlp(fc1, fc2)), WrappedTorchNorm)
