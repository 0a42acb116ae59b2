# SPDX-License-Identifier: Apache-2.0
"""What a module's class and attributes say: head counts, QKV layouts of fused weights, storage of matrices.

One name has several QKV layouts: ``query_key_value`` is grouped in BLOOM and concatenated in a multi-query Falcon. So
only classes that were checked say the order of rows. Classes are recognised by name, so that no model library is
imported. Sources: the attention classes' ``forward`` in transformers 5; nanoGPT's and minGPT's ``model.py``; Qwen 1's
``modeling_qwen.py``; the legacy models of Megatron-LM, Megatron-DeepSpeed and GPT-NeoX.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ds_blockwise.blocks.roles import QKVLayout, Storage
from ds_blockwise.blocks.structure import HeadGeometry

NUM_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads")
_NUM_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_head", "n_kv_heads")
_HEAD_DIM = ("head_dim", "head_size")
_KEY_DIM = ("qk_nope_head_dim",)
_VALUE_DIM = ("v_head_dim",)
_ROPE_DIM = ("qk_rope_head_dim",)


def class_names(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's class and its bases, nearest first."""
    return tuple(cls.__name__ for cls in type(module).__mro__)


# ------------------------------------------------------------------------------------------ QKV layouts

_ReadLayout = Callable[[nn.Module], QKVLayout | None]


def _falcon(attention: nn.Module) -> QKVLayout:
    if attention.new_decoder_architecture:
        return "grouped"
    return "concat" if attention.multi_query else "grouped"


def _gpt_bigcode(attention: nn.Module) -> QKVLayout | None:
    if getattr(attention, "is_cross_attention", False):
        return None  # its forward takes one head's rows, whatever the number of heads
    return "concat" if attention.multi_query else "grouped"


def _gpt2(attention: nn.Module) -> QKVLayout:
    return "key_value_concat" if getattr(attention, "is_cross_attention", False) else "concat"


def _gpt_neox(attention: nn.Module) -> QKVLayout | None:
    # GPT-NeoX says whether its queries are grouped; older Megatron-LM classes of this name do not
    gqa = getattr(attention, "gqa", None)
    return None if gqa is None else "concat" if gqa else "grouped"


def _parallel_attention(attention: nn.Module) -> QKVLayout | None:
    # Megatron-LM's legacy class has this attribute. Megatron-DeepSpeed's class of the same name has not, and its layout
    # changed in 2024-12 while names and attributes stayed the same
    return "grouped" if hasattr(attention, "num_query_groups_per_partition") else None


def _always(layout: QKVLayout) -> _ReadLayout:
    return lambda attention: layout


# Multi-head latent attention: all split the down-projection, and each head of the up-projection, alike
_LATENT = (
    "AXK1Attention",
    "AXK2Attention",
    "BailingHybridAttention",
    "DeepseekV2Attention",
    "DeepseekV3Attention",
    "DeepseekV32Attention",
    "Dots3NoteTextAttention",
    "Glm4MoeLiteAttention",
    "Glm5NextTextAttention",
    "GlmMoeDsaAttention",
    "HYV4Attention",
    "KimiLinearAttention",
    "LongcatFlashMLA",
    "MiniCPM3Attention",
    "Mistral4Attention",
    "MistralLarge4TextAttention",
    "YoutuAttention",
)
# Vision towers whose ``qkv`` is concatenated
_VISION = (
    "Blip2Attention",
    "BlipAttention",
    "CohereCompassVisionAttention",
    "DeepseekOcr2SamVisionAttention",
    "Dots3NoteVisionAttention",
    "Ernie4_5_VLMoeVisionAttention",
    "Exaone4_5_VisionAttention",
    "Florence2VisionWindowAttention",
    "Glm4vMoeVisionAttention",
    "Glm4vVisionAttention",
    "Glm5NextVisionAttention",
    "GlmImageVisionAttention",
    "GlmOcrVisionAttention",
    "GotOcr2VisionAttention",
    "HieraMaskUnitAttention",
    "InstructBlipAttention",
    "InstructBlipVideoAttention",
    "MgpstrAttention",
    "PPFormulaNetVisionAttention",
    "PPOCRV5MobileRecAttention",
    "PPOCRV5ServerRecAttention",
    "PPOCRV6SmallRecAttention",
    "Qwen2_5_VLVisionAttention",
    "Qwen3OmniMoeVisionAttention",
    "Qwen3VLMoeVisionAttention",
    "Qwen3VLVisionAttention",
    "Qwen3_5MoeVisionAttention",
    "Qwen3_5VisionAttention",
    "Qwen4ExpVisionAttention",
    "SLANeXtVisionAttention",
    "Sam2MultiScaleAttention",
    "SamHQVisionAttention",
    "SamVisionAttention",
    "SegGptAttention",
    "TimesformerSelfAttention",
    "UnlimitedOcrSamVisionAttention",
    "VitDetAttention",
    "transformers.models.qwen2_vl.modeling_qwen2_vl.VisionAttention",
)
# Every class whose ``forward`` was read. The same names have other layouts elsewhere: ``qkv_proj`` is concatenated in
# Phi-3 and head by head in MiniMax. A class of which anybody might have one stands with its module.
_FUSED: dict[tuple[str, str], _ReadLayout] = {
    ("BloomAttention", "query_key_value"): _always("grouped"),
    ("CausalSelfAttention", "c_attn"): _always("concat"),
    ("DbrxAttention", "Wqkv"): _always("concat"),
    ("DecisionTransformerGPT2Attention", "c_attn"): _gpt2,
    ("FalconAttention", "query_key_value"): _falcon,
    ("GPT2Attention", "c_attn"): _gpt2,
    ("GPTBigCodeAttention", "c_attn"): _gpt_bigcode,
    ("GPTNeoXAttention", "query_key_value"): _always("grouped"),
    ("GPTNeoXJapaneseAttention", "query_key_value"): _always("grouped"),
    ("ImageGPTAttention", "c_attn"): _gpt2,
    ("JetMoeAttention", "kv_proj"): _always("key_value_concat"),
    ("LayoutLMv2SelfAttention", "qkv_linear"): _always("concat"),
    ("MiniMaxLightningAttention", "qkv_proj"): _always("grouped"),
    ("ModernBertAttention", "Wqkv"): _always("concat"),
    ("MptAttention", "Wqkv"): _always("concat"),
    ("ParallelAttention", "key_value"): _always("key_value"),
    ("ParallelAttention", "query_key_value"): _parallel_attention,
    ("ParallelSelfAttention", "query_key_value"): _gpt_neox,
    ("PersimmonAttention", "query_key_value"): _always("grouped"),
    ("Phi3Attention", "qkv_proj"): _always("concat"),
    ("Phi4MultimodalAttention", "qkv_proj"): _always("concat"),
    ("QWenAttention", "c_attn"): _always("concat"),
    ("Qwen3NextAttention", "q_proj"): _always("query_gate"),
    ("Qwen3_5Attention", "q_proj"): _always("query_gate"),
    ("Qwen3_5MoeAttention", "q_proj"): _always("query_gate"),
    ("Qwen4ExpTextAttention", "q_proj"): _always("query_gate"),
    ("transformers.models.openai.modeling_openai.Attention", "c_attn"): _always("concat"),
    **{(name, "kv_a_proj_with_mqa"): _always("latent_rope") for name in _LATENT},
    **{(name, "kv_b_proj"): _always("key_value") for name in _LATENT},
    **{(name, "qkv"): _always("concat") for name in _VISION},
}
# Their fused weight has as many key heads as query heads, even if the config gives another number of key heads.
_MULTI_HEAD = ("BloomAttention", "GPTNeoXAttention", "GPTNeoXJapaneseAttention", "PersimmonAttention")


def fused_qkv_layout(attention: nn.Module, linear: str) -> QKVLayout | None:
    """The QKV layout of ``attention.<linear>``; None if the class of ``attention`` was not checked or does not fix it.

    Args:
        attention: the module that holds the linear.
        linear: the linear's name in it.
    """
    for cls in type(attention).__mro__:
        for name in (cls.__name__, f"{cls.__module__}.{cls.__name__}"):
            read = _FUSED.get((name, linear))
            if read is not None:
                return read(attention)
    return None


# ----------------------------------------------------------------------------------------- head counts


def generic_heads(attention: nn.Module, *, config_first: bool = False) -> HeadGeometry | None:
    """Head counts from the attributes of an attention module or its config; None if neither has a number of heads.

    Args:
        attention: the module.
        config_first: read the config before the module's own attributes, for a module whose attributes a
            tensor-parallel wrapper has divided by the number of ranks. Such wrappers do not change the config.
    """
    config = _config_of(attention)
    sources = (config, attention) if config_first else (attention, config)
    num_heads, said_by = _count(sources, NUM_HEADS)
    if num_heads is None:
        return None
    num_kv_heads, _ = _count(sources, _NUM_KV_HEADS)
    if num_kv_heads is None or _is_multi_head(attention):
        num_kv_heads = num_heads
    head_dim, _ = _count(sources, _HEAD_DIM)
    rope_dim, _ = _count(sources, _ROPE_DIM)
    if rope_dim is None:
        return HeadGeometry(num_heads, num_kv_heads, head_dim, said_by)
    # Multi-head latent attention: ``head_dim`` of such configs is the rotary part, and every head has its own keys
    key_dim, _ = _count(sources, _KEY_DIM)
    value_dim, _ = _count(sources, _VALUE_DIM)
    query_dim = None if key_dim is None else key_dim + rope_dim
    return HeadGeometry(num_heads, num_heads, query_dim, said_by, key_dim, value_dim, rope_dim)


def _config_of(attention: nn.Module) -> object:
    """The config of an attention module's layer: in some models (Gemma 4, Step 3.7) the layers differ in their heads.

    Such a config raises RuntimeError where a value that differs is read from the whole model.
    """
    config = getattr(attention, "config", None)
    if not getattr(config, "is_heterogeneous", False):
        return config
    layer = getattr(attention, "layer_idx", None)
    return getattr(config, "per_layer_config", {})[layer] if isinstance(layer, int) else None


def _is_multi_head(attention: nn.Module) -> bool:
    names = class_names(attention)
    if "FalconAttention" in names:
        return not attention.new_decoder_architecture and not attention.multi_query
    return any(name in _MULTI_HEAD for name in names)


def _count(sources: tuple[object, ...], names: tuple[str, ...]) -> tuple[int | None, str]:
    for source in sources:
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value, f"{type(source).__name__}.{name}={value}"
    return None, ""


# --------------------------------------------------------------------------------------------- storage


def storage_of(owner: nn.Module) -> Storage | None:
    """How the matrices of a module are stored; None if its class does not say."""
    names = class_names(owner)
    if "Conv1D" in names and hasattr(owner, "nf"):  # Hugging Face's, of GPT-2
        return "in_out"
    transposed = getattr(owner, "is_transposed", None)  # experts of transformers 5
    if isinstance(transposed, bool):
        return "in_out" if transposed else "out_in"
    if "Llama4TextExperts" in names:  # computes tokens @ weight
        return "in_out"
    return None


def num_experts_in(owner: nn.Module) -> int | None:
    """Number of experts on this rank, of a module that keeps them in one parameter; None if it does not say."""
    count, _ = _count((owner,), ("num_local_experts", "num_gemms"))
    return count
