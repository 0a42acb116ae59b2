# SPDX-License-Identifier: Apache-2.0
"""Strict reading: what is no mistake is read as it is meant, what is one is named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ds_blockwise.runs.model_shape import GPTShape
from ds_blockwise.runs.reading.problems import Problems, correction
from ds_blockwise.runs.reading.whole_files import read_json
from ds_blockwise.runs.reading.yaml_file import read_yaml
from ds_blockwise.runs.strict_files import Flag, NotNegative, StrictSection, Texts, read_section
from tests.helpers.run_files import sound


@dataclass(frozen=True, slots=True)
class Part(StrictSection):
    count: NotNegative
    flag: Flag = False
    texts: Texts = ()


def read(values: Any) -> tuple[Part | None, list[str]]:
    problems = Problems()
    return read_section(Part, values, file="f", problems=problems), problems.lines


def test_one_text_is_a_list_of_one() -> None:
    assert read({"count": 0, "texts": "a"}) == (Part(0, False, ("a",)), [])
    assert read({"count": 0, "texts": ["a", "b"]}) == (Part(0, False, ("a", "b")), [])


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "f: count = None: allowed: a whole number, at least 0; add this required key"),
        ({"count": True}, "f: count = True: allowed: a whole number, at least 0; correct the value"),
        ({"count": 1, "flag": 1}, "f: flag = 1: allowed: true or false; correct the value"),
        ({"count": 1, "texts": 7}, "f: texts = 7: allowed: text or a list of texts; correct the value"),
        ({"count": 1, "flag": "yes"}, "f: flag = 'yes': allowed: true or false; write true or false"),
        (
            {"count": "010"},
            "f: count = '010': allowed: a whole number, at least 0; "
            "write its digits alone: no leading zeros, no _ and no :",
        ),
        ({"count": 2**31}, "f: count = 2147483648: allowed: a whole number from 0 to 2147483647; correct the value"),
        ({"count": 1, "flags": 2}, "f: flags = 2: allowed: the keys count, flag, texts; did you mean 'flag'?"),
    ],
)
def test_a_mistake_is_one_line(values: Any, line: str) -> None:
    assert read(values) == (None, [line])


def test_number_without_a_dot_is_a_number(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-6 as text; a norm_eps of text fails deep inside the model."""
    path = tmp_path / "model.yaml"
    text = "".join(f"{key}: {value}\n" for key, value in sound()[1].items())
    path.write_text(text + "norm_eps: 1e-6\n", encoding="utf-8")
    assert GPTShape.load(path).norm_eps == 1e-6
    for wrong in (".inf", "true", "1e-6x", "-1.0"):
        path.write_text(text + f"norm_eps: {wrong}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"norm_eps = .*: allowed: a number, at least 0\.0; correct the value"):
            GPTShape.load(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", ("a readable YAML file", "line 1")),
        ("- 1", ("a mapping of keys to values", "see configs/")),
    ],
)
def test_a_file_that_is_no_mapping(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    problems = Problems()
    (tmp_path / "f.yaml").write_text(text, encoding="utf-8")
    assert read_yaml(tmp_path / "f.yaml", problems) == {}
    assert all(word in problems.lines[0] for word in words), problems.lines


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ("a readable JSON file", "line 1 column 2")),
        ("[]", ("a JSON object", "see configs/deepspeed/")),
        ('{"fp16": {}, "fp16": {}}', ("fp16 = '(twice)'", "each key once", "remove one of them")),
    ],
)
def test_a_json_that_is_no_object_or_says_a_thing_twice(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    problems = Problems()
    (tmp_path / "f.json").write_text(text, encoding="utf-8")
    read_json(tmp_path / "f.json", problems)
    assert len(problems.lines) == 1
    assert all(word in problems.lines[0] for word in words), problems.lines


def test_all_problems_are_raised_together() -> None:
    problems = Problems()
    problems.raise_if_any()
    problems.add("f", "key", "x" * 200, "less", correction("fll", ["full"]))
    problems.refuse("g", "key", 1, "because")
    with pytest.raises(ValueError, match="2 problems") as error:
        problems.raise_if_any()
    first, second = str(error.value).splitlines()[1:]
    assert first == f"- f: key = 'x{'x' * 115}...: allowed: less; did you mean 'full'?"
    assert second == "- g: key = 1: because"
