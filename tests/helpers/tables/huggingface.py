# SPDX-License-Identifier: Apache-2.0
"""What each parameter of the Hugging Face families is, written by hand from their model code.

Nothing here is computed by, or taken from, ``ds_blockwise``. An entry says role, granularity and number of Adam-mini's
blocks, ``+`` between the roles of a fused weight. All models have hidden size 48, 4 query heads, 2 key heads (where the
family groups queries), heads of 12 rows, FFNs of 80 and a vocabulary of 97, unless a table says otherwise.
"""

from __future__ import annotations

Table = dict[str, str]

EMBEDDING, OUTPUT, NORM = "embedding row 97", "output row 97", "norm tensor 1"


def under(prefix: str, *tables: Table) -> Table:
    """The tables' names with a prefix."""
    return {f"{prefix}{name}": what for table in tables for name, what in table.items()}


def norms(*names: str, bias: bool = False) -> Table:
    """Norm vectors, each one block."""
    leaves = ("weight", "bias") if bias else ("weight",)
    return {f"{name}.{leaf}": NORM for name in names for leaf in leaves}


SEPARATE = {
    "self_attn.q_proj.weight": "query head 4",
    "self_attn.k_proj.weight": "key head 2",
    "self_attn.v_proj.weight": "value row 24",
    "self_attn.o_proj.weight": "attn_out row 48",
}
SEPARATE_BIASES = {
    "self_attn.q_proj.bias": "query bias element 48",
    "self_attn.k_proj.bias": "key bias element 24",
    "self_attn.v_proj.bias": "value bias element 24",
}
HEADS_OF_16 = SEPARATE | {"self_attn.v_proj.weight": "value row 32"}
GATED = {
    "mlp.gate_proj.weight": "ffn row 80",
    "mlp.up_proj.weight": "ffn row 80",
    "mlp.down_proj.weight": "ffn row 48",
}
TWO_NORMS = norms("input_layernorm", "post_attention_layernorm")
FOUR_NORMS = TWO_NORMS | norms("pre_feedforward_layernorm", "post_feedforward_layernorm")
QK_NORMS = norms("self_attn.q_norm", "self_attn.k_norm")
ENDS = {"model.embed_tokens.weight": EMBEDDING, "model.norm.weight": NORM, "lm_head.weight": OUTPUT}
TIED_ENDS = {"model.embed_tokens.weight": EMBEDDING, "model.norm.weight": NORM}
LAYER = "model.layers.0."

LLAMA = ENDS | under(LAYER, SEPARATE, GATED, TWO_NORMS)
QWEN2 = LLAMA | under(LAYER, SEPARATE_BIASES)
QWEN3 = LLAMA | under(LAYER, QK_NORMS)
GEMMA = TIED_ENDS | under(LAYER, HEADS_OF_16, GATED, TWO_NORMS)
GEMMA2 = TIED_ENDS | under(LAYER, HEADS_OF_16, GATED, FOUR_NORMS)
GEMMA3 = GEMMA2 | under(LAYER, QK_NORMS)
OLMO2 = ENDS | under(LAYER, SEPARATE, GATED, QK_NORMS, norms("post_attention_layernorm", "post_feedforward_layernorm"))
PHI3 = ENDS | under(
    LAYER,
    {
        "self_attn.qkv_proj.weight": "query head 4 + key head 2 + value row 24",
        "self_attn.o_proj.weight": "attn_out row 48",
        "mlp.gate_up_proj.weight": "ffn row 160",
        "mlp.down_proj.weight": "ffn row 48",
    },
    TWO_NORMS,
)
PHI = {
    "model.embed_tokens.weight": EMBEDDING,
    **norms("model.final_layernorm", bias=True),
    "lm_head.weight": OUTPUT,
    "lm_head.bias": "output bias element 97",
    **under(
        LAYER,
        {k: v for k, v in SEPARATE.items() if "o_proj" not in k},
        SEPARATE_BIASES,
        {
            "self_attn.dense.weight": "attn_out row 48",
            "self_attn.dense.bias": "attn_out bias element 48",
            "mlp.fc1.weight": "ffn row 80",
            "mlp.fc1.bias": "ffn bias element 80",
            "mlp.fc2.weight": "ffn row 48",
            "mlp.fc2.bias": "ffn bias element 48",
        },
        norms("input_layernorm", bias=True),
    ),
}
STARCODER2 = {
    "model.embed_tokens.weight": EMBEDDING,
    **norms("model.norm", bias=True),
    **under(
        LAYER,
        SEPARATE,
        SEPARATE_BIASES,
        {
            "self_attn.o_proj.bias": "attn_out bias element 48",
            "mlp.c_fc.weight": "ffn row 80",
            "mlp.c_fc.bias": "ffn bias element 80",
            "mlp.c_proj.weight": "ffn row 48",
            "mlp.c_proj.bias": "ffn bias element 48",
        },
        norms("input_layernorm", "post_attention_layernorm", bias=True),
    ),
}
NEMOTRON = {
    "model.embed_tokens.weight": EMBEDDING,
    **norms("model.norm", bias=True),
    "lm_head.weight": OUTPUT,
    **under(
        LAYER,
        SEPARATE,
        {"mlp.up_proj.weight": "ffn row 80", "mlp.down_proj.weight": "ffn row 48"},
        norms("input_layernorm", "post_attention_layernorm", bias=True),
    ),
}
STABLELM = {
    "model.embed_tokens.weight": EMBEDDING,
    **norms("model.norm", bias=True),
    "lm_head.weight": OUTPUT,
    **under(
        LAYER,
        SEPARATE,
        SEPARATE_BIASES,
        GATED,
        norms("input_layernorm", "post_attention_layernorm", bias=True),
        norms(*(f"self_attn.q_layernorm.norms.{head}" for head in range(4))),
        norms(*(f"self_attn.k_layernorm.norms.{head}" for head in range(2))),
    ),
}
GLM4 = ENDS | under(
    LAYER,
    SEPARATE,
    SEPARATE_BIASES,
    {"mlp.gate_up_proj.weight": "ffn row 160", "mlp.down_proj.weight": "ffn row 48"},
    TWO_NORMS,
    norms("post_self_attn_layernorm", "post_mlp_layernorm"),
)

# ------------------------------------------------------ the older families: fused weights, biases, tied ends

MHA = "query head 4 + key head 4 + value row 48"
MHA_BIAS = "query bias element 48 + key bias element 48 + value bias element 48"


def _with_biases(weights: Table) -> Table:
    biases = {
        n.replace("weight", "bias"): MHA_BIAS if w == MHA else f"{w.split()[0]} bias element {w.split()[2]}"
        for n, w in weights.items()
    }
    return weights | biases


def _megatron_style(attention: str, ffn: int, qkv: str = MHA) -> Table:
    return {
        f"{attention}.query_key_value.weight": qkv,
        f"{attention}.dense.weight": "attn_out row 48",
        "mlp.dense_h_to_4h.weight": f"ffn row {ffn}",
        "mlp.dense_4h_to_h.weight": "ffn row 48",
    }


def _gpt2_style(qkv: str = MHA) -> Table:
    return {
        "attn.c_attn.weight": qkv,
        "attn.c_proj.weight": "attn_out row 48",
        "mlp.c_fc.weight": "ffn row 192",
        "mlp.c_proj.weight": "ffn row 48",
    }


H = "transformer.h.0."
LN = norms("transformer.ln_f", bias=True)
POSITIONS = {"transformer.wte.weight": EMBEDDING, "transformer.wpe.weight": "embedding row 64"}
GPT2 = POSITIONS | LN | under(H, _with_biases(_gpt2_style()), norms("ln_1", "ln_2", bias=True))
# multi-query: one key head and one value head of 12 rows
MQA = "query head 4 + key head 1 + value row 12"
MQA_BIAS = "query bias element 48 + key bias element 12 + value bias element 12"
GPT_BIGCODE = GPT2 | {f"{H}attn.c_attn.weight": MQA, f"{H}attn.c_attn.bias": MQA_BIAS}
_FALCON_ENDS = {"transformer.word_embeddings.weight": EMBEDDING} | LN
_FALCON_NORM = norms("input_layernorm", bias=True)
FALCON_7B = _FALCON_ENDS | under(H, _megatron_style("self_attention", 192, MQA), _FALCON_NORM)
FALCON_40B = _FALCON_ENDS | under(
    H,
    _megatron_style("self_attention", 192, "query head 4 + key head 2 + value row 24"),
    norms("ln_attn", "ln_mlp", bias=True),
)
FALCON_RW = _FALCON_ENDS | under(
    H,
    _with_biases(_megatron_style("self_attention", 192)),
    norms("input_layernorm", "post_attention_layernorm", bias=True),
)
BLOOM = FALCON_RW | norms("transformer.word_embeddings_layernorm", bias=True)
GPT_NEOX = {
    "gpt_neox.embed_in.weight": EMBEDDING,
    **norms("gpt_neox.final_layer_norm", bias=True),
    "lm_head.weight": OUTPUT,
    **under(
        "gpt_neox.layers.0.",
        _with_biases(_megatron_style("attention", 80)),
        norms("input_layernorm", "post_attention_layernorm", bias=True),
    ),
}
PERSIMMON = {
    "model.embed_tokens.weight": EMBEDDING,
    **norms("model.final_layernorm", bias=True),
    "lm_head.weight": OUTPUT,
    **under(
        LAYER,
        _with_biases(_megatron_style("self_attn", 80)),
        norms("input_layernorm", "post_attention_layernorm", bias=True),
        norms("self_attn.q_layernorm", "self_attn.k_layernorm", bias=True),
    ),
}
MPT = {
    "transformer.wte.weight": EMBEDDING,
    "transformer.norm_f.weight": NORM,
    **under(
        "transformer.blocks.0.",
        {
            "attn.Wqkv.weight": MHA,
            "attn.out_proj.weight": "attn_out row 48",
            "ffn.up_proj.weight": "ffn row 192",
            "ffn.down_proj.weight": "ffn row 48",
        },
        norms("norm_1", "norm_2"),
    ),
}
_FOUR_HEADS = {"q_proj.weight": "query head 4", "k_proj.weight": "key head 4", "v_proj.weight": "value row 48"}
_OUT = {"out_proj.weight": "attn_out row 48"}
GPT_NEO = (
    POSITIONS
    | LN
    | under(
        H,
        under("attn.attention.", _FOUR_HEADS, _OUT, {"out_proj.bias": "attn_out bias element 48"}),
        _with_biases({"mlp.c_fc.weight": "ffn row 192", "mlp.c_proj.weight": "ffn row 48"}),
        norms("ln_1", "ln_2", bias=True),
    )
)
GPTJ = {
    "transformer.wte.weight": EMBEDDING,
    **LN,
    **_with_biases({"lm_head.weight": OUTPUT}),
    **under(
        H,
        under("attn.", _FOUR_HEADS, _OUT),
        _with_biases({"mlp.fc_in.weight": "ffn row 192", "mlp.fc_out.weight": "ffn row 48"}),
        norms("ln_1", bias=True),
    ),
}
# OPT-350M: embeddings of 24, projected to 48 and back; positions are looked up two rows further down
_BIASES = {"q": "query", "k": "key", "v": "value", "out": "attn_out"}
OPT = under(
    "model.decoder.",
    {
        "embed_tokens.weight": EMBEDDING,
        "embed_positions.weight": "embedding row 66",
        "project_in.weight": "other row 48",
        "project_out.weight": "other row 24",
    },
    norms("final_layer_norm", bias=True),
    under(
        "layers.0.",
        under("self_attn.", _FOUR_HEADS, _OUT),
        {f"self_attn.{x}_proj.bias": f"{role} bias element 48" for x, role in _BIASES.items()},
        _with_biases({"fc1.weight": "ffn row 80", "fc2.weight": "ffn row 48"}),
        norms("self_attn_layer_norm", "final_layer_norm", bias=True),
    ),
)
