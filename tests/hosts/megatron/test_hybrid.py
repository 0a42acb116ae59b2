# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's `HybridModel`, whose layers are halves of transformer layers, against the same `GPTModel`."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from ds_blockwise import (
    BlockwiseAdamMini,
    BlockwiseAdamW,
    BlockwiseLion,
    BlockwiseMuon,
    tag_parameters,
    verify_layout,
)
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from tests.helpers.tables.huggingface import norms, under
from tests.unit.tagging.test_families import tags_of

pytest.importorskip("deepspeed", reason="the main job needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="the models are Megatron-core's")
if find_spec("megatron.core.models.hybrid") is None:
    pytest.skip("HybridModel came with Megatron-core 0.18 (make test-megatron-new)", allow_module_level=True)

import megatron_patch
from ds_blockwise.runs.model_shape import GPTShape
from tests.helpers.launch.job_server import jobs
from tests.helpers.launch.project import prepare_project
from tests.helpers.megatron import models
from tests.helpers.tables.megatron import ATTENTION, GATED

SHAPE = GPTShape(
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=80,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    vocab_size=96,
    sequence_length=16,
)
SHAPES = {"llama": SHAPE, "gpt2": replace(SHAPE, architecture="gpt2", tied_embeddings=True)}
OF_ATTENTION = ("input_layernorm", "self_attention")
TOKENS = torch.randint(96, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def groups():
    megatron_patch.cpu_shims()
    with models.alone():
        yield


def in_hybrid(name: str) -> str:
    """The name in a `HybridModel` of a parameter of a `GPTModel`."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(2 * int(parts[2]) + (parts[3] not in OF_ATTENTION))
    return ".".join(parts).replace("decoder.final_layernorm", "decoder.final_norm")


def losses(model: nn.Module) -> torch.Tensor:
    return model(TOKENS[:, :-1], torch.arange(16).expand(2, 16), None, labels=TOKENS[:, 1:])


def pair(shape: GPTShape) -> tuple[nn.Module, nn.Module]:
    """Both models with the same weights, none of which is that of its beginning: norms are not all ones."""
    torch.manual_seed(0)
    gpt, hybrid = (megatron_patch.build_gpt(shape, model_class=name) for name in ("gpt", "hybrid"))
    own = dict(hybrid.named_parameters())
    with torch.no_grad():
        for name, param in gpt.named_parameters():
            param += 0.02 * torch.randn_like(param)
            own.pop(in_hybrid(name)).copy_(param)
    assert not own
    return gpt, hybrid


def updates(model: nn.Module, cls: type[BlockwiseOptimizer], lr: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The losses before, and each parameter's change over lr in two steps."""
    tag_parameters(model)
    optimizer = cls(model.parameters(), lr=lr)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    first = losses(model)
    for _ in range(2):
        optimizer.zero_grad()
        losses(model).mean().backward()
        optimizer.step()
    return first, {name: (param.detach() - before[name]) / lr for name, param in model.named_parameters()}


@pytest.mark.parametrize("cls", [BlockwiseAdamW, BlockwiseAdamMini, BlockwiseMuon, BlockwiseLion])
@pytest.mark.parametrize("architecture", SHAPES)
def test_losses_and_updates_are_those_of_the_gpt_model(architecture, cls):
    """The updates of a `GPTModel` are compared with the oracle's elsewhere."""
    gpt, hybrid = pair(SHAPES[architecture])
    expected, moved = updates(gpt, cls, 1e-3)
    found, moved_here = updates(hybrid, cls, 1e-3)
    assert torch.equal(found, expected)
    assert all(change.abs().max() > 0 for change in moved.values())
    for name, change in moved.items():
        torch.testing.assert_close(moved_here[in_hybrid(name)], change, rtol=1e-6, atol=1e-6, msg=name)


def test_the_same_seed_gives_the_weights_of_the_gpt_model():
    """Projections into the residual stream are scaled by the number of transformer layers, not of halves."""
    weights = {}
    for name in ("gpt", "hybrid"):
        torch.manual_seed(3)
        weights[name] = dict(megatron_patch.build_gpt(SHAPE, model_class=name).named_parameters())
    assert [in_hybrid(name) for name in weights["gpt"]] == list(weights["hybrid"])
    for name, weight in weights["gpt"].items():
        assert torch.equal(weights["hybrid"][in_hybrid(name)], weight), name


def test_every_parameter_and_where_norms_stand():
    model = megatron_patch.build_gpt(SHAPE, model_class="hybrid")
    halves = [
        under(f"decoder.layers.{2 * layer + half}.", part, norms(norm))
        for layer in range(2)
        for half, (part, norm) in enumerate([(ATTENTION, "input_layernorm"), (GATED, "pre_mlp_layernorm")])
    ]
    ends = {"embedding.word_embeddings.weight": "embedding row 96", "output_layer.weight": "output row 96"}
    expected = ends | norms("decoder.final_norm")
    for half in halves:
        expected |= half
    assert tags_of(model) == expected
    assert {row.norm_place for row in tag_parameters(model).rows if row.role == "norm"} == {"norm_in"}
    assert verify_layout(model).num_checks >= 4


def test_a_wrong_reading_of_linear_qkv_is_caught():
    """The check above runs the model itself."""
    model = megatron_patch.build_gpt(SHAPE, model_class="hybrid")
    rules = [{"match": "linear_qkv.weight", "role": "qkv", "layout": "concat", "num_heads": 4, "num_kv_heads": 2}]
    with pytest.raises(ValueError, match="does not compute attention as its weights are tagged"):
        verify_layout(model, rules=rules)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_activation_checkpointing_keeps_what_it_keeps_of_the_gpt_model(kind):
    """``full`` keeps the input of each transformer layer, not of each half; gradients are the same bits."""
    gradients, saved = {}, {}
    for name, how in (("gpt", kind), ("hybrid", kind), ("hybrid", "none")):
        torch.manual_seed(0)
        model = megatron_patch.build_gpt(SHAPE, activation_checkpointing=how, model_class=name)
        kept: dict[int, int] = {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = losses(model).mean()
        loss.backward()
        gradients[name, how] = {n: p.grad for n, p in model.named_parameters()}
        saved[name, how] = sum(kept.values())
    for name, gradient in gradients["gpt", kind].items():
        for how in (kind, "none"):
            assert torch.equal(gradients["hybrid", how][in_hybrid(name)], gradient), name
    assert saved["hybrid", kind] == saved["gpt", kind] < saved["hybrid", "none"]


# ------------------------------------------------------------------------------------ the main job


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_project(tmp_path_factory.mktemp("project"))


def start(project: Path, output: str, *arguments: str, world_size: int = 2):
    log = project / "logs" / f"{output}-{sum(1 for _ in project.glob(f'logs/{output}-*'))}"
    given = ("--run", str(project / "run.yaml"), "--set", f"output={project / output}", *arguments)
    return jobs().start(log, *given, world_size=world_size)


def results(project: Path, output: str) -> dict[str, object]:
    return json.loads((project / output / "mini" / "summary.json").read_text(encoding="utf-8"))


def weights(project: Path, output: str) -> dict[str, torch.Tensor]:
    path = project / output / "mini" / "checkpoints" / "step_0000006" / "mp_rank_00_model_states.pt"
    module = torch.load(path, weights_only=False)["module"]
    return {name: value for name, value in module.items() if isinstance(value, torch.Tensor)}


def test_the_main_job_stops_and_goes_on_and_ends_with_the_weights_of_the_gpt_model(project: Path):
    """Six steps on two ranks, ZeRO-2; the other class is refused where one has begun."""
    hybrid = ("--set", "model_class=hybrid")
    start(project, "gpt").succeed()
    text = start(project, "hybrid", *hybrid, "--stop-at-step", "3").succeed().log(0)
    assert "decoder.layers.1,3.mlp.linear_fc1.weight" in text
    refused = start(project, "hybrid", "--resume").fail()
    assert "model_class = 'gpt': allowed: 'hybrid', with which" in refused
    start(project, "hybrid", *hybrid, "--resume").succeed()
    for key in ("final_validation_loss", "final_train_loss", "steps"):
        assert results(project, "hybrid")[key] == results(project, "gpt")[key], key
    found, expected = weights(project, "hybrid"), weights(project, "gpt")
    assert len(found) == len(expected) == 2 * 6 + 3
    for name, weight in expected.items():
        assert torch.equal(found[in_hybrid(name)], weight), name


def test_a_record_without_the_key_is_one_of_a_gpt_model(project: Path):
    """Runs that began before the key was there go on."""
    start(project, "older", "--stop-at-step", "2").succeed()
    record = project / "older" / "mini" / "run.json"
    known = json.loads(record.read_text(encoding="utf-8"))
    del known["model_class"]
    record.write_text(json.dumps(known), encoding="utf-8")
    refused = start(project, "older", "--resume", "--set", "model_class=hybrid").fail()
    assert "model_class = 'hybrid': allowed: 'gpt', with which" in refused
    start(project, "older", "--resume", "--stop-at-step", "3").succeed()


def test_the_main_job_with_tensor_parallelism_follows_the_gpt_model(project: Path):
    arguments = ("--set", "parallel.tensor=2")
    start(project, "split_gpt", *arguments).succeed()
    start(project, "split", *arguments, "--set", "model_class=hybrid").succeed()
    for key in ("initial_validation_loss", "final_validation_loss"):
        assert results(project, "split")[key] == results(project, "split_gpt")[key], key
