# SPDX-License-Identifier: Apache-2.0
"""The check of token files finds damage of every kind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

pytest.importorskip("megatron.core", reason="the token files need the extra 'megatron'")
pytest.importorskip("tokenizers", reason="the token files need the extra 'launch'")

from data import token_files
from data.check import find_damage
from tests.helpers.launch.data_corpus import data_config, make_corpus, prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of a small corpus, and beside them the corpus."""
    folder = tmp_path_factory.mktemp("files")
    make_corpus(folder / "texts")
    prepare(data_config(folder / "data", folder / "texts"))
    return folder


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
    "token outside the vocabulary": (_token(-20, 900), "train.bin: token 900, but the tokenizer has 320 tokens", False),
    "last token": (_token(-1, 65), "does not end with token 0", False),
    "an end inside": (_token(-20, 0), "1 end-of-document tokens inside documents", False),
    "another token": (_token(-20, 70), "train.bin: its SHA-256 is not the one in metadata.json", False),
    "first document": (_token(3, 70), "document 0 does not decode to the text that was read", True),
    "lengths": (_bytes("train.idx", 34, 1), "the sequence pointers do not follow from the sequence lengths", True),
    "bounds": (_bytes("train.idx", -8, 1), "a document is not exactly one sequence", True),
    "type": (_bytes("train.idx", 17, 252), "tokens of int32, but metadata.json says", True),
    "index cut": (_cut("train.idx"), "train.idx: ", True),
    "no index": (_bytes("validation.idx", 0, 1), "validation.idx: not a Megatron index file", True),
    "tokenizer": (_bytes("tokenizer.json", -2, 1), "tokenizer.json: not the file that the tokens were made with", True),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_check_finds(name: str, prepared: Path, tmp_path: Path) -> None:
    edit, fragment, cheap = DAMAGE[name]
    folder = tmp_path / "data"
    shutil.copytree(prepared / "data", folder)
    metadata = token_files.read_metadata(folder)
    assert metadata is not None
    assert find_damage(folder, metadata, every_token=True) == []
    edit(folder)
    assert any(fragment in line for line in find_damage(folder, metadata, every_token=True))
    assert any(fragment in line for line in find_damage(folder, metadata, every_token=False)) == cheap
    with pytest.raises(ValueError, match="damaged; prepare them again with --force"):
        token_files.check_directory(folder)
