# SPDX-License-Identifier: Apache-2.0
"""A fused name says that a weight is fused, never in which order: a class that nobody checked is asked about."""

import re

import pytest
from torch import nn

from ds_blockwise import tag_parameters
from ds_blockwise.blocks.roles import LAYOUT_CHOICES
from ds_blockwise.tagging.name_rules import NAME_RULES


class MyAttention(nn.Module):
    """An attention class of a user's own: 3 heads of 4."""

    def __init__(self, linear, rows):
        super().__init__()
        self.num_heads, self.head_dim = 3, 4
        setattr(self, linear, nn.Linear(12, rows, bias=False))


def inside(path, linear, rows):
    model = MyAttention(linear, rows)
    for name in reversed(path.split(".")):
        model = nn.ModuleDict({name: model})
    return model


# path of the attention module, the linear, its rows, and the choices that the error offers
FUSED = [
    ("h.0.attn", "c_attn", 36, ("grouped", "concat")),
    ("layers.0.self_attn", "qkv_proj", 36, ("grouped", "concat")),
    ("blocks.0.attn", "qkv", 36, ("grouped", "concat")),
    ("layers.0.attn", "Wqkv", 36, ("grouped", "concat")),
    ("layers.0.self_attn", "W_pack", 36, ("grouped", "concat")),
    ("layers.0.attention", "query_key_value", 36, ("grouped", "concat")),
    ("layers.0.self_attention", "linear_qkv", 36, ("grouped", "concat")),
    ("layers.0.cross_attention", "linear_kv", 24, ("key_value", "key_value_concat")),
    ("layers.0.inter_attention", "key_value", 24, ("key_value", "key_value_concat")),
    ("h.0.crossattention", "c_attn", 24, ("key_value", "key_value_concat")),
    ("layers.0.self_attn", "kv_b_proj", 24, ("key_value", "key_value_concat")),
    ("layers.0.self_attn", "kv_a_proj_with_mqa", 24, ("latent_rope",)),
]


@pytest.mark.parametrize(("path", "linear", "rows", "choices"), FUSED)
def test_an_unchecked_class_is_asked_for_its_layout(path, linear, rows, choices):
    """MiniMax has Phi-3's name and another order: read as Phi-3's, its values trained at the rate of queries."""
    model = inside(path, linear, rows)
    with pytest.raises(ValueError, match="tells the order of its rows") as caught:
        tag_parameters(model)
    assert "MyAttention" in str(caught.value)
    assert tuple(re.findall(r"^  (\w+): ", str(caught.value), re.MULTILINE)) == choices
    for layout in choices[:2] if choices[0] != "latent_rope" else ():
        rule = {"match": rf"{linear}\.weight", "role": "qkv", "layout": layout}
        assert {row.role for row in tag_parameters(model, rules=[rule]).rows} >= {"key", "value"}


def test_the_number_of_heads_alone_does_not_choose_a_layout():
    """A rule that gives heads to a fused weight of Megatron's name left the order to the name."""
    model = inside("layers.0.self_attention", "linear_qkv", 36)
    with pytest.raises(ValueError, match="import megatron_patch"):
        tag_parameters(model, rules=[{"match": "linear_qkv", "num_heads": 3}])


def test_no_naming_rule_gives_a_layout():
    """The kind of fault, not the case: a rule that is added later may not do it either."""
    assert {rule.qkv_layout for rule in NAME_RULES} - {None} == set(LAYOUT_CHOICES)


@pytest.mark.parametrize(
    ("known", "roles"), [("Phi3Attention", "query key value"), ("MiniMaxLightningAttention", "other")]
)
def test_a_class_made_from_a_checked_one_has_its_layout(known, roles):
    """Flash variants replace the class in place; what they inherit is the order of the checkpoint's rows."""
    model = inside("layers.0.self_attn", "qkv_proj", 36)
    attention = model["layers"]["0"]["self_attn"]
    attention.__class__ = type("MyFlashAttention", (type(known, (MyAttention,), {}),), {})
    tag_parameters(model)
    assert [part.role.value for part in attention.qkv_proj.weight.block_spec.parts] == roles.split()
