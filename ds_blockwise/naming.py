# SPDX-License-Identifier: Apache-2.0
"""From a parameter's name to its role.

Decides what a weight does (query, FFN, norm, ...) from its fully qualified name, with one rule table per family of
model code. Knows nothing of shapes, head counts or ranks. Roles and block types follow arXiv 2502.19002, section 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
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

QKVLayout = Literal["concat", "grouped"]
"""How a fused QKV weight stores its rows.

``concat``: all query rows, then all key rows, then all value rows (GPT-2, nanoGPT, Phi-3).
``grouped``: per query group its query heads, its key head, its value head (Megatron-core ``linear_qkv``).
"""
QKV_LAYOUTS: tuple[QKVLayout, ...] = ("concat", "grouped")


@dataclass(frozen=True, slots=True)
class NameMatch:
    """What a name says: one role, or a fused QKV weight in a known layout.

    Attributes:
        role: the role of the whole parameter; None for a fused QKV weight.
        qkv_layout: the row layout of a fused QKV weight; None otherwise.
        is_bias: the parameter is the bias of a linear (biases of norms are not: they are norm vectors).
        dialect: the rule table that matched, for error messages and reports.
    """

    role: Role | None
    qkv_layout: QKVLayout | None
    is_bias: bool
    dialect: str


@dataclass(frozen=True, slots=True)
class _NameRule:
    dialect: str
    module: str
    role: Role | None = None
    qkv_layout: QKVLayout | None = None


# Each pattern is matched against the END of the module path that owns the parameter. Names of one dialect only carry
# what its model code registers; a name that two rules read differently is refused, never resolved by order.
_RULES: tuple[_NameRule, ...] = (
    # Hugging Face LLaMA, Mistral, Qwen2, Qwen3
    _NameRule("hf", r"embed_tokens", Role.EMBEDDING),
    _NameRule("hf", r"lm_head", Role.OUTPUT),
    _NameRule("hf", r"self_attn\.q_proj", Role.QUERY),
    _NameRule("hf", r"self_attn\.k_proj", Role.KEY),
    _NameRule("hf", r"self_attn\.v_proj", Role.VALUE),
    _NameRule("hf", r"self_attn\.o_proj", Role.ATTN_OUT),
    _NameRule("hf", r"self_attn\.[qk]_norm", Role.NORM),
    _NameRule("hf", r"mlp\.(gate|up|down)_proj", Role.FFN),
    _NameRule("hf", r"input_layernorm|post_attention_layernorm", Role.NORM),
    _NameRule("hf", r"(model|transformer)\.norm|norm", Role.NORM),
    # GPT-2 (Hugging Face, transposed Conv1D) and nanoGPT (nn.Linear) share their names
    _NameRule("gpt2", r"wte|wpe", Role.EMBEDDING),
    _NameRule("gpt2", r"attn\.c_attn", qkv_layout="concat"),
    _NameRule("gpt2", r"attn\.c_proj", Role.ATTN_OUT),
    _NameRule("gpt2", r"mlp\.(c_fc|c_proj)", Role.FFN),
    _NameRule("gpt2", r"ln_1|ln_2|ln_f", Role.NORM),
    # Megatron-core, local layer spec
    _NameRule("megatron", r"embedding\.(word|position)_embeddings", Role.EMBEDDING),
    _NameRule("megatron", r"output_layer", Role.OUTPUT),
    _NameRule("megatron", r"self_attention\.linear_qkv", qkv_layout="grouped"),
    _NameRule("megatron", r"self_attention\.linear_proj", Role.ATTN_OUT),
    _NameRule("megatron", r"self_attention\.[qk]_layernorm", Role.NORM),
    _NameRule("megatron", r"mlp\.linear_fc[12]", Role.FFN),
    _NameRule("megatron", r"input_layernorm|pre_mlp_layernorm|final_layernorm", Role.NORM),
)
_COMPILED = tuple((rule, re.compile(rf"(?:^|\.)(?:{rule.module})$")) for rule in _RULES)

_WRAPPER_PREFIX = re.compile(r"^(?:module\.)+")


def canonical_fqn(name: str) -> str:
    """Return ``name`` without what wrappers add: leading ``module.`` and every ``_orig_mod.`` of torch.compile."""
    return _WRAPPER_PREFIX.sub("", name.replace("_orig_mod.", ""))


def match_name(fqn: str) -> NameMatch | None:
    """Read a parameter's role off its fully qualified name.

    Args:
        fqn: fully qualified name as ``named_parameters()`` gives it; wrapper prefixes are ignored.

    Returns:
        What the name says, or None if no rule knows it.

    Raises:
        ValueError: two rules read the name differently.
    """
    module, _, leaf = canonical_fqn(fqn).rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    found: dict[tuple[Role | None, QKVLayout | None], _NameRule] = {}
    for rule, pattern in _COMPILED:
        if pattern.search(module):
            found.setdefault((rule.role, rule.qkv_layout), rule)
    if not found:
        return None
    rule = next(iter(found.values()))
    if len(found) > 1:
        readings = ", ".join(f"{_reading(r)} ({r.dialect})" for r in found.values())
        raise ValueError(
            f"parameter {fqn!r} matches several naming rules: {readings}. Declare it in the optimizer's JSON: "
            f'"rules": [{{"match": "{re.escape(canonical_fqn(fqn))}", "role": "..."}}]'
        )
    return NameMatch(rule.role, rule.qkv_layout, leaf == "bias" and rule.role is not Role.NORM, rule.dialect)


def _reading(rule: _NameRule) -> str:
    return rule.role.value if rule.role else f"qkv/{rule.qkv_layout}"


def merge_tied(fqns: Iterable[str], roles: set[Role]) -> Role:
    """Role of one parameter that is registered under several names.

    An output layer tied to the embedding is an embedding (DESIGN: a tied output layer has block type ``emb``).

    Raises:
        ValueError: the names disagree in any other way.
    """
    if roles == {Role.EMBEDDING, Role.OUTPUT}:
        return Role.EMBEDDING
    if len(roles) == 1:
        return next(iter(roles))
    raise ValueError(
        f"one parameter is shared under the names {sorted(fqns)}, which have different roles "
        f"{sorted(r.value for r in roles)}. Declare its role with a rule that matches one of the names."
    )
