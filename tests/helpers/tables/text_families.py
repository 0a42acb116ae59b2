# SPDX-License-Identifier: Apache-2.0
"""Small encoders, encoder-decoders, hybrids and heads of transformers: the class to build, and its settings."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

_SIZES = {"hidden_size": 48, "num_attention_heads": 4, "vocab_size": 97, "num_hidden_layers": 1, "pad_token_id": 0}
_ENCODER = {**_SIZES, "intermediate_size": 80, "max_position_embeddings": 64, "attn_implementation": "eager"}
_DECODER = {**_ENCODER, "num_key_value_heads": 2}
_HEADS_OF_12 = {**_DECODER, "head_dim": 12}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
_T5 = {
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 80,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "vocab_size": 97,
    "relative_attention_num_buckets": 8,
    "pad_token_id": 0,
}
_BART = {
    "d_model": 48,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
_STATE_SPACE = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_n_groups": 1, "mamba_d_state": 8}

TEXT_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForPreTraining": ("BertConfig", _ENCODER),
    "BertForSequenceClassification": ("BertConfig", _ENCODER),
    "BertForTokenClassification": ("BertConfig", _ENCODER),
    "BertForQuestionAnswering": ("BertConfig", _ENCODER),
    "BertLMHeadModel": ("BertConfig", {**_ENCODER, "is_decoder": True, "add_cross_attention": True}),
    "RobertaForMaskedLM": ("RobertaConfig", _ENCODER),
    "RobertaForSequenceClassification": ("RobertaConfig", _ENCODER),
    "ModernBertForMaskedLM": ("ModernBertConfig", {**_ENCODER, "num_hidden_layers": 2}),
    "ModernBertForSequenceClassification": ("ModernBertConfig", _ENCODER),
    "ModernBertDecoderForCausalLM": ("ModernBertDecoderConfig", _ENCODER),
    "DebertaForMaskedLM": ("DebertaConfig", {**_ENCODER, **_RELATIVE, "max_relative_positions": 8}),
    "DebertaV2ForMaskedLM": (
        "DebertaV2Config",
        {
            **_ENCODER,
            **_RELATIVE,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": False,
            "conv_kernel_size": 3,
        },
    ),
    "ElectraForMaskedLM": ("ElectraConfig", {**_ENCODER, "embedding_size": 24}),
    "ElectraForPreTraining": ("ElectraConfig", {**_ENCODER, "embedding_size": 24}),
    "DistilBertForMaskedLM": (
        "DistilBertConfig",
        {
            "dim": 48,
            "n_heads": 4,
            "n_layers": 1,
            "hidden_dim": 80,
            "vocab_size": 97,
            "max_position_embeddings": 64,
        },
    ),
    "AlbertForMaskedLM": ("AlbertConfig", {**_ENCODER, "embedding_size": 24}),
    "MPNetForMaskedLM": ("MPNetConfig", _ENCODER),
    "T5ForConditionalGeneration": ("T5Config", {**_T5, "feed_forward_proj": "relu"}),
    "T5ForSequenceClassification": ("T5Config", {**_T5, "feed_forward_proj": "relu"}),
    "MT5ForConditionalGeneration": ("MT5Config", _T5),
    "UMT5ForConditionalGeneration": ("UMT5Config", _T5),
    "LongT5ForConditionalGeneration": (
        "LongT5Config",
        {**_T5, "encoder_attention_type": "transient-global", "feed_forward_proj": "relu"},
    ),
    "BartForConditionalGeneration": ("BartConfig", _BART),
    "BartForSequenceClassification": ("BartConfig", _BART),
    "PegasusForConditionalGeneration": ("PegasusConfig", _BART),
    "Lfm2ForCausalLM": (
        "Lfm2Config",
        {
            **_DECODER,
            **_ENDS,
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "conv"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "Lfm2MoeForCausalLM": (
        "Lfm2MoeConfig",
        {
            **_DECODER,
            **_ENDS,
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "conv"],
            "num_dense_layers": 1,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
        },
    ),
    "Gemma3nForCausalLM": (
        "Gemma3nTextConfig",
        {
            **_HEADS_OF_12,
            "layer_types": ["full_attention"],
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.0],
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "intermediate_size": [80],
        },
    ),
    "NemotronHForCausalLM": (
        "NemotronHConfig",
        {
            **_HEADS_OF_12,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "mlp", "attention", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 12,
            "ssm_state_size": 8,
            "n_groups": 1,
            "n_routed_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "moe_shared_expert_intermediate_size": 20,
            "moe_latent_size": 24,
        },
    ),
    "CohereForCausalLM": ("CohereConfig", {**_DECODER, "use_qk_norm": True}),
    "LlamaForSequenceClassification": ("LlamaConfig", _DECODER),
    "LlamaForTokenClassification": ("LlamaConfig", _DECODER),
    "LlamaForQuestionAnswering": ("LlamaConfig", _DECODER),
    "GPT2DoubleHeadsModel": (
        "GPT2Config",
        {"n_embd": 48, "n_head": 4, "n_layer": 1, "vocab_size": 97, "n_positions": 64},
    ),
    "KimiLinearForCausalLM": (
        "KimiLinearConfig",
        {
            **_DECODER,
            **_HYBRID,
            "num_key_value_heads": 4,
            **_ENDS,
            "mlp_layer_types": ["dense", "dense"],
            "linear_head_dim": 8,
            "linear_num_heads": 2,
            "q_lora_rank": None,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
        },
    ),
    "MiniMaxForCausalLM": ("MiniMaxConfig", {**_HEADS_OF_12, **_ENDS, **_HYBRID, "num_local_experts": 3}),
    "OlmoHybridForCausalLM": (
        "OlmoHybridConfig",
        {
            **_HEADS_OF_12,
            **_HYBRID,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "BambaForCausalLM": (
        "BambaConfig",
        {**_DECODER, **_STATE_SPACE, "num_hidden_layers": 2, "attn_layer_indices": [1]},
    ),
    "GraniteMoeHybridForCausalLM": (
        "GraniteMoeHybridConfig",
        {
            **_DECODER,
            **_STATE_SPACE,
            "layer_types": ["mamba"],
            "num_local_experts": 3,
            "shared_intermediate_size": 20,
        },
    ),
    "RecurrentGemmaForCausalLM": (
        "RecurrentGemmaConfig",
        {**_DECODER, "lru_width": 48, "num_hidden_layers": 3, "intermediate_size": 160},
    ),
    "RwkvForCausalLM": (
        "RwkvConfig",
        {
            "hidden_size": 48,
            "num_hidden_layers": 1,
            "vocab_size": 97,
            "attention_hidden_size": 48,
            "intermediate_size": 80,
        },
    ),
    "xLSTMForCausalLM": (
        "xLSTMConfig",
        {"hidden_size": 48, "num_heads": 4, "num_hidden_layers": 1, "vocab_size": 97},
    ),
}


def build_text(model: str, **changes: object) -> nn.Module:
    """The model on the meta device."""
    transformers = importlib.import_module("transformers")
    config, settings = TEXT_FAMILIES[model]
    with torch.device("meta"):
        return getattr(transformers, model)(getattr(transformers, config)(**{**settings, **changes}))
