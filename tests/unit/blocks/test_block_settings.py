# SPDX-License-Identifier: Apache-2.0
"""Settings: which of the user's values applies to a role in a parameter."""

import pytest

from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.settings.block_settings import BlockSettings, Resolved
from ds_blockwise.blocks.settings.update_settings import UpdateSettings

FQN = "layers.0.mlp.up_proj.weight"


def resolve(role, fqn=FQN, *, is_bias=False, **settings):
    return BlockSettings.parse(**settings).resolve(fqn, role, is_bias)


@pytest.mark.parametrize(
    ("role", "multiplier", "granularity"),
    [
        (Role.EMBEDDING, 1.25, "row"),
        (Role.OUTPUT, 1.25, "row"),
        (Role.QUERY, 1, "head"),
        (Role.KEY, 1, "head"),
        (Role.VALUE, 0.5, "row"),
        (Role.ATTN_OUT, 0.5, "row"),
        (Role.FFN, 0.75, "row"),
        (Role.ROUTER, 0.125, "row"),
        (Role.NORM, 0.125, "element"),
        (Role.OTHER, 0.125, "row"),
    ],
)
def test_defaults(role, multiplier, granularity):
    """The paper's ratios on AdamW's rate and Adam-mini's partition, but for norms."""
    assert resolve(role) == Resolved(UpdateSettings(multiplier, 1.0), granularity)


RULE = {"match": "up_proj", "lr_multiplier": 2, "weight_decay_multiplier": 0, "granularity": "tensor"}
ROLE_KEYS = {
    "lr_multipliers": {"ffn": 3, "query": 5, "qk": 7},
    "weight_decay_multipliers": {"ffn": 0.5, "query": 0.25, "qk": 0.75},
    "granularity": {"ffn": "element", "query": "row", "qk": "tensor"},
}


@pytest.mark.parametrize(
    ("role", "rules", "expected"),
    [
        (Role.FFN, (), Resolved(UpdateSettings(3, 0.5), "element")),
        (Role.QUERY, (), Resolved(UpdateSettings(5, 0.25), "row")),
        (Role.KEY, (), Resolved(UpdateSettings(7, 0.75), "tensor")),
        (Role.VALUE, (), Resolved(UpdateSettings(0.5, 1.0), "row")),
        (Role.QUERY, [RULE], Resolved(UpdateSettings(2, 0), "tensor")),
        (Role.VALUE, [RULE], Resolved(UpdateSettings(2, 0), "tensor")),
        (Role.QUERY, [{"match": "up_proj", "lr_multiplier": 0}], Resolved(UpdateSettings(0, 0.25), "row")),
        (Role.QUERY, [{"match": "down_proj", "lr_multiplier": 0}], Resolved(UpdateSettings(5, 0.25), "row")),
    ],
)
def test_a_rule_wins_over_a_role_and_a_role_over_its_block_type(role, rules, expected):
    """The order in the documentation; a zero is a value, not an absent one."""
    assert resolve(role, rules=rules, **ROLE_KEYS) == expected


def test_biases_are_element_wise_unless_the_user_says_otherwise():
    """The granularity of a weight's role is not that of its bias; "bias" is a key of its own."""
    assert resolve(Role.QUERY, is_bias=True, granularity={"query": "tensor"}).granularity == "element"
    assert resolve(Role.QUERY, is_bias=True, granularity={"bias": "tensor"}).granularity == "tensor"
    rules = [{"match": "up_proj", "granularity": "row"}]
    assert resolve(Role.QUERY, is_bias=True, granularity={"bias": "tensor"}, rules=rules).granularity == "row"


def test_the_published_granularity_differs_in_norms_only():
    """`"published"` is Adam-mini's own partition: one second moment for a norm vector."""
    changed = {role for role in Role if resolve(role, granularity="published") != resolve(role)}
    assert changed == {Role.NORM} and resolve(Role.NORM, granularity="published").granularity == "tensor"


@pytest.mark.parametrize(("role", "is_bias", "words"), [(Role.FFN, False, "role 'ffn'"), (Role.KEY, True, "a bias")])
def test_heads_are_for_query_key_and_value_weights(role, is_bias, words):
    """Other rows have no heads to cut at."""
    rules = [{"match": "up_proj", "granularity": "head"}]
    with pytest.raises(ValueError, match=f'{FQN}.*granularity "head" is for .* not for {words}.*Use "row"'):
        resolve(role, is_bias=is_bias, rules=rules)


def test_measured_multipliers_are_one_until_they_are_measured():
    """What a key or a rule fixes is not measured and holds from the first step."""
    rules = [{"match": "up_proj", "lr_multiplier": 2}]
    settings = BlockSettings.parse({"auto": {}, "vo": 3, "key": 5}, rules=rules)
    expected = {
        Role.QUERY: (1, True),
        Role.KEY: (5, False),
        Role.VALUE: (3, False),
        Role.NORM: (1, True),
        Role.OUTPUT: (1.25, False),  # the output layer is not measured unless "head": true
        Role.OTHER: (0.125, False),
    }
    for role, (multiplier, measured) in expected.items():
        assert settings.resolve("x", role, False).update.lr_multiplier == multiplier, role
        assert settings.is_measured(role, "x") == measured, role
        assert settings.resolve(FQN, role, False).update.lr_multiplier == 2 and not settings.is_measured(role, FQN)
    assert not any(BlockSettings.parse().is_measured(role) for role in Role)


def test_replaced_multipliers_keep_everything_else():
    """A measurement changes the multipliers of block types during the run, not the rules of the user."""
    rules = [{"match": "up_proj", "lr_multiplier": 2}]
    before = BlockSettings.parse({"qk": 7, "vo": 3}, {"norm": 0}, {"norm": "tensor"}, rules)
    after = before.with_lr_multipliers({"qk": 9})
    assert after.lr_multipliers == {"qk": 9, "vo": 3} and before.lr_multipliers == {"qk": 7, "vo": 3}
    assert (after.rules, after.granularity) == (before.rules, before.granularity)
    assert after.weight_decay_multipliers == {"norm": 0}
    with pytest.raises(ValueError, match="'qkk'; did you mean 'qk'"):
        before.with_lr_multipliers({"qkk": 9})


def test_settings_are_equal_if_they_set_the_same():
    """The optimizer compares its settings with those of a tagged model; 8 in a JSON is 8.0 in Python."""
    given = {"lr_multipliers": {"qk": 8}, "rules": [{"match": "a", "storage": "in_out"}]}
    assert BlockSettings.parse(**given) == BlockSettings.parse({"qk": 8.0}, {}, {}, given["rules"])
    assert BlockSettings.parse() == BlockSettings.parse({}, {}, {}, []) and BlockSettings.parse({}).is_default
    assert not BlockSettings.parse({"qk": 8}).is_default, "a default that is written down was given by the user"


def test_settings_do_not_change_with_the_dictionaries_they_were_read_from():
    """A script that builds several optimizers from one dictionary changes it in between."""
    raw = {"qk": 2}
    settings = BlockSettings.parse(raw, granularity=(sizes := {"norm": "tensor"}))
    raw["qk"], sizes["norm"] = 3, "element"
    assert (settings.lr_multipliers, settings.granularity) == ({"qk": 2}, {"norm": "tensor"})


def test_a_parameter_that_two_rules_match_is_an_error():
    """The order of rules decides nothing."""
    settings = BlockSettings.parse(rules=[{"match": "mlp", "role": "ffn"}, {"match": "up", "lr_multiplier": 1}])
    assert settings.rule_for("norm.weight") is None
    with pytest.raises(ValueError, match=f"{FQN}.* is matched by 2 rules: 'mlp' and 'up'.*only one"):
        settings.rule_for(FQN)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rules": [{"match": "x", "role": "zzz"}]}, r"unknown role 'zzz'\. Allowed: embedding, "),
        ({"rules": [{"match": "x", "role": "qkv", "layout": "rows"}]}, r"one of concat, grouped, .* got 'rows'"),
        ({"rules": [{"match": "x", "storage": "rows"}]}, r"rules\[0\]\.storage must be one of out_in, in_out, got"),
        ({"rules": "x"}, r"rules must be a list .* got 'x'"),
        ({"granularity": "heads"}, r"from block types or roles to head, row, tensor, element, or \"published\""),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(settings, words):
    """Wrong keys, numbers and regular expressions are in tests/hosts/deepspeed/test_bad_input.py."""
    with pytest.raises((ValueError, TypeError), match=words):
        BlockSettings.parse(**settings)
