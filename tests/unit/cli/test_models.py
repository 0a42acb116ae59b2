# SPDX-License-Identifier: Apache-2.0
"""What a command line can name as a model, on the meta device, small, or with its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ds_blockwise.cli.models import load_model, load_trained
from tests.helpers import ROOT


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of a user."""
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n"
        "def tiny():\n    return nn.ModuleDict({'lm_head': nn.Linear(4, 3, bias=False)})\n"
        "def number():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_function_that_builds_a_model(here: Path) -> None:
    """For models that are neither Hugging Face's nor Megatron's."""
    model = load_model("my_models:tiny")
    assert [(name, p.device.type) for name, p in model.named_parameters()] == [("lm_head.weight", "meta")]
    assert next(load_model("my_models:tiny", small=True).parameters()).device.type == "cpu"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("my_models:tyni", "my_models has no function 'tyni'; did you mean 'tiny'?"),
        ("my_models:number", "my_models:number returned int, not a torch module"),
        ("nothing-here", "cannot build a model from 'nothing-here': give a Hugging Face config.json"),
    ],
)
def test_what_is_no_model_is_named(here: Path, source: str, words: str) -> None:
    with pytest.raises(ValueError) as error:
        load_model(source)
    assert words in str(error.value)


def test_small_models_keep_the_attention_and_little_else(tmp_path: Path) -> None:
    """Layers, vocabulary and FFN are cut down; heads and the hidden size stay."""
    transformers = pytest.importorskip("transformers", reason="models are built from Hugging Face configs")
    transformers.LlamaConfig(
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=800,
        vocab_size=1010,
        num_hidden_layers=6,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    small = dict(load_model(str(tmp_path), small=True).named_parameters())
    assert small["model.embed_tokens.weight"].shape == (256, 48)
    assert small["model.layers.3.mlp.up_proj.weight"].shape == (64, 48)
    assert small["model.layers.3.self_attn.k_proj.weight"].shape == (24, 48)
    assert not any("layers.4" in name for name in small)
    whole = dict(load_model(str(tmp_path)).named_parameters())
    assert whole["model.layers.5.mlp.up_proj.weight"].shape == (800, 48)
    assert all(p.device.type == "meta" for p in whole.values())


def test_the_weights_of_a_function_may_be_random(here: Path) -> None:
    """Nothing but the user can tell, so it is said."""
    model, warning = load_trained("my_models:tiny")
    assert next(model.parameters()).dtype is torch.float32
    assert warning == "my_models:tiny may return random weights, and their sharpness says nothing about training"


def test_a_model_file_has_no_weights() -> None:
    with pytest.raises(ValueError, match=r"tiny\.yaml describes a model without weights: measure a checkpoint"):
        load_trained(str(ROOT / "configs" / "model" / "tiny.yaml"))
