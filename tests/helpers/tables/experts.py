# SPDX-License-Identifier: Apache-2.0
"""Tables as in `tag_tables`, for models with experts, latent attention and state-space layers."""

from __future__ import annotations

from tests.helpers.tables.huggingface import (
    EMBEDDING,
    ENDS,
    GATED,
    HEADS_OF_16,
    LAYER,
    NORM,
    OUTPUT,
    QK_NORMS,
    SEPARATE,
    SEPARATE_BIASES,
    TWO_NORMS,
    norms,
    under,
)

# ------------------------------------------------------------------- experts: 3 of them, each row a block

EXPERTS = {"experts.gate_up_proj": "ffn row 480", "experts.down_proj": "ffn row 144"}
SMALL_EXPERTS = {"mlp.experts.gate_up_proj": "ffn row 120", "mlp.experts.down_proj": "ffn row 144"}
MIXTRAL = ENDS | under(LAYER, SEPARATE, TWO_NORMS, under("mlp.", EXPERTS), {"mlp.gate.weight": "router row 3"})
# Layer 0 has lightning attention, which is linear attention
_MINIMAX_FFN = (TWO_NORMS, under("mlp.", EXPERTS), {"mlp.gate.weight": "router row 3"})
MINIMAX = (
    ENDS
    | under(
        LAYER,
        {
            "self_attn.qkv_proj.weight": "other row 144",
            "self_attn.output_gate.weight": "other row 48",
            "self_attn.out_proj.weight": "other row 48",
            **norms("self_attn.norm"),
        },
        *_MINIMAX_FFN,
    )
    | under("model.layers.1.", SEPARATE, *_MINIMAX_FFN)
)
GRANITE_MOE = ENDS | under(
    LAYER,
    SEPARATE,
    TWO_NORMS,
    under("block_sparse_moe.", EXPERTS),
    {"block_sparse_moe.router.weight": "router row 3"},
)
QWEN2_MOE = ENDS | under(
    LAYER,
    SEPARATE,
    SEPARATE_BIASES,
    TWO_NORMS,
    SMALL_EXPERTS,
    {
        "mlp.gate.weight": "router row 3",
        "mlp.shared_expert.gate_proj.weight": "ffn row 24",
        "mlp.shared_expert.up_proj.weight": "ffn row 24",
        "mlp.shared_expert.down_proj.weight": "ffn row 48",
        "mlp.shared_expert_gate.weight": "router row 1",
    },
)
QWEN3_MOE = ENDS | under(LAYER, SEPARATE, QK_NORMS, TWO_NORMS, SMALL_EXPERTS, {"mlp.gate.weight": "router row 3"})
GPT_OSS = ENDS | under(
    LAYER,
    HEADS_OF_16,
    TWO_NORMS,
    under("mlp.", EXPERTS),
    {
        "self_attn.sinks": NORM,
        "self_attn.q_proj.bias": "query bias element 64",
        "self_attn.k_proj.bias": "key bias element 32",
        "self_attn.v_proj.bias": "value bias element 32",
        "self_attn.o_proj.bias": "attn_out bias element 48",
        "mlp.router.weight": "router row 3",
        "mlp.router.bias": "router bias element 3",
        "mlp.experts.gate_up_proj_bias": "ffn bias element 480",
        "mlp.experts.down_proj_bias": "ffn bias element 144",
    },
)
LLAMA4 = ENDS | under(
    LAYER,
    SEPARATE,
    TWO_NORMS,
    {
        "feed_forward.experts.gate_up_proj": "ffn row 480",
        "feed_forward.experts.down_proj": "ffn row 144",
        "feed_forward.router.weight": "router row 3",
        "feed_forward.shared_expert.gate_proj.weight": "ffn row 80",
        "feed_forward.shared_expert.up_proj.weight": "ffn row 80",
        "feed_forward.shared_expert.down_proj.weight": "ffn row 48",
    },
)
# Latent attention: queries through a latent of 24, keys and values through one of 16 with 4 rotary rows behind it;
# per head 8 + 4 rows of Q, and 8 of K and 12 of V in kv_b_proj. Layer 0 is dense, layer 1 has 4 experts of 20.
_LATENT = {
    "self_attn.q_a_proj.weight": "query row 24",
    "self_attn.q_b_proj.weight": "query head 4",
    "self_attn.kv_a_proj_with_mqa.weight": "value row 16 + key row 4",
    "self_attn.kv_b_proj.weight": "key head 4 + value row 48",
    "self_attn.o_proj.weight": "attn_out row 48",
    **norms("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"),
}
DEEPSEEK = (
    ENDS
    | under(LAYER, _LATENT, GATED, TWO_NORMS)
    | under(
        "model.layers.1.",
        _LATENT,
        TWO_NORMS,
        {
            "mlp.gate.weight": "router row 4",
            "mlp.experts.gate_up_proj": "ffn row 160",
            "mlp.experts.down_proj": "ffn row 192",
            "mlp.shared_experts.gate_proj.weight": "ffn row 20",
            "mlp.shared_experts.up_proj.weight": "ffn row 20",
            "mlp.shared_experts.down_proj.weight": "ffn row 48",
        },
    )
)

# -------------------------------------------------------------------------------------- state-space models

MAMBA2 = {
    "backbone.embeddings.weight": EMBEDDING,
    "backbone.norm_f.weight": NORM,
    "lm_head.weight": OUTPUT,
    **under(
        "backbone.layers.0.",
        {
            "norm.weight": NORM,
            "mixer.in_proj.weight": "other row 212",  # z 96, x 96, B 8, C 8, dt 4
            "mixer.out_proj.weight": "other row 48",
            "mixer.conv1d.weight": "other row 112",
            "mixer.conv1d.bias": "other bias element 112",
            "mixer.dt_bias": "other row 4",
            "mixer.A_log": "other row 4",
            "mixer.D": "other row 4",
            "mixer.norm.weight": NORM,
        },
    ),
}
# Layer 0: linear attention with 2 key heads and 4 value heads of 8 rows. Layer 1: attention whose q_proj holds, head
# by head, 12 rows of query and 12 of its output gate.
_SPARSE = {
    "mlp.gate.weight": "router row 3",
    "mlp.shared_expert.gate_proj.weight": "ffn row 24",
    "mlp.shared_expert.up_proj.weight": "ffn row 24",
    "mlp.shared_expert.down_proj.weight": "ffn row 48",
    "mlp.shared_expert_gate.weight": "router row 1",
    **SMALL_EXPERTS,
}
_LINEAR_ATTENTION = {
    "linear_attn.in_proj_qkvz.weight": "other row 96",  # q 16, k 16, v 32, z 32
    "linear_attn.in_proj_ba.weight": "other row 8",
    "linear_attn.conv1d.weight": "other row 64",
    "linear_attn.dt_bias": "other row 4",
    "linear_attn.A_log": "other row 4",
    "linear_attn.norm.weight": NORM,
    "linear_attn.out_proj.weight": "other row 48",
}
_GATED_ATTENTION = SEPARATE | {"self_attn.q_proj.weight": "query head 4 + attn_out row 48"} | QK_NORMS
QWEN3_NEXT = (
    ENDS
    | under(LAYER, _LINEAR_ATTENTION, TWO_NORMS, _SPARSE)
    | under("model.layers.1.", _GATED_ATTENTION, TWO_NORMS, _SPARSE)
)
# The same with dense FFNs and four projections of the linear attention instead of two
QWEN3_5 = (
    ENDS
    | under(
        LAYER,
        {name: what for name, what in _LINEAR_ATTENTION.items() if "in_proj" not in name},
        {
            "linear_attn.in_proj_qkv.weight": "other row 64",
            "linear_attn.in_proj_z.weight": "other row 32",
            "linear_attn.in_proj_b.weight": "other row 4",
            "linear_attn.in_proj_a.weight": "other row 4",
        },
        GATED,
        TWO_NORMS,
    )
    | under("model.layers.1.", _GATED_ATTENTION, GATED, TWO_NORMS)
)
# Jamba: a Mamba layer with experts, then attention without biases
JAMBA = {
    "model.embed_tokens.weight": EMBEDDING,
    "model.final_layernorm.weight": NORM,
    "lm_head.weight": OUTPUT,
    **under(
        LAYER,
        {
            "mamba.in_proj.weight": "other row 192",
            "mamba.conv1d.weight": "other row 96",
            "mamba.conv1d.bias": "other bias element 96",
            "mamba.x_proj.weight": "other row 35",  # dt 3, B 16, C 16
            "mamba.dt_proj.weight": "other row 96",
            "mamba.dt_proj.bias": "other bias element 96",
            "mamba.A_log": "other row 96",
            "mamba.D": "other row 96",
            "mamba.out_proj.weight": "other row 48",
            "feed_forward.router.weight": "router row 3",
            "feed_forward.experts.gate_up_proj": "ffn row 480",
            "feed_forward.experts.down_proj": "ffn row 144",
        },
        norms("mamba.dt_layernorm", "mamba.b_layernorm", "mamba.c_layernorm", "input_layernorm", "pre_ff_layernorm"),
    ),
    **under(
        "model.layers.1.",
        SEPARATE,
        {
            "feed_forward.gate_proj.weight": "ffn row 80",
            "feed_forward.up_proj.weight": "ffn row 80",
            "feed_forward.down_proj.weight": "ffn row 48",
        },
        norms("input_layernorm", "pre_ff_layernorm"),
    ),
}
