# SPDX-License-Identifier: Apache-2.0
"""Roles, block types, QKV layouts and the storage of matrices.

Definitions only: which parameter has which role is decided in `ds_blockwise.tagging`. Roles and block types follow
arXiv 2502.19002, section 3.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal


class Role(str, Enum):
    """What a weight, or a run of its rows, does in the transformer."""

    EMBEDDING = "embedding"
    OUTPUT = "output"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    ATTN_OUT = "attn_out"
    FFN = "ffn"
    ROUTER = "router"
    NORM = "norm"
    OTHER = "other"


ROLE_MEANING: dict[Role, str] = {
    Role.EMBEDDING: "a table with a row for each token or position; also an output layer that shares its weight",
    Role.OUTPUT: "the output layer over the vocabulary, with a weight of its own",
    Role.QUERY: "projects to attention's queries (needs the number of heads)",
    Role.KEY: "projects to attention's keys (needs the number of heads)",
    Role.VALUE: "projects to attention's values",
    Role.ATTN_OUT: "attention's output projection",
    Role.FFN: "a matrix of a feed-forward layer or of an expert",
    Role.ROUTER: "chooses experts",
    Role.NORM: "scale or offset of a norm",
    Role.OTHER: "anything else: the smallest multiplier, that of norms, in blocks of rows",
}
"""One line on each role, for a user who has to choose one."""


NormPlace = Literal["norm_in", "norm_out", "norm_qk"]
"""Where a norm stands. Its role is ``norm`` and its block type ``norm`` in any case; settings may name the place."""

NORM_PLACE_MEANING: dict[str, str] = {
    "norm_in": "a norm whose output the projections of attention, an FFN or the output layer take (pre-norm)",
    "norm_out": "a norm on what attention or an FFN computed, before it is added to the residual stream (post-norm)",
    "norm_qk": "a norm on queries or keys",
}
NORM_PLACES: tuple[NormPlace, ...] = ("norm_in", "norm_out", "norm_qk")

BlockType = Literal["emb", "head", "qk", "ffn", "vo", "norm", "other"]
BLOCK_TYPES: tuple[BlockType, ...] = ("emb", "head", "qk", "ffn", "vo", "norm", "other")

BLOCK_TYPE_OF: dict[Role, BlockType] = {
    Role.EMBEDDING: "emb",
    Role.OUTPUT: "head",
    Role.QUERY: "qk",
    Role.KEY: "qk",
    Role.VALUE: "vo",
    Role.ATTN_OUT: "vo",
    Role.FFN: "ffn",
    Role.ROUTER: "other",
    Role.NORM: "norm",
    Role.OTHER: "other",
}

QKVLayout = Literal[
    "concat",
    "grouped",
    "grouped_gate",
    "query_gate",
    "key_value",
    "key_value_concat",
    "latent_rope",
    "unknown",
    "unknown_key_value",
    "unknown_latent",
]
"""The order of rows in a weight that holds several attention roles; `QKV_LAYOUT_MEANING` explains each.

Those that begin with ``unknown`` say that a name is known to be fused: the module's class or a rule must give the order
(`LAYOUT_CHOICES`).
"""

QKV_LAYOUT_MEANING: dict[QKVLayout, str] = {
    "concat": "all query rows, then all key rows, then all value rows (GPT-2, nanoGPT, Phi-3, Falcon with multi_query, "
    "GPT-NeoX with grouped queries, Megatron-DeepSpeed since 2024-12)",
    "grouped": "per query group its query heads, its key head, its value head; with one query head per group also "
    "written [heads, 3, head_dim] (Megatron-core, Megatron-LM since checkpoint version 2, Megatron-DeepSpeed before "
    "2024-12, GPT-NeoX, BLOOM)",
    "grouped_gate": "per query group its query heads, as many output gates, its key head, its value head "
    "(Megatron-core with attention_output_gate)",
    "query_gate": "per head its query rows, then its output-gate rows (Qwen3-Next q_proj)",
    "key_value": "per head its key rows, then its value rows (cross attention of Megatron's T5; MLA's up-projection)",
    "key_value_concat": "all key rows, then all value rows (GPT-2's cross attention)",
    "latent_rope": "the latent of keys and values, then the rotary key shared by all heads (MLA's down-projection)",
}
QKV_LAYOUTS: tuple[QKVLayout, ...] = tuple(QKV_LAYOUT_MEANING)
SELF_ATTENTION_LAYOUTS: tuple[QKVLayout, ...] = ("grouped", "concat")
LAYOUT_CHOICES: dict[QKVLayout, tuple[QKVLayout, ...]] = {
    "unknown": SELF_ATTENTION_LAYOUTS,
    "unknown_key_value": ("key_value", "key_value_concat"),
    "unknown_latent": ("latent_rope",),
}
"""The choices that an error offers for a fused weight of unknown layout."""

Storage = Literal["out_in", "in_out", "grouped_in_out"]
"""How a matrix is stored: ``out_in`` is ``nn.Linear``'s [outputs, inputs], ``in_out`` its transpose (Conv1D).

A 3-D tensor is one such matrix per expert. ``grouped_in_out``: experts' [inputs, outputs] matrices one after the other
in a parameter that is registered with two dimensions (Megatron-core's legacy GroupedMLP).
"""
STORAGES: tuple[Storage, ...] = ("out_in", "in_out")  # those that a rule may give
STORAGE_MEANING: dict[str, str] = {
    "out_in": "[outputs, inputs], of several experts [experts, outputs, inputs]",
    "in_out": "[inputs, outputs], of several experts [experts, inputs, outputs]",
}
