# SPDX-License-Identifier: Apache-2.0
"""What the token files are made of and with: readers, tokenizers, blends; and the check that finds damage."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

pytest.importorskip("megatron.core", reason="the token files need the extra 'megatron'")
pytest.importorskip("tokenizers", reason="the token files need the extra 'launch'")

from tokenizers import AddedToken, Tokenizer, normalizers

from ds_blockwise.runs.strict_files import Problems
from tests.helpers.launch.data_corpus import (
    contents,
    data_config,
    documents_of,
    make_corpus,
    prepare,
    text,
    write_lines,
    write_parquet,
)
from tests.helpers.launch.project import corpus, data_check, data_readers, data_tokenizer, token_files


def read(path: Path, part_bytes: int = 1 << 25, key: str = "text") -> list[list[str]]:
    """The documents of each part of a file."""
    parts = corpus.Corpus([(path.name, path)], key).parts(part_bytes)
    return [[document for span in part for document in data_readers.documents(span, key)] for part in parts]


# -------------------------------------------------------------------------------------- readers


@pytest.mark.parametrize("part_bytes", [1, 2, 7, 60, 1000, 10**9])
def test_lines_belong_to_one_part_each(part_bytes: int, tmp_path: Path) -> None:
    """Wherever the file is cut: in a line, before or after its end, in a character, in blank lines."""
    texts = [text(n, 1 + n % 5) for n in range(12)]
    path = tmp_path / "a.jsonl"
    write_lines(path, texts)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\n\n  \n", 3)[:-1])  # no end of the last
    parts = read(path, part_bytes)
    assert [document for part in parts for document in part] == texts
    assert (len(parts) == 1) == (part_bytes > path.stat().st_size)


def test_line_that_begins_where_a_part_does_is_the_parts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nsix\nten\n")
    assert read(tmp_path / "a.txt", part_bytes=8) == [["one\ntwo\n"], ["six\nten\n"]]
    assert read(tmp_path / "a.txt", part_bytes=6) == [["one\ntwo\n"], ["six\n"], ["ten\n"]]


@pytest.mark.parametrize("part_bytes", [1, 5, 64, 10**9])
def test_text_is_cut_at_lines_and_nothing_is_lost(part_bytes: int, tmp_path: Path) -> None:
    whole = "über\r\nlang\nzwei é\rdrei\n" + "ohne Ende " * 9
    path = tmp_path / "a.txt"
    path.write_bytes(whole.encode())
    found = [document for part in read(path, part_bytes) for document in part]
    assert "".join(found) == whole.replace("\r\n", "\n").replace("\r", "\n")
    assert all(document.endswith("\n") for document in found[:-1])


def test_long_text_becomes_several_documents(tmp_path: Path) -> None:
    line = "x" * 999 + "\n"
    (tmp_path / "a.txt").write_text(line * 700 + "y" * 600_000, encoding="utf-8")
    (found,) = read(tmp_path / "a.txt")
    assert "".join(found) == line * 700 + "y" * 600_000
    assert max(map(len, found)) <= 1 << 18
    assert found[0] == line * 262


def test_parquet_row_groups_are_read_once_each(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="parquet and zstd need the extra 'data'")
    texts = write_parquet(tmp_path / "a.parquet", [text(n, 20) for n in range(60)])
    for part_bytes in (1, 3000, 1 << 30):
        parts = read(tmp_path / "a.parquet", part_bytes)
        assert [document for part in parts for document in part] == texts
        assert len(parts) == {1: 6, 3000: len(parts), 1 << 30: 1}[part_bytes]
    with pytest.raises(ValueError, match=r"no column 'body' \(found: id, text\); set data\.text_key"):
        read(tmp_path / "a.parquet", key="body")
    with pytest.raises(ValueError, match=r"the column 'id' holds int64; allowed: text"):
        read(tmp_path / "a.parquet", key="id")
    write_parquet(tmp_path / "b.parquet", ["a", None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"b\.parquet, row 1: no text in the column 'text' \(null\)"):
        read(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"c\.parquet: .*allowed: a complete parquet file"):
        read(tmp_path / "c.parquet")


def test_parquet_and_zstd_become_the_same_tokens_with_three_workers(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="parquet and zstd need the extra 'data'")
    expected = make_corpus(tmp_path / "texts", parquet=True)
    for workers in (1, 3):
        prepare(data_config(tmp_path / f"data{workers}", tmp_path / "texts"), workers=workers)
    assert contents(tmp_path / "data1") == contents(tmp_path / "data3")
    found = [document for split in token_files.SPLITS for document in documents_of(tmp_path / "data1", split)]
    assert len({*expected} - {*found}) <= 5  # long texts are cut at lines


def test_missing_pyarrow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("a.parquet", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"anything")
        with pytest.raises(ValueError, match=rf"{name}: .*pip install pyarrow \(the extra 'data' of ds_blockwise\)"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("a.jsonl", b'{"text": "a"}\n' * 40 + b"{\n", "a.jsonl, line 41: Expecting"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": null}\n', "a.jsonl, line 3: no text under the key 'text'"),
        ("a.jsonl", b'{"text": "a"}\n["text"]\n', "a.jsonl, line 2: no text under the key 'text' (found: list)"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, line 1: 'utf-8' codec can't decode"),
        ("a.jsonl", rb'{"text": "\ud83d"}', "a.jsonl, line 1: half a character"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:-12], "a.jsonl.gz: Compressed file ended"),
        ("a.jsonl.gz", b'{"text": "a"}\n', "a.jsonl.gz: Not a gzipped file"),
    ],
)
def test_bad_files_are_named_with_the_line(name: str, content: bytes, fragment: str, tmp_path: Path) -> None:
    """Also in a part that begins in the middle of the file."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        read(tmp_path / name, part_bytes=100)
    assert fragment in str(error.value)


def test_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_lines(path, ["one", "two"])
    reader = iter(corpus.Corpus([("a.jsonl", path)], "text"))
    next(reader)
    with path.open("a") as file:
        file.write('{"text": "three"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl was changed while it was read"):
        list(reader)


def test_folder_search_and_names(tmp_path: Path) -> None:
    for name in ("a.json.gz", "b.jsonl.zst", "c.parquet", "d.txt", "e.json", "f.png", "c4.00000-of-1.json.gz"):
        (tmp_path / name).write_bytes(b"")
    found = corpus.find_corpus((str(tmp_path),), "text", "run.yaml", Problems()).files
    assert [Path(name).name for name, _ in found] == [
        "a.json.gz",
        "b.jsonl.zst",
        "c.parquet",
        "c4.00000-of-1.json.gz",
        "d.txt",
    ]


# ----------------------------------------------------------------------------------- tokenizers


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


# ---------------------------------------------------------------------------------------- check


def _token(index: int, value: int) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tokens = numpy.fromfile(folder / "train.bin", numpy.uint16)
        tokens[index if index >= 0 else len(tokens) + index] = value
        tokens.tofile(folder / "train.bin")

    return edit


def _bytes(name: str, at: int, more: int) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at] = (content[at] + more) % 256
        (folder / name).write_bytes(content)

    return edit


def _cut(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-2])

    return edit


# What was done to the files, what must be said, and whether the cheap check sees it, too.
DAMAGE: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    "token beyond the vocabulary": (_token(-20, 900), "train.bin: token 900, but the tokenizer has 320", False),
    "last token": (_token(-1, 65), "does not end with 0", False),
    "an end inside": (_token(-20, 0), "1 documents' ends inside documents", False),
    "another token": (_token(-20, 70), "train.bin: its sum is not the one in metadata.json", False),
    "first document": (_token(3, 70), "document 0 does not decode to the text that was read", True),
    "lengths": (_bytes("train.idx", 34, 1), "the places of the documents are not the sums of their lengths", True),
    "bounds": (_bytes("train.idx", -8, 1), "documents of more or less than one sequence", True),
    "type": (_bytes("train.idx", 17, 252), "tokens of int32, but metadata.json says", True),
    "index cut": (_cut("train.idx"), "train.idx: ", True),
    "no index": (_bytes("validation.idx", 0, 1), "validation.idx: no index of Megatron's", True),
    "tokenizer": (_bytes("tokenizer.json", -2, 1), "tokenizer.json: another file than the one", True),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_check_finds(name: str, prepared: Path, tmp_path: Path) -> None:
    edit, fragment, cheap = DAMAGE[name]
    folder = tmp_path / "data"
    shutil.copytree(prepared / "data", folder)
    metadata = token_files.read_metadata(folder)
    assert metadata is not None
    assert data_check.check(folder, metadata, every_token=True) == []
    edit(folder)
    assert any(fragment in line for line in data_check.check(folder, metadata, every_token=True))
    assert any(fragment in line for line in data_check.check(folder, metadata, every_token=False)) == cheap
    with pytest.raises(ValueError, match="damaged; prepare them again with --force"):
        token_files.check_directory(folder)
