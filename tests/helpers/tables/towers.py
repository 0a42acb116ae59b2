# SPDX-License-Identifier: Apache-2.0
"""What each parameter of the vision and audio families is, written by hand from their model code.

Entries as in `huggingface`; sizes too. Images have 8 x 8 pixels in patches of 4 x 4, so 4 patches. A weight's bias is
stated with it: ``name.*`` stands for both.
"""

from __future__ import annotations

from tests.helpers.tables import huggingface as text
from tests.helpers.tables.huggingface import MHA, MHA_BIAS, NORM, Table, norms, under

TOKEN = "embedding row 1"
LN = "norm tensor 1"


def both(table: Table) -> Table:
    """Expand ``name.*`` to the weight and, element-wise, its bias."""
    found: Table = {}
    for name, what in table.items():
        stem = name.removesuffix(".*")
        if stem == name:
            found[name] = what
            continue
        found[f"{stem}.weight"] = what
        if what == NORM:
            found[f"{stem}.bias"] = NORM
        elif what == MHA:
            found[f"{stem}.bias"] = MHA_BIAS
        else:
            role, _, count = what.split()
            heads = role in ("query", "key")
            found[f"{stem}.bias"] = f"{role} bias element {12 * int(count) if heads else count}"
    return found


def attention(out: str, at: str = "self_attn") -> Table:
    """Four heads with separate projections, all with a bias."""
    return under(
        f"{at}.",
        both(
            {"q_proj.*": "query head 4", "k_proj.*": "key head 4", "v_proj.*": "value row 48", out: "attn_out row 48"}
        ),
    )


FC = both({"mlp.fc1.*": "ffn row 80", "mlp.fc2.*": "ffn row 48"})
PATCHES = {"weight": "other row 48", "bias": "other bias element 48"}
PATCHES_NO_BIAS = {"weight": "other row 48"}

# ------------------------------------------------------------------------------------------- towers of images

VIT_LAYER = attention("o_proj.*", "attention") | FC | norms("layernorm_before", "layernorm_after", bias=True)
VIT = under(
    "vit.",
    {"embeddings.cls_token": TOKEN, "embeddings.position_embeddings": "embedding row 5"},
    under("embeddings.patch_embeddings.projection.", PATCHES),
    under("layers.0.", VIT_LAYER),
    norms("layernorm", bias=True),
) | both({"classifier.*": "other row 2"})
VIT_MASKED = {n: w for n, w in VIT.items() if "classifier" not in n} | both(
    {"vit.embeddings.mask_token": TOKEN, "decoder.0.*": "other row 48"}
)

_CLIP_LAYER = attention("out_proj.*") | FC | norms("layer_norm1", "layer_norm2", bias=True)
_CLIP_TEXT = under(
    "text_model.",
    {
        "embeddings.token_embedding.weight": "embedding row 97",
        "embeddings.position_embedding.weight": "embedding row 16",
    },
    under("encoder.layers.0.", _CLIP_LAYER),
    norms("final_layer_norm", bias=True),
)
CLIP_TOWER = {
    # one vector without a dimension for tokens: every element is a block
    "embeddings.class_embedding": "embedding row 48",
    "embeddings.patch_embedding.weight": "other row 48",
    "embeddings.position_embedding.weight": "embedding row 5",
    **under("encoder.layers.0.", _CLIP_LAYER),
    **norms("pre_layrnorm", "post_layernorm", bias=True),
}
CLIP = {
    "logit_scale": NORM,
    **_CLIP_TEXT,
    **under("vision_model.", CLIP_TOWER),
    "visual_projection.weight": "other row 24",
    "text_projection.weight": "other row 24",
}
_POOLING_HEAD = both(
    {
        "head.probe": TOKEN,
        "head.attention.in_proj_weight": MHA,
        "head.attention.in_proj_bias": MHA_BIAS,
        "head.attention.out_proj.*": "attn_out row 48",
        "head.layernorm.*": NORM,
        "head.mlp.fc1.*": "ffn row 80",
        "head.mlp.fc2.*": "ffn row 48",
    }
)
# the patches of SigLIP 2 come unfolded, and a linear takes the convolution's place
SIGLIP_TOWER = {
    **under("embeddings.patch_embedding.", PATCHES),
    "embeddings.position_embedding.weight": "embedding row 4",
    **under("encoder.layers.0.", _CLIP_LAYER),
    **norms("post_layernorm", bias=True),
    **_POOLING_HEAD,
}
SIGLIP = {
    "logit_scale": NORM,
    "logit_bias": NORM,
    **_CLIP_TEXT,
    **both({"text_model.head.*": "other row 48"}),
    **under("vision_model.", SIGLIP_TOWER),
}

_DINO_LAYER = {
    **norms("norm1", "norm2", bias=True),
    "layer_scale1.lambda1": NORM,
    "layer_scale2.lambda1": NORM,
}
DINOV2 = under(
    "dinov2.",
    {
        "embeddings.cls_token": TOKEN,
        "embeddings.mask_token": TOKEN,
        "embeddings.position_embeddings": "embedding row 5",
    },
    under("embeddings.patch_embeddings.projection.", PATCHES),
    under(
        "encoder.layer.0.",
        _DINO_LAYER,
        attention("o_proj.*", "attention"),
        both({"mlp.fc1.*": "ffn row 96", "mlp.fc2.*": "ffn row 48"}),
    ),
    norms("layernorm", bias=True),
) | both({"classifier.*": "other row 2"})
DINOV2_REGISTERS = (
    {
        "embeddings.cls_token": TOKEN,
        "embeddings.mask_token": TOKEN,
        "embeddings.register_tokens": "embedding row 2",
        "embeddings.position_embeddings": "embedding row 5",
    }
    | under("embeddings.patch_embeddings.projection.", PATCHES)
    | under(
        "encoder.layer.0.",
        _DINO_LAYER,
        attention("o_proj.*", "attention"),
        # SwiGLU: two thirds of 96, rounded up to a multiple of 8
        both({"mlp.gate_proj.*": "ffn row 64", "mlp.up_proj.*": "ffn row 64", "mlp.down_proj.*": "ffn row 48"}),
    )
    | norms("layernorm", bias=True)
)
DINOV3 = (
    {"embeddings.cls_token": TOKEN, "embeddings.mask_token": TOKEN, "embeddings.register_tokens": "embedding row 2"}
    | under("embeddings.patch_embeddings.", PATCHES)
    | under(
        "model.layer.0.",
        _DINO_LAYER,
        {n: w for n, w in attention("o_proj.*", "attention").items() if n != "attention.k_proj.bias"},
        both({"mlp.up_proj.*": "ffn row 80", "mlp.down_proj.*": "ffn row 48"}),
    )
    | norms("norm", bias=True)
)

# ------------------------------------------------------------------------------------------- towers of sound


def _no_key_bias(at: str) -> Table:
    return {n: w for n, w in attention("out_proj.*", at).items() if n != f"{at}.k_proj.bias"}


_FC = both({"fc1.*": "ffn row 80", "fc2.*": "ffn row 48"})
_WHISPER_LAYER = _no_key_bias("self_attn") | _FC | norms("self_attn_layer_norm", "final_layer_norm", bias=True)
# the encoder's positions are sinusoids and frozen
WHISPER_ENCODER = {
    **both({"conv1.*": "other row 48", "conv2.*": "other row 48"}),
    **under("layers.0.", _WHISPER_LAYER),
    **norms("layer_norm", bias=True),
}
WHISPER = under("model.encoder.", WHISPER_ENCODER) | under(
    "model.decoder.",
    {"embed_tokens.weight": text.EMBEDDING, "embed_positions.weight": "embedding row 16"},
    under("layers.0.", _WHISPER_LAYER, _no_key_bias("encoder_attn"), norms("encoder_attn_layer_norm", bias=True)),
    norms("layer_norm", bias=True),
)
WHISPER_UNTIED = WHISPER | {"proj_out.weight": text.OUTPUT}
WAV2VEC2 = under(
    "wav2vec2.",
    {
        "masked_spec_embed": "embedding row 48",
        "feature_extractor.conv_layers.0.conv.weight": "other row 16",
        "feature_extractor.conv_layers.1.conv.weight": "other row 16",
        # the kernel of this convolution is a length for each of 4 positions times a direction
        "encoder.pos_conv_embed.conv.bias": "other bias element 48",
        "encoder.pos_conv_embed.conv.parametrizations.weight.original0": NORM,
        "encoder.pos_conv_embed.conv.parametrizations.weight.original1": "other row 48",
    },
    norms("feature_extractor.conv_layers.0.layer_norm", "feature_projection.layer_norm", bias=True),
    norms("encoder.layer_norm", bias=True),
    both({"feature_projection.projection.*": "other row 48"}),
    under(
        "encoder.layers.0.",
        attention("out_proj.*", "attention"),
        both({"feed_forward.intermediate_dense.*": "ffn row 80", "feed_forward.output_dense.*": "ffn row 48"}),
        norms("layer_norm", "final_layer_norm", bias=True),
    ),
) | both({"lm_head.*": text.OUTPUT})
