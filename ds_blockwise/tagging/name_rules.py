# SPDX-License-Identifier: Apache-2.0
"""The naming rules of each family of model code, as data.

A rule's ``module`` is matched against the END of the path of the module that owns the parameter, its ``leaf`` against
the whole last component. A dialect lists only names that its model code registers. A name on which two rules disagree
is an error: the order of the rules has no meaning. No name gives the order of rows in a fused weight: the class of the
module does (`module_facts`), or a user's rule. Sources: the model classes of transformers 5, Megatron-core 0.16,
Megatron-LM (legacy models), Megatron-DeepSpeed and GPT-NeoX.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_blockwise.blocks.roles import QKVLayout, Role, Storage

LINEAR = "weight|bias"
OWN_SHAPES = ("towers", "peft")
"""Dialects whose parameters may have any number of dimensions: ``(1, tokens, width)``, or ``(rows, 1)`` for a scale."""


@dataclass(frozen=True, slots=True)
class NameRule:
    """One naming rule.

    Attributes:
        dialect: the family of model code that uses the name.
        module: regular expression on the end of the owning module's path.
        leaf: regular expression on the parameter's own name.

    The other fields are those of `NameMatch`.
    """

    dialect: str
    module: str
    role: Role | None = None
    qkv_layout: QKVLayout | None = None
    leaf: str = LINEAR
    headless: bool = False
    storage: Storage | None = None


_SELF_ATTENTION = r"self_attn(?:\.\d+)?"  # LongCat's layers have two
_ATTENTION = rf"(?:{_SELF_ATTENTION}|attn|attention|cross_attn|encoder_attn|temporal_block)"
_LAYER = r"(?:layers|h)\.\d+"

NAME_RULES: tuple[NameRule, ...] = (
    # Norms, by the names that every family uses
    NameRule(
        "common",
        r"(?:input|post_attention|pre_feedforward|post_feedforward|post_self_attn|pre_mlp|post_mlp|pre_cross_attn"
        r"|post_inter_attention|pre_ff|final|word_embeddings|dt|b|c|kv|q_a|kv_a)_layernorm",
        Role.NORM,
        leaf="weight|bias|scale|offset|g",
    ),
    NameRule(
        "common",
        r"norm|norm_f|norm_[12]|ln_[12f]|ln_attn|ln_mlp|ln_cross_attn"
        r"|[qk]_norm|[qk]_layernorm(?:\.norms\.\d+)?|query_layernorm|key_layernorm",
        Role.NORM,
        leaf="weight|bias|scale|offset|g",
    ),
    NameRule("common", r"(?:self_attn|encoder_attn|final)_layer_norm", Role.NORM),
    # Hugging Face: attention with separate projections
    NameRule("hf", r"embed_tokens|embed_in|embed_positions|backbone\.embeddings", Role.EMBEDDING),
    NameRule("hf", r"lm_head|embed_out", Role.OUTPUT),
    NameRule("hf", rf"{_ATTENTION}\.q_proj", Role.QUERY),
    NameRule("hf", rf"{_ATTENTION}\.k_proj", Role.KEY),
    NameRule("hf", rf"{_ATTENTION}\.v_proj", Role.VALUE),
    NameRule("hf", rf"{_ATTENTION}\.(?:o_proj|out_proj)", Role.ATTN_OUT),
    # MobileBERT's bottleneck.attention.dense makes the inputs of queries and keys narrow
    NameRule("hf", rf"(?<!bottleneck\.){_ATTENTION}\.dense", Role.ATTN_OUT),
    NameRule("hf", r"self_attn", Role.NORM, leaf="sinks"),
    NameRule("hf", r"decoder\.project_(?:in|out)", Role.OTHER),
    # Fused projections
    NameRule("hf", r"(?:self_attn|attn|attention)\.(?:qkv_proj|qkv|Wqkv|wqkv|W_pack|to_qkv)", qkv_layout="unknown"),
    NameRule("hf", r"attention\.self\.qkv_linear", qkv_layout="unknown"),
    NameRule("hf", r"self_attention\.kv_proj", qkv_layout="unknown_key_value"),
    NameRule("hf", r"self_attn\.output_gate", Role.ATTN_OUT),
    # Hugging Face: multi-head latent attention (DeepSeek-V2, V3)
    NameRule("hf", rf"{_SELF_ATTENTION}\.q_a_proj", Role.QUERY, headless=True),
    NameRule("hf", rf"{_SELF_ATTENTION}\.q_b_proj", Role.QUERY),
    NameRule("hf", rf"{_SELF_ATTENTION}\.kv_a_proj_with_mqa", qkv_layout="unknown_latent"),
    NameRule("hf", rf"{_SELF_ATTENTION}\.kv_b_proj", qkv_layout="unknown_key_value"),
    # Hugging Face: FFN, experts, routers
    NameRule("hf", r"(?:mlp|feed_forward|ffn|shared_experts?)\.(?:gate|up|down|gate_up)_proj", Role.FFN),
    NameRule("hf", r"experts\.\d+\.(?:gate_proj|up_proj|down_proj|w[123])", Role.FFN),
    NameRule("hf", r"experts", Role.FFN, leaf="(?:gate_up|up|down)_proj|(?:gate_up|down)_proj_bias"),
    # a norm's own mlp (A.X K2) computes a gate
    NameRule("hf", r"(?<!norm\.)mlp\.(?:fc1|fc2|fc_in|fc_out)|feed_forward\.w[123]", Role.FFN),
    NameRule("hf", rf"{_LAYER}\.fc[12]", Role.FFN),
    NameRule("hf", r"(?:mlp|block_sparse_moe|feed_forward|mixer)\.(?:gate|router)", Role.ROUTER),
    NameRule("hf", r"mlp\.shared_expert_gate", Role.ROUTER),
    NameRule("hf", r"mlp_block\.(?:gate|up|down)_proj|shared_mlp\.(?:input|output)_linear", Role.FFN),
    NameRule("hf", r"ffn\.proj_(?:up|up_gate|up_gate_z|down)", Role.FFN),
    # Hugging Face: encoders with BERT's names; their heads stand under "heads"
    NameRule("bert", r"(?:attention|crossattention)\.self\.(?:query|query_proj|pos_q_proj|pos_query_proj)", Role.QUERY),
    NameRule("bert", r"(?:attention|crossattention)\.self\.(?:key|key_proj|pos_proj|pos_key_proj)", Role.KEY),
    NameRule("bert", r"(?:attention|crossattention)\.self\.(?:value|value_proj)", Role.VALUE),
    NameRule("bert", r"attention\.self", Role.QUERY, leaf="q_bias"),
    NameRule("bert", r"attention\.self", Role.VALUE, leaf="v_bias"),
    NameRule("bert", r"(?:attention|crossattention)\.output\.dense|attn\.Wo|attention\.out_lin", Role.ATTN_OUT),
    NameRule("bert", r"layer\.\d+\.(?:intermediate|output)\.dense|mlp\.(?:Wi|Wo)|ffn\.lin[12]", Role.FFN),
    NameRule("bert", r"(?:attention\.q_lin|albert_layers\.\d+\.attention\.query|attention\.attn\.q)", Role.QUERY),
    NameRule("bert", r"(?:attention\.k_lin|albert_layers\.\d+\.attention\.key|attention\.attn\.k)", Role.KEY),
    NameRule("bert", r"(?:attention\.v_lin|albert_layers\.\d+\.attention\.value|attention\.attn\.v)", Role.VALUE),
    NameRule("bert", r"attention\.attn\.o", Role.ATTN_OUT),
    NameRule("bert", r"albert_layers\.\d+\.(?:ffn|ffn_output)", Role.FFN),
    NameRule("bert", r"embeddings_project|encoder\.embedding_hidden_mapping_in|albert\.pooler", Role.OTHER),
    NameRule("bert", r"generator_lm_head|vocab_projector", Role.OUTPUT),
    NameRule(
        "bert",
        r"cls\.predictions\.transform\.dense|predictions\.dense|(?:generator|discriminator)_predictions\.dense"
        r"|discriminator_predictions\.dense_prediction|vocab_transform|head\.dense",
        Role.OTHER,
    ),
    # Hugging Face: T5 and its relatives
    NameRule("t5", r"(?:SelfAttention|EncDecAttention|LocalSelfAttention|TransientGlobalSelfAttention)\.q", Role.QUERY),
    NameRule("t5", r"(?:SelfAttention|EncDecAttention|LocalSelfAttention|TransientGlobalSelfAttention)\.k", Role.KEY),
    NameRule("t5", r"(?:SelfAttention|EncDecAttention|LocalSelfAttention|TransientGlobalSelfAttention)\.v", Role.VALUE),
    NameRule(
        "t5", r"(?:SelfAttention|EncDecAttention|LocalSelfAttention|TransientGlobalSelfAttention)\.o", Role.ATTN_OUT
    ),
    NameRule("t5", r"DenseReluDense\.(?:wi|wi_0|wi_1|wo)", Role.FFN),
    # Heads that are no output layer over the vocabulary: classes, spans, rewards, values, and the layers before them
    NameRule(
        "heads",
        r"score|classifier|qa_outputs|pre_classifier|(?:classifier|classification_head)\.(?:dense|out_proj)"
        r"|cls\.seq_relationship|multiple_choice_head\.summary|v_head(?:\.summary)?|value_head|reward_head",
        Role.OTHER,
    ),
    # Gemma 3n: what it adds to a transformer layer beside attention and FFN
    NameRule(
        "gemma3n",
        r"altup\.(?:correction_coefs|prediction_coefs|modality_router)|laurel\.linear_(?:left|right)"
        r"|altup_projections\.\d+|altup_unembed_projections\.\d+"
        r"|per_layer_input_gate|per_layer_projection|per_layer_model_projection",
        Role.OTHER,
    ),
    NameRule("gemma3n", r"altup", Role.OTHER, leaf="correct_output_scale"),
    # Hugging Face: state-space mixers (known by their classes too), and RWKV's shifts of tokens
    NameRule("hf", r"attention|feed_forward", Role.OTHER, leaf=r"time_mix_\w+"),
    NameRule(
        "hf",
        r"(?:mixer|mamba|linear_attn)\.(?:in_proj|x_proj|dt_proj|out_proj|conv1d|in_proj_(?:qkvz|ba|qkv|z|b|a))",
        Role.OTHER,
    ),
    NameRule("hf", r"mixer|mamba|linear_attn", Role.OTHER, leaf="dt_bias|A_log|D"),
    # GPT-2 (Hugging Face, transposed Conv1D) and nanoGPT (nn.Linear) share their names
    NameRule("gpt2", r"wte|wpe", Role.EMBEDDING),
    NameRule("gpt2", r"attn\.c_attn", qkv_layout="unknown"),
    NameRule("gpt2", r"crossattention\.c_attn", qkv_layout="unknown_key_value"),
    NameRule("gpt2", r"crossattention\.q_attn", Role.QUERY),
    NameRule("gpt2", r"(?:attn|crossattention)\.c_proj", Role.ATTN_OUT),
    NameRule("gpt2", r"mlp\.(?:c_fc|c_proj)", Role.FFN),
    # Megatron-core: embeddings, attention
    NameRule("megatron", r"embedding\.(?:word|position|tokentype)_embeddings", Role.EMBEDDING),
    # TimesFM's feed-forward layers end with this name
    NameRule("megatron", r"(?<![\w.])output_layer|(?:language_model|lm_head)\.output_layer", Role.OUTPUT),
    NameRule("megatron", r"self_attention\.linear_qkv", qkv_layout="unknown"),
    NameRule("megatron", r"(?:self_attention|cross_attention)\.linear_proj", Role.ATTN_OUT),
    NameRule("megatron", r"cross_attention\.linear_q", Role.QUERY),
    NameRule("megatron", r"cross_attention\.linear_kv", qkv_layout="unknown_key_value"),
    NameRule("megatron", r"self_attention\.(?:linear_q_proj|linear_q_up_proj)", Role.QUERY),
    NameRule("megatron", r"self_attention\.linear_q_down_proj", Role.QUERY, headless=True),
    NameRule("megatron", r"self_attention\.linear_kv_down_proj", qkv_layout="unknown_latent"),
    NameRule("megatron", r"self_attention\.linear_kv_up_proj", qkv_layout="unknown_key_value"),
    NameRule("megatron", r"core_attention", Role.NORM, leaf="softmax_offset"),
    # Transformer Engine fuses a norm into the linear that follows it
    NameRule("megatron", r".+", Role.NORM, leaf="layer_norm_weight|layer_norm_bias"),
    # Megatron-core: FFN, experts, router
    NameRule("megatron", r"(?:mlp|shared_experts|local_experts\.\d+)\.linear_fc[12]", Role.FFN),
    NameRule("megatron", r"experts\.linear_fc[12]", Role.FFN, leaf=r"weight\d*|bias\d*"),
    NameRule("megatron", r"experts", Role.FFN, leaf=r"weight[12]", storage="grouped_in_out"),
    NameRule("megatron", r"mlp\.fc[12]_latent_proj", Role.FFN),
    NameRule("megatron", r"shared_experts", Role.ROUTER, leaf="gate_weight"),
    # Megatron-core: multi-token prediction and BERT's heads
    NameRule("megatron", r"eh_proj", Role.FFN),
    NameRule("megatron", r"enorm|hnorm|lm_head\.layer_norm", Role.NORM),
    NameRule("megatron", r"lm_head\.dense|pooler\.dense|binary_head", Role.OTHER),
    # Megatron-LM's legacy models and Megatron-DeepSpeed, its pipeline names included; GPT-NeoX
    NameRule("megatron-legacy", r"word_embeddings|embed\.(?:position|tokentype)_embeddings", Role.EMBEDDING),
    NameRule("megatron-legacy", r"(?:self_attention|self_attn|attention)\.query_key_value", qkv_layout="unknown"),
    NameRule("megatron-legacy", r"inter_attention\.query", Role.QUERY),
    NameRule("megatron-legacy", r"inter_attention\.key_value", qkv_layout="unknown_key_value"),
    NameRule("megatron-legacy", r"(?:self_attention|inter_attention)\.dense", Role.ATTN_OUT),
    NameRule("megatron-legacy", r"(?:mlp|deepspeed_experts\.\d+)\.(?:dense_h_to_4h|dense_4h_to_h)", Role.FFN),
    NameRule("megatron-legacy", r"mlp\.(?:linear1|linear2)", Role.FFN),
    NameRule("megatron-legacy", r"deepspeed_moe\.gate\.wg|(?:mlp|moe)\.coefficient", Role.ROUTER),
    # DeepSpeed's MoE: an expert is whatever module its user has written, and norms are called norms
    NameRule("deepspeed", r"deepspeed_experts\.\d+(?:\.(?!ln|\w*norm)\w+)*", Role.FFN),
    NameRule("megatron-legacy", r"input_norm|post_attention_norm|post_inter_attention_norm|final_norm", Role.NORM),
    NameRule("megatron-legacy", r"final_linear", Role.OUTPUT),
    # Vision and audio towers: vectors that stand in the sequence beside tokens and patches, one in each row
    NameRule(
        "towers",
        r".*",
        Role.EMBEDDING,
        leaf="cls_token|class_embedding|mask_token|register_tokens|query_tokens|image_newline|masked_spec_embed"
        "|positional_embedding_vlm",
        storage="out_in",
    ),
    NameRule("towers", r"embeddings", Role.EMBEDDING, leaf="position_embeddings?", storage="out_in"),
    NameRule("towers", r"head", Role.EMBEDDING, leaf="probe", storage="out_in"),
    NameRule("towers", r"perceiver_resampler", Role.EMBEDDING, leaf="latents", storage="out_in"),
    NameRule("towers", r"gated_positional_embedding", Role.EMBEDDING, leaf="embedding", storage="out_in"),
    # Towers: numbers that scale a whole layer, a feature or all logits
    NameRule("towers", r".*", Role.NORM, leaf="logit_scale|logit_bias"),
    NameRule("towers", r"layer_scale[12]|layer\.\d+", Role.NORM, leaf="lambda_?[12]"),
    NameRule("towers", r"\w+_positional_embedding", Role.NORM, leaf="gate"),
    NameRule("towers", r"conv\.parametrizations\.weight", Role.NORM, leaf="original0"),  # weight norm: the length
    NameRule("towers", r"conv\.parametrizations\.weight", Role.OTHER, leaf="original1"),  # and the direction
    NameRule("towers", r"layers\.\d+", Role.NORM, leaf="gate_attn|gate_ffn|cross_attn_attn_gate|cross_attn_mlp_gate"),
    # Towers: attention and FFN
    NameRule("towers", r"(?:attn|self_attn)\.qkv", qkv_layout="unknown"),
    NameRule("towers", r"blocks\.\d+\.attn\.proj|self_attn\.projection|attention\.projection_layer", Role.ATTN_OUT),
    NameRule("towers", r"feed_forward\.(?:intermediate|output)_dense", Role.FFN),
    # From a tower to the language model
    NameRule("towers", r"multi_modal_projector(?:\.linear(?:_[12])?|\.patch_merger\.merging_layer)?", Role.FFN),
    NameRule("towers", r"multi_modal_projector", Role.FFN, leaf="mm_input_projection_weight", storage="in_out"),
    NameRule("towers", r"merger\.mlp\.[02]|(?:merger|deepstack_merger_list\.\d+)\.linear_fc[12]", Role.FFN),
    NameRule("towers", r"modality_projection\.(?:proj|gate_proj|up_proj|down_proj)|language_projection", Role.FFN),
    # Single linears between widths: from pixels or features into a tower, from a tower to what is compared
    NameRule(
        "towers", r"embeddings\.patch_embedding|patch_embedding\.linear|feature_projection\.projection", Role.OTHER
    ),
    NameRule("towers", r"visual_projection|text_projection|text_model\.head", Role.OTHER),
    # PEFT: what scales the outputs, the inputs or the rank of a linear, element by element
    NameRule("peft", r"lora_magnitude_vector(?:\.[^.]+)?|lora_E|vera_lambda_[bd]|ia3_l|boft_s", Role.NORM, leaf=".+"),
    # PEFT: rotations of a linear's inputs, one in each row
    NameRule("peft", r"oft_R(?:\.[^.]+)?|boft_R", Role.OTHER, leaf=".+"),
    # PEFT: LoRA on the weights of all experts; what computes prompts and prefixes
    NameRule("peft", r"experts", Role.FFN, leaf="weight"),
    NameRule("peft", r"prompt_encoder\.[^.]+\.(?:transform|mlp_head)\.\d+", Role.FFN),
    NameRule("peft", r"prompt_encoder\.[^.]+\.lstm_head", Role.OTHER, leaf=r"(?:weight|bias)_[ih]h_l\d+(?:_reverse)?"),
)
