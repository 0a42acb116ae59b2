# SPDX-License-Identifier: Apache-2.0
"""What a module's class and attributes say: head counts, QKV layouts of fused weights, storage of matrices.

The module decides before the name, because one name has several QKV layouts: ``query_key_value`` is grouped in BLOOM
and concatenated in a multi-query Falcon. Classes are recognised by name, so that no model library is imported.
Sources: the attention classes' ``forward`` in transformers 5; ``megatron/model/transformer.py`` of GPT-NeoX.
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


def _falcon(attention: nn.Module) -> QKVLayout:
    if attention.new_decoder_architecture:
        return "grouped"
    return "concat" if attention.multi_query else "grouped"


def _gpt_bigcode(attention: nn.Module) -> QKVLayout:
    return "concat" if attention.multi_query else "grouped"


def _gpt_neox(attention: nn.Module) -> QKVLayout | None:
    # GPT-NeoX says whether its queries are grouped; older Megatron-LM classes of this name do not
    gqa = getattr(attention, "gqa", None)
    return None if gqa is None else "concat" if gqa else "grouped"


def _parallel_attention(attention: nn.Module) -> QKVLayout | None:
    # Megatron-LM's legacy class has this attribute. Megatron-DeepSpeed's class of the same name has not, and its layout
    # changed in 2024-12 while names and attributes stayed the same
    return "grouped" if hasattr(attention, "num_query_groups_per_partition") else None


def _qwen2_vl(attention: nn.Module) -> QKVLayout | None:
    # a class name that several towers share; this one was read in Qwen2-VL's code
    return "concat" if any("qwen2_vl" in cls.__module__ for cls in type(attention).__mro__) else None


def _always(layout: QKVLayout) -> Callable[[nn.Module], QKVLayout]:
    return lambda attention: layout


_FUSED: dict[tuple[str, str], Callable[[nn.Module], QKVLayout | None]] = {
    ("FalconAttention", "query_key_value"): _falcon,
    ("BloomAttention", "query_key_value"): _always("grouped"),
    ("GPTNeoXAttention", "query_key_value"): _always("grouped"),
    ("PersimmonAttention", "query_key_value"): _always("grouped"),
    ("ParallelSelfAttention", "query_key_value"): _gpt_neox,
    ("ParallelAttention", "query_key_value"): _parallel_attention,
    ("GPTBigCodeAttention", "c_attn"): _gpt_bigcode,
    ("Qwen3NextAttention", "q_proj"): _always("query_gate"),
    ("Qwen3_5Attention", "q_proj"): _always("query_gate"),
    ("Qwen3_5MoeAttention", "q_proj"): _always("query_gate"),
    # vision towers: their code reshapes to [.., 3, heads, head_dim]
    ("VisionAttention", "qkv"): _qwen2_vl,
    ("Qwen2_5_VLVisionAttention", "qkv"): _always("concat"),
    ("Qwen3VLVisionAttention", "qkv"): _always("concat"),
    ("Qwen3VLMoeVisionAttention", "qkv"): _always("concat"),
    ("Qwen3_5VisionAttention", "qkv"): _always("concat"),
    ("Qwen3_5MoeVisionAttention", "qkv"): _always("concat"),
    ("Qwen3OmniMoeVisionAttention", "qkv"): _always("concat"),
    ("Glm4vVisionAttention", "qkv"): _always("concat"),
    ("Glm4vMoeVisionAttention", "qkv"): _always("concat"),
    ("Ernie4_5_VLMoeVisionAttention", "qkv"): _always("concat"),
    ("BlipAttention", "qkv"): _always("concat"),
    ("Blip2Attention", "qkv"): _always("concat"),
    ("InstructBlipAttention", "qkv"): _always("concat"),
}
# Their fused weight has as many key heads as query heads, even if the config gives another number of key heads.
_MULTI_HEAD = ("BloomAttention", "GPTNeoXAttention", "PersimmonAttention")


def fused_qkv_layout(attention: nn.Module, linear: str) -> QKVLayout | None:
    """The QKV layout of ``attention.<linear>``; None if the class of ``attention`` does not fix it.

    Args:
        attention: the module that holds the linear.
        linear: the linear's name in it.
    """
    for name in class_names(attention):
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
    config = getattr(attention, "config", None)
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
