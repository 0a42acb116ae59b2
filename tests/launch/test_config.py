# SPDX-License-Identifier: Apache-2.0
"""The main job's data: prepared, checked against the run, and cut into batches, in this process."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="the main job needs the extra 'megatron'")
pytest.importorskip("tokenizers", reason="the main job needs the extra 'launch'")

from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer

from tests.helpers.launch.project import (
    MODEL,
    Batches,
    DataConfig,
    check_data,
    corpus,
    load,
    load_run,
    make_project,
    token_files,
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a run file, a model file, a JSON and text; nothing is prepared yet."""
    return make_project(tmp_path)


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
    (project / "model.yaml").write_text(MODEL.replace("vocab_size: 320", "vocab_size: 300"), encoding="utf-8")
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
