# SPDX-License-Identifier: Apache-2.0
"""The shipped model files build, on the meta device, what they say."""

import re

import pytest
import torch

from tests.helpers import ROOT

pytest.importorskip("megatron.core", reason="the model files are Megatron-core's")

from ds_blockwise import tag_parameters
from ds_blockwise.runs.model_shape import ARCHITECTURES
from megatron_patch import GPTShape, build_meta_gpt

pytestmark = pytest.mark.usefixtures("ends_process_groups")

FOLDER = ROOT / "configs" / "model"
FILES = {path.stem: path for path in FOLDER.glob("*.yaml")}
# billions of parameters, as the paper (or the model's own authors) round them
SIZES = {
    "tiny": 0.0013,
    "llama_5m": 0.005,
    "llama_30m": 0.0267,
    "llama_130m": 0.13,
    "llama_250m": 0.24,
    "llama_500m": 0.52,
    "llama_750m": 0.74,
    "llama_1100m": 1.18,
    "llama_2b": 1.94,
    "llama_2b_gqa": 1.77,
    "gpt2_small": 0.12,
    "gpt2_medium": 0.35,
}


def test_every_model_is_checked():
    """A file that nobody builds may say anything."""
    assert set(FILES) == set(SIZES)
    assert {GPTShape.load(path).architecture for path in FILES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", SIZES)
def test_the_stated_size_is_that_of_the_real_model(name):
    """Megatron-core's own module is counted, not our arithmetic; every parameter has a role."""
    model = build_meta_gpt(FILES[name])
    counted = sum(p.numel() for p in model.parameters())
    shape = GPTShape.load(FILES[name])
    assert shape.num_parameters == shape.count_parameters() == counted
    assert round(counted / 1e9, 4 if counted < 1e8 else 2) == SIZES[name]
    assert all(p.device == torch.device("meta") for p in model.parameters())
    assert tag_parameters(model).totals["parameters"] == counted


def test_the_family_has_the_papers_proportions():
    """SwiGLU with an FFN of four times the width, untied, vocabulary 50304."""
    for name in ("llama_130m", "llama_250m", "llama_500m", "llama_750m", "llama_2b"):
        shape = GPTShape.load(FILES[name])
        assert shape.ffn_hidden_size == 4 * shape.hidden_size
        assert shape.vocab_size == 50304 and not shape.tied_embeddings
        assert shape.num_heads * shape.head_dim == shape.hidden_size


def test_an_unknown_architecture_is_refused(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(FILES["tiny"].read_text() + "architecture: gtp2\n")
    with pytest.raises(ValueError, match=r"architecture = 'gtp2'.*llama or gpt2.*did you mean 'gpt2'"):
        GPTShape.load(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hybird", "model_class = 'hybird': allowed: gpt, hybrid; did you mean 'hybrid'"),
        ("hybrid", "allowed: gpt with megatron-core 0.17.1: HybridModel came with 0.18; leave it out, or pip install"),
    ],
)
def test_a_class_that_is_not_there_is_refused(name, words, monkeypatch):
    from megatron_patch import build_gpt

    build_meta_gpt(FILES["tiny"])  # process groups
    monkeypatch.setattr("megatron_patch.model.MEGATRON_VERSION", "0.17.1")
    with pytest.raises(ValueError, match=rf"(?s)build_gpt: .*{re.escape(words)}"):
        build_gpt(GPTShape.load(FILES["tiny"]), model_class=name)


def test_gpt2_steps_and_learns(tmp_path):
    """Learned positions and biases get gradients, and the loss of a repeated batch falls."""
    from ds_blockwise import BlockwiseAdamMini
    from megatron_patch import build_small_gpt

    torch.manual_seed(0)
    model = build_small_gpt(FILES["gpt2_small"])
    tag_parameters(model)
    optimizer = BlockwiseAdamMini(model.parameters(), lr=1e-4)
    tokens = torch.randint(256, (2, 17))
    losses = []
    for _ in range(4):
        positions = torch.arange(16).expand(2, 16)
        loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_activation_checkpointing_changes_no_gradient(kind):
    """What is computed again in the backward pass is what was computed before, bit for bit."""
    from dataclasses import replace

    from megatron_patch import build_gpt

    build_meta_gpt(FILES["tiny"])  # process groups
    shape = replace(GPTShape.load(FILES["tiny"]), num_layers=2, vocab_size=64, num_parameters=None)
    tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(1))
    gradients, saved = {}, {}
    for name in ("none", kind):
        torch.manual_seed(0)
        model = build_gpt(shape, activation_checkpointing=name)
        kept: dict[int, int] = {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(tokens[:, :-1], torch.arange(16).expand(2, 16), None, labels=tokens[:, 1:]).mean()
        loss.backward()
        gradients[name] = {n: p.grad for n, p in model.named_parameters()}
        saved[name] = sum(kept.values())
    assert all(torch.equal(gradients[kind][n], g) for n, g in gradients["none"].items())
    assert saved[kind] < saved["none"]
