# SPDX-License-Identifier: Apache-2.0
"""What a message proposes is safe to paste: the class decides, a pattern is exact, and a choice is left to the user."""

import json
import re

import pytest
import torch
from torch import nn

from ds_blockwise import tag_parameters
from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.tagged_parameter import tags_of
from ds_blockwise.tagging.tag import read_tags
from tests.helpers.proposed_rules import proposed_rules


class Scaled(nn.Module):
    """A module of a user's with a vector, a scalar, a matrix and a bias of its own."""

    def __init__(self):
        super().__init__()
        self.scale, self.temperature = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(()))
        self.weight, self.bias = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))


class TwoShapeNorm(nn.Module):
    """Named like a norm, and no norm that we know: its weight is a matrix."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.own, self.odd_norm = nn.Linear(4, 4), Scaled(), TwoShapeNorm()


def refused(model, **settings):
    with pytest.raises(ValueError) as caught:
        tag_parameters(model, **settings)
    return str(caught.value)


def layers(count=12):
    return nn.ModuleDict({"layers": nn.ModuleList([Layer() for _ in range(count)])})


def test_one_line_and_one_rule_for_all_layers():
    """A user should mend a model of 80 layers in one go."""
    text = refused(layers())
    lines = [line for line in text.splitlines() if line.startswith("  - ")]
    assert lines[0] == (
        "  - no naming rule matches parameter 'layers.0.mix.weight' of shape (4, 4) (24 parameters like it: "
        r"^layers\.\d+\.mix\.(?:weight|bias)$) in a Linear."
    )
    assert len(lines) == len(proposed_rules(text)) == 4
    assert proposed_rules(text) == [
        {"match": r"^layers\.\d+\.mix\.(?:weight|bias)$", "role": "?"},
        {"match": r"^layers\.\d+\.own\.(?:scale|temperature)$", "role": "other"},
        {"match": r"^layers\.\d+\.own\.(?:weight|bias)$", "role": "?"},
        {"match": r"^layers\.\d+\.odd_norm\.(?:weight|bias)$", "role": "norm"},
    ]
    for role in Role:
        assert text.count(f"\n  {role.value}: ") == 1, "one line on each role"


def test_a_choice_that_was_not_made_is_refused_and_one_that_was_made_is_taken():
    """Nothing that is pasted unread may train."""
    model = layers(3)
    rules = proposed_rules(refused(model))
    assert "rules[0]: unknown role '?'" in refused(model, rules=rules)
    tag_parameters(model, rules=[{**rule, "role": rule["role"].replace("?", "ffn")} for rule in rules])
    roles = {name: tags_of(p).block_spec.parts[0].role.value for name, p in model.named_parameters()}
    assert {role for name, role in roles.items() if "odd_norm" in name} == {"norm"}
    assert {role for name, role in roles.items() if "scale" in name or "temperature" in name} == {"other"}
    assert {role for name, role in roles.items() if "mix" in name} == {"ffn"}


def test_a_pattern_matches_no_parameter_that_is_known():
    """In a Sequential, 0 and 2 may be linears and 1 a norm: ``\\d+`` would train the norm as a matrix."""
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))})
    (rule,) = proposed_rules(refused(model))
    assert rule["match"] == r"^net\.(?:0|2)\.(?:weight|bias)$"
    names = ("net.0.weight", "net.2.bias", "net.1.weight", "net.10.weight", "subnet.0.weight", "net.0.weight_scale")
    assert [bool(re.search(rule["match"], name)) for name in names] == [True, True, False, False, False, False]


def test_where_numbers_do_not_tell_the_parameters_apart_each_has_a_rule():
    """Layers that alternate in two ways: only the exact names are safe."""

    def row(first, second):
        return nn.ModuleList([first, second])

    model = nn.ModuleDict(
        {"grid": nn.ModuleList([row(nn.Linear(4, 4), nn.LayerNorm(4)), row(nn.LayerNorm(4), nn.Linear(4, 4))])}
    )
    assert [rule["match"] for rule in proposed_rules(refused(model))] == [
        r"^grid\.0\.0\.weight$",
        r"^grid\.0\.0\.bias$",
        r"^grid\.1\.1\.weight$",
        r"^grid\.1\.1\.bias$",
    ]


def test_a_stage_does_not_speak_for_the_numbers_of_other_stages():
    """The second stage may have a norm where this one has a linear."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(2)))
    with pytest.raises(ValueError) as caught:
        read_tags(model, BlockSettings(), is_stage=True)
    assert [rule["match"] for rule in proposed_rules(str(caught.value))] == [r"^(?:0|1)\.weight$"]


@pytest.mark.parametrize("place", ["json", "python", "megatron"])
def test_the_rules_are_written_for_the_place_where_they_go(place):
    """A backslash means something else in JSON than in a raw string, and ``rules=`` is no JSON."""
    with pytest.raises(ValueError) as caught:
        read_tags(nn.ModuleDict({"a.b".replace(".", "_"): nn.Linear(2, 2)}), BlockSettings(), place=place)
    text = str(caught.value)
    assert proposed_rules(text) == [{"match": r"^a_b\.(?:weight|bias)$", "role": "?"}]
    assert ('"rules": [' in text) == (place == "json") and ("rules=[" in text) == (place != "json")
    assert ("--blockwise-rules" in text) == (place == "megatron")
    if place == "json":
        assert json.loads("{" + re.search(r'"rules": \[\n.*?\n  \]', text, re.DOTALL)[0] + "}")


def test_a_rule_of_the_users_that_matches_already_is_named():
    """A second rule for the same parameter would be refused."""
    text = refused(nn.ModuleDict({"mix": nn.Linear(4, 4)}), rules=[{"match": "weight$", "lr_multiplier": 2}])
    assert "Your rule 'weight$' matches it too" in text


def test_problems_that_no_rule_solves_are_listed_once_too():
    """Two rules that match in every layer are one mistake."""
    rules = [{"match": "mix", "role": "ffn"}, {"match": "mix.weight", "lr_multiplier": 2}]
    lines = [line for line in refused(layers(), rules=rules).splitlines() if "matched by 2 rules" in line]
    assert len(lines) == 1 and "'layers.0.mix.weight'" in lines[0] and "12 parameters like it" in lines[0]


HEADS = {"self_attn": nn.ModuleDict({"q_proj": nn.Linear(4, 4, bias=False)})}
EXPERTS = type("Experts", (nn.Module,), {})()
EXPERTS.gate_up_proj = nn.Parameter(torch.ones(2, 4, 6))
TIED = {"lm_head": nn.Linear(4, 4, bias=False), "mlp": nn.ModuleDict({"up_proj": nn.Linear(4, 4, bias=False)})}
TIED["mlp"]["up_proj"].weight = TIED["lm_head"].weight
OTHERS = {
    "heads": (HEADS, {"match": r"^self_attn\.q_proj\.weight$", "role": "query", "num_heads": "?"}, {"num_heads": 2}),
    "storage": (
        {"experts": EXPERTS},
        {"match": r"^experts\.gate_up_proj$", "role": "ffn", "storage": "?"},
        {"storage": "in_out"},
    ),
    "tied": (TIED, {"match": r"^lm_head\.weight$", "role": "?"}, {"role": "ffn"}),
    "vector": (
        {"lm_head": type("Scale", (nn.Module,), {})()},
        {"match": r"^lm_head\.weight$", "role": "?"},
        {"role": "norm"},
    ),
    "disagreement": (
        {"q_proj": nn.Embedding(4, 4), "self_attn": nn.ModuleDict({"q_proj": nn.Embedding(4, 4)})},
        {"match": r"^self_attn\.q_proj\.weight$", "role": "?"},
        {"role": "embedding"},
    ),
}
OTHERS["vector"][0]["lm_head"].weight = nn.Parameter(torch.ones(4))


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_hint_is_exact_too_and_can_be_pasted(name):
    """Unescaped, ``lm_head.weight`` also matches ``lm_head_weight``; not anchored, it matches an adapter's copy."""
    parts, expected, chosen = OTHERS[name]
    model = nn.ModuleDict(parts)
    (rule,) = proposed_rules(refused(model))
    assert rule == expected
    tag_parameters(model, rules=[{**rule, **chosen}])
