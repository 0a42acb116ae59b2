# SPDX-License-Identifier: Apache-2.0
"""What the owner's class says of a parameter, under any name, and what counts as evidence."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ds_blockwise import BlockwiseAdamMini, tag_parameters
from ds_blockwise.blocks.tagged_parameter import tags_of


def roles_of(model, **settings):
    """name -> roles along the rows, joined by +."""
    tag_parameters(model, **settings)
    parts = {name: tags_of(p).block_spec.parts for name, p in model.named_parameters()}
    return {name: "+".join(part.role.value for part in of) for name, of in parts.items()}


def under(name, module):
    return nn.ModuleDict({name: module})


def norm_class(name, *shapes, base=nn.Module):
    """A module whose class has a name, with parameters of these shapes."""
    made = type(name, (base,), {})()
    for leaf, shape in zip(("weight", "bias"), shapes, strict=False):
        setattr(made, leaf, nn.Parameter(torch.ones(shape)))
    return made


NORMS = {
    "LayerNorm": nn.LayerNorm(4),
    "LayerNorm over two dimensions": nn.LayerNorm((3, 4)),
    "RMSNorm": nn.RMSNorm(4),
    "GroupNorm": nn.GroupNorm(2, 4),
    "BatchNorm1d": nn.BatchNorm1d(4),
    "BatchNorm2d": nn.BatchNorm2d(4),
    "SyncBatchNorm": nn.SyncBatchNorm(4),
    "InstanceNorm3d": nn.InstanceNorm3d(4, affine=True),
    "LlamaRMSNorm": norm_class("LlamaRMSNorm", (4,)),
    "DebertaLayerNorm": norm_class("DebertaLayerNorm", (4,), (4,)),
    "MambaRMSNormGated": norm_class("MambaRMSNormGated", (4,)),
    "LayerNorm1P": norm_class("NemotronLayerNorm1P", (4,), (4,)),
    "a class derived from one": norm_class("Mine", (4,), base=type("FusedRMSNorm", (nn.Module,), {})),
    "a scalar": norm_class("ScaleNorm", ()),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("called", ["0", "whatever"])
def test_a_norm_is_a_norm_under_any_name(name, called):
    """At a matrix's multiplier its scales would move six times too far, and no curve says so."""
    assert set(roles_of(under(called, NORMS[name])).values()) == {"norm"}


NO_NORMS = {
    "a matrix": norm_class("FooNorm", (3, 4)),
    "vectors of two lengths": norm_class("FooNorm", (3,), (4,)),
    "a matrix and a vector": norm_class("WeightNorm", (3, 4), (3,)),
    "norm at the start of the name": norm_class("NormLinear", (4,)),
    "a name that only contains it": norm_class("NormalEstimator", (4,)),
}


@pytest.mark.parametrize("name", NO_NORMS)
def test_a_class_name_counts_only_if_the_shape_agrees(name):
    """A user's class may be called anything."""
    with pytest.raises(ValueError, match="no naming rule matches"):
        tag_parameters(under("whatever", NO_NORMS[name]))


def test_a_norm_that_holds_a_linear_does_not_lend_it_its_name():
    """Adaptive norms compute their scales by a linear."""
    adaptive = norm_class("AdaLayerNorm", (4,))
    adaptive.linear = nn.Linear(4, 8)
    with pytest.raises(ValueError, match=r"whatever\.linear\.weight") as caught:
        tag_parameters(under("whatever", adaptive))
    assert '"role": "?"' in str(caught.value)


def attention_with(norm, **heads):
    attention = nn.Module()
    attention.config = SimpleNamespace(**heads)
    attention.q_norm = norm
    return under("self_attn", attention)


def test_a_norm_with_a_row_for_each_head():
    """Cohere's: element-wise moments by default, and a vector of them is still what the heads say it is."""
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4}
    for rows in (6, 2):
        model = attention_with(norm_class("CohereLayerNorm", (rows, 4)), **heads)
        (row,) = tag_parameters(model).rows
        assert (row.role, row.lr_multiplier, row.granularity, row.num_blocks) == ("norm", 0.125, "element", rows * 4)
    with pytest.raises(ValueError, match=r"matches role 'norm' by name, but a norm of that role has 1 dimension"):
        tag_parameters(attention_with(norm_class("CohereLayerNorm", (5, 4)), **heads))
    declared = attention_with(norm_class("Scale", (5, 4)), **heads)
    assert tag_parameters(declared, rules=[{"match": "q_norm", "role": "norm"}]).rows[0].granularity == "element"


def test_a_norm_with_a_row_for_each_head_steps_like_adam():
    """Element-wise moments: the first step of every element is the learning rate, whatever its gradient."""
    model = attention_with(norm_class("CohereLayerNorm", (6, 4)), num_attention_heads=6, head_dim=4)
    tag_parameters(model)
    (weight,) = model.parameters()
    before = weight.detach().clone()
    weight.grad = torch.linspace(-3, 5, 24).reshape(6, 4) ** 3
    BlockwiseAdamMini(model.parameters(), lr=0.01, weight_decay=0.0, lr_multipliers="uniform").step()
    moved = (before - weight.detach()) / 0.01
    torch.testing.assert_close(moved, weight.grad.sign(), atol=1e-4, rtol=0)


TABLES = {
    "token table": (under("whatever", nn.Embedding(5, 4)), "embedding"),
    "numbered": (nn.Sequential(nn.Embedding(5, 4)), "embedding"),
    "bag": (under("whatever", nn.EmbeddingBag(5, 4)), "embedding"),
    "T5's biases of distances": (under("relative_attention_bias", nn.Embedding(5, 4)), "other"),
    "LongT5's": (under("global_relative_attention_bias", nn.Embedding(5, 4)), "other"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name):
    """What is looked up in T5's table is added to scores of attention: it is no embedding, and ten times its rate would
    move all scores of a head."""
    model, role = TABLES[name]
    assert set(roles_of(model).values()) == {role}


ENCODER = {
    "self_attn.in_proj_weight": "query+key+value",
    "self_attn.in_proj_bias": "query+key+value",
    "self_attn.out_proj.weight": "attn_out",
    "self_attn.out_proj.bias": "attn_out",
    "linear1.weight": "ffn",
    "linear1.bias": "ffn",
    "linear2.weight": "ffn",
    "linear2.bias": "ffn",
    "norm1.weight": "norm",
    "norm1.bias": "norm",
    "norm2.weight": "norm",
    "norm2.bias": "norm",
}


def test_the_layers_of_pytorch():
    """Their names are in no rule: the classes are PyTorch's own, so they are certain."""
    encoder, decoder = nn.TransformerEncoderLayer(12, 3, 20), nn.TransformerDecoderLayer(12, 3, 20)
    assert roles_of(encoder) == ENCODER
    cross = {name.replace("self_attn", "multihead_attn"): role for name, role in ENCODER.items() if "attn" in name}
    norm3 = {"norm3.weight": "norm", "norm3.bias": "norm"}
    assert roles_of(decoder) == ENCODER | cross | norm3
    assert tags_of(encoder.self_attn.in_proj_weight).block_spec.num_blocks == 3 + 3 + 12
    assert tags_of(encoder.self_attn.in_proj_bias).block_spec.structure.is_bias
    stack = nn.Transformer(12, 3, 1, 1, 20)
    assert set(roles_of(under("model", stack)).values()) == {"query+key+value", "attn_out", "ffn", "norm"}


def test_attention_of_pytorch_with_keys_of_another_width():
    """Three weights instead of a fused one, and the two rows that it appends to keys and values."""
    found = roles_of(nn.MultiheadAttention(12, 3, kdim=8, vdim=10, add_bias_kv=True))
    assert found == {
        "q_proj_weight": "query",
        "k_proj_weight": "key",
        "v_proj_weight": "value",
        "in_proj_bias": "query+key+value",
        "bias_k": "other",
        "bias_v": "other",
        "out_proj.weight": "attn_out",
        "out_proj.bias": "attn_out",
    }


def test_the_fused_weight_of_pytorch_lies_as_its_forward_reads_it():
    """By function: without its value rows, attention gives nothing but the output's bias."""
    attention = nn.MultiheadAttention(12, 3, bias=False, batch_first=True)
    tag_parameters(attention)
    (value,) = [p for p in tags_of(attention.in_proj_weight).block_spec.parts if p.role.value == "value"]
    x = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attention.in_proj_weight[value.start : value.end] = 0
        assert attention(x, x, x)[0].abs().max() == 0
        attention.in_proj_weight[value.start : value.end] = 1
        attention.in_proj_weight[: value.start] = 0
        assert attention(x, x, x)[0].abs().max() > 0


@pytest.mark.parametrize("conv", [nn.Conv1d(2, 6, 3), nn.Conv2d(2, 6, 3), nn.Conv3d(2, 6, 3)])
def test_a_convolution_whose_name_says_nothing_trains_at_the_smallest_multiplier(conv):
    """Patch embeddings are known to break training at high rates; nobody measured a higher one for them."""
    rows = tag_parameters(under("whatever", conv)).rows
    assert [(row.role, row.lr_multiplier, row.granularity) for row in rows] == [
        ("other", 0.125, "row"),
        ("other bias", 0.125, "element"),
    ]
    assert rows[0].num_blocks == 6


def test_a_convolution_in_a_feed_forward_is_no_stack_of_experts():
    """Its kernel has three dimensions too: a row is an output channel, not one of several matrices."""
    (row,) = tag_parameters(under("mlp", under("fc1", nn.Conv1d(2, 6, 3, bias=False)))).rows
    assert (row.role, row.num_blocks) == ("ffn", 6)


def test_a_transposed_convolution_is_left_to_the_user():
    """Its rows are inputs, so blocks of rows would mix outputs."""
    with pytest.raises(ValueError, match="no naming rule matches"):
        tag_parameters(under("whatever", nn.ConvTranspose1d(2, 6, 3)))


CONFLICTS = {
    "a linear called a norm": (under("norm", nn.Linear(4, 4)), "its name says norm, but it belongs to a Linear"),
    "a linear without bias called a norm": (under("final_layernorm", nn.Linear(4, 1, bias=False)), "to a Linear"),
    "a linear called an embedding": (
        under("embed_tokens", nn.Linear(4, 4)),
        "its name says embedding, but it belongs to a Linear",
    ),
    "a table called queries": (
        under("self_attn", under("q_proj", nn.Embedding(4, 4))),
        "its name says query, but its Embedding says embedding",
    ),
    "a norm called a head": (under("lm_head", nn.LayerNorm(4)), "its name says output, but its LayerNorm says norm"),
    "a norm called a fused weight": (
        under("self_attn", under("qkv_proj", nn.LayerNorm(4))),
        "its name says qkv, but its LayerNorm says norm",
    ),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_a_class_and_a_name_that_disagree_are_an_error_that_names_both(name):
    """One of them is wrong, and only the user knows which. A rule decides."""
    model, words = CONFLICTS[name]
    with pytest.raises(ValueError) as caught:
        tag_parameters(model)
    assert words in str(caught.value)
    assert set(roles_of(model, rules=[{"match": ".", "role": "other"}]).values()) == {"other"}


def test_an_expert_may_hold_a_norm():
    """The rule for DeepSpeed's experts is about whatever they hold; the class knows better."""
    expert = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
    model = under("deepspeed_experts", nn.ModuleList([expert]))
    assert list(roles_of(model).values()) == ["norm", "norm", "ffn"]


def test_a_rule_decides_before_the_class_but_calls_no_matrix_a_norm():
    """A pattern that is too wide must not slow a matrix down without a word; ``other`` has the same multiplier."""
    model = nn.ModuleDict({"in_norm": nn.LayerNorm(4), "in_norm_proj": nn.Linear(4, 4)})
    with pytest.raises(
        ValueError, match=r"rule 'norm' gives the role norm to parameter 'in_norm_proj.weight' .*Linear"
    ):
        tag_parameters(model, rules=[{"match": "norm", "role": "norm"}])
    assert roles_of(under("x", nn.LayerNorm(4)), rules=[{"match": "x", "role": "ffn"}])["x.weight"] == "ffn"
