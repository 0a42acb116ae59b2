# SPDX-License-Identifier: Apache-2.0
"""The main job's configuration files and data preparation, in this process."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="the main job needs the extra 'megatron'")
pytest.importorskip("tokenizers", reason="the main job needs the extra 'launch'")

from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer

from megatron_patch import GPTShape
from tests.helpers.launch.project import (
    MODEL,
    ROOT,
    Batches,
    DataConfig,
    check_data,
    check_run,
    compose,
    corpus,
    load,
    load_run,
    make_project,
    token_files,
)

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


# --- data ---------------------------------------------------------------------------------------


def _data(project: Path, **changes: Any) -> DataConfig:
    run, text = load(project)
    assert run is not None, text
    return dataclasses.replace(run.data, **changes)


def _documents(folder: Path, split: str) -> list[str]:
    tokenizer = Tokenizer.from_file(str(folder / token_files.TOKENIZER))
    dataset = IndexedDataset(str(token_files.token_prefix(folder, split)))
    texts = []
    for index in range(len(dataset)):
        tokens = dataset[index].tolist()
        assert tokens[-1] == tokenizer.token_to_id("<|endoftext|>")
        texts.append(tokenizer.decode(tokens[:-1]))
    return texts


def test_text_and_json_lines_become_tokens_and_back(project: Path) -> None:
    data = _data(project)
    metadata = token_files.prepare(data, 320, "run.yaml")
    folder = Path(data.directory)
    train, validation = (_documents(folder, split) for split in token_files.SPLITS)
    files = [path.read_text(encoding="utf-8") for path in sorted((project / "texts").glob("*.txt"))]
    lines = (project / "texts" / "more.jsonl").read_text(encoding="utf-8").splitlines()
    expected = files + [json.loads(line)["text"] for line in lines]
    assert sorted(train + validation) == sorted(expected)
    assert validation
    assert sorted(validation) == sorted(text for text in expected if corpus.is_validation(text, 0.2))
    assert metadata["splits"]["train"]["documents"] == len(train)
    assert metadata["tokenizer"]["vocab_size"] == 320


def test_no_validation_text_is_trained_on_even_when_files_are_copied(project: Path) -> None:
    """Copies are common in crawled text: a split by file would train on validation documents."""
    for path in sorted((project / "texts").glob("*.txt")):
        shutil.copy(path, path.with_name(f"copy_{path.name}"))
    data = _data(project)
    token_files.prepare(data, 320, "run.yaml")
    train, validation = (set(_documents(Path(data.directory), split)) for split in token_files.SPLITS)
    assert validation
    assert not train & validation


def test_preparation_is_repeated_only_when_something_changed(project: Path) -> None:
    data = _data(project)
    first = token_files.prepare(data, 320, "run.yaml")
    folder = Path(data.directory)
    before = (folder / "train.bin").stat().st_mtime_ns
    assert token_files.prepare(data, 320, "run.yaml") == first
    assert (folder / "train.bin").stat().st_mtime_ns == before

    (folder / token_files.CACHE).mkdir()  # Megatron's sample indices of the old tokens
    (project / "texts" / "00.txt").write_text("new words " * 200, encoding="utf-8")
    second = token_files.prepare(data, 320, "run.yaml")
    assert second["fingerprint"] != first["fingerprint"]
    assert not (folder / token_files.CACHE).exists()
    (folder / "train.bin").write_bytes(b"cut")  # as if the disk had been full
    assert token_files.read_metadata(folder) is None


def test_given_tokenizer_is_used_and_must_fit(project: Path) -> None:
    data = _data(project)
    token_files.prepare(data, 320, "run.yaml")
    given = str(Path(data.directory) / token_files.TOKENIZER)
    other = dataclasses.replace(data, directory=str(project / "other"), tokenizer=given)
    first = token_files.read_metadata(Path(data.directory))
    assert first is not None
    second = token_files.prepare(other, 320, "run.yaml")
    assert second["tokenizer"]["sha256"] == first["tokenizer"]["sha256"]
    with pytest.raises(ValueError, match=r"data\.tokenizer .*at most vocab_size = 300"):
        token_files.prepare(other, 300, "run.yaml")


def test_wrong_sources_are_named(project: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.yaml: data\.source = 'nowhere/\*'"):
        token_files.prepare(_data(project, source=("nowhere/*",)), 320, "run.yaml")
    with pytest.raises(ValueError, match=r"more\.jsonl, line 1: no text under the key 'body' \(found: text, id\)"):
        token_files.prepare(_data(project, text_key="body"), 320, "run.yaml")
    (project / "one").mkdir()
    (project / "one" / "a.txt").write_text("alone", encoding="utf-8")
    with pytest.raises(ValueError, match="at least one document for training and another one for validation"):
        token_files.prepare(_data(project, source=(str(project / "one"),)), 320, "run.yaml")


def test_file_that_is_not_text_is_left_out_and_reported(project: Path) -> None:
    (project / "texts" / "picture.txt").write_bytes(b"\xff\xfe\x00\x80")
    metadata = token_files.prepare(_data(project), 320, "run.yaml")
    assert [Path(name).name for name in metadata["files_skipped_not_utf8"]] == ["picture.txt"]


def test_prepared_data_must_fit_the_model_and_the_validation(project: Path) -> None:
    token_files.prepare(_data(project), 320, "run.yaml")
    _edit_model("vocab_size: 300")(project)
    run, problems = load_run(project / "run.yaml", overrides=["training.validation_sequences=100000"])
    assert run is not None
    check_data(run, problems)
    vocabulary, sequences = problems.lines
    assert "model.yaml: vocab_size = 300: allowed: at least 320" in vocabulary
    assert "run.yaml: training.validation_sequences = 100000: allowed: at most" in sequences


def test_batches_are_a_function_of_the_step_and_cover_each_sample_once(project: Path) -> None:
    """Whatever the number of ranks, one optimizer step sees the same sequences, each once."""
    metadata = token_files.prepare(_data(project), 320, "run.yaml")
    run, _ = load(project)
    assert run is not None

    def rows(dp_size: int, step: int | None) -> list[tuple[int, ...]]:
        found = []
        for dp_rank in range(dp_size):
            batches = Batches(run, metadata, dp_rank=dp_rank, dp_size=dp_size, device=torch.device("cpu"))
            for batch in batches.validation() if step is None else batches.micro_batches(step):
                assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
                assert torch.equal(batch.position_ids[-1], torch.arange(run.shape.sequence_length))
                found += [tuple(row) for row in batch.tokens.tolist()]
        return sorted(found)

    for step in (0, 5):
        whole = rows(1, step)
        assert len(whole) == run.training.global_batch_size
        assert rows(2, step) == whole
        assert rows(4, step) == whole
    assert rows(1, 0) != rows(1, 5)
    validation = rows(1, None)
    assert len(validation) == run.training.validation_sequences
    assert rows(2, None) == validation
    assert rows(4, None) == validation
