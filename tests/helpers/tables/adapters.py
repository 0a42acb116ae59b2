# SPDX-License-Identifier: Apache-2.0
"""What each parameter that PEFT trains is, written by hand from its layers' code, with the models that have them.

Entries and sizes as in `huggingface`. The low rank is 8 unless a config says otherwise.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

from torch import nn

from tests.helpers.tables.families import FAMILIES, build
from tests.helpers.tables.huggingface import LAYER, NORM, Table, under
from tests.helpers.tables.tower_models import build_tower

_AT = f"base_model.model.{LAYER}"
_EMBED = "base_model.model.model.embed_tokens."
_LINEARS = ["q_proj", "k_proj", "v_proj", "down_proj"]
# module: role, rows of the weight, heads
_ADAPTED = {
    "self_attn.q_proj": ("query", "query head 4"),
    "self_attn.k_proj": ("key", "key head 2"),
    "self_attn.v_proj": ("value", "value row 24"),
    "mlp.down_proj": ("ffn", "ffn row 48"),
}


def _factors(low_rank: str, outputs: str, *others: str, rank: int = 8) -> Table:
    """Of the four linears: the factor whose rows are the rank, the one whose rows are outputs, and scales."""
    table: Table = {}
    for linear, (role, rows) in _ADAPTED.items():
        table |= {f"{linear}.{low_rank}": f"{role} row {rank}", f"{linear}.{outputs}": rows}
        table |= {f"{linear}.{other}": NORM for other in others}
    return under(_AT, table)


def _scales(*names: str) -> Table:
    return under(_AT, {f"{linear}.{name}": NORM for linear in _ADAPTED for name in names})


_LORA = _factors("lora_A.default.weight", "lora_B.default.weight")
_LOW_RANK_QUERY = {
    f"{_AT}self_attn.q_proj.lora_A.default.weight": "query row 8",
    f"{_AT}self_attn.q_proj.lora_B.default.weight": "query head 4",
}
_PROMPT = {"prompt_encoder.default.embedding.weight": "embedding row 5"}

# config class, settings, table
ADAPTERS: dict[str, tuple[str, dict[str, Any], Table]] = {
    "LoRA": (
        "LoraConfig",
        {"r": 8, "target_modules": _LINEARS, "modules_to_save": ["lm_head"]},
        _LORA | {"base_model.model.lm_head.modules_to_save.default.weight": "output row 97"},
    ),
    "LoRA with biases": (
        "LoraConfig",
        {"r": 8, "target_modules": ["q_proj"], "lora_bias": True},
        _LOW_RANK_QUERY | {f"{_AT}self_attn.q_proj.lora_B.default.bias": "query bias element 48"},
    ),
    # A's columns are tokens; B's rows are features
    "LoRA on the embedding and the output": (
        "LoraConfig",
        {"r": 8, "target_modules": ["embed_tokens", "lm_head"]},
        {
            f"{_EMBED}lora_embedding_A.default": "embedding row 97",
            f"{_EMBED}lora_embedding_B.default": "embedding row 48",
            "base_model.model.lm_head.lora_A.default.weight": "output row 8",
            "base_model.model.lm_head.lora_B.default.weight": "output row 97",
        },
    ),
    "LoRA, tokens trained whole": (
        "LoraConfig",
        {"r": 8, "target_modules": ["q_proj"], "trainable_token_indices": [1, 2, 3]},
        _LOW_RANK_QUERY | {f"{_EMBED}token_adapter.trainable_tokens_delta.default": "embedding row 3"},
    ),
    "LoRA, tokens of a tied table trained whole": (
        "LoraConfig",
        {"r": 8, "target_modules": ["q_proj"], "trainable_token_indices": [1, 2, 3]},
        _LOW_RANK_QUERY | {f"{_EMBED}token_adapter.trainable_tokens_delta.default": "embedding row 3"},
    ),
    "LoRA, modules trained whole": (
        "LoraConfig",
        {"r": 8, "target_modules": ["o_proj"], "modules_to_save": ["mlp", "embed_tokens", "input_layernorm"]},
        {
            f"{_AT}self_attn.o_proj.lora_A.default.weight": "attn_out row 8",
            f"{_AT}self_attn.o_proj.lora_B.default.weight": "attn_out row 48",
            f"{_EMBED}modules_to_save.default.weight": "embedding row 97",
            f"{_AT}input_layernorm.modules_to_save.default.weight": NORM,
            f"{_AT}mlp.modules_to_save.default.gate_proj.weight": "ffn row 80",
            f"{_AT}mlp.modules_to_save.default.up_proj.weight": "ffn row 80",
            f"{_AT}mlp.modules_to_save.default.down_proj.weight": "ffn row 48",
        },
    ),
    "LoRA, attention trained whole": (
        "LoraConfig",
        {"r": 8, "target_modules": ["down_proj"], "modules_to_save": ["self_attn"]},
        {
            f"{_AT}mlp.down_proj.lora_A.default.weight": "ffn row 8",
            f"{_AT}mlp.down_proj.lora_B.default.weight": "ffn row 48",
            f"{_AT}self_attn.modules_to_save.default.q_proj.weight": "query head 4",
            f"{_AT}self_attn.modules_to_save.default.k_proj.weight": "key head 2",
            f"{_AT}self_attn.modules_to_save.default.v_proj.weight": "value row 24",
            f"{_AT}self_attn.modules_to_save.default.o_proj.weight": "attn_out row 48",
        },
    ),
    "LoRA, classifier trained whole": (
        "LoraConfig",
        {"r": 8, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
        _LOW_RANK_QUERY | {"base_model.model.score.modules_to_save.default.weight": "other row 2"},
    ),
    "LoRA on a LLaVA's tower and text": (
        "LoraConfig",
        {"r": 8, "target_modules": ["q_proj"]},
        {
            f"base_model.model.model.{layer}.self_attn.q_proj.lora_{leaf}": what
            for layer in ("vision_tower.encoder.layers.0", "language_model.layers.0")
            for leaf, what in (("A.default.weight", "query row 8"), ("B.default.weight", "query head 4"))
        },
    ),
    # 3 experts times rank 2; a row of B is an output of all experts
    "LoRA on experts' weights": (
        "LoraConfig",
        {"r": 2, "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        under(
            f"{_AT}mlp.experts.",
            {
                "base_layer.lora_A.default.weight": "ffn row 6",
                "base_layer.lora_B.default.weight": "ffn row 160",
                "lora_A.default.weight": "ffn row 6",
                "lora_B.default.weight": "ffn row 48",
            },
        ),
    ),
    "DoRA": (
        "LoraConfig",
        {"r": 8, "target_modules": _LINEARS, "use_dora": True},
        _LORA | _scales("lora_magnitude_vector.default.weight"),
    ),
    "DoRA on the embedding": (
        "LoraConfig",
        {"r": 8, "target_modules": ["embed_tokens"], "use_dora": True},
        {
            f"{_EMBED}lora_embedding_A.default": "embedding row 97",
            f"{_EMBED}lora_embedding_B.default": "embedding row 48",
            f"{_EMBED}lora_magnitude_vector.default.weight": NORM,
        },
    ),
    "DoRA on a convolution": (
        "LoraConfig",
        {"r": 8, "target_modules": ["patch_embedding", "fc1"], "use_dora": True},
        under(
            "base_model.model.vision_model.",
            {
                "embeddings.patch_embedding.lora_A.default.weight": "other row 8",
                "embeddings.patch_embedding.lora_B.default.weight": "other row 48",
                "embeddings.patch_embedding.lora_magnitude_vector.default.weight": NORM,
            },
        )
        | {
            f"base_model.model.{tower}.encoder.layers.0.mlp.fc1.{leaf}": what
            for tower in ("text_model", "vision_model")
            for leaf, what in (
                ("lora_A.default.weight", "ffn row 8"),
                ("lora_B.default.weight", "ffn row 80"),
                ("lora_magnitude_vector.default.weight", NORM),
            )
        },
    ),
    "AdaLoRA": (
        "AdaLoraConfig",
        {"init_r": 8, "target_r": 4, "total_step": 10, "target_modules": _LINEARS},
        _factors("lora_A.default", "lora_B.default", "lora_E.default"),
    ),
    "VeRA": (
        "VeraConfig",
        {"r": 8, "target_modules": ["q_proj", "down_proj"]},
        {
            f"{_AT}{linear}.vera_lambda_{end}.default": NORM
            for linear in ("self_attn.q_proj", "mlp.down_proj")
            for end in "bd"
        },
    ),
    "IA3": ("IA3Config", {"target_modules": _LINEARS, "feedforward_modules": ["down_proj"]}, _scales("ia3_l.default")),
    # a row holds the upper triangle of one rotation
    "OFT": (
        "OFTConfig",
        {"r": 4, "oft_block_size": 0, "target_modules": _LINEARS},
        under(_AT, {f"{linear}.oft_R.default.weight": "other row 4" for linear in _ADAPTED}),
    ),
    "BOFT": (
        "BOFTConfig",
        {"boft_block_size": 4, "boft_n_butterfly_factor": 1, "target_modules": _LINEARS},
        _scales("boft_s.default") | under(_AT, {f"{linear}.boft_R.default": "other row 1" for linear in _ADAPTED}),
    ),
    "LoHa": (
        "LoHaConfig",
        {"r": 8, "target_modules": _LINEARS},
        _factors("hada_w1_b.default", "hada_w1_a.default") | _factors("hada_w2_b.default", "hada_w2_a.default"),
    ),
    # a Kronecker product: rows of either factor belong to many outputs
    "LoKr": (
        "LoKrConfig",
        {"r": 4, "target_modules": ["q_proj", "down_proj"]},
        under(
            _AT,
            {
                "self_attn.q_proj.lokr_w1.default": "query row 6",
                "self_attn.q_proj.lokr_w2.default": "query row 8",
                "mlp.down_proj.lokr_w1.default": "ffn row 6",
                "mlp.down_proj.lokr_w2_a.default": "ffn row 8",
                "mlp.down_proj.lokr_w2_b.default": "ffn row 4",
            },
        ),
    ),
    "norms only": (
        "LNTuningConfig",
        {"task_type": "CAUSAL_LM"},
        {
            f"base_model.model.model.{norm}.ln_tuning_layers.default.weight": NORM
            for norm in ("norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm")
        },
    ),
    "tokens only": (
        "TrainableTokensConfig",
        {"token_indices": [1, 2, 3]},
        {f"{_EMBED}trainable_tokens_delta.default": "embedding row 3"},
    ),
    "prompt tuning": ("PromptTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}, _PROMPT),
    "prefix tuning": ("PrefixTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}, _PROMPT),
    "prefix tuning, projected": (
        "PrefixTuningConfig",
        {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 20},
        _PROMPT
        | under(
            "prompt_encoder.default.transform.",
            {
                "0.weight": "ffn row 20",
                "0.bias": "ffn bias element 20",
                "2.weight": "ffn row 48",
                "2.bias": "ffn bias element 48",
            },
        ),
    ),
    "P-tuning": (
        "PromptEncoderConfig",
        {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5, "encoder_hidden_size": 20},
        _PROMPT
        | under(
            "prompt_encoder.default.mlp_head.",
            {f"{at}.weight": f"ffn row {n}" for at, n in ((0, 20), (2, 20), (4, 48))},
            {f"{at}.bias": f"ffn bias element {n}" for at, n in ((0, 20), (2, 20), (4, 48))},
        ),
    ),
    "P-tuning, LSTM": (
        "PromptEncoderConfig",
        {
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": 5,
            "encoder_hidden_size": 20,
            "encoder_reparameterization_type": "LSTM",
        },
        _PROMPT
        | under(
            "prompt_encoder.default.",
            {
                f"lstm_head.{kind}_{source}_l{layer}{direction}": "other row 80"
                for kind in ("weight", "bias")
                for source in ("ih", "hh")
                for layer in (0, 1)
                for direction in ("", "_reverse")
            },
            {
                "mlp_head.0.weight": "ffn row 40",
                "mlp_head.0.bias": "ffn bias element 40",
                "mlp_head.2.weight": "ffn row 48",
                "mlp_head.2.bias": "ffn bias element 48",
            },
        ),
    ),
}


def _classifier() -> nn.Module:
    transformers = importlib.import_module("transformers")
    made: nn.Module = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**FAMILIES["Llama"]))
    return made


_BASES: dict[str, Callable[[], nn.Module]] = {
    "LoRA, tokens of a tied table trained whole": lambda: build("Llama", tie_word_embeddings=True),
    "LoRA, classifier trained whole": _classifier,
    "LoRA on a LLaVA's tower and text": lambda: build_tower("LLaVA"),
    "LoRA on experts' weights": lambda: build("Mixtral"),
    "DoRA on a convolution": lambda: build_tower("CLIP"),
}


def adapted_model(kind: str) -> nn.Module:
    """A small model with an adapter of a kind, on the default device; a LLaMA unless `_BASES` names another."""
    peft = importlib.import_module("peft")
    config, settings, _ = ADAPTERS[kind]
    base = _BASES.get(kind, lambda: build("Llama"))()
    with mock.patch.dict(os.environ):  # BOFT leaves another compiler in it
        adapted: nn.Module = peft.get_peft_model(base, getattr(peft, config)(**settings))
    return adapted
