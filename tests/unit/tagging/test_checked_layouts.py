# SPDX-License-Identifier: Apache-2.0
"""Classes in the table of fused weights, beside those of `test_families`: their own forward says whether it is right.

The other classes of the table share their code with one of these (`tests/data/names/transformers.txt` lists all).
"""

import pytest
import torch

from ds_blockwise import tag_parameters, verify_layout
from ds_blockwise.blocks.roles import Role
from ds_blockwise.tagging.names import match_name
from tests.helpers.tables.families import LATENT_ATTENTION_WITH_EXPERTS

transformers = pytest.importorskip("transformers", reason="the models are transformers' own")

TEXT = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 97,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT = {"n_embd": 48, "n_head": 4, "n_layer": 1, "vocab_size": 97, "n_positions": 64}
LATENT = {**TEXT, **LATENT_ATTENTION_WITH_EXPERTS, "n_group": 2, "topk_group": 1}
VISION = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4}


def image(size=16):
    return torch.randn(1, 3, size, size)


def from_image(size=16):
    """Runs a vision tower on an image."""
    return lambda model: first(model(pixel_values=image(size)))


def from_patches(width):
    """Runs a vision tower that takes patches, and the grid on which they lie."""
    return lambda model: first(model(torch.randn(16, width), grid_thw=torch.tensor([[1, 4, 4]])))


def first(result):
    result = getattr(result, "last_hidden_state", result)
    return result if isinstance(result, torch.Tensor) else result[0]


# model class -> (config class, its settings, the fused weights and their roles in the order of rows, how to run it)
MODELS = {
    "DbrxForCausalLM": (
        "DbrxConfig",
        {
            "d_model": 48,
            "n_heads": 4,
            "n_layers": 1,
            "vocab_size": 97,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 2, "moe_top_k": 1, "hidden_size": 48},
        },
        {"Wqkv": "qkv"},
        None,
    ),
    "OpenAIGPTLMHeadModel": ("OpenAIGPTConfig", GPT, {"c_attn": "qkv"}, None),
    "ImageGPTForCausalImageModeling": ("ImageGPTConfig", GPT, {"c_attn": "qkv"}, None),
    "ModernBertModel": ("ModernBertConfig", TEXT, {"Wqkv": "qkv"}, None),
    "GPTNeoXJapaneseForCausalLM": ("GPTNeoXJapaneseConfig", TEXT, {"query_key_value": "qkv" * 4}, None),
    "MiniCPM3ForCausalLM": ("MiniCPM3Config", LATENT, {"kv_b_proj": "kv" * 4, "kv_a_proj_with_mqa": "vk"}, None),
    "Glm4MoeLiteForCausalLM": (
        "Glm4MoeLiteConfig",
        LATENT,
        {"kv_b_proj": "kv" * 4, "kv_a_proj_with_mqa": "vk"},
        None,
    ),
    "LongcatFlashForCausalLM": (
        "LongcatFlashConfig",
        {
            **LATENT,
            "num_layers": 1,
            "ffn_hidden_size": 40,
            "expert_ffn_hidden_size": 20,
            "zero_expert_num": 2,
            "head_dim": 4,
        },
        {"kv_b_proj": "kv" * 4, "kv_a_proj_with_mqa": "vk"},
        None,
    ),
    "YoutuForCausalLM": ("YoutuConfig", LATENT, {"kv_b_proj": "kv" * 4, "kv_a_proj_with_mqa": "vk"}, None),
    "BlipVisionModel": ("BlipVisionConfig", VISION, {"qkv": "qkv"}, from_image()),
    "Blip2VisionModel": ("Blip2VisionConfig", VISION, {"qkv": "qkv"}, from_image()),
    "SamVisionModel": (
        "SamVisionConfig",
        {**VISION, "output_channels": 8, "mlp_dim": 40, "global_attn_indexes": [0], "initializer_range": 0.02},
        {"qkv": "qkv"},
        from_image(),
    ),
    "VitDetModel": ("VitDetConfig", {**VISION, "pretrain_image_size": 16}, {"qkv": "qkv"}, from_image()),
    "TimesformerModel": (
        "TimesformerConfig",
        {**VISION, "num_frames": 2},
        {"qkv": "qkv"},
        lambda model: first(model(pixel_values=torch.randn(1, 2, 3, 16, 16))),
    ),
    "Qwen3VLVisionModel": (
        "Qwen3VLVisionConfig",
        {
            "hidden_size": 48,
            "num_heads": 4,
            "depth": 1,
            "intermediate_size": 40,
            "patch_size": 4,
            "temporal_patch_size": 1,
            "out_hidden_size": 24,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [],
        },
        {"qkv": "qkv"},
        from_patches(48),
    ),
    "Glm4vVisionModel": (
        "Glm4vVisionConfig",
        {
            "hidden_size": 48,
            "num_heads": 4,
            "depth": 1,
            "intermediate_size": 40,
            "patch_size": 4,
            "image_size": 16,
            "temporal_patch_size": 1,
            "out_hidden_size": 24,
        },
        {"qkv": "qkv"},
        from_patches(48),
    ),
}


def build(name, settings=None):
    """The model, with only those weights trainable whose names are known; experts have no part in attention."""
    config, given, _, _ = MODELS[name]
    torch.manual_seed(3)
    config_class = getattr(transformers, config)
    model = getattr(transformers, name)(config_class(**(settings or given)))
    for fqn, param in model.named_parameters():
        match = match_name(fqn)
        param.requires_grad_(match is not None and match.role is not Role.FFN)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_order_of_rows_is_the_one_that_forward_computes_with(name):
    """A table of class names is a claim about code that somebody else changes."""
    _, _, fused, run = MODELS[name]
    model = build(name)
    tag_parameters(model)
    letters = {"query": "q", "key": "k", "value": "v"}
    for linear, roles in fused.items():
        specs = [p.block_spec for n, p in model.named_parameters() if f".{linear}.weight" in n]
        assert specs
        assert {"".join(letters[part.role.value] for part in spec.parts) for spec in specs} == {roles}
    assert verify_layout(model, run).num_checks >= 4
