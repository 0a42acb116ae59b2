# SPDX-License-Identifier: Apache-2.0
"""Small vision, audio and multimodal models of transformers, one for each family, on the default device."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

_TOWER = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 80}
_IMAGES = {**_TOWER, "image_size": 8, "patch_size": 4}
_TEXT = {
    **_TOWER,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CLIP_TEXT = {
    **_TOWER,
    "vocab_size": 97,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROTARY = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}}
_QWEN_TOWER = {
    "depth": 1,
    "hidden_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "intermediate_size": 80,
    "out_hidden_size": 48,
}
_QWEN3_TOWER = {**_QWEN_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
_SOUND = {
    "num_mel_bins": 8,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "d_model": 48,
    "max_source_positions": 20,
}
_DINO = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}


def _text(kind: str, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **_TEXT, **more}


# model class, config class, settings
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **_SOUND,
            "decoder_layers": 1,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 80,
            "max_target_positions": 16,
            "vocab_size": 97,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    ),
    "Wav2Vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            **_TOWER,
            "vocab_size": 97,
            "conv_dim": (16, 16),
            "conv_kernel": (3, 3),
            "conv_stride": (2, 2),
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
    ),
    "ViT": ("ViTForImageClassification", "ViTConfig", _IMAGES),
    "ViT for masked images": ("ViTForMaskedImageModeling", "ViTConfig", {**_IMAGES, "encoder_stride": 4}),
    "CLIP": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": _CLIP_TEXT, "vision_config": _IMAGES, "projection_dim": 24},
    ),
    "SigLIP": (
        "SiglipModel",
        "SiglipConfig",
        {"text_config": {**_CLIP_TEXT, "projection_size": 48}, "vision_config": _IMAGES},
    ),
    "SigLIP 2": (
        "Siglip2Model",
        "Siglip2Config",
        {
            "text_config": {**_CLIP_TEXT, "projection_size": 48},
            "vision_config": {**_TOWER, "patch_size": 4, "num_patches": 4},
        },
    ),
    "DINOv2": ("Dinov2ForImageClassification", "Dinov2Config", {**_DINO, "mlp_ratio": 2}),
    "DINOv2 with registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**_DINO, "mlp_ratio": 2, "use_swiglu_ffn": True, "num_register_tokens": 2},
    ),
    "DINOv3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**_IMAGES, "num_register_tokens": 2}),
    "LLaVA": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "vision_config": {"model_type": "clip_vision_model", **_IMAGES},
            "text_config": _text("llama"),
            "image_token_index": 5,
            "image_seq_length": 4,
        },
    ),
    "LLaVA-NeXT": (
        "LlavaNextForConditionalGeneration",
        "LlavaNextConfig",
        {
            "vision_config": {"model_type": "clip_vision_model", **_IMAGES},
            "text_config": _text("llama"),
            "image_token_index": 5,
            "image_seq_length": 4,
        },
    ),
    "LLaVA-OneVision": (
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionConfig",
        {"vision_config": {"model_type": "siglip_vision_model", **_IMAGES}, "text_config": _text("qwen2")},
    ),
    "Qwen2-VL": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "vision_config": {
                "depth": 1,
                "embed_dim": 48,
                "hidden_size": 48,
                "num_heads": 4,
                "patch_size": 4,
                "mlp_ratio": 2,
            },
            "text_config": {**_TEXT, **_ROTARY},
        },
    ),
    "Qwen2.5-VL": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "vision_config": {**_QWEN_TOWER, "window_size": 16, "fullatt_block_indexes": [0]},
            "text_config": {**_TEXT, **_ROTARY},
        },
    ),
    "Qwen3-VL": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {"vision_config": _QWEN3_TOWER, "text_config": {**_TEXT, **_ROTARY, "head_dim": 12}},
    ),
    "Qwen3-VL-MoE": (
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {
            "vision_config": _QWEN3_TOWER,
            "text_config": {
                **_TEXT,
                **_ROTARY,
                "head_dim": 12,
                "num_experts": 3,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 20,
            },
        },
    ),
    "InternVL": (
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        {
            "vision_config": {**_IMAGES, "use_absolute_position_embeddings": True, "use_qk_norm": True},
            "text_config": _text("qwen2"),
            "image_token_id": 5,
            "downsample_ratio": 0.5,
        },
    ),
    "Idefics3 and SmolVLM": (
        "Idefics3ForConditionalGeneration",
        "Idefics3Config",
        {"vision_config": _IMAGES, "text_config": _text("llama"), "image_token_id": 5, "scale_factor": 2},
    ),
    "Idefics2": (
        "Idefics2ForConditionalGeneration",
        "Idefics2Config",
        {
            "vision_config": _IMAGES,
            "perceiver_config": {
                "hidden_size": 48,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": 12,
                "num_key_value_heads": 2,
            },
            "text_config": _text("mistral"),
            "image_token_id": 5,
        },
    ),
    "PaliGemma": (
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {
            "vision_config": {"model_type": "siglip_vision_model", **_IMAGES},
            "text_config": _text("gemma", head_dim=16),
            "image_token_index": 5,
            "projection_dim": 48,
            "hidden_size": 48,
        },
    ),
    "Gemma 3 with images": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"vision_config": _IMAGES, "text_config": {**_TEXT, "head_dim": 16}, "mm_tokens_per_image": 4},
    ),
    "Mistral 3 (Pixtral)": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "vision_config": {"model_type": "pixtral", "head_dim": 12, **_IMAGES},
            "text_config": _text("mistral", head_dim=12),
            "image_token_index": 5,
        },
    ),
    "Llama 4 with images": (
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        {
            "vision_config": {
                **_IMAGES,
                "intermediate_size": 192,
                "vision_output_dim": 48,
                "projector_input_dim": 48,
                "projector_output_dim": 48,
                "pixel_shuffle_ratio": 0.5,
            },
            "text_config": {
                **_TEXT,
                "head_dim": 12,
                "num_local_experts": 3,
                "interleave_moe_layer_step": 1,
                "tie_word_embeddings": False,
            },
        },
    ),
    "Llama 3.2 Vision": (
        "MllamaForConditionalGeneration",
        "MllamaConfig",
        {
            "vision_config": {
                "hidden_size": 48,
                "attention_heads": 4,
                "num_hidden_layers": 1,
                "num_global_layers": 1,
                "intermediate_size": 80,
                "image_size": 8,
                "patch_size": 4,
                "vision_output_dim": 96,
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
                "intermediate_layers_indices": [0],
            },
            "text_config": {**_TEXT, "num_hidden_layers": 2, "cross_attention_layers": [0], "rope_scaling": None},
        },
    ),
    "Qwen2-Audio": (
        "Qwen2AudioForConditionalGeneration",
        "Qwen2AudioConfig",
        {"audio_config": _SOUND, "text_config": _text("qwen2")},
    ),
    "Voxtral": (
        "VoxtralForConditionalGeneration",
        "VoxtralConfig",
        {
            "audio_config": {**_TOWER, "num_mel_bins": 8, "max_source_positions": 20},
            "text_config": _text("llama", head_dim=12),
        },
    ),
}


def build_tower(family: str, **changes: object) -> nn.Module:
    """The family's model, randomly initialised on the default device."""
    transformers = importlib.import_module("transformers")
    model, config, settings = MODELS[family]
    make: Callable[[Any], nn.Module] = getattr(transformers, model)
    return make(getattr(transformers, config)(**{**settings, **changes}))
