# SPDX-License-Identifier: Apache-2.0
"""From a model to tags: what decides first, what a tensor-parallel rank holds, and what changes in the model."""

import pytest
import torch
from torch import nn

from ds_blockwise import BlockwiseAdamW, tag_parameters
from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.tagged_parameter import tags_of
from ds_blockwise.hosts.model_tags import tag_for
from ds_blockwise.tagging import module_reader
from ds_blockwise.tagging.names import NameMatch
from ds_blockwise.tagging.tag import read_tags, tag_with_settings


class Reader:
    """A host whose ``lm_head`` is an FFN, split by rows over two ranks of which this is the second."""

    exact_shards = True

    def __init__(self, shape=(6, 4)):
        self.whole_shape = shape

    def match(self, owner, parent, param, name):
        return NameMatch(Role.FFN, None, False, "host") if name == "lm_head.weight" else None

    def heads(self, attention):
        return None

    def shard(self, owner, param, leaf):
        return TensorShard.even(self.whole_shape, 0, 1, 2) if param.shape == (3, 4) else None

    def split(self, owner, param, leaf):
        return None


def model():
    return nn.ModuleDict({"lm_head": nn.Linear(4, 3, bias=False), "norm": nn.LayerNorm(4)})


@pytest.fixture
def with_reader():
    """Registers readers instead of those of the hosts, for one test."""
    before = list(module_reader.READERS)
    module_reader.READERS.clear()

    def register(*readers):
        for reader in readers:
            module_reader.register_reader(reader)

    yield register
    module_reader.READERS[:] = before


def roles(tagged):
    return {name: tags_of(p).block_spec.parts[0].role.value for name, p in tagged.named_parameters()}


def test_a_rule_decides_before_the_module_and_the_module_before_the_name(with_reader):
    """The host knows its own classes; the user knows better than either."""
    tagged = model()
    tag_parameters(tagged)
    assert roles(tagged)["lm_head.weight"] == "output"
    with_reader(Reader())
    tag_parameters(tagged)
    assert roles(tagged) == {"lm_head.weight": "ffn", "norm.weight": "norm", "norm.bias": "norm"}
    tag_parameters(tagged, rules=[{"match": "lm_head", "role": "embedding"}])
    assert roles(tagged)["lm_head.weight"] == "embedding"


def test_a_shard_is_tagged_in_unsharded_coordinates(with_reader):
    """Blocks belong to the whole tensor, so that they are the same on every rank."""
    with_reader(Reader())
    tagged = model()
    tag_parameters(tagged)
    tags = tags_of(tagged["lm_head"].weight)
    assert (tags.block_spec.shape, tags.block_spec.num_blocks) == ((6, 4), 6)
    assert tags.block_shard == TensorShard((6, 4), 0, 1, (((0, 3),), ((3, 6),)))
    assert tags_of(tagged["norm"].weight).block_shard is None


def test_a_shard_of_another_shape_is_an_error(with_reader):
    """Rows would be given to the wrong blocks."""
    with_reader(Reader((8, 4)))
    with pytest.raises(
        ValueError, match=r"'lm_head.weight' has shape \(3, 4\) .* its Linear says .* \(4, 4\) of \(8, 4\)"
    ):
        tag_parameters(model())


def test_a_second_reader_of_one_class_is_ignored(with_reader):
    """Importing a host twice must not ask it twice."""
    with_reader(Reader(), Reader((8, 4)))
    assert [reader.whole_shape for reader in module_reader.READERS] == [(6, 4)]


def test_reading_tags_changes_nothing_and_setting_them_replaces_all():
    """`verify_layout` reads tags under other rules than those that the model trains with."""
    read = model()
    found = read_tags(read, BlockSettings.parse({"norm": 3}))
    assert [(p is q, spec.fqn) for (p, spec, _), q in zip(found, read.parameters(), strict=True)] == [
        (True, name) for name, _ in read.named_parameters()
    ]
    assert all(tags_of(p) is None for p in read.parameters())
    for multiplier in (3, 5):
        tag_with_settings(read, BlockSettings.parse({"norm": multiplier}))
        assert tags_of(read["norm"].weight).block_spec.parts[0].update.lr_multiplier == multiplier


def test_a_model_with_a_problem_gets_no_tag():
    """Half of a model with new tags would train with two sets of settings."""
    broken = model()
    broken["unknown"] = nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"cannot cut the model into blocks:\n  - .*'unknown\.weight' of shape \(2, 2\)"
    ):
        tag_parameters(broken)
    assert all(tags_of(p) is None for p in broken.parameters())


def test_a_host_may_name_parameters_and_a_rule_may_give_the_role_under_any_name():
    """A pipeline numbers its layers; the names in the user's rules are those of the whole model."""
    staged = nn.Sequential(nn.Linear(4, 3, bias=False))
    names = {staged[0].weight: "module.layers.7.mlp.up_proj.weight"}
    ((_, spec, _),) = read_tags(staged, BlockSettings(), names)
    assert (spec.fqn, spec.parts[0].role) == ("layers.7.mlp.up_proj.weight", Role.FFN)
    for match in ("layers.7", r"^0\.weight"):
        ((_, spec, _),) = read_tags(staged, BlockSettings.parse(rules=[{"match": match, "role": "value"}]), names)
        assert spec.parts[0].role is Role.VALUE


def test_a_rule_may_match_nothing_in_one_pipeline_stage_only():
    """The other stages have the layers that it is for; in a whole model it is a misspelt name."""
    settings = BlockSettings.parse(rules=[{"match": "layers.9", "lr_multiplier": 2}])
    assert len(read_tags(model(), settings, is_stage=True)) == 3
    with pytest.raises(ValueError, match=r"rule 'layers\.9' matches no parameter"):
        read_tags(model(), settings)


def test_a_weight_shared_by_two_roles_is_an_error_with_the_rule_to_write():
    """Only an output layer tied to its embedding has a role that everybody agrees on."""
    shared = nn.ModuleDict({"lm_head": nn.Linear(4, 4, bias=False), "mlp": nn.ModuleDict()})
    shared["mlp"]["up_proj"] = nn.Linear(4, 4, bias=False)
    shared["mlp"]["up_proj"].weight = shared["lm_head"].weight
    with pytest.raises(ValueError, match=r"(?s)several roles: ffn, output\..*\^lm_head\\.weight\$"):
        tag_parameters(shared)
    tag_parameters(shared, rules=[{"match": "lm_head.weight", "role": "ffn"}])
    assert roles(shared) == {"lm_head.weight": "ffn"}


def test_zero_3_placeholders_have_the_shape_that_zero_keeps():
    """The parameter itself is empty while its elements are partitioned."""
    empty = nn.Module()
    empty.lm_head = nn.Module()
    empty.lm_head.weight = nn.Parameter(torch.empty(0))
    empty.lm_head.weight.ds_shape = torch.Size([5, 4])
    assert tag_parameters(empty).rows[0].shape == (5, 4)


def test_an_optional_rule_may_match_nothing():
    """One JSON serves policy, value and reward models, and only one of them has the layer."""
    rule = {"match": "v_head", "role": "output", "optional": True}
    tag_parameters(model(), rules=[rule])
    with pytest.raises(ValueError, match=r"'v_head' matches no parameter of the model.* \"optional\": true"):
        tag_parameters(model(), rules=[{**rule, "optional": False}])


def tied():
    both = nn.ModuleDict({"embed_tokens": nn.Embedding(5, 4), "lm_head": nn.Linear(4, 5, bias=False)})
    both["lm_head"].weight = both["embed_tokens"].weight
    return both


SETTINGS = {"lr_multiplier": 3.0, "weight_decay_multiplier": 0.5, "betas": [0.8, 0.9], "granularity": "tensor"}


def applied(part):
    update = part.update
    rates = {"lr_multiplier": update.lr_multiplier, "weight_decay_multiplier": update.weight_decay_multiplier}
    return {**rates, "betas": [update.beta1, update.beta2], "granularity": part.granularity}


@pytest.mark.parametrize("match", ["embed_tokens", "lm_head"])
def test_every_name_of_a_tied_weight_counts_for_all_that_a_rule_sets(match):
    """By its later name a rule gave the role, and its multipliers and granularity were left out."""
    both = tied()
    tag_parameters(both, rules=[{"match": match, **SETTINGS}])
    (part,) = both["lm_head"].weight.block_spec.parts
    assert applied(part) == SETTINGS


def test_every_name_counts_beside_a_hosts_own():
    """A pipeline numbers its layers; behind that is the module tree."""
    staged = nn.Sequential(nn.Linear(4, 3, bias=False))
    names = {staged[0].weight: "layers.7.mlp.up_proj.weight"}
    for match in ("layers.7", r"^0\.weight"):
        ((_, spec, _),) = read_tags(staged, BlockSettings.parse(rules=[{"match": match, **SETTINGS}]), names)
        assert applied(spec.parts[0]) == SETTINGS


def test_two_rules_for_two_names_of_one_weight_are_an_error():
    """Which of them should win can only be guessed."""
    rules = [{"match": "embed", "lr_multiplier": 3}, {"match": "lm_head", "lr_multiplier": 2}]
    words = (
        r"'embed_tokens.weight' \(one weight, also called 'lm_head.weight'\) is matched by 2 rules: 'embed' and 'lm_h"
    )
    with pytest.raises(ValueError, match=words):
        tag_parameters(tied(), rules=rules)


@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 4), (2, 0, 3)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parameters_without_elements_have_no_blocks_and_need_no_role(shape, device):
    """Placeholders of quantizers, adapters of rank 0: an assertion of ours ended tagging, with no name."""
    with torch.device(device):
        some = model()
        some.placeholder = nn.Parameter(torch.empty(shape))
        some["lm_head"].bias = nn.Parameter(torch.empty(shape))
    report = tag_parameters(some)
    assert {row.fqn for row in report.rows} == {"lm_head.weight", "norm.weight", "norm.bias"}
    assert tags_of(some.placeholder) is None


def test_an_empty_shard_of_a_parameter_with_elements_is_tagged(with_reader):
    """More tensor-parallel ranks than heads: this rank holds nothing, but takes part in sums."""
    reader = Reader()
    reader.shard = lambda owner, param, leaf: (
        TensorShard((6, 4), 0, 1, (((0, 6),), ())) if param.shape == (0, 4) else None
    )
    with_reader(reader)
    empty = nn.ModuleDict({"lm_head": nn.Linear(4, 0, bias=False)})
    tag_parameters(empty)
    assert empty["lm_head"].weight.block_spec.shape == (6, 4)


def test_a_parameter_that_has_no_shape_yet_is_refused_by_name():
    """Lazy modules make theirs in the first forward pass."""
    model = nn.ModuleDict({"lm_head": nn.Linear(3, 3, bias=False)})
    tag_parameters(model)
    optimizer = BlockwiseAdamW(model.parameters())
    model["proj"] = nn.LazyLinear(3, bias=False)
    said = (
        r"'proj.weight' cannot be cut into blocks: its lazy module has not seen an input yet\. Run the model once first"
    )
    with pytest.raises(ValueError, match=said):
        tag_parameters(model)
    with pytest.raises(ValueError, match=said):
        tag_for(optimizer, [(model, None)], is_stage=False, what_tags="host()", place="json")
