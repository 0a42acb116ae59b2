# SPDX-License-Identifier: Apache-2.0
"""`verify_layout` on real models: right layouts pass, wrong ones are caught, and the model is left as it was.

The models' own forward decides. That a gradient vanishes is proved by products with exact zeros, so a right layout
passes at any size and dtype, and these tests need no tolerance.
"""

import copy

import pytest
import torch
from torch import nn

from ds_blockwise import tag_parameters, verify_layout
from ds_blockwise.blocks.roles import QKV_LAYOUTS
from tests.helpers.models import NanoGPT
from tests.helpers.tables.families import FAMILIES, build

transformers = pytest.importorskip("transformers", reason="the models are transformers' own")


def seeded(family, **changes):
    torch.manual_seed(3)
    return build(family, **changes)


ATTENTION_FREE = ("Mamba2",)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_compute_attention_as_they_are_tagged(family):
    """The tables of test_families were written by people, who misread; the forward pass does not."""
    report = verify_layout(seeded(family))
    assert bool(report.parameters) == (family not in ATTENTION_FREE)
    assert report.num_checks >= (0 if family in ATTENTION_FREE else 4)


def test_nanogpt():
    """A model that returns its loss and takes nothing but tokens."""
    torch.manual_seed(3)
    report = verify_layout(NanoGPT())
    assert report.num_checks == 2 * 2 * 4  # two layers, weight and bias, Q once, K twice, and Q under V
    assert "transformer.h.1.attn.c_attn.weight" in report.parameters


def test_bfloat16():
    """Exact zeros are exact in every dtype."""
    assert verify_layout(seeded("Falcon-40B").to(torch.bfloat16)).num_checks == 4


# Each entry: family, the fused weight, a wrong reading of it whose rows fit the shape. Heads are named where the wrong
# layout needs other ones to fit.
WRONG = {
    "concatenated read as grouped": ("GPT2", "c_attn", {"layout": "grouped", "num_heads": 4}),
    "grouped read as concatenated": ("Bloom", "query_key_value", {"layout": "concat", "num_heads": 4}),
    "groups of another size": (
        "Falcon-40B",
        "query_key_value",
        {"layout": "grouped", "num_heads": 6, "num_kv_heads": 1},
    ),
    "groups read as concatenated": (
        "Falcon-40B",
        "query_key_value",
        {"layout": "concat", "num_heads": 4, "num_kv_heads": 2},
    ),
    "multi-query read as multi-head": ("Falcon-7B", "query_key_value", {"layout": "concat", "num_heads": 2}),
    "fewer key heads": ("Phi3", "qkv_proj", {"layout": "concat", "num_heads": 6, "num_kv_heads": 1}),
    "values before keys": ("DeepseekV3", "kv_b_proj", {"layout": "key_value_concat", "num_heads": 4}),
    "heads of equal key and value rows": ("DeepseekV3", "kv_b_proj", {"layout": "key_value", "num_heads": 2}),
    "a gate read as queries": ("Qwen3Next", "layers.1.self_attn.q_proj", {"role": "query", "num_heads": 8}),
    "queries read as values": ("Llama", "q_proj", {"role": "value", "num_heads": 4}),
    "keys read as values": ("Llama", "k_proj", {"role": "value"}),
    "values read as keys": ("Llama", "v_proj", {"role": "key", "num_heads": 2}),
    "the output projection read as values": ("Llama", "o_proj", {"role": "query", "num_heads": 4}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_layout_is_caught(name):
    """Nothing else would: the model trains, only some values at the rate of queries."""
    family, weight, reading = WRONG[name]
    rule = {"match": rf"{weight}\.(weight|bias)", "role": "qkv", **reading}
    with pytest.raises(ValueError, match=r"does not compute attention as its weights are tagged|Attention needs") as e:
        verify_layout(seeded(family), rules=[rule])
    assert "rule" in str(e.value)


class CrossAttention(nn.Module):
    """Cross attention as Megatron's T5 computes it: linear_kv holds [k v] head by head; here with GPT-2's as well."""

    def __init__(self, interleaved, heads=3, dim=4, width=10):
        super().__init__()
        self.num_heads, self.head_dim, self.interleaved = heads, dim, interleaved
        self.query = nn.Linear(width, heads * dim)
        self.key_value = nn.Linear(width, 2 * heads * dim)
        self.dense = nn.Linear(heads * dim, width)

    def forward(self, x, memory):
        batch, _, _ = x.shape
        q = self.query(x).view(batch, -1, self.num_heads, self.head_dim).transpose(1, 2)
        kv = self.key_value(memory)
        if self.interleaved:
            k, v = kv.view(batch, -1, self.num_heads, 2 * self.head_dim).transpose(1, 2).chunk(2, dim=-1)
        else:
            k, v = (t.view(batch, -1, self.num_heads, self.head_dim).transpose(1, 2) for t in kv.chunk(2, dim=-1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.dense(mixed.transpose(1, 2).reshape(batch, -1, self.num_heads * self.head_dim))


@pytest.mark.parametrize("interleaved", [True, False])
def test_keys_and_values_of_cross_attention(interleaved):
    """Both forms are in use, and each must be refused as the other. The caller says how to run the model."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"inter_attention": CrossAttention(interleaved)})

    def outputs(m):
        generator = torch.Generator().manual_seed(1)
        x, memory = (torch.randn(2, n, 10, generator=generator) for n in (5, 7))
        return m["inter_attention"](x, memory)

    right, wrong = ("key_value", "key_value_concat") if interleaved else ("key_value_concat", "key_value")
    rule = {"match": "key_value", "role": "qkv", "num_heads": 3}
    assert verify_layout(model, outputs, rules=[{**rule, "layout": right}]).num_checks == 8
    with pytest.raises(ValueError, match=r"key_value\.weight"):
        verify_layout(model, outputs, rules=[{**rule, "layout": wrong}])


def test_every_layout_is_verified_here_or_in_test_megatron_layers():
    """A layout that nothing runs is a guess."""
    probed = {"concat", "grouped", "query_gate", "key_value", "key_value_concat", "latent_rope"}
    assert set(QKV_LAYOUTS) == probed | {"grouped_gate"}


def test_frozen_weights_elsewhere_do_not_matter():
    """Fine-tuning often freezes embeddings; attention can still be probed."""
    model = seeded("Llama")
    model.model.embed_tokens.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    assert verify_layout(model).num_checks == 4


def test_the_message_says_what_to_do():
    """It names the parameter, the rows, what was zeroed, and the rule to write."""
    rules = [{"match": "c_attn", "role": "qkv", "layout": "grouped", "num_heads": 4}]
    with pytest.raises(ValueError) as caught:
        verify_layout(seeded("GPT2"), rules=rules)
    for words in (
        "parameter 'transformer.h.0.attn.c_attn.weight': with all rows tagged key at zero",
        ", tagged query, must vanish but is",
        "of its usual size",
        '"role": "qkv", "layout": "..."',
    ):
        assert words in str(caught.value)


def test_nothing_is_changed():
    """A check before training must not move a weight, a gradient, a tag, a mode or the random numbers."""
    model = seeded("GPTNeoX").train()
    model.gpt_neox.layers[0].mlp.eval()
    tag_parameters(model, lr_multipliers={"qk": 3})
    specs = {n: p.block_spec for n, p in model.named_parameters()}
    weights = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    verify_layout(model)
    verify_layout(model, rules=[])
    wrong = [{"match": "query_key_value", "role": "qkv", "layout": "concat", "num_heads": 4}]
    with pytest.raises(ValueError, match="does not compute"):
        verify_layout(model, rules=wrong)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert {n: p.block_spec for n, p in model.named_parameters()} == specs
    assert model.training and not model.gpt_neox.layers[0].mlp.training
    assert torch.equal(torch.get_rng_state(), random_state)
    untagged = seeded("GPTNeoX")
    verify_layout(untagged)
    assert not any(hasattr(p, "block_spec") for p in untagged.parameters())


def frozen():
    model = seeded("Llama")
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    return model


def dead():
    model = seeded("Llama")
    nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
    return model


def on_meta():
    with torch.device("meta"):
        return build("Llama")


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.num_heads = 1
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self.self_attn, name, nn.Linear(4, 4))


CANNOT_TELL = {
    "frozen": (frozen, {}, r"k_proj\.weight' is frozen"),
    "meta device": (on_meta, {}, "is on the meta device"),
    "no gradient": (dead, {}, "is 0.0 with all weights in place"),
    "unknown forward": (Odd, {}, "does not know how to run a Odd"),
    "no tensor": (Odd, {"outputs": lambda m: None}, "returned NoneType, not a tensor"),
    "queries only": (
        lambda: seeded("Llama"),
        {"rules": [{"match": "[kv]_proj", "role": "other"}]},
        "no rows of the model are tagged key or value, but some as query",
    ),
}


@pytest.mark.parametrize("name", CANNOT_TELL)
def test_a_probe_that_cannot_tell_says_so(name):
    """A check that passes because it saw nothing is worse than none."""
    make, settings, words = CANNOT_TELL[name]
    with pytest.raises(ValueError, match=words):
        verify_layout(make(), **settings)
