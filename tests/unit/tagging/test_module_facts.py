# SPDX-License-Identifier: Apache-2.0
"""What a module's class and attributes say, on modules that have nothing but these."""

from types import SimpleNamespace

import pytest
from torch import nn

from ds_blockwise.blocks.structure import HeadGeometry
from ds_blockwise.tagging.module_facts import fused_qkv_layout, generic_heads, num_experts_in, storage_of


def module(name, **attributes):
    """A module whose class has a name; classes are recognised by name only."""
    made = type(name, (nn.Module,), {})()
    for key, value in attributes.items():
        setattr(made, key, value)
    return made


@pytest.mark.parametrize(
    ("attention", "linear", "layout"),
    [
        (module("BloomAttention"), "query_key_value", "grouped"),
        (module("FalconAttention", new_decoder_architecture=False, multi_query=True), "query_key_value", "concat"),
        (module("FalconAttention", new_decoder_architecture=False, multi_query=False), "query_key_value", "grouped"),
        (module("FalconAttention", new_decoder_architecture=True, multi_query=True), "query_key_value", "grouped"),
        (module("GPTBigCodeAttention", multi_query=True), "c_attn", "concat"),
        (module("GPTBigCodeAttention", multi_query=False), "c_attn", "grouped"),
        (module("ParallelSelfAttention", gqa=True), "query_key_value", "concat"),
        (module("ParallelSelfAttention", gqa=False), "query_key_value", "grouped"),
        (module("ParallelSelfAttention"), "query_key_value", None),
        (module("ParallelAttention", num_query_groups_per_partition=2), "query_key_value", "grouped"),
        (module("ParallelAttention"), "query_key_value", None),
        (module("Qwen3NextAttention"), "q_proj", "query_gate"),
        (module("Qwen3NextAttention"), "k_proj", None),
        (module("GPT2Attention", is_cross_attention=False), "c_attn", "concat"),
        (module("GPT2Attention", is_cross_attention=True), "c_attn", "key_value_concat"),
        (module("GPTBigCodeAttention", multi_query=False, is_cross_attention=True), "c_attn", None),
        (module("MiniMaxLightningAttention"), "qkv_proj", "grouped"),
        (module("Phi3Attention"), "qkv_proj", "concat"),
        (module("Attention"), "c_attn", None),
        (module("VisionAttention"), "qkv", None),
        (module("MyAttention"), "qkv_proj", None),
    ],
)
def test_the_class_fixes_the_order_of_rows(attention, linear, layout):
    """One name, several layouts; None leaves it to the name or a rule."""
    assert fused_qkv_layout(attention, linear) == layout


def test_a_class_derived_from_a_known_one_is_known():
    """Wrappers and flash variants subclass the attention that they replace."""
    derived = type("BloomFlashAttention", (type(module("BloomAttention")),), {})()
    assert fused_qkv_layout(derived, "query_key_value") == "grouped"


CONFIG = SimpleNamespace(num_attention_heads=8, num_key_value_heads=2, head_dim=16)


def test_head_counts_come_from_the_module_then_from_its_config():
    """`config_first` is for modules whose attributes a tensor-parallel wrapper has divided."""
    attention = module("Attention", num_heads=4, config=CONFIG)
    assert generic_heads(attention) == HeadGeometry(4, 2, 16, "Attention.num_heads=4")
    from_config = HeadGeometry(8, 2, 16, "SimpleNamespace.num_attention_heads=8")
    assert generic_heads(attention, config_first=True) == from_config
    assert generic_heads(module("Attention", config=CONFIG)) == from_config


def test_without_a_count_of_key_heads_every_query_head_has_its_own():
    """The head size is never computed from the hidden size."""
    assert generic_heads(module("Attention", n_head=3, hidden_size=12)) == HeadGeometry(
        3, 3, None, "Attention.n_head=3"
    )
    assert generic_heads(module("BloomAttention", num_heads=8, config=CONFIG)).num_kv_heads == 8
    assert generic_heads(module("Attention", hidden_size=12)) is None
    assert generic_heads(module("Attention", num_heads=True)) is None, "a switch is no count"


def test_heads_of_latent_attention():
    """A query head has the rows without and with rotation; head_dim of such configs is the rotary part only."""
    config = SimpleNamespace(qk_nope_head_dim=6, qk_rope_head_dim=2, v_head_dim=5, head_dim=2, num_key_value_heads=1)
    heads = generic_heads(module("DeepseekV3Attention", num_heads=4, config=config))
    assert heads == HeadGeometry(4, 4, 8, "DeepseekV3Attention.num_heads=4", key_dim=6, value_dim=5, rope_dim=2)


@pytest.mark.parametrize(
    ("owner", "storage"),
    [
        (nn.Linear(2, 3), None),
        (module("Conv1D", nf=3), "in_out"),
        (module("Conv1D"), None),
        (module("Experts", is_transposed=True), "in_out"),
        (module("Experts", is_transposed=False), "out_in"),
        (module("Llama4TextExperts"), "in_out"),
    ],
)
def test_storage_of_matrices(owner, storage):
    """A block of a transposed weight is a column; read as a row it would mix all outputs."""
    assert storage_of(owner) == storage


def test_number_of_experts():
    """Of this rank, as Megatron-core's classes call it."""
    assert num_experts_in(module("GroupedMLP", num_local_experts=3)) == 3
    assert num_experts_in(module("TEGroupedLinear", num_gemms=2)) == 2
    assert num_experts_in(nn.Linear(2, 2)) is None


class PerLayer(SimpleNamespace):
    """A config as transformers has where layers differ: the whole model's value raises RuntimeError."""

    is_heterogeneous = True

    def __getattribute__(self, name):
        if name == "num_key_value_heads":
            raise RuntimeError("ambiguous")
        return super().__getattribute__(name)


def test_heads_of_a_layer_whose_config_differs_from_its_neighbours():
    """Gemma 4's full and sliding layers differ in their key heads; asking the whole model's config raises."""
    layers = [SimpleNamespace(num_attention_heads=8, num_key_value_heads=n, head_dim=16) for n in (4, 1)]
    config = PerLayer(num_attention_heads=8, per_layer_config=layers)
    counts = [generic_heads(module("Attention", config=config, layer_idx=i)).num_kv_heads for i in (0, 1)]
    assert counts == [4, 1]
    assert generic_heads(module("Attention", config=config)) is None
