# SPDX-License-Identifier: Apache-2.0
"""What each tensor of a Megatron module does, and how many heads it has, read off the module that owns it.

Names inside a module are fixed by its class, wherever the module sits in a model: encoders, vision towers, MTP layers
and pipeline stages need no rules of their own. Source: Megatron-core 0.16 to 0.19, ``transformer/`` and ``ssm/``;
``megatron/model/transformer.py`` of Megatron-LM, Megatron-DeepSpeed and GPT-NeoX for the older attention classes.
"""

from __future__ import annotations

import re
from typing import Protocol, TypeGuard

from megatron.core import parallel_state
from torch import nn

from ds_blockwise.blocks.roles import NormPlace, QKVLayout, Role, Storage
from ds_blockwise.blocks.structure import HeadGeometry
from ds_blockwise.tagging.module_facts import class_names
from ds_blockwise.tagging.names import NameMatch
from ds_blockwise.tagging.owner_class import is_norm

DIALECT = "megatron"
_NORM_LEAVES = ("layer_norm_weight", "layer_norm_bias")  # of a norm that is fused into a linear

# Of a class that holds modules: the module's name in it, the role, and whether rows have no head
_CHILDREN: dict[str, tuple[tuple[str, Role, bool], ...]] = {
    "Attention": (
        (r"linear_proj", Role.ATTN_OUT, False),
        (r"linear_q|linear_q_proj|linear_q_up_proj", Role.QUERY, False),
        (r"linear_q_down_proj", Role.QUERY, True),
        (r"(?:q|k|kv)_layernorm", Role.NORM, False),
    ),
    "MLP": ((r"linear_fc[12]", Role.FFN, False),),
    "TEGroupedMLP": ((r"linear_fc[12]", Role.FFN, False),),
    "MoELayer": ((r"fc[12]_latent_proj", Role.FFN, False),),
    "LanguageModelEmbedding": ((r"(?:word|position|tokentype)_embeddings", Role.EMBEDDING, False),),
    "MultiTokenPredictionLayer": (
        (r"eh_proj", Role.FFN, False),
        (r"enorm|hnorm|final_layernorm", Role.NORM, False),
    ),
    "MambaMixer": ((r"norm", Role.NORM, False), (r"in_proj|out_proj|conv1d", Role.OTHER, False)),
    "GatedDeltaNet": ((r"out_norm", Role.NORM, False), (r"in_proj|out_proj|conv1d", Role.OTHER, False)),
}
# Of a class that holds norms: the norm's name in it, and where it stands. MLA's norms on latents stand in no such place
_NORM_PLACES: dict[str, tuple[str, NormPlace]] = {
    "TransformerLayer": (r"input_layernorm|pre_cross_attn_layernorm|pre_mlp_layernorm", "norm_in"),
    "TransformerBlock": (r"final_layernorm", "norm_in"),
    "HybridStack": (r"final_norm", "norm_in"),
    "MultiTokenPredictionLayer": (r"enorm|hnorm|final_layernorm", "norm_in"),
    "SelfAttention": (r"[qk]_layernorm", "norm_qk"),
}
_OF_LATENTS = re.compile(r"linear_(?:q|kv)_up_proj")
# Of a class that registers parameters itself: the parameter's name, the role, how it lies in memory
_OWN: dict[str, tuple[tuple[str, Role, Storage | None], ...]] = {
    "Router": ((r"weight|bias", Role.ROUTER, None),),
    "SharedExpertMLP": ((r"gate_weight", Role.ROUTER, None),),
    "GroupedMLP": ((r"weight[12]", Role.FFN, "grouped_in_out"),),
    "MambaMixer": ((r"dt_bias|A_log|D", Role.OTHER, None),),
    "GatedDeltaNet": ((r"dt_bias|A_log", Role.OTHER, None),),
    "DotProductAttention": ((r"softmax_offset", Role.NORM, None),),
    "TEDotProductAttention": ((r"softmax_offset", Role.NORM, None),),
}


def match_of(owner: nn.Module, parent: nn.Module | None, param: nn.Parameter, name: str) -> NameMatch | None:
    """What a parameter is, from the classes of its owner and of the module above.

    Args:
        owner: the module that registers the parameter.
        parent: the module above it.
        param: the parameter; Megatron-core marks copies of a tied embedding on it.
        name: the owner's name in its parent, a dot, the parameter's name in the owner.

    Returns:
        None if neither class is one of Megatron-core's; names then decide.
    """
    child, _, leaf = name.rpartition(".")
    if leaf in _NORM_LEAVES:
        # what a linear is fused with feeds it
        place: NormPlace | None = None if _OF_LATENTS.fullmatch(child) else "norm_in"
        return NameMatch(Role.NORM, None, False, DIALECT, norm_place=place)
    own = class_names(owner)
    for class_name in own if "MegatronModule" in own or "TEDotProductAttention" in own else ():
        for pattern, role, storage in _OWN.get(class_name, ()):
            if re.fullmatch(pattern, leaf):
                is_bias = leaf == "bias"
                return NameMatch(role, None, is_bias, DIALECT, storage=storage)
    if parent is None:
        return None
    names = class_names(parent)
    if "MegatronModule" not in names:
        return None  # another library's class of the same name
    is_bias = re.fullmatch(r"bias\d*", leaf) is not None
    for class_name in names:
        pattern, norm_place = _NORM_PLACES.get(class_name, ("", None))
        if norm_place is not None and re.fullmatch(pattern, child) and is_norm(owner, parent):
            return NameMatch(Role.NORM, None, False, DIALECT, norm_place=norm_place)
    layout = _layout(parent, names, child)
    if layout is not None:
        return NameMatch(None, layout, is_bias, DIALECT)
    if child == "output_layer":
        return NameMatch(_output_role(parent, param), None, is_bias, DIALECT)
    for class_name in names:
        for pattern, role, headless in _CHILDREN.get(class_name, ()):
            if re.fullmatch(pattern, child):
                storage = "out_in" if role is Role.FFN else None
                bias = is_bias and role is not Role.NORM
                return NameMatch(role, None, bias, DIALECT, headless=headless, storage=storage)
    return None


def _layout(parent: nn.Module, names: tuple[str, ...], child: str) -> QKVLayout | None:
    if "Attention" not in names:
        return None
    if child == "linear_qkv":
        gated = getattr(getattr(parent, "config", None), "attention_output_gate", False)
        return "grouped_gate" if gated else "grouped"
    if child in ("linear_kv", "linear_kv_up_proj"):
        return "key_value"
    return "latent_rope" if child == "linear_kv_down_proj" else None


def _output_role(model: nn.Module, param: nn.Parameter) -> Role:
    # The last pipeline stage has a copy of a tied embedding under this name; both copies must get the same updates
    tied = getattr(param, "shared_embedding", False) or getattr(model, "share_embeddings_and_output_weights", False)
    return Role.EMBEDDING if tied else Role.OUTPUT


class _AttentionConfig(Protocol):
    """A ``TransformerConfig`` or ``MLATransformerConfig``; only the second has the last three."""

    num_attention_heads: int
    num_query_groups: int | None
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int


class _CoreAttention(Protocol):
    """An ``Attention`` of Megatron-core, of whatever subclass."""

    config: _AttentionConfig  # the module's own: in heterogeneous models each layer has another one
    hidden_size_per_attention_head: int


def heads_of(attention: nn.Module) -> HeadGeometry | None:
    """Unsharded head counts of an attention module; None if it is not one of Megatron's.

    Args:
        attention: of Megatron-core (any subclass of its ``Attention``), or of Megatron-LM, Megatron-DeepSpeed or
            GPT-NeoX, whose attributes count what one tensor-parallel rank holds.
    """
    names = class_names(attention)
    if _is_core_attention(attention, names):
        return _core_heads(attention, names)
    local = getattr(attention, "num_attention_heads_per_partition", None)
    if not isinstance(local, int):
        return None
    world_size = 1
    if parallel_state.model_parallel_is_initialized():
        world_size = parallel_state.get_tensor_model_parallel_world_size()
    local_kv = next(
        (
            value
            for key in (
                "num_query_groups_per_partition",  # Megatron-LM
                "num_key_value_heads_per_partition",  # Megatron-DeepSpeed
                "num_kv_heads_per_partition",  # GPT-NeoX
            )
            if isinstance(value := getattr(attention, key, None), int)
        ),
        local,
    )
    head_dim = getattr(attention, "hidden_size_per_attention_head", None)
    source = f"{type(attention).__name__}.num_attention_heads_per_partition={local}"
    return HeadGeometry(local * world_size, local_kv * world_size, head_dim, source)


def _core_heads(attention: _CoreAttention, names: tuple[str, ...]) -> HeadGeometry:
    config = attention.config
    num_heads = config.num_attention_heads
    source = f"{type(attention).__name__}.config"
    if "MultiLatentAttention" in names:
        key_dim, rope_dim = config.qk_head_dim, config.qk_pos_emb_head_dim
        return HeadGeometry(num_heads, num_heads, key_dim + rope_dim, source, key_dim, config.v_head_dim, rope_dim)
    num_kv_heads = config.num_query_groups or num_heads
    return HeadGeometry(num_heads, num_kv_heads, attention.hidden_size_per_attention_head, source)


def _is_core_attention(attention: nn.Module, names: tuple[str, ...]) -> TypeGuard[_CoreAttention]:
    return "MegatronModule" in names and "Attention" in names
