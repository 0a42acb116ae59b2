# SPDX-License-Identifier: Apache-2.0
"""Every parameter of the Hugging Face families, from the real classes, against tables written by hand.

A missing name, a name too many, another role, block count or granularity fails. `test_verify` then asks the models
themselves whether their fused weights lie as the tables say.
"""

import pytest
import torch

from ds_blockwise import tag_parameters
from tests.helpers.tables import experts
from tests.helpers.tables import huggingface as tables
from tests.helpers.tables.families import FAMILIES, build

pytest.importorskip("transformers", reason="the models are transformers' own")

EXPECTED = {
    "Llama": tables.LLAMA,
    "Mistral": tables.LLAMA,
    "Granite": tables.LLAMA,
    "Qwen2": tables.QWEN2,
    "Qwen3": tables.QWEN3,
    "Gemma": tables.GEMMA,
    "Gemma2": tables.GEMMA2,
    "Gemma3": tables.GEMMA3,
    "Olmo2": tables.OLMO2,
    "Phi3": tables.PHI3,
    "Phi": tables.PHI,
    "Starcoder2": tables.STARCODER2,
    "Nemotron": tables.NEMOTRON,
    "StableLm": tables.STABLELM,
    "Glm4": tables.GLM4,
    "Mixtral": experts.MIXTRAL,
    "MiniMax": experts.MINIMAX,
    "GraniteMoe": experts.GRANITE_MOE,
    "Qwen2Moe": experts.QWEN2_MOE,
    "Qwen3Moe": experts.QWEN3_MOE,
    "GptOss": experts.GPT_OSS,
    "Llama4": experts.LLAMA4,
    "DeepseekV2": experts.DEEPSEEK,
    "DeepseekV3": experts.DEEPSEEK,
    "GPT2": tables.GPT2,
    "GPTBigCode": tables.GPT_BIGCODE,
    "Falcon-7B": tables.FALCON_7B,
    "Falcon-40B": tables.FALCON_40B,
    "Falcon-RW": tables.FALCON_RW,
    "Bloom": tables.BLOOM,
    "GPTNeoX": tables.GPT_NEOX,
    "Persimmon": tables.PERSIMMON,
    "Mpt": tables.MPT,
    "GPTNeo": tables.GPT_NEO,
    "GPTJ": tables.GPTJ,
    "OPT": tables.OPT,
    "Mamba2": experts.MAMBA2,
    "Qwen3Next": experts.QWEN3_NEXT,
    "Qwen3_5": experts.QWEN3_5,
    "Jamba": experts.JAMBA,
}


def tags_of(model, **settings):
    """name -> "role granularity blocks", joined by + for the roles of a fused weight, in the order of its rows.

    As published unless the settings say otherwise: with one block for each norm the tables need no vector's length.
    """
    found = {}
    for row in tag_parameters(model, **{"granularity": "published", **settings}).rows:
        found.setdefault(row.fqn, []).append(f"{row.role} {row.granularity} {row.num_blocks}")
    return {name: " + ".join(roles) for name, roles in found.items()}


@pytest.mark.parametrize("family", EXPECTED)
def test_every_parameter_is_what_the_model_code_makes_of_it(family):
    """A weight read as another role trains at up to ten times its rate, and the loss curve does not say why."""
    with torch.device("meta"):
        assert tags_of(build(family)) == EXPECTED[family]


@pytest.mark.parametrize(("family", "heads"), [("Llama", {}), ("Qwen3", {"q_norm": 12, "k_norm": 12}), ("GPT2", {})])
def test_by_default_every_element_of_a_norm_is_a_block(family, heads):
    """The one departure from Adam-mini's partition; nothing else may move with it."""
    with torch.device("meta"):
        found = tags_of(build(family), granularity={})
    for name, published in EXPECTED[family].items():
        length = next((n for part, n in heads.items() if part in name), 48)
        assert found[name] == published.replace("norm tensor 1", f"norm element {length}"), name


def test_every_family_has_a_table():
    """A family without one would be built and never looked at."""
    assert set(EXPECTED) == set(FAMILIES) and len(EXPECTED) >= 20


def test_a_gpt_bigcode_with_all_its_key_heads_interleaves_them():
    """The same class and name as the multi-query form, and another layout."""
    with torch.device("meta"):
        model = build("GPTBigCode", multi_query=False)
    tags_of(model)
    parts = dict(model.named_parameters())["transformer.h.0.attn.c_attn.weight"].block_spec.parts
    assert [part.role.value for part in parts] == ["query", "key", "value"] * 4


def test_cross_attention_of_gpt2():
    """Its c_attn holds keys and values only, and its queries have a linear of their own."""
    with torch.device("meta"):
        found = tags_of(build("GPT2", add_cross_attention=True))
    assert {name: what for name, what in found.items() if "crossattention" in name} == {
        "transformer.h.0.crossattention.c_attn.weight": "key head 4 + value row 48",
        "transformer.h.0.crossattention.c_attn.bias": "key bias element 48 + value bias element 48",
        "transformer.h.0.crossattention.q_attn.weight": "query head 4",
        "transformer.h.0.crossattention.q_attn.bias": "query bias element 48",
        "transformer.h.0.crossattention.c_proj.weight": "attn_out row 48",
        "transformer.h.0.crossattention.c_proj.bias": "attn_out bias element 48",
    }
    assert found["transformer.h.0.ln_cross_attn.weight"] == "norm tensor 1"


def test_a_model_without_lora_on_the_queries_of_latent_attention():
    """DeepSeek-V2-Lite projects queries in one step; its config's head_dim is the rotary part only."""
    with torch.device("meta"):
        found = tags_of(build("DeepseekV2", q_lora_rank=None))
    assert found["model.layers.0.self_attn.q_proj.weight"] == "query head 4"
