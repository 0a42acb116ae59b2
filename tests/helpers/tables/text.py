# SPDX-License-Identifier: Apache-2.0
"""What each parameter of `text_families` is, written by hand from the model code; the form is that of `huggingface`.

Layers that mix tokens without softmax attention are ``other`` throughout, but for their norms. So are heads that are no
output layer over the vocabulary, and the linears between a model and its output layer.
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


def biased(weights: Table) -> Table:
    """Weights of one role each, with the biases of their linears."""
    return weights | {
        name.replace("weight", "bias"): f"{what.split()[0]} bias element {what.split()[-1]}"
        if what.split()[1] != "head"
        else f"{what.split()[0]} bias element 48"
        for name, what in weights.items()
    }


def linears(role: str, **rows: int) -> Table:
    """Weights without biases."""
    return {f"{name.replace('__', '.')}.weight": f"{role} row {count}" for name, count in rows.items()}


# ------------------------------------------------------------------------------------------------ BERT

_FOUR = {"query.weight": "query head 4", "key.weight": "key head 4", "value.weight": "value row 48"}
_BERT_FFN = biased({"intermediate.dense.weight": "ffn row 80", "output.dense.weight": "ffn row 48"})


def _bert_attention(name: str) -> Table:
    return under(
        f"{name}.",
        under("self.", biased(_FOUR)),
        biased({"output.dense.weight": "attn_out row 48"}),
        norms("output.LayerNorm", bias=True),
    )


_BERT_LAYER = _bert_attention("attention") | _BERT_FFN | norms("output.LayerNorm", bias=True)
_BERT_TABLES = {
    "word_embeddings.weight": EMBEDDING,
    "position_embeddings.weight": "embedding row 64",
    "token_type_embeddings.weight": "embedding row 2",
    **norms("LayerNorm", bias=True),
}
_BERT_BODY = under("embeddings.", _BERT_TABLES) | under("encoder.layer.0.", _BERT_LAYER)
_POOLER = biased({"pooler.dense.weight": "other row 48"})
_CLASSIFIER = biased({"classifier.weight": "other row 2"})
_BERT_MLM = under(
    "cls.predictions.",
    {"bias": "output bias element 97"},
    biased({"transform.dense.weight": "other row 48"}),
    norms("transform.LayerNorm", bias=True),
)
_BERT = under("bert.", _BERT_BODY)
_BERT_POOLED = under("bert.", _BERT_BODY, _POOLER)
_ROBERTA_HEAD = under(
    "lm_head.",
    {"bias": "output bias element 97"},
    biased({"dense.weight": "other row 48"}),
    norms("layer_norm", bias=True),
)
_DENSE_CLASSIFIER = biased({"classifier.dense.weight": "other row 48", "classifier.out_proj.weight": "other row 2"})

# ------------------------------------------------------------------------------------------------ ModernBERT

_MODERN_FFN = linears("ffn", mlp__Wi=160, mlp__Wo=48)
_MODERN_LAYER = {"attn.Wqkv.weight": "query head 4 + key head 4 + value row 48", "attn.Wo.weight": "attn_out row 48"}
_MODERN_ENDS = {
    "model.embeddings.tok_embeddings.weight": EMBEDDING,
    **norms("model.embeddings.norm", "model.final_norm"),
}
# the first layer has no norm before attention: the embeddings were just normed
_MODERN_FIRST = under(LAYER, _MODERN_LAYER, _MODERN_FFN, norms("mlp_norm"))
_MODERN_SECOND = under("model.layers.1.", _MODERN_LAYER, _MODERN_FFN, norms("attn_norm", "mlp_norm"))
_MODERN_HEAD = linears("other", head__dense=48) | norms("head.norm")
_DECODER_BIAS = {"decoder.bias": "output bias element 97"}
_MODERN_DECODER = under(
    LAYER,
    {
        "attn.q_proj.weight": "query head 4",
        "attn.k_proj.weight": "key head 4",
        "attn.v_proj.weight": "value row 48",
        "attn.Wo.weight": "attn_out row 48",
    },
    _MODERN_FFN,
    norms("mlp_norm"),
)

# ------------------------------------------------------------------------------------------------ DeBERTa

_DEBERTA_TABLES = {k: v for k, v in _BERT_TABLES.items() if "token_type" not in k}
# per head its query, key and value rows; the biases of queries and values stand beside the fused weight
_DISENTANGLED = {
    "attention.self.in_proj.weight": "query head 4 + key head 4 + value row 48",
    "attention.self.q_bias": "query bias element 48",
    "attention.self.v_bias": "value bias element 48",
    "attention.self.pos_proj.weight": "key head 4",
    **biased({"attention.self.pos_q_proj.weight": "query head 4"}),
}
_WITHOUT_SELF = {k: v for k, v in _BERT_LAYER.items() if ".self." not in k}
_V2_SELF = {f"{x}_proj.weight": what for x, what in zip(("query", "key", "value"), _FOUR.values(), strict=True)}
_V2_POSITIONS = {"pos_key_proj.weight": "key head 4", "pos_query_proj.weight": "query head 4"}
_DEBERTA = under(
    "deberta.",
    under("embeddings.", _DEBERTA_TABLES),
    under("encoder.layer.0.", _DISENTANGLED, _WITHOUT_SELF),
    {"encoder.rel_embeddings.weight": "embedding row 16"},
)
_DEBERTA_V2 = under(
    "deberta.",
    under("embeddings.", _DEBERTA_TABLES),
    under("encoder.layer.0.", under("attention.self.", biased(_V2_SELF | _V2_POSITIONS)), _WITHOUT_SELF),
    {"encoder.rel_embeddings.weight": "embedding row 16"},
    norms("encoder.LayerNorm", "encoder.conv.LayerNorm", bias=True),
    biased({"encoder.conv.conv.weight": "other row 48"}),
)

# ------------------------------------------------------------------------------------------------ BERT's relatives

_ELECTRA = under("electra.", _BERT_BODY, biased({"embeddings_project.weight": "other row 48"}))
_DISTILBERT = under(
    "distilbert.",
    under("embeddings.", _DEBERTA_TABLES),
    under(
        "transformer.layer.0.",
        under(
            "attention.",
            biased({f"{x}_lin.weight": what for x, what in zip("qkv", _FOUR.values(), strict=True)}),
            biased({"out_lin.weight": "attn_out row 48"}),
        ),
        biased(linears("ffn", ffn__lin1=80, ffn__lin2=48)),
        norms("sa_layer_norm", "output_layer_norm", bias=True),
    ),
)
_ALBERT = under(
    "albert.",
    under("embeddings.", _BERT_TABLES),
    biased({"encoder.embedding_hidden_mapping_in.weight": "other row 48"}),
    under(
        "encoder.albert_layer_groups.0.albert_layers.0.",
        under("attention.", biased(_FOUR), biased({"dense.weight": "attn_out row 48"}), norms("LayerNorm", bias=True)),
        biased(linears("ffn", ffn=80, ffn_output=48)),
        norms("full_layer_layer_norm", bias=True),
    ),
)
_MPNET = under(
    "mpnet.",
    under("embeddings.", _DEBERTA_TABLES),
    under(
        "encoder.layer.0.",
        under(
            "attention.",
            biased({f"attn.{x}.weight": what for x, what in zip("qkv", _FOUR.values(), strict=True)}),
            biased({"attn.o.weight": "attn_out row 48"}),
            norms("LayerNorm", bias=True),
        ),
        _BERT_FFN,
        norms("output.LayerNorm", bias=True),
    ),
    {"encoder.relative_attention_bias.weight": "other row 32"},
)

# ------------------------------------------------------------------------------------------------ T5

_T5_ATTENTION = {
    "q.weight": "query head 4",
    "k.weight": "key head 4",
    "v.weight": "value row 48",
    "o.weight": "attn_out row 48",
}
# a number for each bucket of distances and each head, added to attention's scores
_T5_BIAS = {"relative_attention_bias.weight": "other row 8"}
_PLAIN_T5_FFN = linears("ffn", DenseReluDense__wi=80, DenseReluDense__wo=48)
_GATED_T5_FFN = linears("ffn", DenseReluDense__wi_0=80, DenseReluDense__wi_1=80, DenseReluDense__wo=48)


def _t5(ffn: Table, encoder: str = "SelfAttention", **extra: Table) -> Table:
    first = under(f"layer.0.{encoder}.", _T5_ATTENTION, _T5_BIAS, extra.get("in_encoder", {}))
    own = under("layer.0.SelfAttention.", _T5_ATTENTION, _T5_BIAS)
    cross = under("layer.1.EncDecAttention.", _T5_ATTENTION, extra.get("in_cross", {}))
    return {
        "shared.weight": EMBEDDING,
        **under("encoder.block.0.", first, under("layer.1.", ffn), norms("layer.0.layer_norm", "layer.1.layer_norm")),
        **under(
            "decoder.block.0.",
            own,
            cross,
            under("layer.2.", ffn),
            norms("layer.0.layer_norm", "layer.1.layer_norm", "layer.2.layer_norm"),
        ),
        **norms("encoder.final_layer_norm", "decoder.final_layer_norm"),
    }


_T5 = _t5(_PLAIN_T5_FFN)
_LONG_T5 = _t5(
    _PLAIN_T5_FFN,
    "TransientGlobalSelfAttention",
    in_encoder={"global_relative_attention_bias.weight": "other row 8", "global_input_layer_norm.weight": NORM},
)


def _head(classes: int) -> Table:
    return biased(linears("other", classification_head__dense=48, classification_head__out_proj=classes))


# ------------------------------------------------------------------------------------------------ BART

_BART_ATTENTION = {
    "q_proj.weight": "query head 4",
    "k_proj.weight": "key head 4",
    "v_proj.weight": "value row 48",
    "out_proj.weight": "attn_out row 48",
}
_BART_LAYER = (
    under("self_attn.", biased(_BART_ATTENTION))
    | biased(linears("ffn", fc1=80, fc2=48))
    | norms("self_attn_layer_norm", "final_layer_norm", bias=True)
)
_BART_CROSS = under("encoder_attn.", biased(_BART_ATTENTION)) | norms("encoder_attn_layer_norm", bias=True)
_BART_LAYERS = under("encoder.layers.0.", _BART_LAYER) | under("decoder.layers.0.", _BART_LAYER, _BART_CROSS)
_BART = under(
    "model.",
    {"shared.weight": EMBEDDING},
    # looked up two rows further down
    {f"{side}.embed_positions.weight": "embedding row 66" for side in ("encoder", "decoder")},
    norms("encoder.layernorm_embedding", "decoder.layernorm_embedding", bias=True),
    _BART_LAYERS,
)
# its positions are sines, which do not train
_PEGASUS = under(
    "model.", {"shared.weight": EMBEDDING}, _BART_LAYERS, norms("encoder.layer_norm", "decoder.layer_norm", bias=True)
)

# ------------------------------------------------------------------------------------------------ decoders and hybrids

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
    "kv_a_proj_with_mqa.weight": "value row 16 + key head 4",
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

TEXT: dict[str, Table] = {
    "BertForPreTraining": _BERT_POOLED | _BERT_MLM | biased({"cls.seq_relationship.weight": "other row 2"}),
    "BertForSequenceClassification": _BERT_POOLED | _CLASSIFIER,
    "BertForTokenClassification": _BERT | _CLASSIFIER,
    "BertForQuestionAnswering": _BERT | biased({"qa_outputs.weight": "other row 2"}),
    "BertLMHeadModel": _BERT | _BERT_MLM | under("bert.encoder.layer.0.", _bert_attention("crossattention")),
    "RobertaForMaskedLM": under("roberta.", _BERT_BODY) | _ROBERTA_HEAD,
    "RobertaForSequenceClassification": under("roberta.", _BERT_BODY) | _DENSE_CLASSIFIER,
    "ModernBertForMaskedLM": _MODERN_ENDS | _MODERN_FIRST | _MODERN_SECOND | _MODERN_HEAD | _DECODER_BIAS,
    "ModernBertForSequenceClassification": _MODERN_ENDS | _MODERN_FIRST | _MODERN_HEAD | _CLASSIFIER,
    "ModernBertDecoderForCausalLM": _MODERN_ENDS
    | _MODERN_DECODER
    | _DECODER_BIAS
    | linears("other", lm_head__dense=48)
    | norms("lm_head.norm"),
    "DebertaForMaskedLM": _DEBERTA | _BERT_MLM,
    "DebertaV2ForMaskedLM": _DEBERTA_V2 | _BERT_MLM,
    "ElectraForMaskedLM": _ELECTRA
    | norms("generator_predictions.LayerNorm", bias=True)
    | biased(linears("other", generator_predictions__dense=24))
    | {"generator_lm_head.bias": "output bias element 97"},
    "ElectraForPreTraining": _ELECTRA
    | under("discriminator_predictions.", biased(linears("other", dense=48, dense_prediction=1))),
    "DistilBertForMaskedLM": _DISTILBERT
    | biased(linears("other", vocab_transform=48))
    | norms("vocab_layer_norm", bias=True)
    | {"vocab_projector.bias": "output bias element 97"},
    "AlbertForMaskedLM": _ALBERT
    | under("predictions.", {"bias": "output bias element 97"}, norms("LayerNorm", bias=True))
    | biased(linears("other", predictions__dense=24)),
    "MPNetForMaskedLM": _MPNET | _ROBERTA_HEAD,
    "T5ForConditionalGeneration": _T5,
    "T5ForSequenceClassification": under("transformer.", _T5) | _head(2),
    "MT5ForConditionalGeneration": _t5(_GATED_T5_FFN),
    "UMT5ForConditionalGeneration": _t5(_GATED_T5_FFN),
    "LongT5ForConditionalGeneration": _LONG_T5,
    "BartForConditionalGeneration": _BART,
    "BartForSequenceClassification": _BART | _head(3),
    "PegasusForConditionalGeneration": _PEGASUS,
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
