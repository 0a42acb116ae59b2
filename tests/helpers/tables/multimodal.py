# SPDX-License-Identifier: Apache-2.0
"""What each parameter of the families that read images or sound and write text is, by hand from their model code.

Entries as in `huggingface`, towers as in `towers`.
"""

from __future__ import annotations

from tests.helpers.tables import experts, towers
from tests.helpers.tables import huggingface as text
from tests.helpers.tables.huggingface import MHA, MHA_BIAS, NORM, Table, norms, under
from tests.helpers.tables.towers import both


def language(table: Table, at: str = "model.language_model.") -> Table:
    """A language model's table, its decoder one module further down."""
    return {n.replace("model.", at, 1) if n.startswith("model.") else n: what for n, what in table.items()}


def tied(table: Table) -> Table:
    """Without the output layer."""
    return {n: what for n, what in table.items() if n != "lm_head.weight"}


def _no_biases(prefix: str, table: Table) -> Table:
    return {f"{prefix}{n}": what for n, what in table.items() if not n.endswith("bias")}


_TWO_LINEARS = both({"linear_1.*": "ffn row 48", "linear_2.*": "ffn row 48"})
_TO_TEXT = under("model.multi_modal_projector.", _TWO_LINEARS)
LLAVA = language(text.LLAMA) | under("model.vision_tower.", towers.CLIP_TOWER) | _TO_TEXT
LLAVA_NEXT = LLAVA | {"model.image_newline": "embedding row 48"}
LLAVA_ONEVISION = (
    language(text.QWEN2)
    | under("model.vision_tower.", towers.SIGLIP_TOWER)
    | _TO_TEXT
    | {"model.image_newline": "embedding row 48"}
)

# ------------------------------------------------------------------------- towers written for a language model

_FUSED_ATTENTION = {"attn.qkv.weight": MHA, "attn.qkv.bias": MHA_BIAS, **both({"attn.proj.*": "attn_out row 48"})}
# four patches of 48 become one vector
_MERGED = "ffn row 192"
QWEN2_VL = language(text.QWEN2) | under(
    "model.visual.",
    {"patch_embed.proj.weight": "other row 48"},
    under(
        "blocks.0.",
        _FUSED_ATTENTION,
        both({"mlp.fc1.*": "ffn row 96", "mlp.fc2.*": "ffn row 48"}),
        norms("norm1", "norm2", bias=True),
    ),
    both({"merger.ln_q.*": NORM, "merger.mlp.0.*": _MERGED, "merger.mlp.2.*": "ffn row 48"}),
)
_GATED = both({"mlp.gate_proj.*": "ffn row 80", "mlp.up_proj.*": "ffn row 80", "mlp.down_proj.*": "ffn row 48"})
QWEN2_5_VL = language(text.QWEN2) | under(
    "model.visual.",
    {"patch_embed.proj.weight": "other row 48", "merger.ln_q.weight": NORM},
    under("blocks.0.", _FUSED_ATTENTION, _GATED, norms("norm1", "norm2")),
    both({"merger.mlp.0.*": _MERGED, "merger.mlp.2.*": "ffn row 48"}),
)
_MERGER = both({"norm.*": NORM, "linear_fc1.*": _MERGED, "linear_fc2.*": "ffn row 48"})
_QWEN3_TOWER = under(
    "model.visual.",
    under("patch_embed.proj.", towers.PATCHES),
    {"pos_embed.weight": "embedding row 16"},
    under(
        "blocks.0.",
        _FUSED_ATTENTION,
        both({"mlp.linear_fc1.*": "ffn row 80", "mlp.linear_fc2.*": "ffn row 48"}),
        norms("norm1", "norm2", bias=True),
    ),
    under("merger.", _MERGER),
    under("deepstack_merger_list.0.", _MERGER),
)
QWEN3_VL = language(text.QWEN3) | _QWEN3_TOWER
QWEN3_VL_MOE = language(experts.QWEN3_MOE) | _QWEN3_TOWER
INTERNVL = (
    tied(language(text.QWEN2))
    | _TO_TEXT
    | both({"model.multi_modal_projector.layer_norm.*": NORM})
    | under(
        "model.vision_tower.",
        {"embeddings.cls_token": towers.TOKEN, "embeddings.position_embeddings": "embedding row 5"},
        under("embeddings.patch_embeddings.projection.", towers.PATCHES),
        under(
            "encoder.layer.0.",
            {"lambda_1": NORM, "lambda_2": NORM},
            {
                "attention.q_proj.weight": "query head 4",
                "attention.k_proj.weight": "key head 4",
                "attention.v_proj.weight": "value row 48",
            },
            both({"attention.projection_layer.*": "attn_out row 48"}),
            norms("attention.q_norm", "attention.k_norm"),
            towers.FC,
            norms("layernorm_before", "layernorm_after", bias=True),
        ),
    )
)
_SIGLIP_NO_HEAD = {n: what for n, what in towers.SIGLIP_TOWER.items() if not n.startswith("head")}
IDEFICS3 = (
    language(text.LLAMA, "model.text_model.")
    | under("model.vision_model.", _SIGLIP_NO_HEAD)
    | {"model.connector.modality_projection.proj.weight": "ffn row 48"}
)
IDEFICS2 = (
    language(text.LLAMA, "model.text_model.")
    | under("model.vision_model.", _SIGLIP_NO_HEAD)
    | under(
        "model.connector.",
        under("modality_projection.", {n.removeprefix("mlp."): what for n, what in text.GATED.items()}),
        {"perceiver_resampler.latents": "embedding row 4", "perceiver_resampler.norm.weight": NORM},
        under(
            "perceiver_resampler.layers.0.",
            text.SEPARATE,
            norms("input_latents_norm", "input_context_norm", "post_attention_layernorm"),
            {
                "mlp.gate_proj.weight": "ffn row 192",
                "mlp.up_proj.weight": "ffn row 192",
                "mlp.down_proj.weight": "ffn row 48",
            },
        ),
    )
)
PALIGEMMA = (
    language(text.GEMMA)
    | under("model.vision_tower.", towers.SIGLIP_TOWER)
    | both({"model.multi_modal_projector.linear.*": "ffn row 48"})
)
GEMMA3 = (
    language(text.GEMMA3)
    | under("model.vision_tower.", towers.SIGLIP_TOWER)
    # stored [inputs, outputs]: the code multiplies from the right
    | {"model.multi_modal_projector.mm_input_projection_weight": "ffn row 48"}
    | norms("model.multi_modal_projector.mm_soft_emb_norm")
)
MISTRAL3 = (
    tied(language(text.LLAMA))
    | _no_biases("model.multi_modal_projector.", _TWO_LINEARS)
    | {"model.multi_modal_projector.patch_merger.merging_layer.weight": "ffn row 48"}
    | norms("model.multi_modal_projector.norm")
    | under(
        "model.vision_tower.",
        {"patch_conv.weight": "other row 48", "ln_pre.weight": NORM},
        under(
            "transformer.layers.0.",
            _no_biases("", towers.attention("o_proj.*", "attention")),
            {n.replace("mlp", "feed_forward"): what for n, what in text.GATED.items()},
            norms("attention_norm", "ffn_norm"),
        ),
    )
)
LLAMA4 = (
    {f"language_model.{n}": what for n, what in experts.LLAMA4.items()}
    | {
        "vision_model.class_embedding": "embedding row 48",
        "vision_model.positional_embedding_vlm": "embedding row 5",
        "vision_model.patch_embedding.linear.weight": "other row 48",
        "vision_model.vision_adapter.mlp.fc1.weight": "ffn row 48",
        "vision_model.vision_adapter.mlp.fc2.weight": "ffn row 48",
        "multi_modal_projector.linear_1.weight": "ffn row 48",
    }
    | norms("vision_model.layernorm_pre", "vision_model.layernorm_post", bias=True)
    | under(
        "vision_model.model.layers.0.",
        towers.attention("o_proj.*"),
        both({"mlp.fc1.*": "ffn row 192", "mlp.fc2.*": "ffn row 48"}),
        norms("input_layernorm", "post_attention_layernorm", bias=True),
    )
)
_MLLAMA_LAYER = (
    _no_biases("", towers.attention("o_proj.*"))
    | towers.FC
    | norms("input_layernorm", "post_attention_layernorm", bias=True)
)
# layer 0 looks at the image, layer 1 at the text; 8 rows of the table are for the image's own tokens
MLLAMA = (
    language({n.replace("layers.0", "layers.1"): what for n, what in text.LLAMA.items()})
    | under(
        "model.language_model.",
        {"embed_tokens.weight": "embedding row 105"},
        under(
            "layers.0.",
            {n.replace("self_attn", "cross_attn"): what for n, what in (text.SEPARATE | text.QK_NORMS).items()},
            text.GATED,
            text.TWO_NORMS,
            {"cross_attn_attn_gate": NORM, "cross_attn_mlp_gate": NORM},
        ),
    )
    | both({"model.multi_modal_projector.*": "ffn row 48"})
    | under(
        "model.vision_model.",
        {
            "class_embedding": "embedding row 48",
            "patch_embedding.weight": "other row 48",
            "gated_positional_embedding.gate": NORM,
            "gated_positional_embedding.embedding": "embedding row 5",
            "gated_positional_embedding.tile_embedding.weight": "embedding row 2",
            "pre_tile_positional_embedding.gate": NORM,
            "pre_tile_positional_embedding.embedding.weight": "embedding row 2",
            "post_tile_positional_embedding.gate": NORM,
            "post_tile_positional_embedding.embedding.weight": "embedding row 2",
        },
        norms("layernorm_pre", "layernorm_post", bias=True),
        under("transformer.layers.0.", _MLLAMA_LAYER),
        under("global_transformer.layers.0.", _MLLAMA_LAYER, {"gate_attn": NORM, "gate_ffn": NORM}),
    )
)
# Whisper's encoder; its positions are frozen
QWEN2_AUDIO = (
    language(text.QWEN2)
    | under("model.audio_tower.", towers.WHISPER_ENCODER)
    | both({"model.multi_modal_projector.linear.*": "ffn row 48"})
)
VOXTRAL = (
    language(text.LLAMA)
    | under("model.audio_tower.", towers.WHISPER_ENCODER)
    | _no_biases("model.multi_modal_projector.", _TWO_LINEARS)
)
