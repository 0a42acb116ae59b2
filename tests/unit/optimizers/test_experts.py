# SPDX-License-Identifier: Apache-2.0
"""Weights that hold several experts in one tensor train like the same experts in tensors of their own.

Three ways to store them are in use: [experts, out, in] (transformers 5), [experts, in, out] (GPT-OSS, Llama 4), and
Megatron-core's legacy GroupedMLP, whose two-dimensional shapes say nothing about where an expert lies.
"""

import json

import pytest
import torch
from torch import nn

from ds_blockwise import BlockwiseAdamMini, tag_parameters
from ds_blockwise.checkpoint.record import record_of, spec_of, table_of
from ds_blockwise.optimizers.registry import OPTIMIZERS
from tests.helpers.optimizers import SHORT_NAMES

EXPERTS, HIDDEN, WIDTH = 3, 5, 4
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}


class Stacked(nn.Module):
    """Experts as transformers 5 holds them; ``is_transposed`` is its own attribute."""

    def __init__(self, transposed):
        super().__init__()
        self.is_transposed = transposed
        shapes = {"gate_up_proj": (EXPERTS, 2 * WIDTH, HIDDEN), "down_proj": (EXPERTS, HIDDEN, WIDTH)}
        for name, (count, outputs, inputs) in shapes.items():
            shape = (count, inputs, outputs) if transposed else (count, outputs, inputs)
            setattr(self, name, nn.Parameter(torch.zeros(shape)))

    def matrices(self, tensors):
        """[experts] lists of [out, in] tensors, from tensors of the parameters' shapes."""
        return {n: [m.T if self.is_transposed else m for m in tensors[n]] for n in ("gate_up_proj", "down_proj")}


class GroupedMLP(nn.Module):
    """Storage of Megatron-core's legacy class: ``weight1.view(experts, hidden, -1)``, the same way for weight2."""

    def __init__(self):
        super().__init__()
        self.num_local_experts = EXPERTS
        self.weight1 = nn.Parameter(torch.zeros(HIDDEN, EXPERTS * 2 * WIDTH))
        self.weight2 = nn.Parameter(torch.zeros(EXPERTS * WIDTH, HIDDEN))

    def matrices(self, tensors):
        return {
            "weight1": [m.T for m in tensors["weight1"].reshape(EXPERTS, HIDDEN, 2 * WIDTH)],
            "weight2": [m.T for m in tensors["weight2"].reshape(EXPERTS, WIDTH, HIDDEN)],
        }


KINDS = {"out_in": lambda: Stacked(False), "in_out": lambda: Stacked(True), "grouped": GroupedMLP}


def model_of(kind):
    return nn.ModuleDict({"mlp": nn.ModuleDict({"experts": KINDS[kind]()})})


def separate(experts, start):
    """The same experts as linears with names that Hugging Face used before version 5."""
    model = nn.Module()
    model.experts = nn.ModuleList()
    (first, ups), (second, downs) = experts.matrices(start).items()
    for up, down in zip(ups, downs, strict=True):
        expert = nn.ModuleDict(
            {"up_proj": nn.Linear(HIDDEN, 2 * WIDTH, bias=False), "down_proj": nn.Linear(WIDTH, HIDDEN, bias=False)}
        )
        with torch.no_grad():
            expert["up_proj"].weight.copy_(up)
            expert["down_proj"].weight.copy_(down)
        model.experts.append(expert)
    return model, {first: "up_proj", second: "down_proj"}


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("optimizer", [OPTIMIZERS[name] for name in SHORT_NAMES])
@pytest.mark.parametrize("kind", KINDS)
def test_stacked_experts_train_like_separate_ones(kind, optimizer, backend):
    """One second moment over the wrong axis, or over all experts, is invisible in a loss curve of a few steps."""
    torch.manual_seed(0)
    model = model_of(kind)
    experts = model["mlp"]["experts"]
    start = {n: torch.randn_like(p) for n, p in experts.named_parameters()}
    reference, names = separate(experts, start)
    with torch.no_grad():
        for name, p in experts.named_parameters():
            p.copy_(start[name])
    tag_parameters(model)
    tag_parameters(reference)
    ours = optimizer(model.parameters(), backend=backend, **SETTINGS)
    theirs = optimizer(reference.parameters(), backend=backend, **SETTINGS)
    for step in range(3):
        gradients = {n: torch.randn_like(p) * 10.0 ** (step - 1) for n, p in experts.named_parameters()}
        for name, p in experts.named_parameters():
            p.grad = gradients[name].clone()
        for name, matrices in experts.matrices(gradients).items():
            for expert, gradient in zip(reference.experts, matrices, strict=True):
                expert[names[name]].weight.grad = gradient.contiguous()
        ours.step()
        theirs.step()
        now = experts.matrices(dict(experts.named_parameters()))
        for name, matrices in now.items():
            for expert, matrix in zip(reference.experts, matrices, strict=True):
                # sums of squares of a strided row may be added in another order
                torch.testing.assert_close(matrix, expert[names[name]].weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_rows_of_experts(kind):
    """An output neuron of an expert, whichever axis it lies along."""
    report = tag_parameters(model_of(kind))
    assert [(row.role, row.granularity, row.num_blocks) for row in report.rows] == [
        ("ffn", "row", EXPERTS * 2 * WIDTH),
        ("ffn", "row", EXPERTS * HIDDEN),
    ]
    report = tag_parameters(model_of(kind), granularity={"ffn": "tensor"})
    assert [row.num_blocks for row in report.rows] == [EXPERTS, EXPERTS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_remembers_where_experts_lie(kind):
    """Offline tools rebuild the segment table from the record alone; without the matrices it would be another one."""
    model = model_of(kind)
    tag_parameters(model)
    optimizer = BlockwiseAdamMini(model.parameters(), **SETTINGS)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    record = json.loads(json.dumps(record_of(optimizer, "test")))
    for index, (name, p) in enumerate(model.named_parameters()):
        spec = spec_of(record, name)
        assert spec.structure == p.block_spec.structure and spec.num_blocks == p.block_spec.num_blocks
        assert table_of(record, index).runs == optimizer.binding_of(p).table.runs


def test_a_3d_weight_that_does_not_say_where_its_outputs_are_is_refused():
    """Half of the model classes store experts one way, half the other."""
    model = model_of("out_in")
    del model["mlp"]["experts"].is_transposed
    with pytest.raises(ValueError, match=r'"storage": "\?"[^?]* write one of\n  out_in: .*\n  in_out: ') as caught:
        tag_parameters(model)
    assert "mlp.experts.gate_up_proj" in str(caught.value)
    rules = [{"match": "experts", "storage": "in_out"}]
    report = tag_parameters(model, rules=rules)
    assert [row.num_blocks for row in report.rows] == [EXPERTS * HIDDEN, EXPERTS * WIDTH]
    assert all(p.block_spec.axis == 2 for p in model.parameters())
    with pytest.raises(ValueError, match=r"rules\[0\]\.storage must be one of out_in, in_out, got 'rows'"):
        tag_parameters(model, rules=[{"match": "experts", "storage": "rows"}])


def test_a_rule_declares_a_transposed_linear():
    """A linear of one's own that stores [in, out]: blocks must run along its columns."""
    model = nn.Module()
    model.kernel = nn.Parameter(torch.zeros(3, 7))
    tag_parameters(model, rules=[{"match": "kernel", "role": "ffn", "storage": "in_out"}])
    assert (model.kernel.block_spec.axis, model.kernel.block_spec.num_blocks) == (1, 7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ["ffn", "other"])
def test_a_rule_for_the_role_leaves_the_storage_alone(kind, role):
    """Another multiplier for experts is a usual wish; it must not turn columns into rows."""
    tagged, ruled = model_of(kind), model_of(kind)
    tag_parameters(tagged)
    tag_parameters(ruled, rules=[{"match": "experts", "role": role, "lr_multiplier": 2}])
    for (name, p), q in zip(tagged.named_parameters(), ruled.parameters(), strict=True):
        assert q.block_spec.structure.matrices == p.block_spec.structure.matrices, name
        assert (q.block_spec.axis, q.block_spec.num_blocks) == (p.block_spec.axis, p.block_spec.num_blocks)


def test_a_grouped_mlp_that_does_not_say_how_many_experts_it_holds_is_refused():
    """Its shape has room for any number of them."""
    model = model_of("grouped")
    del model["mlp"]["experts"].num_local_experts
    with pytest.raises(ValueError, match="does not say how many"):
        tag_parameters(model)
