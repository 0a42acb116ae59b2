# SPDX-License-Identifier: Apache-2.0
"""The main job's configuration files: what is shipped is right, and each mistake is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="the main job needs the extra 'megatron'")
pytest.importorskip("tokenizers", reason="the main job needs the extra 'launch'")

from ds_blockwise.runs.engine_json import compose
from ds_blockwise.runs.run_file import check_run, load_run
from megatron_patch import GPTShape
from tests.helpers.launch.project import MODEL, ROOT, load, make_project

JSONS = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a run file, a model file, a JSON and text; nothing is prepared yet."""
    return make_project(tmp_path)


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_shipped_configuration_is_composed_from_one_place_each(path: Path) -> None:
    run, problems = load_run(ROOT / "configs" / "run" / "tiny.yaml", deepspeed_file=path)
    assert run is not None
    check_run(run, 2, problems)
    config = compose(run, problems)
    assert problems.lines == []
    assert config["train_batch_size"] == run.training.global_batch_size
    assert config["train_micro_batch_size_per_gpu"] == run.training.micro_batch_size
    params = config["scheduler"]["params"]
    assert params["total_num_steps"] == run.training.steps
    assert params["warmup_num_steps"] == run.training.warmup_steps
    assert run.output.name == path.stem
    assert config["csv_monitor"]["output_path"] == str(run.output)
    assert run.deepspeed == json.loads(path.read_text(encoding="utf-8"))  # compose made a copy


def test_tiny_model_has_the_stated_number_of_parameters() -> None:
    shape = GPTShape.load(ROOT / "configs" / "model" / "tiny.yaml")
    assert shape.num_parameters == shape.count_parameters()
    assert 1_000_000 <= shape.count_parameters() <= 2_000_000


def _edit_model(line: str) -> Callable[[Path], None]:
    key = line.split(":")[0]

    def edit(project: Path) -> None:
        lines = [old for old in MODEL.splitlines() if not old.startswith(key + ":")]
        (project / "model.yaml").write_text("\n".join([*lines, line]), encoding="utf-8")

    return edit


def _edit_json(**changes: Any) -> Callable[[Path], None]:
    def edit(project: Path) -> None:
        config = json.loads((project / "mini.json").read_text(encoding="utf-8")) | changes
        kept = {key: value for key, value in config.items() if value is not None}
        (project / "mini.json").write_text(json.dumps(kept), encoding="utf-8")

    return edit


def _write(name: str, text: str) -> Callable[[Path], None]:
    def write(project: Path) -> None:
        (project / name).write_text(text, encoding="utf-8")

    return write


# What is wrong: overrides, an edit, and what the message must name (file, key, value, remedy).
MISTAKES: dict[str, tuple[list[str], Callable[[Path], None] | None, list[str]]] = {
    "misspelt key": (["training.stepz=3"], None, ["run.yaml", "training.stepz", "'steps'"]),
    "misspelt section": (["trainings=3"], None, ["run.yaml", "trainings", "remove it"]),
    "wrong type": (["training.steps=many"], None, ["training.steps", "'many'", "a whole number, at least 1"]),
    "truth is no number": (["training.steps=true"], None, ["training.steps", "True", "a whole number"]),
    "negative": (["training.warmup_steps=-1"], None, ["training.warmup_steps", "-1", "at least 0"]),
    "fraction": (["data.validation_fraction=0.9"], None, ["data.validation_fraction", "from 0.001 to 0.5"]),
    "section is text": (["training=fast"], None, ["training", "a section of keys"]),
    "warm-up too long": (["training.warmup_steps=6"], None, ["training.warmup_steps", "fewer than", "6"]),
    "batch": (["training.global_batch_size=6"], None, ["global_batch_size", "6", "multiple of 4", "2 data-parallel"]),
    "processes": (["parallel.tensor=3"], None, ["parallel.tensor", "divisor of the number of processes, 2"]),
    "pipeline": (["parallel.pipeline=2"], None, ["parallel.pipeline", "not supported", "parallel.tensor"]),
    "heads": (
        ["parallel.tensor=2"],
        _edit_model("num_heads: 3"),
        ["model.yaml", "num_heads", "multiple of the tensor-parallel size 2"],
    ),
    "grouped heads": ([], _edit_model("num_kv_heads: 3"), ["model.yaml", "num_kv_heads", "divisor of num_heads = 4"]),
    "odd head": ([], _edit_model("head_dim: 11"), ["model.yaml", "head_dim", "even"]),
    "stated size": ([], _edit_model("num_parameters: 7"), ["model.yaml", "num_parameters", "7", "state that number"]),
    "model key": ([], _edit_model("hidden_sise: 8"), ["model.yaml", "hidden_sise", "did you mean 'hidden_size'"]),
    "model file": (["model=none.yaml"], None, ["none.yaml", "a readable YAML file"]),
    "no optimizer": ([], _edit_json(optimizer=None), ["mini.json", "optimizer", "add it"]),
    "second batch size": (
        [],
        _edit_json(train_batch_size=8),
        ["mini.json", "train_batch_size", "8", "training.global_batch_size", "run.yaml"],
    ),
    "second schedule length": (
        [],
        _edit_json(scheduler={"type": "BlockwiseCosineLR", "params": {"total_num_steps": 9}}),
        ["mini.json", "scheduler.params.total_num_steps", "9", "training.steps"],
    ),
    "misspelt JSON key": (
        [],
        _edit_json(zero_optimisation={"stage": 2}),
        ["mini.json", "zero_optimisation", "'zero_optimization'"],
    ),
    "ZeRO-3 with TP": (
        ["parallel.tensor=2"],
        _edit_json(zero_optimization={"stage": 3}),
        ["mini.json", "zero_optimization.stage", "0, 1 or 2"],
    ),
    "broken JSON": ([], _write("mini.json", "{"), ["mini.json", "a readable JSON file"]),
    "key twice": ([], _write("mini.json", '{"fp16": {}, "fp16": {}}'), ["mini.json", "fp16", "each key once"]),
    "broken YAML": ([], _write("run.yaml", "a: [1"), ["run.yaml", "a readable YAML file"]),
    "override without value": (["training.steps"], None, ["--set", "training.steps", "section.key=value"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named(name: str, project: Path) -> None:
    overrides, edit, fragments = MISTAKES[name]
    if edit is not None:
        edit(project)
    _, text = load(project, *overrides)
    for fragment in fragments:
        assert fragment in text


def test_all_mistakes_are_listed_at_once(project: Path) -> None:
    _edit_json(optimizer=None)(project)
    run, problems = load_run(
        project / "run.yaml", overrides=["training.global_batch_size=6", "training.warmup_steps=9"]
    )
    assert run is not None
    check_run(run, 2, problems)
    compose(run, problems)
    with pytest.raises(ValueError, match="3 problems") as error:
        problems.raise_if_any()
    for key in ("training.global_batch_size", "training.warmup_steps", "optimizer"):
        assert key in str(error.value)


def test_number_without_a_dot_is_a_number(project: Path) -> None:
    """YAML 1.1 reads 1e-6 as text; a norm_eps of text fails deep inside the model."""
    _edit_model("norm_eps: 1e-6")(project)
    run, text = load(project)
    assert text == ""
    assert run is not None
    assert run.shape.norm_eps == 1e-6
