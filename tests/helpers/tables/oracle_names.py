# SPDX-License-Identifier: Apache-2.0
"""Names, roles and block sizes of the test models, written by hand for the oracle.

Nothing here is derived from a rule or taken from ``ds_blockwise``: a table per model family says
which rows of which parameter are what.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

BLOCK_TYPE = {
    "embedding": "emb",
    "output": "head",
    "query": "qk",
    "key": "qk",
    "value": "vo",
    "attn_out": "vo",
    "ffn": "ffn",
    "norm": "norm",
    "router": "other",
    "other": "other",
}
MULTIPLIERS = {"emb": 1.25, "head": 1.25, "qk": 1, "ffn": 0.75, "vo": 0.5, "norm": 0.125, "other": 0.125}


@dataclass(frozen=True)
class Span:
    """Rows [start, end) of a tensor, their role, and how Adam-mini cuts them into blocks.

    ``size`` is the number of rows of one block: a head's, 1 for a row, all for a whole tensor;
    0 means element-wise, ROLE one block for all rows of this role in the tensor.
    """

    start: int
    end: int
    role: str
    size: int


@dataclass(frozen=True)
class Classified:
    """The spans of one parameter; ``axis`` is 1 where outputs run along columns (Conv1D)."""

    spans: tuple[Span, ...]
    axis: int = 0


Classes = dict[str, Classified]
ROLE = -1


# ------------------------------------------------------------- names, written by hand per family


def _rows(count: int, role: str, size: int = 1) -> Classified:
    return Classified((Span(0, count, role, size),))


def _norm(count: int) -> Classified:
    return _rows(count, "norm", 0)


def _elements(spans: tuple[Span, ...]) -> Classified:
    return Classified(tuple(replace(span, size=0) for span in spans))


def hf_llama_classes(
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ffn: int,
    vocab: int,
    biases: bool = False,
    qk_norms: bool = False,
) -> Classes:
    """HF LLaMA / Qwen names: q, k, v apart; untied output."""
    table = {
        "model.embed_tokens.weight": _rows(vocab, "embedding"),
        "model.norm.weight": _norm(hidden),
        "lm_head.weight": _rows(vocab, "output"),
    }
    attention = {
        "q_proj": _rows(heads * head_dim, "query", head_dim),
        "k_proj": _rows(kv_heads * head_dim, "key", head_dim),
        "v_proj": _rows(kv_heads * head_dim, "value"),
        "o_proj": _rows(hidden, "attn_out"),
    }
    for i in range(layers):
        at = f"model.layers.{i}."
        for key, classified in attention.items():
            table[f"{at}self_attn.{key}.weight"] = classified
            if biases:
                table[f"{at}self_attn.{key}.bias"] = _elements(classified.spans)
        if qk_norms:
            table[f"{at}self_attn.q_norm.weight"] = _norm(head_dim)
            table[f"{at}self_attn.k_norm.weight"] = _norm(head_dim)
        table[f"{at}mlp.gate_proj.weight"] = _rows(ffn, "ffn")
        table[f"{at}mlp.up_proj.weight"] = _rows(ffn, "ffn")
        table[f"{at}mlp.down_proj.weight"] = _rows(hidden, "ffn")
        table[f"{at}input_layernorm.weight"] = _norm(hidden)
        table[f"{at}post_attention_layernorm.weight"] = _norm(hidden)
    return table


def gpt2_classes(
    *, layers: int, hidden: int, heads: int, ffn: int, vocab: int, positions: int, conv1d: bool
) -> Classes:
    """nanoGPT / HF GPT-2 names: c_attn is q, then k, then v; lm_head is wte itself."""
    axis = 1 if conv1d else 0
    head = hidden // heads
    qkv = (
        Span(0, hidden, "query", head),
        Span(hidden, 2 * hidden, "key", head),
        Span(2 * hidden, 3 * hidden, "value", 1),
    )
    table = {
        "transformer.wte.weight": _rows(vocab, "embedding"),
        "transformer.wpe.weight": _rows(positions, "embedding"),
        "transformer.ln_f.weight": _norm(hidden),
        "transformer.ln_f.bias": _norm(hidden),
    }
    linears = {
        "attn.c_attn": qkv,
        "attn.c_proj": (Span(0, hidden, "attn_out", 1),),
        "mlp.c_fc": (Span(0, ffn, "ffn", 1),),
        "mlp.c_proj": (Span(0, hidden, "ffn", 1),),
    }
    for i in range(layers):
        at = f"transformer.h.{i}."
        for key, spans in linears.items():
            table[f"{at}{key}.weight"] = Classified(spans, axis)
            table[f"{at}{key}.bias"] = _elements(spans)
        for key in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            table[at + key] = _norm(hidden)
    return table


def megatron_classes(
    *, layers: int, hidden: int, heads: int, groups: int, head_dim: int, ffn: int, vocab: int
) -> Classes:
    """Megatron-core names: linear_qkv holds [q .. q k v] per query group, linear_fc1 [gate up]."""
    qkv: list[Span] = []
    for _ in range(groups):
        for role, count, size in (
            ("query", heads // groups * head_dim, head_dim),
            ("key", head_dim, head_dim),
            ("value", head_dim, 1),
        ):
            start = qkv[-1].end if qkv else 0
            qkv.append(Span(start, start + count, role, size))
    table = {
        "embedding.word_embeddings.weight": _rows(vocab, "embedding"),
        "decoder.final_layernorm.weight": _norm(hidden),
        "output_layer.weight": _rows(vocab, "output"),
    }
    for i in range(layers):
        at = f"decoder.layers.{i}."
        table[at + "input_layernorm.weight"] = _norm(hidden)
        table[at + "pre_mlp_layernorm.weight"] = _norm(hidden)
        table[at + "self_attention.linear_qkv.weight"] = Classified(tuple(qkv))
        table[at + "self_attention.linear_proj.weight"] = _rows(hidden, "attn_out")
        table[at + "mlp.linear_fc1.weight"] = _rows(2 * ffn, "ffn")
        table[at + "mlp.linear_fc2.weight"] = _rows(hidden, "ffn")
    return table


def regroup(classes: Classes, role: str, size: Callable[[Span], int] | int) -> Classes:
    """The same table with another block size for the weights of one role, or for every "bias"."""

    def changed(name: str, span: Span) -> Span:
        is_bias = name.endswith("bias") and span.role != "norm"
        wanted = is_bias if role == "bias" else span.role == role and not is_bias
        return replace(span, size=size if isinstance(size, int) else size(span)) if wanted else span

    return {n: replace(c, spans=tuple(changed(n, s) for s in c.spans)) for n, c in classes.items()}
