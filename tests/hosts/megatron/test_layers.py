# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's layers: every parameter of real models against tables written by hand, and probed by function.

Models of the Transformer Engine specs are Megatron-core's classes around the stand-ins of `te_fakes`.
"""

import pytest
import torch
from torch import nn

from ds_blockwise import tag_parameters, verify_layout
from ds_blockwise.tagging.module_reader import tensor_splits
from tests.helpers.tables.huggingface import under
from tests.unit.tagging.test_families import tags_of

pytest.importorskip("megatron.core", reason="the layers are Megatron-core's")
from megatron.core.transformer.moe import experts

import megatron_patch
from megatron_patch.reader import MegatronReader
from tests.helpers.megatron import models
from tests.helpers.tables.megatron import LAYER, MODELS

CANNOT_RUN = {
    "te experts": "the stand-ins of grouped linears have no forward",
    "te experts in one tensor": "the stand-ins of grouped linears have no forward",
    "te with a learnable softmax": "the stand-in has no sink; its attention is that of the case te",
    "bert": "its default spec needs a padding mask; linear_qkv is that of gpt with biases",
}


@pytest.fixture(scope="module", autouse=True)
def groups():
    megatron_patch.cpu_shims()
    # Megatron-core compiles the output gate, which takes longer than all tests of this file
    with models.alone(), models.te_symbols(), torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_a_megatron_core_model(name):
    """Fused weights, fused norms, experts and latent projections: a substring rule reads most of them wrongly."""
    make, expected = MODELS[name]
    assert tags_of(make()) == expected


@pytest.mark.parametrize("name", [name for name in MODELS if name not in CANNOT_RUN])
def test_megatron_core_computes_attention_as_it_is_tagged(name):
    """Zero the keys and no query has a gradient: the only proof of a fused layout that needs no reading of code."""
    outputs = models.t5_outputs if name == "t5" else None
    assert verify_layout(MODELS[name][0](), outputs).num_checks >= 4


@pytest.mark.parametrize(
    ("name", "reading"),
    [
        ("llama", {"layout": "concat", "num_heads": 4, "num_kv_heads": 2}),
        ("llama", {"layout": "grouped", "num_heads": 6, "num_kv_heads": 1}),
        ("output gate", {"layout": "grouped", "num_heads": 4, "num_kv_heads": 4}),
        ("output gate", {"layout": "grouped_gate", "num_heads": 2, "num_kv_heads": 1}),
        ("te", {"layout": "concat", "num_heads": 4, "num_kv_heads": 2}),
    ],
)
def test_a_wrong_reading_of_linear_qkv_is_caught(name, reading):
    """The gate has as many rows as the queries, so several wrong readings fit the shape."""
    rules = [{"match": "linear_qkv.weight", "role": "qkv", **reading}]
    with pytest.raises(ValueError, match="does not compute attention as its weights are tagged"):
        verify_layout(MODELS[name][0](), rules=rules)


BEFORE = {"input_layernorm": "norm_in", "pre_mlp_layernorm": "norm_in", "final_layernorm": "norm_in"}
ON_HEADS = {"q_layernorm": "norm_qk", "k_layernorm": "norm_qk"}
FUSED = {"linear_qkv": "norm_in", "linear_fc1": "norm_in"}
PLACES = {
    "llama": BEFORE,
    "gpt with biases, q/k norms, tied": BEFORE | ON_HEADS,
    "te": FUSED | {"final_layernorm": "norm_in"},
    "latent attention": BEFORE | {"q_layernorm": None, "kv_layernorm": None},  # norms of latents are neither
    "te latent attention": BEFORE | {"linear_q_up_proj": None, "linear_kv_up_proj": None},
}


@pytest.mark.parametrize("name", PLACES)
def test_where_norms_stand(name):
    """Decay helps the gains of norms before projections and hurts those on heads; a fused norm feeds its linear."""
    model = MODELS[name][0]()
    rows = [row for row in tag_parameters(model).rows if row.role == "norm"]
    assert {row.fqn.split(".")[-2]: row.norm_place for row in rows} == PLACES[name]


def test_the_copy_of_a_tied_embedding_on_the_last_pipeline_stage_is_an_embedding():
    """Its name says output layer. With another multiplier than the first stage's copy the two would drift apart."""
    model = models.gpt(**models.LLAMA)
    assert tags_of(model)["output_layer.weight"] == "output row 96"
    model.output_layer.weight.shared_embedding = True
    assert tags_of(model)["output_layer.weight"] == "embedding row 96"


def test_a_module_is_known_wherever_it_sits():
    """Names inside a module are its class's own; what the model around it calls it does not matter."""
    layer = models.gpt(models.te_spec(), **models.LLAMA).decoder.layers[0]
    model = nn.ModuleDict({"first": layer.self_attention, "second": layer.mlp})
    assert tags_of(model) == {
        "first.linear_qkv.weight": "query head 4 + key head 2 + value row 24",
        "first.linear_qkv.layer_norm_weight": "norm tensor 1",
        "first.linear_proj.weight": "attn_out row 48",
        "second.linear_fc1.weight": "ffn row 160",
        "second.linear_fc1.layer_norm_weight": "norm tensor 1",
        "second.linear_fc2.weight": "ffn row 48",
    }


def test_layers_of_one_model_may_have_different_heads():
    """Heterogeneous models give each layer a config of its own; the model's config would be wrong for some."""
    first = models.gpt(**models.LLAMA).decoder.layers[0]
    second = models.gpt(**models.LLAMA, num_query_groups=4).decoder.layers[0]
    found = tags_of(nn.ModuleDict({"0": first, "1": second}))
    assert found["0.self_attention.linear_qkv.weight"] == "query head 4 + key head 2 + value row 24"
    assert found["1.self_attention.linear_qkv.weight"] == "query head 4 + key head 4 + value row 48"


def skeleton(cls, **children):
    """An instance of a class that cannot be built here, with the modules and parameters that its __init__ registers."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name, child in children.items():
        setattr(module, name, child)
    return module


def parameter(*shape, **marks):
    made = nn.Parameter(torch.zeros(shape))
    for name, value in marks.items():
        setattr(made, name, value)
    return made


def mamba():
    """Hybrid models: registered as in ``ssm/mamba_mixer.py``; the name of the tower says nothing about it."""
    from megatron.core.ssm.mamba_mixer import MambaMixer

    conv = nn.Conv1d(112, 112, 4, groups=112)
    for p in conv.parameters():
        p.tensor_model_parallel = True
    marked = {"tensor_model_parallel": True}
    mixer = skeleton(
        MambaMixer,
        in_proj=nn.Linear(48, 212, bias=False),
        conv1d=conv,
        dt_bias=parameter(4, **marked),
        A_log=parameter(4, **marked),
        D=parameter(4, **marked),
        norm=nn.RMSNorm(96),
        out_proj=nn.Linear(96, 48, bias=False),
    )
    return nn.ModuleDict({"tower": nn.ModuleDict({"mixer": mixer})})


def test_mamba_mixers_are_other_but_for_their_norm():
    """The paper has no class for state-space weights; they keep the base learning rate."""
    assert tags_of(mamba()) == under(
        "tower.mixer.",
        {
            "in_proj.weight": "other row 212",
            "conv1d.weight": "other row 112",
            "conv1d.bias": "other bias element 112",
            "dt_bias": "other row 4",
            "A_log": "other row 4",
            "D": "other row 4",
            "norm.weight": "norm tensor 1",
            "out_proj.weight": "other row 48",
        },
    )


HAS_GROUPED_MLP = pytest.mark.skipif(
    not hasattr(experts, "GroupedMLP"), reason="Megatron-core has no GroupedMLP from 0.17 on"
)


def grouped_mlp():
    weights = {"weight1": parameter(5, 3 * 8), "weight2": parameter(3 * 4, 5)}
    grouped = skeleton(experts.GroupedMLP, num_local_experts=3, **weights)
    return nn.ModuleDict({"mlp": nn.ModuleDict({"experts": grouped})})


@HAS_GROUPED_MLP
def test_the_legacy_grouped_mlp_has_a_block_per_output_column_of_an_expert():
    """Its two-dimensional shape is a disguise: rows of the shape are neither inputs nor outputs of one expert."""
    model = grouped_mlp()
    assert tags_of(model) == {"mlp.experts.weight1": "ffn row 24", "mlp.experts.weight2": "ffn row 15"}
    grouped = model["mlp"]["experts"]
    assert grouped.weight1.block_spec.structure.matrices == (3, 5, 8)
    assert grouped.weight2.block_spec.structure.matrices == (3, 4, 5)
    assert grouped.weight1.block_spec.axis == grouped.weight2.block_spec.axis == 2


class Group:
    """A process group as far as its size and rank are asked for."""

    def __init__(self, size, rank=0):
        self._size, self._rank = size, rank

    def size(self):
        return self._size

    def rank(self):
        return self._rank


@HAS_GROUPED_MLP
def test_the_legacy_grouped_mlp_is_refused_where_it_is_split():
    """Treating a shard as a whole would give each rank a second moment of its own, and the ranks drift apart."""
    model = grouped_mlp()
    model["mlp"]["experts"].tp_group = Group(2)
    with pytest.raises(
        ValueError,
        match=r"parameter 'mlp\.experts\.weight1': GroupedMLP\.weight1 is split over 2 tensor-parallel ranks",
    ):
        tag_parameters(model)


def test_a_mixer_is_refused_where_it_is_split(monkeypatch):
    """As above; it packs several tensors into one."""
    monkeypatch.setattr("megatron_patch.reader._tensor_parallel", lambda: (2, 0))
    with pytest.raises(ValueError, match=r"(?s)MambaMixer\.dt_bias is split over 2 .*Conv1d\.weight is split over 2"):
        tag_parameters(mamba())


def test_weights_that_are_rematerialised_are_refused_by_the_name_of_the_setting():
    """0.19 cuts rows over ranks that tensor parallelism does not know: heads would be counted in a part of them."""
    model = models.gpt(**models.LLAMA)
    attention = model.decoder.layers[0].self_attention
    half = parameter(48, 48, tensor_model_parallel=True, partition_dim=0, is_gtp_weight_remat=True)
    attention.linear_qkv.weight = half
    setting = r"linear_qkv\.weight': .*Set tensor_parallel_num_weight_shards to tensor_model_parallel_size"
    with pytest.raises(ValueError, match=setting):
        tag_parameters(model)


def test_experts_split_over_other_ranks_than_the_dense_layers_are_refused(monkeypatch):
    """Sums of a block travel over the tensor-parallel group; another group would add up other experts' rows."""
    model = models.gpt(models.te_spec(experts=True), **models.EXPERTS)
    model.decoder.layers[0].mlp.experts.linear_fc2._tp_group = Group(2)
    ranks = {True: [0, 4], False: [0, 1]}
    monkeypatch.setattr("torch.distributed.get_process_group_ranks", lambda g: ranks[isinstance(g, Group)])
    with pytest.raises(ValueError, match=r"split over ranks \[0, 4\], but .* is \[0, 1\]. Set expert_tensor_parallel"):
        tag_parameters(model)


def test_splits_of_transformer_engine_layers_come_from_their_classes():
    """Their attributes say dimension 0 for the rows of expert weights and for weights that every rank holds whole."""
    found = {}
    for spec, config in (
        (models.te_spec(), models.LLAMA),
        (models.te_spec(experts=True), {**models.EXPERTS, "expert_model_parallel_size": 1}),
        (models.te_spec(experts=True, single=True), models.EXPERTS),
        (models.latent_spec(te=True), models.LATENT),
    ):
        model = models.gpt(spec, **config)
        names = {p: n.removeprefix(LAYER) for n, p in model.named_parameters()}
        splits = tensor_splits(model)
        for p, name in names.items():
            split = splits.get(p)
            found[name, p.ndim] = None if split is None else (split.dim, split.parts)
    expected = {
        ("embedding.word_embeddings.weight", 2): (0, 1),
        ("output_layer.weight", 2): (0, 1),
        ("self_attention.linear_qkv.weight", 2): (0, 1),
        ("self_attention.linear_qkv.layer_norm_weight", 1): None,
        ("self_attention.linear_proj.weight", 2): (1, 1),
        ("mlp.linear_fc1.weight", 2): (0, 2),
        ("mlp.linear_fc1.layer_norm_weight", 1): None,
        ("mlp.linear_fc2.weight", 2): (1, 1),
        ("mlp.experts.linear_fc1.weight0", 2): (0, 2),
        ("mlp.experts.linear_fc2.weight3", 2): (1, 1),
        ("mlp.experts.linear_fc1.weight", 3): (1, 2),
        ("mlp.experts.linear_fc2.weight", 3): (2, 1),
        ("mlp.router.weight", 2): None,
        ("mlp.shared_experts.gate_weight", 2): None,
        ("mlp.shared_experts.linear_fc1.weight", 2): (0, 2),
        ("mlp.shared_experts.linear_fc2.weight", 2): (1, 1),
        ("self_attention.linear_q_down_proj.weight", 2): None,
        ("self_attention.linear_kv_down_proj.weight", 2): None,
        ("self_attention.linear_q_up_proj.weight", 2): (0, 1),
        ("self_attention.linear_kv_up_proj.weight", 2): (0, 1),
    }
    assert {key: found[key] for key in expected} == expected


def test_a_duplicated_linear_is_not_refused_for_its_marks():
    """Transformer Engine marks it as split on dimension 0; every rank holds all of it."""
    model = models.gpt(models.latent_spec(te=True), **models.LATENT)
    down = model.decoder.layers[0].self_attention.linear_kv_down_proj
    assert down.weight.tensor_model_parallel and down.weight.partition_dim == 0
    down._tp_group = Group(4)
    assert MegatronReader().shard(down, down.weight, "weight") is None
