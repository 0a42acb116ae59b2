# SPDX-License-Identifier: Apache-2.0
"""Every parameter of real models gets exactly one role; unknown, ambiguous and indivisible parameters are errors."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from ds_blockwise import Role, tag_parameters
from ds_blockwise.tagging.names import canonical_fqn, match_name

transformers = pytest.importorskip("transformers", reason="the model lists come from transformers")

SMALL = dict(
    hidden_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=80,
    vocab_size=97,
    num_hidden_layers=2,
)


def meta(cls, config):
    with torch.device("meta"):
        return cls(config)


def roles_of(model):
    tag_parameters(model)
    return {name: [part.role.value for part in p.block_spec.parts] for name, p in model.named_parameters()}


def blocks_of(model):
    tag_parameters(model)
    return {name: p.block_spec.num_blocks for name, p in model.named_parameters()}


LLAMA_ROLES = {
    "model.embed_tokens.weight": ["embedding"],
    "model.layers.1.self_attn.q_proj.weight": ["query"],
    "model.layers.1.self_attn.k_proj.weight": ["key"],
    "model.layers.1.self_attn.v_proj.weight": ["value"],
    "model.layers.1.self_attn.o_proj.weight": ["attn_out"],
    "model.layers.1.mlp.gate_proj.weight": ["ffn"],
    "model.layers.1.mlp.up_proj.weight": ["ffn"],
    "model.layers.1.mlp.down_proj.weight": ["ffn"],
    "model.layers.1.input_layernorm.weight": ["norm"],
    "model.layers.1.post_attention_layernorm.weight": ["norm"],
    "model.norm.weight": ["norm"],
    "lm_head.weight": ["output"],
}


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_every_parameter_of_the_hugging_face_llama_family_has_its_role(family):
    """A weight read as the wrong role trains at a learning rate up to ten times off, and nothing else would show it."""
    config = getattr(transformers, f"{family}Config")(**SMALL)
    roles = roles_of(meta(getattr(transformers, f"{family}ForCausalLM"), config))
    expected = dict(LLAMA_ROLES)
    if family == "Qwen2":
        expected |= {
            f"model.layers.1.self_attn.{x}_proj.bias": [r]
            for x, r in zip("qkv", ("query", "key", "value"), strict=True)
        }
    if family == "Qwen3":
        expected |= {f"model.layers.1.self_attn.{x}_norm.weight": ["norm"] for x in "qk"}
    layer_1 = {k: v for k, v in roles.items() if "layers.0." not in k}
    assert layer_1 == expected


def test_an_explicit_head_dim_decides_the_head_size_not_the_hidden_size():
    """Qwen3 and Gemma-like models: 4 heads of 16 on a hidden size of 48 are 64 rows, 48 // 4 would be wrong."""
    config = transformers.Qwen3Config(**SMALL, head_dim=16)
    blocks = blocks_of(meta(transformers.Qwen3ForCausalLM, config))
    assert blocks["model.layers.0.self_attn.q_proj.weight"] == 4
    assert blocks["model.layers.0.self_attn.k_proj.weight"] == 2
    assert blocks["model.layers.0.self_attn.v_proj.weight"] == 32
    assert blocks["model.layers.0.self_attn.q_norm.weight"] == 0, "element-wise: no second moment is shared"


def test_gpt2_conv1d_blocks_run_along_the_output_columns():
    """Conv1D stores [in, out]; rows of the storage are inputs, and a row-wise second moment would mix all outputs."""
    config = transformers.GPT2Config(n_embd=48, n_head=4, n_layer=1, vocab_size=97, n_positions=16)
    model = meta(transformers.GPT2LMHeadModel, config)
    roles = roles_of(model)
    assert roles["transformer.h.0.attn.c_attn.weight"] == ["query", "key", "value"]
    spec = dict(model.named_parameters())["transformer.h.0.attn.c_attn.weight"].block_spec
    assert (spec.axis, spec.num_blocks) == (1, 4 + 4 + 48)
    assert roles["transformer.wte.weight"] == ["embedding"] and roles["transformer.wpe.weight"] == ["embedding"]
    assert dict(model.named_parameters())["transformer.h.0.mlp.c_fc.weight"].block_spec.num_blocks == 192
    assert roles["transformer.ln_f.bias"] == ["norm"]


class CausalSelfAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.n_head, self.n_embd = heads, dim
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)


class NanoBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = CausalSelfAttention(dim, heads)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(dim, 4 * dim), "c_proj": nn.Linear(4 * dim, dim)})


class NanoGPT(nn.Module):
    def __init__(self, dim=24, heads=3, vocab=17, tied=True):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, dim),
                "wpe": nn.Embedding(8, dim),
                "h": nn.ModuleList([NanoBlock(dim, heads)]),
                "ln_f": nn.LayerNorm(dim),
            }
        )
        self.lm_head = nn.Linear(dim, vocab, bias=False)
        if tied:
            self.transformer["wte"].weight = self.lm_head.weight


@pytest.mark.parametrize("tied", [True, False])
def test_nanogpt_tied_output_is_an_embedding_and_an_untied_one_a_head(tied):
    """One shared weight must have one role: the embedding's."""
    roles = roles_of(NanoGPT(tied=tied))
    assert roles["transformer.wte.weight"] == ["embedding"]
    assert roles.get("lm_head.weight") == (None if tied else ["output"])
    assert roles["transformer.h.0.attn.c_attn.weight"] == ["query", "key", "value"]


def test_a_tied_weight_is_an_embedding_even_if_the_head_is_registered_first():
    """named_parameters() only yields the first name; the role must not depend on the order of registration."""

    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(8, 5, bias=False)
            self.embed_tokens = nn.Embedding(5, 8)
            self.embed_tokens.weight = self.lm_head.weight

    assert roles_of(HeadFirst()) == {"lm_head.weight": ["embedding"]}


@pytest.mark.parametrize("prefix", ["", "module.", "module.module.", "_orig_mod.", "module._orig_mod."])
def test_names_survive_the_prefixes_of_wrappers(prefix):
    """DDP, DeepSpeed and torch.compile prepend names of their own."""
    match = match_name(f"{prefix}model.layers.0.self_attn.q_proj.weight")
    assert match is not None and match.role is Role.QUERY
    assert canonical_fqn(f"{prefix}model.norm.weight") == "model.norm.weight"


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.self_attention.linear_qkv_down_proj.weight",
        "decoder.layers.0.self_attention.linear_qkv.layer_norm",
        "encoder.layers.0.self_attn.in_proj_weight",
        "transformer.h.0.attn.qkv_projection.weight",
        "encoder.layer.0.bottleneck.attention.dense.weight",
        "horizon_ff_layer.output_layer.weight",
        "model.layers.0.input_layernorm.mlp.fc1.weight",
        "model.layers.0.self_attn.lambda_q1",
        "model.layers.0.mlp.experts.gate_up_proj.weight",
        "layers.0.mlp.routers.weight",
        "0.weight",
        "wo.weight",
        "my_word_embeddings.weight",
    ],
)
def test_names_that_no_rule_knows_match_nothing(name):
    """Adam-mini's substring rules read several of these as something else without a word."""
    assert match_name(name) is None


def test_a_gate_without_experts_is_no_router():
    """Half of a gated FFN under that name would train at a sixth of its rate."""
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"gate": nn.Linear(4, 8, bias=False)})})
    with pytest.raises(ValueError, match=r"no naming rule matches parameter 'mlp\.gate\.weight'"):
        tag_parameters(model)
    model["mlp"].experts = nn.ModuleList()
    assert roles_of(model) == {"mlp.gate.weight": ["router"]}


def test_rules_give_roles_to_unknown_parameters_and_override_known_ones():
    """The documented way to use the optimizers on a model of one's own."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 12, bias=False))
    report = tag_parameters(
        model,
        rules=[
            {"match": r"^0\.", "role": "ffn"},
            {"match": r"^1\.weight", "role": "qkv", "layout": "concat", "num_heads": 2, "lr_multiplier": 3},
        ],
    )
    rows = {(row.fqn, row.role): row for row in report.rows}
    assert rows["0.weight", "ffn"].lr_multiplier == 0.75 and rows["0.bias", "ffn bias"].granularity == "element"
    assert rows["1.weight", "query"].num_blocks == 2 and rows["1.weight", "value"].num_blocks == 4
    assert rows["1.weight", "value"].lr_multiplier == 3


def test_roles_and_block_types_may_both_be_keys_and_the_role_wins():
    """`"vo": 4, "value": 5` means 5 for V and 4 for the attention output."""
    model = meta(transformers.LlamaForCausalLM, transformers.LlamaConfig(**SMALL))
    report = tag_parameters(model, lr_multipliers={"vo": 4, "value": 5}, granularity={"value": "tensor", "norm": "row"})
    by_role = {row.role: row for row in report.rows}
    assert (by_role["value"].lr_multiplier, by_role["attn_out"].lr_multiplier) == (5, 4)
    assert (by_role["value"].num_blocks, by_role["norm"].num_blocks) == (1, 48)


def test_importing_megatron_patch_changes_nothing_for_other_models():
    """Its reader is asked about every module; without Megatron's process groups it must not ask for their size."""
    pytest.importorskip("megatron.core", reason="needs Megatron-core")
    code = """
import torch, megatron_patch, ds_blockwise
model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(4, 3, bias=False)})
print(ds_blockwise.tag_parameters(model))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "lm_head.weight" in done.stdout, done.stderr


def test_a_frozen_parameter_needs_no_role():
    """Fine-tuning freezes parts whose names nobody knows; they are never stepped."""
    model = nn.ModuleDict({"lm_head": nn.Linear(4, 4, bias=False), "vision": nn.Linear(4, 4)})
    model["vision"].requires_grad_(False)
    assert [row.fqn for row in tag_parameters(model).rows] == ["lm_head.weight"]
