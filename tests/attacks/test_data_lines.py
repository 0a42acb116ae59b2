# SPDX-License-Identifier: Apache-2.0
"""JSON lines as data preparation meets them: each is read as its text, or refused with the file and the line."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import pytest

pytest.importorskip("megatron.core", reason="the token files need the extra 'megatron'")
pytest.importorskip("tokenizers", reason="the token files need the extra 'launch'")

from data.corpus import Corpus
from data.documents import documents
from tests.helpers.attacks import Input, attack, number_of_inputs

INPUTS = 400
BEFORE, AFTER = "the line before", "the line after"
WORDS = ["plain", "ü", "\u2028", "\x7f", "'quoted\"", "\\", "tab\t", "end\n", "𝔘", "text", "{", "]"]
REFUSED = {
    "deep lists": b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep and cut": b"[" * 100_000,
    "long number": b'{"text": "a", "n": ' + b"9" * 10_000 + b"}",
    "text twice": b'{"text": "a", "id": 1, "text": "b"}',
    "no object": b'["text"]',
    "a number": b"7",
    "other key": b'{"texts": "a"}',
    "a list for text": b'{"text": ["a"]}',
    "null for text": b'{"text": null}',
    "half a surrogate pair": b'{"text": "\\ud800"}',
    "key of half a pair": b'{"\\ud800": "a"}',
    "many keys": json.dumps(dict.fromkeys(map(str, range(9999)))).encode(),
    "not UTF-8": b'{"text": "\xff"}',
    "UTF-16": '{"text": "a"}'.encode("utf-16"),
    "control character": b'{"text": "a\x01"}',
    "NUL": b'{"text": "a"}\0',
    "two objects": b'{"text": "a"} {"text": "b"}',
    "single quotes": b"{'text': 'a'}",
}
ACCEPTED = {
    "key inside another": (b'{"text": "a", "more": {"text": "b"}}', "a"),
    "key as a value": (b'{"id": "text", "text": "a"}', "a"),
    "byte order mark": (b'\xef\xbb\xbf{"text": "a"}', "a"),
    "NaN beside it": (b'{"x": NaN, "text": "a"}', "a"),
    "escaped": (b'{"text": "\\u00fc\\ud835\\udd18"}', "ü𝔘"),
    "carriage return": (b'{"text": "a"}\r', "a"),
    "spaces": (b' \t{ "text" : "a" } ', "a"),
    "no text": (b'{"text": " \\n"}', " \n"),
}


def read(path: Path, line: bytes) -> list[str]:
    path.write_bytes(b"\n".join([json.dumps({"text": BEFORE}).encode(), line, json.dumps({"text": AFTER}).encode()]))
    corpus = Corpus([(path.name, path)], "text")
    try:
        return [text for part in corpus.parts(1 << 30) for span in part for text in documents(span, "text")]
    except ValueError as error:
        raise ValueError(str(error)) from None  # subclasses are for people here: the text says where and what


def read_as(text: str) -> list[str]:
    return [BEFORE, *([text] if text.strip() else []), AFTER]  # blank documents are no documents


def wrong(expected: list[str] | None, found: object) -> str | None:
    assert isinstance(found, list)
    if expected is not None and found != expected:
        return f"read as {found!r:.200}"
    return None if (found[0], found[-1]) == (BEFORE, AFTER) else "took a neighbour along"


def inputs(path: Path, count: int) -> Iterator[Input]:
    for label, line in REFUSED.items():
        yield Input(label, partial(read, path, line))
    for label, (line, text) in ACCEPTED.items():
        yield Input(label, partial(read, path, line), "accept", partial(wrong, read_as(text)))
    for seed in range(count - len(REFUSED) - len(ACCEPTED)):
        rng = random.Random(seed)
        text = "".join(rng.choices(WORDS, k=rng.randrange(6)))
        line = bytearray(json.dumps({"id": seed, "text": text}, ensure_ascii=rng.random() < 0.5).encode())
        must: Literal["refuse", "accept", "either"] = "either"
        expected = None
        kind = seed % 4
        if kind == 0:
            must, expected = "accept", read_as(text)
        elif kind == 1:
            line, must = line[: 1 + rng.randrange(len(line) - 1)], "refuse"
        elif kind == 2:
            line[rng.randrange(len(line))] ^= 1 << rng.randrange(8)
        else:
            line.insert(rng.randrange(len(line)), rng.randrange(256))
        yield Input(f"{seed}: {bytes(line)!r}", partial(read, path, bytes(line)), must, partial(wrong, expected))


def names_the_place(error: BaseException) -> str | None:
    text = str(error)
    if len(text) > 1000:
        return f"an error of {len(text)} characters"
    text.encode()
    return None if "lines.jsonl, line " in text and "; " in text else "names no file, line or remedy"


def test_lines(tmp_path: Path) -> None:
    made = inputs(tmp_path / "lines.jsonl", number_of_inputs(INPUTS))
    attack("JSON lines of `prepare_data.py`", made, unfit=names_the_place).keep("data_lines")
