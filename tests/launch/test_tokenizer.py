# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of token files, given as Hugging Face saves it or trained on a sample."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="the token files need the extra 'megatron'")
pytest.importorskip("tokenizers", reason="the token files need the extra 'launch'")

from tokenizers import AddedToken, Tokenizer, normalizers

from data import corpus, token_files
from data import tokenizer as data_tokenizer
from ds_blockwise.runs.reading.problems import Problems
from tests.helpers.launch.data_corpus import data_config, documents_of, make_corpus, prepare, text, write_lines


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of a small corpus, and beside them the corpus."""
    folder = tmp_path_factory.mktemp("files")
    make_corpus(folder / "texts")
    prepare(data_config(folder / "data", folder / "texts"))
    return folder


def hugging_face(folder: Path, prepared: Path, config: dict[str, Any] | None, **changes: Any) -> Path:
    """A tokenizer folder as `save_pretrained` writes it, with an end token of its own."""
    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(prepared / "data" / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|stop|>", special=True)])
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("entry", ["<|stop|>", {"content": "<|stop|>", "special": True}])
def test_hugging_face_folder_ends_documents_with_its_own_token(
    entry: Any, as_file: bool, prepared: Path, tmp_path: Path
) -> None:
    """Whole documents, though the file asks to cut them at 8 tokens; text that spells the end is text."""
    given = hugging_face(tmp_path / "given", prepared, {"eos_token": entry})
    texts = [text(n, 40) + " <|stop|> <|endoftext|> more" for n in range(30)]
    write_lines(tmp_path / "a.jsonl", texts)
    tokenizer = str(given / "tokenizer.json") if as_file else str(given)
    data = data_config(tmp_path / "data", tmp_path / "a.jsonl", tokenizer=tokenizer)
    metadata = token_files.prepare(data, 400, "run.yaml")
    assert metadata["tokenizer"]["end_of_document"] == 320
    assert metadata["tokenizer"]["vocab_size"] == 321
    found = [document for split in token_files.SPLITS for document in documents_of(tmp_path / "data", split)]
    assert sorted(found) == sorted(texts)
    assert (tmp_path / "data" / "tokenizer.json").read_bytes() == (given / "tokenizer.json").read_bytes()
    token_files.check_directory(tmp_path / "data")
    # The folder of the tokens is a tokenizer itself, with the same end.
    again = data_config(tmp_path / "again", tmp_path / "a.jsonl", tokenizer=str(tmp_path / "data"))
    assert token_files.prepare(again, 400, "run.yaml")["splits"] == metadata["splits"]


def test_tokenizer_that_changes_text_is_taken(prepared: Path, tmp_path: Path) -> None:
    given = hugging_face(tmp_path / "given", prepared, {"eos_token": "<|stop|>"}, normalizer=normalizers.Lowercase())
    write_lines(tmp_path / "a.jsonl", ["UPPER case " + text(n, 9) for n in range(30)])
    data = data_config(tmp_path / "data", tmp_path / "a.jsonl", tokenizer=str(given))
    assert token_files.prepare(data, 400, "run.yaml")["tokenizer"]["exact"] is False
    token_files.check_directory(tmp_path / "data")


def _unreadable(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")


def _slow(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


@pytest.mark.parametrize(
    ("config", "edit", "fragments"),
    [
        ({"eos_token": "<none>"}, None, ["<none>", "name the right one as eos_token in tokenizer_config.json"]),
        ({"eos_token": "<|stop|>"}, _unreadable, ["a tokenizer.json of the tokenizers library"]),
        ({"eos_token": "<|stop|>"}, _slow, ["tokenizer.model, tokenizer_config.json", "AutoTokenizer(use_fast=True)"]),
        ([], None, ["a readable tokenizer_config.json"]),
    ],
)
def test_wrong_tokenizers_are_named(
    config: Any, edit: Callable[[Path], None] | None, fragments: list[str], prepared: Path, tmp_path: Path
) -> None:
    given = hugging_face(tmp_path / "given", prepared, config)
    if edit is not None:
        edit(given)
    with pytest.raises(ValueError, match=r"run\.yaml: data\.tokenizer = ") as error:
        prepare(data_config(tmp_path / "data", prepared / "texts", tokenizer=str(given)))
    for fragment in fragments:
        assert fragment in str(error.value)


def test_sample_for_a_tokenizer_is_bounded_and_holds_no_validation_text(prepared: Path) -> None:
    data = data_config(prepared / "none", prepared / "texts")
    found = corpus.find_corpus(data.source, "text", "run.yaml", Problems())
    parts = found.parts(3000)
    everything = [t for t in found if not corpus.is_validation(t, 0.2)]
    few = list(data_tokenizer.sample(data, found, parts, 4000))
    assert 3000 < sum(map(len, few)) <= 4000
    cut = [document for part in parts for document in data_tokenizer._training_texts(part, data, found)]
    assert list(data_tokenizer.sample(data, found, parts, 10**9)) == cut
    assert sum(map(len, cut)) > 0.9 * sum(map(len, everything))
