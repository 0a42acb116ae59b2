# SPDX-License-Identifier: Apache-2.0
"""What a command line can name as a model, on the meta device, small, or with its weights."""

from __future__ import annotations

import json
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
        ("nothing-here", "'nothing-here': no such file or folder. Names on the Hugging Face Hub are not read here"),
        ("meta-llama/Llama-2-7b", "Names on the Hugging Face Hub are not read here: download the model's config.json"),
        ("nothing.json", "'nothing.json': no such file or folder. Correct the path: give a Hugging Face"),
        ("./a/b/nothing", "'./a/b/nothing': no such file or folder. Correct the path"),
        ("my_models.py", "my_models.py is no model: give a Hugging Face config.json"),
        (".", ". holds no config.json: give a Hugging Face config.json"),
        ("my_modles:tiny", "there is no module 'my_modles' in the working directory"),
    ],
)
def test_what_is_no_model_is_named(here: Path, source: str, words: str) -> None:
    with pytest.raises(ValueError) as error:
        load_model(source)
    assert words in str(error.value)


def test_a_module_that_lacks_another_is_not_called_absent(here: Path) -> None:
    (here / "lacking.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(ImportError, match="lacking, for 'lacking:f', imports nowhere_to_be_found, which is not"):
        load_model("lacking:f")


def written(path: Path, **changes: object) -> str:
    """A config of a small LLaMA, with other entries."""
    values = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 80,
        "vocab_size": 101,
        "num_hidden_layers": 1,
    }
    path.write_text(json.dumps({key: value for key, value in (values | changes).items() if value is not None}))
    return str(path)


def test_the_file_that_is_named_is_read(tmp_path: Path) -> None:
    """Beside a config.json of another size."""
    pytest.importorskip("transformers", reason="models are built from Hugging Face configs")
    written(tmp_path / "config.json")
    other = written(tmp_path / "other.json", hidden_size=96, head_dim=24)
    assert load_model(str(tmp_path)).get_parameter("lm_head.weight").shape == (101, 48)
    assert load_model(other).get_parameter("lm_head.weight").shape == (101, 96)
    with pytest.raises(ValueError, match=r"other\.json is no model with weights: give the folder"):
        load_trained(other, random_init=True)


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("BertForSequenceClassification", "bert"),
        ("BertForMaskedLM", "bert"),
        ("LlamaForSequenceClassification", "llama"),
        ("ViTForImageClassification", "vit"),
        ("T5ForConditionalGeneration", "t5"),
    ],
)
def test_the_class_is_the_one_that_the_config_names(tmp_path: Path, name: str, model_type: str) -> None:
    pytest.importorskip("transformers", reason="models are built from Hugging Face configs")
    source = written(tmp_path / "config.json", architectures=[name], model_type=model_type)
    assert type(load_model(source)).__name__ == name
    assert type(load_model(source, small=True)).__name__ == name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["MyLlama"]}, "\"architectures\" = 'MyLlama': allowed: a class of transformers"),
        ({"architectures": ["LlamaConfig"]}, "\"architectures\" = 'LlamaConfig': allowed: a class of transformers"),
        ({"architectures": "LlamaModel"}, "\"architectures\" = 'LlamaModel': allowed: a list"),
        ({"architectures": ["BertModel"]}, "whose config is BertConfig, but \"model_type\" = 'llama' is LlamaConfig"),
        ({"model_type": None}, 'it has no "model_type"'),
        ({"model_type": "llamma"}, "transformers does not read it: ValueError"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
    ],
)
def test_a_config_that_no_class_can_be_built_from(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    pytest.importorskip("transformers", reason="models are built from Hugging Face configs")
    source = written(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError) as error:
        load_model(source)
    assert words in str(error.value)
    assert source in str(error.value)


def test_code_in_a_models_folder_is_not_run(tmp_path: Path) -> None:
    """Nor is the user asked on the terminal, where a script would wait."""
    pytest.importorskip("transformers", reason="models are built from Hugging Face configs")
    (tmp_path / "code.py").write_text("raise SystemExit('it was run')\n")
    auto = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    source = written(tmp_path / "config.json", model_type="own", architectures=["M"], auto_map=auto)
    with pytest.raises(ValueError, match="transformers does not read it"):
        load_model(source)


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
