# SPDX-License-Identifier: Apache-2.0
"""What each parameter of the decoders, hybrids and heads of `text_families` is, by hand; the form is `huggingface`'s.

Layers that mix tokens without softmax attention are ``other`` throughout, but for their norms.
"""

from __future__ import annotations

from tests.helpers.tables.huggingface import (
    EMBEDDING,
    ENDS,
    GATED,
    GPT2,
    LAYER,
    LLAMA,
    NORM,
    OUTPUT,
    QK_NORMS,
    SEPARATE,
    TIED_ENDS,
    TWO_NORMS,
    Table,
    norms,
    under,
)
from tests.helpers.tables.text import biased, linears

_OUT_PROJ = {k.replace("o_proj", "out_proj"): v for k, v in SEPARATE.items()}
_LFM2_NORMS = norms("operator_norm", "ffn_norm")
_LFM2_ATTENTION = _OUT_PROJ | norms("self_attn.q_layernorm", "self_attn.k_layernorm")
_SHORT_CONVOLUTION = linears("other", conv__conv=48, conv__in_proj=144, conv__out_proj=48)
_W123 = linears("ffn", feed_forward__w1=80, feed_forward__w2=48, feed_forward__w3=80)
_LFM2_ENDS = {"model.embed_tokens.weight": EMBEDDING, **norms("model.embedding_norm")}
_EXPERTS_OF_20 = {
    "experts.gate_up_proj": "ffn row 120",
    "experts.down_proj": "ffn row 144",
    "gate.weight": "router row 3",
}
_GEMMA3N = (
    {"model.embed_tokens.weight": EMBEDDING, "model.embed_tokens_per_layer.weight": EMBEDDING}
    | norms("model.norm", "model.per_layer_projection_norm")
    | under("model.", linears("other", per_layer_model_projection=8))
    | under("model.", linears("other", altup_projections__0=48, altup_unembed_projections__0=48))
    | under(
        LAYER,
        SEPARATE,
        QK_NORMS,
        GATED,
        TWO_NORMS,
        norms("pre_feedforward_layernorm", "post_feedforward_layernorm", "post_per_layer_input_norm"),
        norms("altup.router_norm", "laurel.post_laurel_norm"),
        {"altup.correct_output_scale": "other row 48"},
        linears("other", altup__correction_coefs=2, altup__prediction_coefs=4, altup__modality_router=2),
        linears("other", laurel__linear_left=4, laurel__linear_right=48),
        linears("other", per_layer_input_gate=8, per_layer_projection=48),
    )
)
_MAMBA2_OF_4 = {"dt_bias": "other row 4", "A_log": "other row 4", "D": "other row 4"}
_NEMOTRON_H = (
    {"model.embeddings.weight": EMBEDDING, "model.norm_f.weight": NORM, "lm_head.weight": OUTPUT}
    | norms(*(f"model.layers.{i}.norm" for i in range(4)))
    # in_proj: 48 gates, 48 + 2 * 8 channels of the convolution, 4 time steps
    | under("model.layers.0.mixer.", _MAMBA2_OF_4, linears("other", in_proj=116, out_proj=48), norms("norm"))
    | under("model.layers.0.mixer.", biased(linears("other", conv1d=64)))
    | under("model.layers.1.mixer.", linears("ffn", up_proj=80, down_proj=48))
    | under("model.layers.2.mixer.", {k.removeprefix("self_attn."): v for k, v in SEPARATE.items()})
    | under(
        "model.layers.3.mixer.",
        # the experts work on the latent of 24, so they give back 24
        {"experts.up_proj": "ffn row 60", "experts.down_proj": "ffn row 72", "gate.weight": "router row 3"},
        linears("ffn", fc1_latent_proj=24, fc2_latent_proj=48),
        linears("ffn", shared_experts__up_proj=20, shared_experts__down_proj=48),
    )
)
_HEADLESS_LLAMA = {k: v for k, v in LLAMA.items() if k != "lm_head.weight"}
_COHERE = TIED_ENDS | under(LAYER, SEPARATE, QK_NORMS, GATED, norms("input_layernorm"))
_KIMI_ATTENTION = {
    "q_proj.weight": "query head 4",  # of 8 + 4 rows
    "kv_a_proj_with_mqa.weight": "value row 16 + key row 4",
    "kv_b_proj.weight": "key head 4 + value row 48",
    "o_proj.weight": "attn_out row 48",
    "kv_a_layernorm.weight": NORM,
}
_KIMI_DELTA = {
    **linears("other", q_proj=16, k_proj=16, v_proj=16, conv1d=48, b_proj=2, g_a_proj=8, g_b_proj=16, o_proj=48),
    "forget_gate.dt_bias": "other row 16",
    "forget_gate.A_log": "other row 1",
    **linears("other", forget_gate__f_a_proj=8, forget_gate__f_b_proj=16),
    **norms("o_norm"),
}
_KIMI = (
    ENDS
    | under(LAYER, under("self_attn.", _KIMI_DELTA), GATED, TWO_NORMS)
    | under("model.layers.1.", under("self_attn.", _KIMI_ATTENTION), GATED, TWO_NORMS)
)
_MINIMAX_EXPERTS = {
    "mlp.gate.weight": "router row 3",
    "mlp.experts.gate_up_proj": "ffn row 480",
    "mlp.experts.down_proj": "ffn row 144",
}
_LIGHTNING = linears("other", self_attn__qkv_proj=144, self_attn__out_proj=48, self_attn__output_gate=48)
_MINIMAX = (
    ENDS
    | under(LAYER, _LIGHTNING, norms("self_attn.norm"), _MINIMAX_EXPERTS, TWO_NORMS)
    | under("model.layers.1.", SEPARATE, _MINIMAX_EXPERTS, TWO_NORMS)
)
_DELTA_NET = linears("other", q_proj=16, k_proj=16, v_proj=32, a_proj=4, b_proj=4, g_proj=32, o_proj=48, conv1d=64)
_OLMO_HYBRID = (
    ENDS
    | under(
        LAYER,
        under("linear_attn.", _DELTA_NET, {"A_log": "other row 4", "dt_bias": "other row 4"}, norms("o_norm")),
        GATED,
        TWO_NORMS,
    )
    | under(
        "model.layers.1.",
        SEPARATE,
        QK_NORMS,
        GATED,
        norms("post_attention_layernorm", "post_feedforward_layernorm"),
    )
)
# in_proj: 96 gates, 96 + 2 * 8 channels of the convolution, 8 time steps
_MAMBA2_OF_8 = {
    **{name: "other row 8" for name in ("dt_bias", "A_log", "D")},
    **linears("other", in_proj=216, out_proj=48),
    **biased(linears("other", conv1d=112)),
    **norms("norm"),
}
_FEED_FORWARD = {k.replace("mlp.", "feed_forward."): v for k, v in GATED.items()}
_BAMBA_NORMS = norms("input_layernorm", "pre_ff_layernorm")
_BAMBA = (
    {"model.embed_tokens.weight": EMBEDDING, "model.final_layernorm.weight": NORM, "lm_head.weight": OUTPUT}
    | under(LAYER, under("mamba.", _MAMBA2_OF_8), _FEED_FORWARD, _BAMBA_NORMS)
    | under("model.layers.1.", SEPARATE, _FEED_FORWARD, _BAMBA_NORMS)
)
_GRANITE_HYBRID = ENDS | under(
    LAYER,
    under("mamba.", _MAMBA2_OF_8),
    linears("router", block_sparse_moe__router=3),
    {"block_sparse_moe.experts.gate_up_proj": "ffn row 480", "block_sparse_moe.experts.down_proj": "ffn row 144"},
    linears("ffn", shared_mlp__input_linear=40, shared_mlp__output_linear=48),
    TWO_NORMS,
)
_GRIFFIN_LAYER = biased(
    {f"mlp_block.{x}_proj.weight": f"ffn row {n}" for x, n in (("gate", 80), ("up", 80), ("down", 48))}
)
_GRIFFIN_NORMS = norms("temporal_pre_norm", "channel_pre_norm")
_RECURRENT = biased(linears("other", linear_x=48, linear_y=48, linear_out=48, conv_1d=48)) | {
    "rg_lru.recurrent_param": "other row 48",
    **{f"rg_lru.{gate}_gate_{leaf}": "other row 4" for gate in ("input", "recurrent") for leaf in ("weight", "bias")},
}
_GRIFFIN_ATTENTION = {k.removeprefix("self_attn."): v for k, v in SEPARATE.items()} | {
    "o_proj.bias": "attn_out bias element 48"
}
_RECURRENT_GEMMA = (
    {"model.embed_tokens.weight": EMBEDDING, "model.final_norm.weight": NORM}
    | under(LAYER, under("temporal_block.", _RECURRENT), _GRIFFIN_LAYER, _GRIFFIN_NORMS)
    | under("model.layers.1.", under("temporal_block.", _RECURRENT), _GRIFFIN_LAYER, _GRIFFIN_NORMS)
    | under("model.layers.2.", under("temporal_block.", _GRIFFIN_ATTENTION), _GRIFFIN_LAYER, _GRIFFIN_NORMS)
)
_RWKV = (
    {"rwkv.embeddings.weight": EMBEDDING, "head.weight": OUTPUT}
    | norms("rwkv.ln_out", bias=True)
    | under(
        "rwkv.blocks.0.",
        norms("pre_ln", "ln1", "ln2", bias=True),
        under(
            "attention.",
            linears("other", key=48, value=48, receptance=48, output=48),
            {"time_decay": "other row 48", "time_first": "other row 48"},
            {f"time_mix_{x}": "other row 1" for x in ("key", "value", "receptance")},
        ),
        under(
            "feed_forward.",
            linears("ffn", key=80, value=48, receptance=48),
            {"time_mix_key": "other row 1", "time_mix_receptance": "other row 1"},
        ),
    )
)
_XLSTM = {"backbone.embeddings.weight": EMBEDDING, "backbone.out_norm.weight": NORM, "lm_head.weight": OUTPUT} | under(
    "backbone.blocks.0.",
    norms("norm_mlstm", "norm_ffn", "mlstm_layer.multihead_norm"),
    under("mlstm_layer.", linears("other", q=24, k=24, v=48, ogate_preact=48, out_proj=48)),
    under("mlstm_layer.", biased(linears("other", igate_preact=4, fgate_preact=4))),
    under("ffn.", linears("ffn", proj_up=128, proj_up_gate=128, proj_down=48)),
)

DECODERS: dict[str, Table] = {
    "Lfm2ForCausalLM": _LFM2_ENDS
    | under(LAYER, _LFM2_ATTENTION, _W123, _LFM2_NORMS)
    | under("model.layers.1.", _SHORT_CONVOLUTION, _W123, _LFM2_NORMS),
    "Lfm2MoeForCausalLM": _LFM2_ENDS
    | under(LAYER, _LFM2_ATTENTION, _W123, _LFM2_NORMS)
    | under("model.layers.1.", _SHORT_CONVOLUTION, under("feed_forward.", _EXPERTS_OF_20), _LFM2_NORMS),
    "Gemma3nForCausalLM": _GEMMA3N,
    "NemotronHForCausalLM": _NEMOTRON_H,
    "CohereForCausalLM": _COHERE,
    "LlamaForSequenceClassification": _HEADLESS_LLAMA | {"score.weight": "other row 2"},
    "LlamaForTokenClassification": _HEADLESS_LLAMA | biased({"score.weight": "other row 2"}),
    "LlamaForQuestionAnswering": {k.replace("model.", "transformer.", 1): v for k, v in _HEADLESS_LLAMA.items()}
    | biased({"qa_outputs.weight": "other row 2"}),
    "GPT2DoubleHeadsModel": GPT2 | biased(linears("other", multiple_choice_head__summary=1)),
    "KimiLinearForCausalLM": _KIMI,
    "MiniMaxForCausalLM": _MINIMAX,
    "OlmoHybridForCausalLM": _OLMO_HYBRID,
    "BambaForCausalLM": _BAMBA,
    "GraniteMoeHybridForCausalLM": _GRANITE_HYBRID,
    "RecurrentGemmaForCausalLM": _RECURRENT_GEMMA,
    "RwkvForCausalLM": _RWKV,
    "xLSTMForCausalLM": _XLSTM,
}
