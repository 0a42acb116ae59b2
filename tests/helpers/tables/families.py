# SPDX-License-Identifier: Apache-2.0
"""Small Hugging Face models, one for each family whose names or layouts differ."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

_COMMON = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
_MODERN = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 80}
_HEADS_OF_12 = {**_MODERN, "head_dim": 12}
_HEADS_OF_16 = {**_MODERN, "head_dim": 16}
_UNTIED = {"tie_word_embeddings": False}
_QWEN_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_SHARED = {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}
LATENT_ATTENTION_WITH_EXPERTS = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
}
_LATENT = {**_MODERN, "num_hidden_layers": 2, **LATENT_ATTENTION_WITH_EXPERTS}
_FALCON = {**_COMMON, "alibi": False, "bias": False}

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": _MODERN,
    "Mistral": _MODERN,
    "Granite": _MODERN,
    "Qwen2": _MODERN,
    "Qwen3": _HEADS_OF_12,
    "Gemma": _HEADS_OF_16,
    "Gemma2": _HEADS_OF_16,
    "Gemma3": _HEADS_OF_16,
    "Olmo2": _MODERN,
    "Phi3": _MODERN,
    "Phi": _MODERN,
    "Starcoder2": {**_MODERN, "use_bias": True},
    "Nemotron": {**_HEADS_OF_12, **_UNTIED},
    "StableLm": {**_MODERN, "qk_layernorm": True, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "Glm4": {**_HEADS_OF_12, "attention_bias": True, "partial_rotary_factor": 0.5},
    "Mixtral": {**_MODERN, "num_local_experts": 3},
    "MiniMax": {
        **_HEADS_OF_12,
        "num_hidden_layers": 2,
        "num_local_experts": 3,
        "layer_types": ["linear_attention", "full_attention"],
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "GraniteMoe": {**_MODERN, **_UNTIED, "num_local_experts": 3},
    "Qwen2Moe": {**_MODERN, **_QWEN_EXPERTS, **_SHARED},
    "Qwen3Moe": {**_HEADS_OF_12, **_QWEN_EXPERTS},
    "GptOss": {**_HEADS_OF_16, "num_local_experts": 3, "num_experts_per_tok": 2},
    "Llama4": {**_HEADS_OF_12, **_UNTIED, "num_local_experts": 3, "interleave_moe_layer_step": 1},
    "DeepseekV2": {**_LATENT, **_UNTIED},
    "DeepseekV3": {**_LATENT, **_UNTIED, "n_group": 2, "topk_group": 1},
    "GPT2": {"n_embd": 48, "n_head": 4, "n_layer": 1, "vocab_size": 97, "n_positions": 64},
    "GPTBigCode": {"n_embd": 48, "n_head": 4, "n_layer": 1, "vocab_size": 97, "n_positions": 64},
    "Falcon-7B": {**_FALCON, "multi_query": True},
    "Falcon-40B": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "Falcon-RW": {**_COMMON, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
    "Bloom": {"hidden_size": 48, "n_head": 4, "n_layer": 1, "vocab_size": 97, "pad_token_id": 0},
    "GPTNeoX": {**_COMMON, **_UNTIED, "intermediate_size": 80},
    "Persimmon": {**_COMMON, **_UNTIED, "intermediate_size": 80},
    "Mpt": {"d_model": 48, "n_heads": 4, "n_layers": 1, "vocab_size": 97, "max_seq_len": 64},
    "GPTNeo": {
        "hidden_size": 48,
        "num_heads": 4,
        "num_layers": 1,
        "attention_types": [[["global"], 1]],
        "vocab_size": 97,
        "max_position_embeddings": 64,
    },
    "GPTJ": {
        "n_embd": 48,
        "n_head": 4,
        "n_layer": 1,
        "vocab_size": 97,
        "n_positions": 64,
        "rotary_dim": 8,
        **_UNTIED,
    },
    "OPT": {**_COMMON, "ffn_dim": 80, "word_embed_proj_dim": 24},
    "Mamba2": {
        **_UNTIED,
        "hidden_size": 48,
        "num_hidden_layers": 1,
        "vocab_size": 97,
        "num_heads": 4,
        "head_dim": 24,
        "state_size": 8,
        "n_groups": 1,
        "pad_token_id": 0,
    },
    "Qwen3Next": {
        **_HEADS_OF_12,
        **_QWEN_EXPERTS,
        **_SHARED,
        **_UNTIED,
        "num_hidden_layers": 2,
        "full_attention_interval": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "Qwen3_5": {
        **_HEADS_OF_12,
        **_UNTIED,
        "num_hidden_layers": 2,
        "full_attention_interval": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "Jamba": {
        **_MODERN,
        **_UNTIED,
        "num_hidden_layers": 2,
        "num_experts": 3,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 0,
        "expert_layer_period": 2,
        "use_mamba_kernels": False,
    },
}
_TEXT_CONFIGS = ("Gemma3", "Llama4", "Qwen3_5")  # whose plain config is that of the multi-modal model


def build(family: str, **changes: object) -> nn.Module:
    """The family's causal language model, randomly initialised on the default device."""
    transformers = importlib.import_module("transformers")
    name = family.partition("-")[0]
    config = f"{name}TextConfig" if name in _TEXT_CONFIGS else f"{name}Config"
    settings = {**FAMILIES[family], **changes}
    model = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    return getattr(transformers, model)(getattr(transformers, config)(**settings))
