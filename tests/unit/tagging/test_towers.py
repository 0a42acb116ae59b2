# SPDX-License-Identifier: Apache-2.0
"""Every parameter of vision, audio and multimodal families, from the real classes, against tables written by hand."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ds_blockwise import verify_layout
from tests.helpers.tables import multimodal, towers
from tests.helpers.tables.tower_models import MODELS, build_tower
from tests.unit.tagging.test_families import tags_of

pytest.importorskip("transformers", reason="the models are transformers' own")

EXPECTED = {
    "Whisper": towers.WHISPER,
    "Wav2Vec2": towers.WAV2VEC2,
    "ViT": towers.VIT,
    "ViT for masked images": towers.VIT_MASKED,
    "CLIP": towers.CLIP,
    "SigLIP": towers.SIGLIP,
    "SigLIP 2": towers.SIGLIP,
    "DINOv2": towers.DINOV2,
    "DINOv2 with registers": towers.DINOV2_REGISTERS,
    "DINOv3": towers.DINOV3,
    "LLaVA": multimodal.LLAVA,
    "LLaVA-NeXT": multimodal.LLAVA_NEXT,
    "LLaVA-OneVision": multimodal.LLAVA_ONEVISION,
    "Qwen2-VL": multimodal.QWEN2_VL,
    "Qwen2.5-VL": multimodal.QWEN2_5_VL,
    "Qwen3-VL": multimodal.QWEN3_VL,
    "Qwen3-VL-MoE": multimodal.QWEN3_VL_MOE,
    "InternVL": multimodal.INTERNVL,
    "Idefics3 and SmolVLM": multimodal.IDEFICS3,
    "Idefics2": multimodal.IDEFICS2,
    "PaliGemma": multimodal.PALIGEMMA,
    "Gemma 3 with images": multimodal.GEMMA3,
    "Mistral 3 (Pixtral)": multimodal.MISTRAL3,
    "Llama 4 with images": multimodal.LLAMA4,
    "Llama 3.2 Vision": multimodal.MLLAMA,
    "Qwen2-Audio": multimodal.QWEN2_AUDIO,
    "Voxtral": multimodal.VOXTRAL,
}


@pytest.mark.parametrize("family", EXPECTED)
def test_every_parameter_is_what_the_model_code_makes_of_it(family: str) -> None:
    """A tower is fine-tuned with its language model, and one unknown parameter would refuse both."""
    with torch.device("meta"):
        assert tags_of(build_tower(family)) == EXPECTED[family]


def test_every_family_has_a_table() -> None:
    """A family without one would be built and never looked at."""
    assert set(EXPECTED) == set(MODELS)


def test_an_output_layer_of_whisper_of_its_own() -> None:
    """`proj_out` is the embedding unless the config unties them; inside other models the name means other things."""
    with torch.device("meta"):
        assert tags_of(build_tower("Whisper", tie_word_embeddings=False)) == towers.WHISPER_UNTIED
    with pytest.raises(ValueError, match="no naming rule matches parameter 'proj_out"):
        tags_of(nn.ModuleDict({"proj_out": nn.Linear(4, 4)}))


# ------------------------------------------------------- fused weights, asked by function instead of by name

_HEADS = {"hidden_size": 48, "embed_dim": 48, "num_heads": 4, "num_attention_heads": 4}
_FUSED_TOWERS = (
    ("qwen2_vl", "VisionAttention"),
    ("qwen2_5_vl", "Qwen2_5_VLVisionAttention"),
    ("qwen3_vl", "Qwen3VLVisionAttention"),
    ("qwen3_vl_moe", "Qwen3VLMoeVisionAttention"),
    ("qwen3_5", "Qwen3_5VisionAttention"),
    ("qwen3_5_moe", "Qwen3_5MoeVisionAttention"),
    ("qwen3_omni_moe", "Qwen3OmniMoeVisionAttention"),
    ("glm4v", "Glm4vVisionAttention"),
    ("glm4v_moe", "Glm4vMoeVisionAttention"),
    ("ernie4_5_vl_moe", "Ernie4_5_VLMoeVisionAttention"),
    ("blip", "BlipAttention"),
    ("blip_2", "Blip2Attention"),
    ("instructblip", "InstructBlipAttention"),
)


def _config(**more: object) -> SimpleNamespace:
    return SimpleNamespace(
        **_HEADS, attention_bias=True, qkv_bias=True, attention_dropout=0.0, _attn_implementation="eager", **more
    )


def _attention(folder: str, name: str) -> nn.Module:
    torch.manual_seed(0)
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    return getattr(module, name)(_config())


def _run(model: nn.Module) -> Tensor:
    attention, tokens = model[0].self_attn, torch.randn(6, 48)
    if "Blip" in type(attention).__name__:
        return attention(tokens[None])[0]
    angles = torch.randn(6, 12)
    return attention(tokens, torch.tensor([0, 6], dtype=torch.int32), position_embeddings=(angles.cos(), angles.sin()))


_OUT = {"match": r"\.proj(ection)?\.", "role": "attn_out"}


@pytest.mark.parametrize(("folder", "name"), _FUSED_TOWERS)
def test_fused_attention_of_towers_lies_as_its_class_says(folder: str, name: str) -> None:
    """The class decides the order of rows; the module itself shows whether that was read rightly."""
    model = nn.ModuleList([nn.ModuleDict({"self_attn": _attention(folder, name)})])
    assert verify_layout(model, outputs=_run, rules=[_OUT]).num_checks >= 4
    grouped = {"match": r"\.qkv\.", "role": "qkv", "layout": "grouped", "num_heads": 4}
    with pytest.raises(ValueError, match="must vanish"):
        verify_layout(model, outputs=_run, rules=[_OUT, grouped])


def test_the_pooling_head_of_siglip_lies_as_pytorch_says() -> None:
    """One learnt query looks at all patches, through PyTorch's own attention."""
    torch.manual_seed(0)
    tower = build_tower("SigLIP").vision_model
    report = verify_layout(tower, outputs=lambda model: model(torch.randn(2, 3, 8, 8)).pooler_output)
    assert "head.attention.in_proj_weight" in report.parameters


def test_an_attention_that_only_has_the_name_of_a_known_one_is_asked_about() -> None:
    """`VisionAttention` is a name that many write; the order of rows is known of Qwen2-VL's."""
    other = type("VisionAttention", (nn.Module,), {})()
    other.qkv, other.num_heads = nn.Linear(48, 144), 4
    with pytest.raises(ValueError, match=r"neither its name nor VisionAttention tells the order of its rows"):
        tags_of(nn.ModuleDict({"attn": other}))
