# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models for AutoTP, and by hand what two tensor-parallel ranks hold of their weights.

Nothing here is read from DeepSpeed's metadata: widths follow from the sizes alone, so that a wrong idea of a shard in
the library can't be repeated by a test.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import models
from tests.helpers.tables.oracle_names import Classes, Classified, Span, hf_llama_classes

_COMMON = {
    "vocab_size": 37,
    "intermediate_size": 21,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
    "pad_token_id": None,
}
_LLAMA = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
_GQA = {"hidden_size": 15, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}


@dataclass(frozen=True)
class Model:
    """A model family with its sizes.

    Attributes:
        kind: prefix of the class names in transformers.
        sizes: of its config.
        tp: more of the JSON's "tensor_parallel".
        head_is_split: whether the output layer is cut, as the model's own plan says.
        biases: of queries, keys and values.
        qk_norms: norms of heads, whose gradients AutoTP sums.
    """

    kind: str
    sizes: dict[str, Any]
    tp: dict[str, Any]
    head_is_split: bool = True
    biases: bool = False
    qk_norms: bool = False

    def build(self) -> nn.Module:
        import transformers

        config = getattr(transformers, f"{self.kind}Config")(**{**_COMMON, **self.sizes})
        return getattr(transformers, f"{self.kind}ForCausalLM")(config)

    def size(self, name: str) -> int:
        return int({**_COMMON, **self.sizes}.get(name, 0))

    @property
    def kv_heads(self) -> int:
        return self.size("num_key_value_heads") or self.size("num_attention_heads")

    @property
    def head_dim(self) -> int:
        return self.size("head_dim") or self.size("hidden_size") // self.size("num_attention_heads")


def _specs(*columns: Any, rows: str, norms: bool = False) -> dict[str, Any]:
    specs = [{"patterns": [p], "partition_type": "column", **more} for p, more in columns]
    specs.append({"patterns": [rows], "partition_type": "row"})
    if norms:
        specs.append({"patterns": [r".*[qk]_norm\.weight$"], "partition_type": "skip", "grad_allreduce": True})
    return {"partition_config": {"layer_specs": specs}}


_GLM = _specs(
    (r".*self_attn\.[qkv]_proj\.weight$", {}),
    (r".*mlp\.gate_up_proj\.weight$", {"shape": [2, -1], "partition_dim": 0}),
    rows=r".*(?:self_attn\.o_proj|mlp\.down_proj)\.weight$",
)
_ATTENTION_ONLY = _specs((r".*self_attn\.[qkv]_proj\.weight$", {}), rows=r".*self_attn\.o_proj\.weight$", norms=True)
_NO_NORMS = _specs((r".*self_attn\.[qkv]_proj\.weight$", {}), rows=r".*self_attn\.o_proj\.weight$")
_HEAD_BY_HEAD = _specs((r".*query_key_value\.weight$", {}), rows=r".*self_attn\.dense\.weight$")
_ROWS = {"vocab_size": 38, "intermediate_size": 14}

MODELS: dict[str, Model] = {
    # every shard is even: all ranks' flat buffers have the same offsets
    "even": Model("Llama", {**_LLAMA, **_ROWS}, {}),
    # 21 FFN rows and 37 tokens on two ranks: offsets differ
    "qwen3": Model("Qwen3", {**_GQA, "attention_bias": True}, {}, biases=True, qk_norms=True),
    "qwen2": Model("Qwen2", _LLAMA, {}, biases=True),
    # one key head: the second rank holds no part of attention
    "mqa": Model("Mistral", {**_GQA, "num_key_value_heads": 1}, {}),
    # three key heads on two ranks: two thirds and a third of the heads
    "thirds": Model("Mistral", {**_GQA, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}, {}),
    "neox": Model("GPTNeoX", {"hidden_size": 20, "num_attention_heads": 4}, {}),
    "glm": Model("Glm4", {**_GQA, "attention_bias": True}, _GLM, head_is_split=False, biases=True),
    "attention": Model("Qwen3", _GQA, _ATTENTION_ONLY, head_is_split=False, qk_norms=True),
    # AutoTP's patterns cut Persimmon's rows as if queries, keys and values were not mixed head by head
    "persimmon": Model("Persimmon", {"hidden_size": 24, "num_attention_heads": 4}, {}),
    # its attention counts its own heads: AutoTP makes that number the rank's
    "counting": Model("Persimmon", {"hidden_size": 32, "num_attention_heads": 4, "qk_layernorm": False}, _HEAD_BY_HEAD),
    "unsummed": Model("Qwen3", _GQA, _NO_NORMS),
    "nothing": Model("Qwen2", _LLAMA, _specs((r"no_such_layer", {}), rows="none")),
    "tied": Model("Mistral", {**_GQA, "tie_word_embeddings": True}, {}),
}


# -------------------------------------------------------------------------------------- the shards


def _near_even(size: int, ranks: int) -> list[int]:
    return [size // ranks + (1 if rank < size % ranks else 0) for rank in range(ranks)]


def _piece(full: Tensor, widths: list[int], rank: int, dim: int) -> Tensor:
    return full.narrow(dim, sum(widths[:rank]), widths[rank]).contiguous()


def cut(model: str, name: str, full: Tensor, rank: int, size: int = 2, *, gradient: bool = False) -> Tensor:
    """What tensor-parallel rank ``rank`` of ``size`` holds of an unsharded tensor.

    ``gradient``: what it feeds as its own gradient: of norms that see its own heads only, its share of the sum.
    """
    spec = MODELS[model]
    leaf = name.split(".")[-2]
    if leaf in ("q_norm", "k_norm"):
        return full / size if gradient else full
    by_head = [n * full.shape[0] // spec.kv_heads for n in _near_even(spec.kv_heads, size)]
    if leaf in ("q_proj", "k_proj", "v_proj", "query_key_value"):
        return _piece(full, by_head, rank, 0)
    if leaf in ("o_proj", "dense"):
        if name.endswith("bias"):
            return full
        return _piece(full, [n * full.shape[1] // spec.kv_heads for n in _near_even(spec.kv_heads, size)], rank, 1)
    if model == "attention":
        return full
    if leaf in ("down_proj", "dense_4h_to_h"):
        return full if name.endswith("bias") else _piece(full, _near_even(full.shape[1], size), rank, 1)
    if leaf in ("gate_proj", "up_proj", "dense_h_to_4h"):
        return _piece(full, _near_even(full.shape[0], size), rank, 0)
    if leaf == "gate_up_proj":  # its part of gate, then its part of up
        return torch.cat([_piece(half, _near_even(half.shape[0], size), rank, 0) for half in full.chunk(2)])
    if (leaf == "lm_head" and spec.head_is_split) or (model == "tied" and leaf == "embed_tokens"):
        return _piece(full, _near_even(full.shape[0], size), rank, 0)
    return full


def shapes_of(model: str) -> dict[str, tuple[int, ...]]:
    """Unsharded shapes of the trained parameters."""
    return {name: tuple(p.shape) for name, p in MODELS[model].build().named_parameters()}


def small(model: str) -> nn.Module:
    """The model with the weights of ``models.small_weight``."""
    return models.set_small_weights(MODELS[model].build())


# -------------------------------------------------------------------------------------- the blocks


def classes_of(model: str) -> Classes:
    """Roles and blocks, by hand."""
    spec = MODELS[model]
    if spec.kind == "GPTNeoX":
        return _neox(spec)
    table = hf_llama_classes(
        layers=2,
        hidden=spec.size("hidden_size"),
        heads=spec.size("num_attention_heads"),
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        ffn=spec.size("intermediate_size"),
        vocab=spec.size("vocab_size"),
        biases=spec.biases,
        qk_norms=spec.qk_norms,
    )
    if model == "tied":
        del table["lm_head.weight"]
    if spec.kind == "Qwen2" or spec.kind == "Glm4":
        table = {n: c for n, c in table.items() if not n.endswith("o_proj.bias")}
    if spec.kind == "Glm4":
        table = {n: c for n, c in table.items() if "mlp.gate_proj" not in n and "mlp.up_proj" not in n}
        norm = table["model.norm.weight"]
        for i in range(2):
            at = f"model.layers.{i}."
            table[f"{at}mlp.gate_up_proj.weight"] = _rows(2 * spec.size("intermediate_size"), "ffn")
            table[f"{at}post_self_attn_layernorm.weight"] = table[f"{at}post_mlp_layernorm.weight"] = norm
    return table


def _rows(count: int, role: str, size: int = 1) -> Classified:
    return Classified((Span(0, count, role, size),))


def _neox(spec: Model) -> Classes:
    hidden, ffn, vocab = (spec.size(n) for n in ("hidden_size", "intermediate_size", "vocab_size"))
    head, norm = spec.head_dim, partial(_rows, hidden, "norm", 0)
    qkv: list[Span] = []
    for _ in range(spec.size("num_attention_heads")):  # head by head: its queries, keys and values
        for role, rows in (("query", head), ("key", head), ("value", 1)):
            at = qkv[-1].end if qkv else 0
            qkv.append(Span(at, at + head, role, rows))
    table = {
        "gpt_neox.embed_in.weight": _rows(vocab, "embedding"),
        "gpt_neox.final_layer_norm.weight": norm(),
        "gpt_neox.final_layer_norm.bias": norm(),
        "lm_head.weight": _rows(vocab, "output"),
    }
    linears = {
        "attention.query_key_value": Classified(tuple(qkv)),
        "attention.dense": _rows(hidden, "attn_out"),
        "mlp.dense_h_to_4h": _rows(ffn, "ffn"),
        "mlp.dense_4h_to_h": _rows(hidden, "ffn"),
    }
    for i in range(2):
        at = f"gpt_neox.layers.{i}."
        for key, classified in linears.items():
            table[f"{at}{key}.weight"] = classified
            elements = tuple(replace(span, size=0) for span in classified.spans)
            table[f"{at}{key}.bias"] = Classified(elements)
        for key in ("input_layernorm", "post_attention_layernorm"):
            table[f"{at}{key}.weight"] = table[f"{at}{key}.bias"] = norm()
    return table
