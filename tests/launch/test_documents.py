# SPDX-License-Identifier: Apache-2.0
"""Text, JSON lines and parquet are read as documents, each once, wherever a file is cut."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="the token files need the extra 'megatron'")
pytest.importorskip("tokenizers", reason="the token files need the extra 'launch'")

from data import corpus
from data.documents import documents
from data.metadata import read_metadata
from tests.helpers.launch.data_corpus import text, write_lines, write_parquet


def read(path: Path, part_bytes: int = 1 << 25, key: str = "text") -> list[list[str]]:
    """The documents of each part of a file."""
    parts = corpus.Corpus([(path.name, path)], key).parts(part_bytes)
    return [[document for span in part for document in documents(span, key)] for part in parts]


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
        ("a.jsonl", rb'{"text": "\ud83d"}', "a.jsonl, line 1: half of a surrogate pair"),
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


@pytest.mark.parametrize(
    "content", [b"[]", b"null", b"{}", b'{"format": []}', b"\xff", b"[" * 100_000, b'{"format": 1}']
)
def test_damaged_metadata_is_as_good_as_none(tmp_path: Path, content: bytes) -> None:
    """What was not written whole has to be prepared again; no traceback of ours."""
    (tmp_path / "metadata.json").write_bytes(content)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert read_metadata(tmp_path) is None
