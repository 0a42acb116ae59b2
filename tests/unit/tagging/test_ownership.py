# SPDX-License-Identifier: Apache-2.0
"""Whose tags are whose: a host's are made anew by the next, the user's stay, and no other optimizer takes a host's."""

import copy
import pickle

import pytest
import torch
from torch import nn

from ds_blockwise import BlockwiseAdamMini, BlockwiseAdamW, block_report, tag_parameters
from ds_blockwise.blocks.segment_table import whole_placement
from ds_blockwise.blocks.tagged_parameter import is_tagged_by_host, tags_of, user_tags_of
from ds_blockwise.hosts.model_tags import tag_for
from ds_blockwise.parallel.reduce import LOCAL

BOTH = pytest.mark.parametrize("cls", [BlockwiseAdamW, BlockwiseAdamMini])
ROLE_RULE = {"match": r"^mlp\.up_proj", "role": "value"}


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(4, 3, bias=False)})
        self.lm_head = nn.Linear(3, 5, bias=False)

    def forward(self, x):
        return self.lm_head(self.mlp["up_proj"](x))


class Wrapped(nn.Module):
    def __init__(self, policy):
        super().__init__()
        self.policy = policy


def host(model, *, cls=BlockwiseAdamMini, names=None, is_stage=False, **settings):
    """What a host does: its optimizer, and the model tagged for that."""
    optimizer = cls([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0, **settings)
    tag_for(optimizer, [(model, names)], is_stage=is_stage, what_tags="host()", place="json")
    return optimizer


def seen(model):
    """Name, role and multiplier of every tag."""
    return {row.fqn: (row.role, row.lr_multiplier) for row in block_report(model).rows}


def placements(param):
    return [whole_placement(param.block_spec, param.block_shard)]


def step(model, optimizer, *params):
    for p in params or model.parameters():
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()


# --------------------------------------------------------------------------------- one host after another


def test_a_wrapper_is_tagged_under_its_own_names():
    """The rule names the path in the wrapper; with the first host's names it would match and not be applied."""
    policy = Policy()
    host(policy)
    host(Wrapped(policy), rules=[{"match": r"^policy\.lm_head", "lr_multiplier": 0.5}])
    assert seen(policy) == {"policy.mlp.up_proj.weight": ("ffn", 0.75), "policy.lm_head.weight": ("output", 0.5)}


def test_role_rules_count_on_a_model_that_was_tagged_before():
    """It was called "already tagged", to a user who never tagged it."""
    policy = Policy()
    host(policy, rules=[ROLE_RULE])
    host(policy)
    assert seen(policy)["mlp.up_proj.weight"] == ("ffn", 0.75)  # the first host's rule is gone with it
    host(policy, rules=[ROLE_RULE])
    assert seen(policy)["mlp.up_proj.weight"] == ("value", 0.5)


def test_unfreezing_between_two_hosts_is_no_partly_tagged_model():
    """Train the head, unfreeze the rest, build a new engine."""
    policy = Policy()
    policy.mlp.requires_grad_(False)
    host(policy)
    policy.requires_grad_(True)
    host(policy)
    assert set(seen(policy)) == {"mlp.up_proj.weight", "lm_head.weight"}


def test_a_compiled_model_is_tagged_anew():
    """torch.compile puts a module around the model."""
    policy = Policy()
    host(policy, lr_multipliers={"head": 3})
    host(torch.compile(policy), lr_multipliers={"head": 2})
    assert seen(policy)["lm_head.weight"] == ("output", 2)


def test_what_the_first_host_bound_stays_when_a_second_one_comes():
    """Both live at the same time: policy, and policy with a value head."""
    policy = Policy()
    first = host(policy, lr_multipliers={"head": 3})
    weight = policy.lm_head.weight
    first.bind(weight, placements(weight), LOCAL)
    second = host(Wrapped(policy), lr_multipliers={"head": 2})
    second.bind(weight, placements(weight), LOCAL)
    assert first.placements_in(weight)[0].spec.fqn == "lm_head.weight"
    moved = {}
    for optimizer in (first, second):
        before = weight.detach().clone()
        step(policy, optimizer, weight)
        moved[optimizer] = (before - weight).abs().mean().item()
    assert moved[first] == pytest.approx(3e-2, rel=1e-4) and moved[second] == pytest.approx(2e-2, rel=1e-4)


# ------------------------------------------------------------------------------------------- the user's tags


def test_the_users_settings_stay_through_hosts_and_their_settings():
    """A host that has settings of its own must not leave them in the user's tags: the next one has others."""
    policy = Policy()
    tag_parameters(policy)
    for head in (3, 2):
        host(policy, lr_multipliers={"head": head})
        assert seen(policy)["lm_head.weight"] == ("output", head)
    host(policy)
    assert seen(policy)["lm_head.weight"] == ("output", 1.25)
    tag_parameters(policy, rules=[ROLE_RULE])
    host(policy)
    assert seen(policy)["mlp.up_proj.weight"] == ("value", 0.5)
    with pytest.raises(ValueError, match=r"'mlp.up_proj.weight' was tagged with other .* Give them in one place"):
        host(policy, lr_multipliers={"head": 3})


def test_rules_name_the_present_names_of_a_model_that_the_user_tagged_and_then_wrapped():
    """The tag has the name from before; a rule for the present one must not be accepted and left out."""
    policy = Policy()
    tag_parameters(policy)
    wrapped = Wrapped(policy)
    host(wrapped, rules=[{"match": r"^policy\.lm_head", "lr_multiplier": 0.5}])
    assert seen(policy)["policy.lm_head.weight"] == ("output", 0.5)
    with pytest.raises(ValueError, match=r"'\^policy.*up', which sets a role, .* Give such rules to tag_parameters"):
        host(wrapped, rules=[{"match": r"^policy\.mlp\.up", "role": "value"}])


def test_the_users_own_rules_keep_their_meaning_in_a_wrapper():
    """They were given for the names of then, which a later change of multipliers looks up again."""
    policy = Policy()
    tag_parameters(policy, rules=[{"match": "^lm_head", "lr_multiplier": 0.5}])
    optimizer = host(Wrapped(policy))
    weight = policy.lm_head.weight
    assert (weight.block_spec.fqn, weight.block_spec.parts[0].update.lr_multiplier) == ("policy.lm_head.weight", 0.5)
    optimizer.bind(weight, placements(weight), LOCAL)
    optimizer.set_lr_multipliers({"head": 7})
    assert optimizer.bindings().of(weight).table.multiplier_runs[0].update.lr_multiplier == 0.5
    tag_parameters(policy, rules=[{"match": "policy", "lr_multiplier": 2, "optional": True}])
    with pytest.raises(ValueError, match=r"called 'policy\.mlp.* by now, and the rules set something else"):
        host(Wrapped(policy))


CHANGES = {
    "unfrozen": lambda m: m.lm_head.requires_grad_(True),
    "another Parameter": lambda m: setattr(m.mlp["up_proj"], "weight", nn.Parameter(torch.ones(3, 4))),
    "a new module": lambda m: m.mlp.update({"gate_proj": nn.Linear(4, 3, bias=False)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_the_user_tagged_in_part_is_refused(change):
    """What the user's rules would say about the rest can only be guessed."""
    policy = Policy()
    policy.lm_head.requires_grad_(change != "unfrozen")
    tag_parameters(policy)
    CHANGES[change](policy)
    with pytest.raises(ValueError, match=r"is not tagged although others are.*or not at all \(host\(\) does it\)"):
        host(policy)
    tag_parameters(policy)
    host(policy)


def test_a_parameter_that_was_resized_after_the_users_tags_is_refused():
    """Its blocks would be those of the old shape."""
    policy = Policy()
    tag_parameters(policy)
    policy.lm_head.weight.data = torch.zeros(7, 3)
    with pytest.raises(ValueError, match=r"'lm_head.weight' has shape \(7, 3\), but it had \(5, 3\) when tag_param"):
        host(policy)


def test_an_attribute_that_the_user_sets_over_a_hosts_is_the_users():
    """The names of the attributes are public."""
    policy = Policy()
    host(policy)
    weight = policy.lm_head.weight
    assert is_tagged_by_host(weight) and user_tags_of(weight) is None
    other = Policy()
    tag_parameters(other)
    weight.block_spec = other.lm_head.weight.block_spec
    assert user_tags_of(weight) is not None and not is_tagged_by_host(weight)


def test_a_pickled_model_knows_whose_tags_it_has():
    """torch.save(model) keeps attributes of parameters."""
    policy = Policy()
    tag_parameters(policy.mlp, rules=[{"match": "up_proj", "role": "ffn"}])
    host(policy.lm_head, rules=[{"match": "weight", "role": "output"}])
    again = pickle.loads(pickle.dumps(policy))
    assert user_tags_of(again.lm_head.weight) is None and is_tagged_by_host(again.lm_head.weight)
    assert user_tags_of(again.mlp["up_proj"].weight) is not None


# ----------------------------------------------------------------------------------- plain PyTorch afterwards


@BOTH
def test_a_plain_optimizer_takes_no_tags_of_a_host(cls):
    """It would train with the multipliers and roles of the engine's JSON, without a word."""
    policy = Policy()
    host(policy, lr_multipliers={"head": 3}, rules=[ROLE_RULE])
    optimizer = cls(policy.parameters(), lr=1e-2, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"'mlp.up_proj.weight' of .* tagged by an engine .*tag_parameters\(model\)"):
        step(policy, optimizer)
    tag_parameters(policy)
    before = policy.lm_head.weight.detach().clone()
    step(policy, optimizer)
    assert ((before - policy.lm_head.weight) / 1e-2).mean().item() == pytest.approx(1.25, rel=1e-4)


@BOTH
def test_a_plain_optimizer_takes_the_users_tags_under_a_hosts(cls):
    """The user tagged, an engine trained, and now a loop of the user's own goes on."""
    policy = Policy()
    tag_parameters(policy, lr_multipliers={"head": 4})
    host(policy)
    optimizer = cls(policy.parameters(), lr=1e-2, weight_decay=0.0)
    assert optimizer.block_settings.lr_multipliers == {"head": 4.0}
    before = policy.lm_head.weight.detach().clone()
    step(policy, optimizer)
    assert ((before - policy.lm_head.weight) / 1e-2).mean().item() == pytest.approx(4, rel=1e-4)


def test_copies_have_no_tags():
    """A reference model is often a deep copy of the policy."""
    policy = Policy()
    host(policy)
    assert all(tags_of(p) is None for p in copy.deepcopy(policy).parameters())
