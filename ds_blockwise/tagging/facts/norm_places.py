# SPDX-License-Identifier: Apache-2.0
"""Where a norm stands: before a layer's projections, after them, or on queries and keys.

Weight decay helps the gains of the first and hurts those of the others (arXiv 2605.26895). Names do not tell:
``post_attention_layernorm`` feeds the FFN in Llama and normalizes what attention computed in Gemma 2. So the classes of
layers stand here whose ``forward`` was run (`tests.helpers.norm_probe`). Of any other class the place is not known.
"""

from __future__ import annotations

import re

from torch import nn

from ds_blockwise.blocks.roles import NormPlace
from ds_blockwise.tagging.module_facts import class_names, generic_heads
from ds_blockwise.tagging.owner_class import is_norm
from ds_blockwise.tagging.registered import Registration

# Layers all of whose norms stand before attention or the FFN
_BEFORE = re.compile(
    r"(?:Llama|Mistral|Mixtral|Granite|GraniteMoe|Qwen2|Qwen3|Qwen2Moe|Qwen3Moe|Qwen3Next|Qwen3_5|Gemma|Phi|Phi3"
    r"|Starcoder2|Nemotron|StableLm|MiniMax|GptOss|Llama4Text|DeepseekV2|DeepseekV3|Persimmon|Cohere|KimiLinear"
    r"|Lfm2|Lfm2Moe|RecurrentGemma|JambaMamba|JambaAttention|Bamba|Falcon)DecoderLayer"
    r"|(?:GPT2|GPTBigCode|GPTNeo|GPTJ|Mpt)Block|GPTNeoXLayer"
)
# Layers with norms behind attention or the FFN: the names of those
_BEHIND: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"Gemma(?:2|3)DecoderLayer"), r"post_(?:attention|feedforward)_layernorm"),
    (re.compile(r"Glm4DecoderLayer"), r"post_(?:self_attn|mlp)_layernorm"),
    (re.compile(r"Olmo2DecoderLayer"), r"post_(?:attention|feedforward)_layernorm"),
)
# What holds the layers; its norm feeds the output layer
_MODELS = re.compile(
    r"(?:Llama|Mistral|Mixtral|Granite|GraniteMoe|Qwen2|Qwen3|Qwen2Moe|Qwen3Moe|Qwen3Next|Qwen3_5Text|Gemma|Gemma2"
    r"|Gemma3Text|Phi|Phi3|Starcoder2|Nemotron|StableLm|MiniMax|GptOss|Llama4Text|DeepseekV2|DeepseekV3|Persimmon"
    r"|Cohere|KimiLinear|RecurrentGemma|Jamba|Bamba|Falcon|Glm4|Olmo2|GPT2|GPTBigCode|GPTNeo|GPTJ|Mpt|GPTNeoX)Model"
)
_FINAL = re.compile(r"norm|norm_f|ln_f|final_norm|final_layernorm|final_layer_norm")
_ON_HEADS = re.compile(r"[qk]_(?:layer)?norm|(?:query|key)_layernorm")


def norm_place_of(registration: Registration) -> NormPlace | None:
    """Where a norm stands; None if the modules around it do not tell.

    Args:
        registration: of one of its parameters.
    """
    layer, child = registration.parent, registration.linear
    if layer is None or not is_norm(registration.owner, layer):
        return None
    if _ON_HEADS.fullmatch(child) and _projects_queries_and_keys(layer):
        return "norm_qk"
    names = class_names(layer)
    for name in names:
        if _BEFORE.fullmatch(name) or (_MODELS.fullmatch(name) and _FINAL.fullmatch(child)):
            return "norm_in"
        for classes, behind in _BEHIND:
            if classes.fullmatch(name):
                return "norm_out" if re.fullmatch(behind, child) else "norm_in"
    return None


def _projects_queries_and_keys(attention: nn.Module) -> bool:
    projections = any(hasattr(attention, name) for name in ("q_proj", "qkv_proj", "query_key_value"))
    return projections and generic_heads(attention) is not None
