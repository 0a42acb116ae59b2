# SPDX-License-Identifier: Apache-2.0
"""What each parameter of `text_families` is, written by hand from the model code; the form is that of `huggingface`.

Heads that are no output layer over the vocabulary are ``other``, and so are the linears between a model and its output
layer.
"""

from __future__ import annotations

from tests.helpers.tables.huggingface import (
    EMBEDDING,
    LAYER,
    NORM,
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

ENCODERS: dict[str, Table] = {
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
}
