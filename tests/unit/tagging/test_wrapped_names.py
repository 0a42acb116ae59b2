# SPDX-License-Identifier: Apache-2.0
"""Names that wrappers change: PEFT adapters and torch.compile."""

import pytest
import torch

from ds_blockwise import tag_parameters
from tests.helpers.tables import huggingface as tables
from tests.helpers.tables.families import build
from tests.helpers.tables.huggingface import LAYER
from tests.unit.tagging.test_families import tags_of

pytest.importorskip("transformers", reason="the wrapped models are transformers' own")
peft = pytest.importorskip("peft", reason="it is PEFT's names that are looked at")


def adapted(family, targets, saved=(), **changes):
    """A family's model as PEFT makes it: frozen but for the adapters of ``targets`` and the modules ``saved``."""
    with torch.device("meta"):
        model = build(family, **changes)
        config = peft.LoraConfig(r=8, target_modules=list(targets), modules_to_save=list(saved) or None)
        return peft.get_peft_model(model, config)


def test_lora_factors_have_the_role_of_the_linear_they_adapt():
    """B's rows are the linear's outputs, heads included; A's are the low rank, which belongs to no head."""
    model = adapted("Llama", ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"), saved=("lm_head",))
    at = f"base_model.model.{LAYER}"
    assert tags_of(model) == {
        f"{at}self_attn.q_proj.lora_A.default.weight": "query row 8",
        f"{at}self_attn.q_proj.lora_B.default.weight": "query head 4",
        f"{at}self_attn.k_proj.lora_A.default.weight": "key row 8",
        f"{at}self_attn.k_proj.lora_B.default.weight": "key head 2",
        f"{at}self_attn.v_proj.lora_A.default.weight": "value row 8",
        f"{at}self_attn.v_proj.lora_B.default.weight": "value row 24",
        f"{at}self_attn.o_proj.lora_A.default.weight": "attn_out row 8",
        f"{at}self_attn.o_proj.lora_B.default.weight": "attn_out row 48",
        f"{at}mlp.down_proj.lora_A.default.weight": "ffn row 8",
        f"{at}mlp.down_proj.lora_B.default.weight": "ffn row 48",
        "base_model.model.lm_head.modules_to_save.default.weight": "output row 97",
    }


def test_a_wrapped_linear_that_is_trained_keeps_its_role():
    """Some recipes train the base weights too."""
    model = adapted("Llama", ("q_proj",))
    for p in model.parameters():
        p.requires_grad_(True)
    found = tags_of(model)
    assert found[f"base_model.model.{LAYER}self_attn.q_proj.base_layer.weight"] == "query head 4"
    assert found["base_model.model.model.embed_tokens.weight"] == "embedding row 97"


@pytest.mark.parametrize("family", ["GPT2", "Falcon-40B", "Phi3"])
def test_lora_on_a_fused_weight(family):
    """B has the fused rows, in their order, whichever way the base weight is stored. A serves Q, K and V at once, and
    which multiplier it should have is the user's to say."""
    target = {"GPT2": "c_attn", "Falcon-40B": "query_key_value", "Phi3": "qkv_proj"}[family]
    model = adapted(family, (target,))
    with pytest.raises(ValueError, match=r"is the low-rank input of a fused weight") as caught:
        tag_parameters(model)
    assert '"role": "value"' in str(caught.value) and "lora_B" not in str(caught.value)
    (a, _), (b, what) = sorted(tags_of(model, rules=[{"match": "lora_A", "role": "value"}]).items())
    assert "lora_A" in a and "lora_B" in b
    rows = {"GPT2": tables.MHA, "Falcon-40B": "query head 4 + key head 2 + value row 24"}
    assert what == rows.get(family, rows["Falcon-40B"])


def test_latent_attention_with_adapters():
    """The heads of kv_b_proj are read off the attention module, two modules above the factor."""
    rules = [{"match": r"kv_b_proj\.lora_A", "role": "value"}]
    found = tags_of(adapted("DeepseekV3", ("kv_b_proj", "q_a_proj")), rules=rules)
    at = f"base_model.model.{LAYER}self_attn."
    assert found[f"{at}kv_b_proj.lora_B.default.weight"] == "key head 4 + value row 48"
    assert found[f"{at}q_a_proj.lora_B.default.weight"] == "query row 24"


@pytest.mark.parametrize("where", ["model", "layer", "attention"])
def test_torch_compile_changes_no_tag(where):
    """Compiled modules are wrapped, and their names get a component anywhere in the path."""
    with torch.device("meta"):
        model = build("Qwen3")
    if where == "model":
        model = torch.compile(model)
    elif where == "layer":
        model.model.layers[0] = torch.compile(model.model.layers[0])
    else:
        model.model.layers[0].self_attn = torch.compile(model.model.layers[0].self_attn)
    names = [name for name, _ in model.named_parameters()]
    assert any("_orig_mod" in name for name in names)
    model.requires_grad_(True)
    tag_parameters(model)
    found = {p.block_spec.fqn: p.block_spec for p in model.parameters()}
    assert set(found) == set(tables.QWEN3)
    assert found[f"{LAYER}self_attn.q_proj.weight"].num_blocks == 4
