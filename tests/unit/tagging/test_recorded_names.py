# SPDX-License-Identifier: Apache-2.0
"""Models whose code is not installed: names recorded from their sources, tables by hand, and the layouts that a name
alone cannot tell.

The modules are stand-ins with the owners' class names and the attributes that the real attention classes have.
"""

import pytest
import torch
from torch import nn

from ds_blockwise import tag_parameters
from ds_blockwise.blocks.ranges import TensorShard
from tests.helpers import ROOT
from tests.helpers.proposed_rules import proposed_rules
from tests.helpers.tables.huggingface import norms, under
from tests.unit.tagging.test_families import tags_of

pytest.importorskip("megatron.core", reason="megatron_patch reads these models' attention")
import megatron_patch  # noqa: F401 - registers its reader

NAMES = ROOT / "tests" / "data" / "names"
# What the attention classes say about their heads, on one tensor-parallel rank
LOCAL = {"num_attention_heads_per_partition": 4, "hidden_size_per_attention_head": 12}
MEGATRON_LM = ("ParallelAttention", {**LOCAL, "num_query_groups_per_partition": 2})
MEGATRON_LM_MHA = ("ParallelAttention", {**LOCAL, "num_query_groups_per_partition": 4})
MEGATRON_DEEPSPEED = ("ParallelAttention", {**LOCAL, "num_key_value_heads_per_partition": 2, "use_gqa": True})
NEOX = ("ParallelSelfAttention", {**LOCAL, "num_kv_heads_per_partition": 4, "gqa": False})
NEOX_GROUPED = ("ParallelSelfAttention", {**LOCAL, "num_kv_heads_per_partition": 2, "gqa": True})


def module(class_name, **attributes):
    made = type(class_name, (nn.Module,), {})()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def recorded(name, attention):
    """The module tree of a recorded list; ``attention`` is the class and attributes of what holds projections."""
    model = nn.Module()
    for line in (NAMES / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        fqn, shape, owner_class = line.split()
        *path, leaf = fqn.split(".")
        owner = model
        for depth, part in enumerate(path):
            if part not in owner._modules:
                holds_attention = part in ("self_attention", "inter_attention", "attention")
                last = depth == len(path) - 1
                made = (
                    module(owner_class) if last else module(attention[0], **attention[1]) if holds_attention else None
                )
                owner.add_module(part, nn.Module() if made is None else made)
            owner = owner._modules[part]
        owner.register_parameter(leaf, nn.Parameter(torch.zeros([int(n) for n in shape.split("x")])))
    return model


GQA = "query head 4 + key head 2 + value row 24"
MHA = "query head 4 + key head 4 + value row 48"
GQA_BIAS = "query bias element 48 + key bias element 24 + value bias element 24"
MHA_BIAS = "query bias element 48 + key bias element 48 + value bias element 48"


def layer(qkv, qkv_bias=None, attention="self_attention", ffn=("dense_h_to_4h", "dense_4h_to_h"), width=80):
    table = {
        f"{attention}.query_key_value.weight": qkv,
        f"{attention}.dense.weight": "attn_out row 48",
        f"mlp.{ffn[0]}.weight": f"ffn row {width}",
        f"mlp.{ffn[1]}.weight": "ffn row 48",
    }
    if qkv_bias is not None:
        table |= {
            f"{attention}.query_key_value.bias": qkv_bias,
            f"{attention}.dense.bias": "attn_out bias element 48",
            f"mlp.{ffn[0]}.bias": f"ffn bias element {width}",
            f"mlp.{ffn[1]}.bias": "ffn bias element 48",
        }
    return table


WORDS = "embedding row 96"
EMBEDDINGS = {
    "language_model.embedding.word_embeddings.weight": WORDS,
    "language_model.embedding.position_embeddings.weight": "embedding row 16",
}
HEAD = {"language_model.output_layer.weight": "output row 96"}
ENCODER, DECODER = "language_model.encoder.", "language_model.decoder."
LAYER_NORMS = norms("input_layernorm", "post_attention_layernorm", bias=True)
MOE = f"{ENCODER}layers.0.mlp."
DENSE_FFN = {name.removeprefix("mlp."): what for name, what in layer(GQA, GQA_BIAS).items() if name.startswith("mlp.")}

GROUPED = ({"match": "query_key_value", "role": "qkv", "layout": "grouped"},)
CONCAT = ({"match": "query_key_value", "role": "qkv", "layout": "concat"},)

# name -> (recorded list, attention, the user's rules, what every parameter is)
MODELS = {
    "Megatron-LM": (
        "megatron_lm_legacy",
        MEGATRON_LM,
        (),
        EMBEDDINGS
        | HEAD
        | under(f"{ENCODER}layers.0.", layer(GQA, GQA_BIAS), LAYER_NORMS)
        | norms(f"{ENCODER}final_layernorm", bias=True),
    ),
    "Megatron-LM, newer norm names": (
        "megatron_lm_legacy_norms",
        MEGATRON_LM,
        (),
        {"language_model.embedding.word_embeddings.weight": WORDS}
        | HEAD
        | under(f"{ENCODER}layers.0.", layer(GQA), norms("input_norm", "post_attention_norm", bias=True))
        | norms(f"{ENCODER}final_norm", bias=True),
    ),
    "Megatron-LM, T5": (
        "megatron_lm_legacy_t5",
        MEGATRON_LM_MHA,
        (),
        EMBEDDINGS
        | {"lm_head.bias": "output bias element 96"}
        | under(f"{ENCODER}layers.0.", layer(MHA, MHA_BIAS), LAYER_NORMS)
        | under(
            f"{DECODER}layers.0.",
            layer(MHA, MHA_BIAS),
            LAYER_NORMS,
            norms("post_inter_attention_layernorm", bias=True),
            {
                "inter_attention.query.weight": "query head 4",
                "inter_attention.query.bias": "query bias element 48",
                "inter_attention.key_value.weight": "key head 4 + value row 48",
                "inter_attention.key_value.bias": "key bias element 48 + value bias element 48",
                "inter_attention.dense.weight": "attn_out row 48",
                "inter_attention.dense.bias": "attn_out bias element 48",
            },
        )
        | norms(f"{ENCODER}final_layernorm", f"{DECODER}final_layernorm", bias=True),
    ),
    "Megatron-DeepSpeed, experts, before 2024-12": (
        "megatron_deepspeed_moe",
        MEGATRON_DEEPSPEED,
        GROUPED,
        EMBEDDINGS
        | under(
            f"{ENCODER}layers.0.",
            {n: w for n, w in layer(GQA, GQA_BIAS).items() if not n.startswith("mlp.")},
            LAYER_NORMS,
        )
        | under(f"{MOE}mlp.", DENSE_FFN)
        | under(f"{MOE}deepspeed_moe.experts.deepspeed_experts.0.", DENSE_FFN)
        | under(f"{MOE}deepspeed_moe.experts.deepspeed_experts.1.", DENSE_FFN)
        | {
            f"{MOE}deepspeed_moe.gate.wg.weight": "router row 2",
            f"{MOE}coefficient.weight": "router row 2",
            f"{MOE}coefficient.bias": "router bias element 2",
        }
        | norms(f"{ENCODER}final_layernorm", bias=True),
    ),
    "Megatron-DeepSpeed, pipeline, since 2024-12": (
        "megatron_deepspeed_pipe",
        MEGATRON_DEEPSPEED,
        CONCAT,
        {
            "tied_modules.embed.word_embeddings.weight": WORDS,
            "tied_modules.embed.position_embeddings.weight": "embedding row 16",
            "4.weight": "norm tensor 1",
            "4.bias": "norm tensor 1",
            **under("2.", layer(GQA, GQA_BIAS), LAYER_NORMS),
        },
    ),
    "Megatron-DeepSpeed, pipeline, untied, before 2024-12": (
        "megatron_deepspeed_pipe_untied",
        MEGATRON_DEEPSPEED,
        GROUPED,
        {
            "1.word_embeddings.weight": WORDS,
            "5.weight": "norm tensor 1",
            "6.lm_head.weight": "output row 96",
            **under("3.", layer(GQA, width=160), norms("input_layernorm", "post_attention_layernorm")),
        },
    ),
    "GPT-NeoX": (
        "gpt_neox",
        NEOX,
        (),
        {
            "0.word_embeddings.weight": WORDS,
            **norms("4.norm", bias=True),
            "5.final_linear.weight": "output row 96",
            **under("2.", layer(MHA, MHA_BIAS, "attention", ("linear1", "linear2")), LAYER_NORMS),
        },
    ),
    "GPT-NeoX, grouped queries": (
        "gpt_neox_grouped",
        NEOX_GROUPED,
        (),
        {
            "tied_modules.embed.word_embeddings.weight": WORDS,
            "2.input_layernorm.scale": "norm tensor 1",
            "2.post_attention_layernorm.scale": "norm tensor 1",
            "4.norm.scale": "norm tensor 1",
            **under("2.", layer(GQA, attention="attention")),
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_recorded_parameter_is_what_its_code_makes_of_it(name):
    """These codebases have no package to test against, and most of the large models of their time came from them."""
    source, attention, rules, expected = MODELS[name]
    assert tags_of(recorded(source, attention), rules=rules) == expected


def roles_of_rows(model, name):
    return [part.role.value for part in dict(model.named_parameters())[name].block_spec.parts]


@pytest.mark.parametrize(
    ("source", "attention", "rules", "weight", "expected"),
    [
        ("megatron_lm_legacy", MEGATRON_LM, (), f"{ENCODER}layers.0.self_attention", ["query", "key", "value"] * 2),
        ("megatron_deepspeed_pipe", MEGATRON_DEEPSPEED, GROUPED, "2.self_attention", ["query", "key", "value"] * 2),
        ("megatron_deepspeed_pipe", MEGATRON_DEEPSPEED, CONCAT, "2.self_attention", ["query", "key", "value"]),
        ("gpt_neox", NEOX, (), "2.attention", ["query", "key", "value"] * 4),
        ("gpt_neox_grouped", NEOX_GROUPED, (), "2.attention", ["query", "key", "value"]),
    ],
)
def test_the_order_of_rows_follows_the_module_or_the_rule(source, attention, rules, weight, expected):
    """The tables above count blocks, which two layouts may have in common; this looks at where they lie."""
    model = recorded(source, attention)
    tag_parameters(model, rules=rules)
    assert roles_of_rows(model, f"{weight}.query_key_value.weight") == expected


AMBIGUOUS = {
    "Megatron-DeepSpeed": ("megatron_deepspeed_pipe", MEGATRON_DEEPSPEED, "ParallelAttention"),
    "an old Megatron-LM": ("gpt_neox", ("ParallelSelfAttention", LOCAL), "ParallelSelfAttention"),
    "somebody's fork": ("gpt_neox", ("FusedAttention", {"num_heads": 4}), "FusedAttention"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_layout_that_nothing_tells_must_be_given_and_the_error_says_how(name):
    """Megatron-DeepSpeed changed the order of rows in 2024-12 without a trace in names, shapes or attributes."""
    source, attention, class_name = AMBIGUOUS[name]
    with pytest.raises(ValueError) as caught:
        tag_parameters(recorded(source, attention))
    text = str(caught.value)
    assert f"neither its name nor {class_name} tells" in text and "verify_layout" in text
    (rule,) = proposed_rules(text)
    assert rule.pop("layout") == "?"
    counts = {"num_heads": 4, "num_kv_heads": 2 if source == "megatron_deepspeed_pipe" else 4}
    for layout in ("grouped", "concat"):
        assert f"\n  {layout}: " in text
        rules = [{**rule, **{key: counts[key] for key in rule if key in counts}, "layout": layout}]
        tag_parameters(recorded(source, attention), rules=rules)


class Group:
    """Size and rank of a process group."""

    def size(self):
        return 2

    def rank(self):
        return 1


def test_a_concatenated_weight_is_split_part_by_part(monkeypatch):
    """Each rank holds its heads' Q, K and V one after the other: its rows are three runs of the whole weight."""
    model = recorded("gpt_neox_grouped", ("ParallelSelfAttention", {**NEOX_GROUPED[1]}))
    attention = model._modules["2"].attention
    for name in ("num_attention_heads_per_partition", "num_kv_heads_per_partition"):
        setattr(attention, name, getattr(attention, name) // 2)
    attention.query_key_value.weight = nn.Parameter(torch.zeros(48, 48))
    attention.query_key_value.tp_group = Group()
    parallel = "megatron.core.parallel_state"
    monkeypatch.setattr(f"{parallel}.model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr(f"{parallel}.get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(f"{parallel}.get_tensor_model_parallel_rank", lambda: 1)
    monkeypatch.setattr(f"{parallel}.get_tensor_model_parallel_group", Group)
    monkeypatch.setattr("torch.distributed.get_process_group_ranks", lambda group: [0, 1])
    tag_parameters(model)
    weight = attention.query_key_value.weight
    assert weight.block_spec.num_blocks == 4 + 2 + 24
    halves = (((0, 24), (48, 60), (72, 84)), ((24, 48), (60, 72), (84, 96)))
    assert weight.block_shard == TensorShard((96, 48), 0, 1, halves)


def test_universal_checkpoints_do_not_join_a_concatenated_weight_as_if_it_were_one_run():
    """Joined along dimension 0 the rows of Q, K and V of all ranks would lie mixed, and load without complaint."""
    pytest.importorskip("deepspeed", reason="the patterns are for DeepSpeed's converter")
    from ds_blockwise.hosts.deepspeed.checkpoint.universal import _category
    from ds_blockwise.tagging.module_reader import TensorSplit

    weight = nn.Parameter(torch.zeros(6, 2))
    weight.block_shard = TensorShard((12, 2), 0, 0, (((0, 2), (4, 6), (8, 10)), ((2, 4), (6, 8), (10, 12))))
    assert "a shard is 3 runs of its rows" in _category(weight, TensorSplit(0))
    weight.block_shard = TensorShard.even((12, 2), 0, 0, 2)
    assert _category(weight, TensorSplit(0)) == ""


def test_a_numbered_layer_is_only_a_norm_if_its_class_is_one():
    """In a pipeline any layer may be called 4.weight."""
    model = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3, bias=False))
    with pytest.raises(ValueError, match=r"no naming rule matches parameter '1\.weight'") as caught:
        tag_parameters(model)
    assert "'0.weight'" not in str(caught.value)
