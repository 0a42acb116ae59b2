# SPDX-License-Identifier: Apache-2.0
"""Tables as in `huggingface`, for Megatron-core's models: how to build each, and what every parameter of it is.

Sizes are those of `tests.helpers.megatron.models`: hidden size 48, 4 query heads and 2 query groups of 12 rows, FFNs of
80, 4 experts of 20 with a shared one of 24, a vocabulary of 96.
"""

from __future__ import annotations

from tests.helpers.megatron import models
from tests.helpers.tables.huggingface import norms, under

LAYER = "decoder.layers.0."
GQA = "query head 4 + key head 2 + value row 24"
ENDS = {
    "embedding.word_embeddings.weight": "embedding row 96",
    "decoder.final_layernorm.weight": "norm tensor 1",
    "output_layer.weight": "output row 96",
}
ATTENTION = {"self_attention.linear_qkv.weight": GQA, "self_attention.linear_proj.weight": "attn_out row 48"}
GATED = {"mlp.linear_fc1.weight": "ffn row 160", "mlp.linear_fc2.weight": "ffn row 48"}
TWO_NORMS = norms("input_layernorm", "pre_mlp_layernorm")
LAYER_NORMS = norms("input_layernorm", "pre_mlp_layernorm", bias=True)
WITH_BIASES = {
    **ATTENTION,
    "self_attention.linear_qkv.bias": "query bias element 48 + key bias element 24 + value bias element 24",
    "self_attention.linear_proj.bias": "attn_out bias element 48",
    "mlp.linear_fc1.weight": "ffn row 80",
    "mlp.linear_fc1.bias": "ffn bias element 80",
    "mlp.linear_fc2.weight": "ffn row 48",
    "mlp.linear_fc2.bias": "ffn bias element 48",
    **LAYER_NORMS,
}
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "norm tensor 1",
    "mlp.linear_fc1.layer_norm_weight": "norm tensor 1",
}
SHARED = {
    "mlp.router.weight": "router row 4",
    "mlp.shared_experts.gate_weight": "router row 1",
    "mlp.shared_experts.linear_fc1.weight": "ffn row 48",
    "mlp.shared_experts.linear_fc2.weight": "ffn row 48",
}
LATENT = {
    "self_attention.linear_q_down_proj.weight": "query row 24",
    "self_attention.linear_q_up_proj.weight": "query head 4",
    "self_attention.linear_kv_down_proj.weight": "value row 16 + key row 4",
    "self_attention.linear_kv_up_proj.weight": "key head 4 + value row 48",
    "self_attention.linear_proj.weight": "attn_out row 48",
}
MHA = {
    "linear_qkv.weight": "query head 4 + key head 4 + value row 48",
    "linear_qkv.bias": "query bias element 48 + key bias element 48 + value bias element 48",
}
T5_LAYER = {**WITH_BIASES, **under("self_attention.", MHA)}
CROSS = {
    "cross_attention.linear_q.weight": "query head 4",
    "cross_attention.linear_q.bias": "query bias element 48",
    "cross_attention.linear_kv.weight": "key head 4 + value row 48",
    "cross_attention.linear_kv.bias": "key bias element 48 + value bias element 48",
    "cross_attention.linear_proj.weight": "attn_out row 48",
    "cross_attention.linear_proj.bias": "attn_out bias element 48",
    **norms("pre_cross_attn_layernorm", bias=True),
}

# name -> (how to build it, what every parameter is)
MODELS = {
    "llama": (lambda: models.gpt(**models.LLAMA), ENDS | under(LAYER, ATTENTION, GATED, TWO_NORMS)),
    "gpt with biases, q/k norms, tied": (
        lambda: models.gpt(spec_settings={"qk_layernorm": True}, qk_layernorm=True, tied=True),
        {
            "embedding.word_embeddings.weight": "embedding row 96",
            "embedding.position_embeddings.weight": "embedding row 16",
            **norms("decoder.final_layernorm", bias=True),
            **under(
                LAYER,
                WITH_BIASES,
                norms("self_attention.q_layernorm", "self_attention.k_layernorm", bias=True),
            ),
        },
    ),
    "output gate": (
        lambda: models.gpt(**models.LLAMA, attention_output_gate=True),
        ENDS
        | under(
            LAYER,
            ATTENTION,
            GATED,
            TWO_NORMS,
            {"self_attention.linear_qkv.weight": "query head 4 + attn_out row 48 + key head 2 + value row 24"},
        ),
    ),
    "sequential experts": (
        lambda: models.gpt(spec_settings={"num_experts": 4}, **models.EXPERTS),
        ENDS
        | under(
            LAYER,
            ATTENTION,
            TWO_NORMS,
            SHARED,
            *(
                under(
                    f"mlp.experts.local_experts.{i}.",
                    {"linear_fc1.weight": "ffn row 40", "linear_fc2.weight": "ffn row 48"},
                )
                for i in range(4)
            ),
        ),
    ),
    "multi-token prediction": (
        lambda: models.gpt(mtp_num_layers=1),
        ENDS
        | norms("decoder.final_layernorm", bias=True)
        | under(LAYER, WITH_BIASES)
        | under(f"mtp.layers.0.{models.MTP_LAYER}.", WITH_BIASES)
        | under(
            "mtp.layers.0.",
            norms("enorm", "hnorm", "final_layernorm", bias=True),
            {"eh_proj.weight": "ffn row 48"},
        ),
    ),
    "te": (lambda: models.gpt(models.te_spec(), **models.LLAMA), ENDS | under(LAYER, ATTENTION, GATED, FUSED_NORMS)),
    "te with a learnable softmax": (
        lambda: models.gpt(models.te_spec(), **models.LLAMA, softmax_type="learnable"),
        ENDS
        | under(
            LAYER, ATTENTION, GATED, FUSED_NORMS, {"self_attention.core_attention.softmax_offset": "norm tensor 1"}
        ),
    ),
    "te experts": (
        lambda: models.gpt(models.te_spec(experts=True), **models.EXPERTS),
        ENDS
        | under(
            LAYER,
            ATTENTION,
            SHARED,
            norms("pre_mlp_layernorm"),
            {"self_attention.linear_qkv.layer_norm_weight": "norm tensor 1"},
            {f"mlp.experts.linear_fc1.weight{i}": "ffn row 40" for i in range(4)},
            {f"mlp.experts.linear_fc2.weight{i}": "ffn row 48" for i in range(4)},
        ),
    ),
    "te experts in one tensor": (
        lambda: models.gpt(models.te_spec(experts=True, single=True), **models.EXPERTS),
        ENDS
        | under(
            LAYER,
            ATTENTION,
            SHARED,
            norms("pre_mlp_layernorm"),
            {
                "self_attention.linear_qkv.layer_norm_weight": "norm tensor 1",
                "mlp.experts.linear_fc1.weight": "ffn row 160",
                "mlp.experts.linear_fc2.weight": "ffn row 192",
            },
        ),
    ),
    "latent attention": (
        lambda: models.gpt(models.latent_spec(te=False), **models.LATENT_WITH_NORMS),
        ENDS
        | under(
            LAYER,
            LATENT,
            GATED,
            TWO_NORMS,
            norms("self_attention.q_layernorm", "self_attention.kv_layernorm"),
        ),
    ),
    "te latent attention": (
        lambda: models.gpt(models.latent_spec(te=True), **models.LATENT),
        ENDS
        | under(
            LAYER,
            LATENT,
            GATED,
            TWO_NORMS,
            {
                "self_attention.linear_q_up_proj.layer_norm_weight": "norm tensor 1",
                "self_attention.linear_kv_up_proj.layer_norm_weight": "norm tensor 1",
            },
        ),
    ),
    "latent attention without a query latent": (
        lambda: models.gpt(models.latent_spec(te=False, norms=False), **{**models.LATENT, "q_lora_rank": None}),
        ENDS
        | under(
            LAYER,
            {name: what for name, what in LATENT.items() if "linear_q_" not in name},
            {"self_attention.linear_q_proj.weight": "query head 4"},
            GATED,
            TWO_NORMS,
        ),
    ),
    "t5": (
        models.t5,
        {
            "embedding.word_embeddings.weight": "embedding row 96",
            "embedding.position_embeddings.weight": "embedding row 16",
            "lm_head.output_layer.weight": "output row 96",
            # Megatron-core's block specs for T5 name no final norm
            **under("encoder.layers.0.", T5_LAYER),
            **under(LAYER, T5_LAYER, CROSS),
        },
    ),
    "bert": (
        models.bert,
        {
            "embedding.word_embeddings.weight": "embedding row 96",
            "embedding.position_embeddings.weight": "embedding row 16",
            "embedding.tokentype_embeddings.weight": "embedding row 2",
            **norms("encoder.final_layernorm", "lm_head.layer_norm", bias=True),
            **under("encoder.layers.0.", T5_LAYER),
            "lm_head.dense.weight": "other row 48",
            "lm_head.dense.bias": "other bias element 48",
            "output_layer.weight": "output row 96",
            "output_layer.bias": "output bias element 96",
            "binary_head.weight": "other row 2",
            "binary_head.bias": "other bias element 2",
            "pooler.dense.weight": "other row 48",
            "pooler.dense.bias": "other bias element 48",
        },
    ),
}
