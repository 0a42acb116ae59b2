# SPDX-License-Identifier: Apache-2.0
"""Every parameter of encoders, encoder-decoders, hybrids and heads, from the real classes, against tables by hand."""

import re

import pytest
import torch

from ds_blockwise import tag_parameters
from ds_blockwise.tagging import names
from tests.helpers.proposed_rules import proposed_rules
from tests.helpers.tables.families import build
from tests.helpers.tables.text import ENCODERS
from tests.helpers.tables.text_families import TEXT_FAMILIES, build_text
from tests.helpers.tables.text_hybrids import DECODERS
from tests.unit.tagging.test_families import EXPECTED, tags_of

transformers = pytest.importorskip("transformers", reason="the models are transformers' own")

TEXT = ENCODERS | DECODERS


@pytest.mark.parametrize("model", TEXT)
def test_every_parameter_is_what_the_model_code_makes_of_it(model):
    """None needs a rule, and none is read as something that it is not."""
    assert tags_of(build_text(model)) == TEXT[model]


def test_every_model_has_a_table():
    """One without would be built and never looked at."""
    assert set(TEXT) == set(TEXT_FAMILIES)


def roles_in(what):
    """The roles of a table's entry, without block sizes: "query bias element 48 + ..." -> query, ..."""
    return [role.split()[0] for role in what.split(" + ")]


ALL = {**TEXT, **{f"{family}*": table for family, table in EXPECTED.items()}}


def built(name):
    if name in TEXT:
        return build_text(name)
    with torch.device("meta"):
        return build(name.removesuffix("*"))


@pytest.mark.parametrize("name", ALL)
def test_what_is_proposed_for_a_family_that_no_name_rule_knows_does_no_harm(name, monkeypatch):
    """Every family, as if nobody had written name rules for it: what the class does not say is proposed or asked.

    All that is proposed is pasted as it is, and gives nothing a matrix's multiplier. Where the user has to choose, one
    pattern never covers two roles, so that a choice which is right for one parameter is right for all of them.
    """
    monkeypatch.setattr(names, "_COMPILED", ())
    model, table = built(name), ALL[name]
    rules = []
    for _ in range(4):  # the first answer can bring up another question: fused weights are told by their modules
        try:
            tag_parameters(model, rules=rules)
            break
        except ValueError as error:
            proposed = proposed_rules(str(error))
            assert proposed, str(error)
            for rule in proposed:
                covered = {tuple(roles_in(what)) for fqn, what in table.items() if re.search(rule["match"], fqn)}
                assert covered, f"{rule} matches no parameter of the table"
                if rule["role"] == "?":
                    assert len(covered) == 1, f"{rule} covers {covered}"
                    (roles,) = covered
                    # rows of several roles, and rows that belong to no head, need more than a role
                    headless = any("a_proj" in fqn for fqn in table if re.search(rule["match"], fqn))
                    rule["role"] = "other" if len(roles) > 1 or headless else roles[0]
                else:
                    assert rule["role"] in ("norm", "other"), rule
                if rule.get("storage") == "?":
                    rule["storage"] = "out_in"
            rules += proposed
    pasted = {fqn: roles_in(what) for fqn, what in tags_of(model, rules=rules).items()}
    for fqn, what in table.items():
        assert pasted[fqn] == roles_in(what) or pasted[fqn][0] in ("norm", "other"), (fqn, pasted[fqn], what)
        assert (pasted[fqn] == ["embedding"]) == (roles_in(what) == ["embedding"]), (fqn, pasted[fqn], what)


def test_the_fused_weight_of_deberta_lies_as_its_forward_reads_it():
    """By function: without its value rows, attention gives nothing but the biases of values and output."""
    torch.manual_seed(0)
    attention = transformers.models.deberta.modeling_deberta.DisentangledSelfAttention(
        transformers.DebertaConfig(hidden_size=48, num_attention_heads=4, relative_attention=False)
    )
    tag_parameters(attention_in := torch.nn.ModuleDict({"attention": torch.nn.ModuleDict({"self": attention})}))
    parts = attention_in["attention"]["self"].in_proj.weight.block_spec.parts
    assert [part.role.value for part in parts] == ["query", "key", "value"] * 4
    x, mask = torch.randn(1, 5, 48), torch.ones(1, 1, 5, 5, dtype=torch.long)
    attention.eval()
    with torch.no_grad():
        for part in parts:
            if part.role.value == "value":
                attention.in_proj.weight[part.start : part.end] = 0
        assert attention(x, mask)[0].abs().max() == 0, "q_bias and v_bias begin at zero"


class ValueHead(torch.nn.Module):
    """TRL's: the policy's states to one number."""

    def __init__(self):
        super().__init__()
        self.summary = torch.nn.Linear(48, 1)


def test_policies_with_value_and_reward_heads():
    """TRL wraps the policy and puts ``v_head.summary`` beside it; others call theirs ``v_head`` or ``value_head``."""
    policy = {f"pretrained_model.{name}": what for name, what in EXPECTED["Llama"].items()}
    for path, leaf in (("v_head", "summary."), ("v_head", ""), ("value_head", ""), ("reward_head", ""), ("score", "")):
        with torch.device("meta"):
            head = ValueHead() if leaf else torch.nn.Linear(48, 1)
            model = torch.nn.ModuleDict({"pretrained_model": build("Llama"), path: head})
        at = f"{path}.{leaf}"
        assert tags_of(model) == policy | {f"{at}weight": "other row 1", f"{at}bias": "other bias element 1"}


RECURRENT = {
    "Mamba2*": "mixer.",
    "Qwen3Next*": "linear_attn.",
    "Qwen3_5*": "linear_attn.",
    "Jamba*": "mamba.",
    "KimiLinearForCausalLM": "layers.0.self_attn.",
    "MiniMaxForCausalLM": "layers.0.self_attn.",
    "OlmoHybridForCausalLM": "linear_attn.",
    "Lfm2ForCausalLM": ".conv.",
    "NemotronHForCausalLM": "layers.0.mixer.",
    "RecurrentGemmaForCausalLM": "layers.0.temporal_block.",
    "RwkvForCausalLM": "attention.",
    "xLSTMForCausalLM": "mlstm_layer.",
}


@pytest.mark.parametrize("name", RECURRENT)
def test_layers_without_softmax_attention_train_at_one_multiplier(name):
    """One rule for all of them: the same layer was 8x and 4x in Kimi Linear and 1x in Qwen3-Next."""
    rows = [row for row in tag_parameters(built(name)).rows if RECURRENT[name] in row.fqn]
    assert len(rows) >= 3 and {row.lr_multiplier for row in rows} == {0.125}
    assert {row.role.split()[0] for row in rows} <= {"other", "norm"}
