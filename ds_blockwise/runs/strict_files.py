# SPDX-License-Identifier: Apache-2.0
"""Strict reading of configuration files: every mistake is listed at once, and none is ignored.

A misspelt key that is silently ignored costs a training run. pydantic checks the entries against frozen dataclasses,
whose fields carry their limits; each problem is then one line: file, key, value, what is allowed and what to do.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from ds_blockwise.values import nearest

Section = TypeVar("Section", bound="StrictSection")
JsonObject: TypeAlias = dict[str, Any]


def _number(value: object) -> object:
    # YAML 1.1 reads 5e-4 (no dot) as text
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _texts(value: object) -> object:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


# Types of fields. A truth value is no number here, and 1 is no truth value.
NUMBER = BeforeValidator(_number)
NotNegative = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]
AtLeastTwo = Annotated[int, Field(strict=True, ge=2)]
Flag = Annotated[bool, Field(strict=True)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]


class StrictSection:
    """Base of the dataclasses that `read_section` reads: their fields are the allowed keys."""

    __slots__ = ()
    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


class Problems:
    """The mistakes found so far; raising waits until all are known."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __bool__(self) -> bool:
        return bool(self.lines)

    def add(self, file: str | Path, key: str, value: object, allowed: str, remedy: str) -> None:
        """Note one mistake.

        Args:
            file: File that the user has to edit.
            key: Dotted name of the entry.
            value: What was found.
            allowed: What may stand there.
            remedy: What to do, as an order.
        """
        self.refuse(file, key, value, f"allowed: {allowed}; {remedy}")

    def refuse(self, file: str | Path, key: str, value: object, reason: str) -> None:
        """Note one mistake with the words of the code that found it, which say what is allowed and what to do."""
        text = repr(value)
        shown = text if len(text) <= 120 else text[:117] + "..."
        self.lines.append(f"{file}: {key} = {shown}: {reason}")

    def raise_if_any(self) -> None:
        """Raise one `ValueError` that lists everything noted.

        Raises:
            ValueError: At least one problem was noted.
        """
        if self.lines:
            count = f"{len(self.lines)} problem" + ("s" if len(self.lines) > 1 else "")
            raise ValueError(f"{count} in the configuration:\n- " + "\n- ".join(self.lines))


def read_yaml(path: Path, problems: Problems) -> JsonObject:
    """The mapping in a YAML file; an empty one if there is none, which is then noted in ``problems``."""
    return _read(path, yaml.safe_load, "YAML file", "a mapping of keys to values", "see configs/", problems)


def read_json(path: Path, problems: Problems) -> JsonObject:
    """As `read_yaml`, of JSON. A key that stands twice is a problem, as in DeepSpeed."""

    def unique(pairs: list[tuple[str, Any]]) -> JsonObject:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                problems.add(path, key, "(twice)", "each key once", "remove one of them")
        return dict(pairs)

    parse = partial(json.loads, object_pairs_hook=unique)
    return _read(path, parse, "JSON file", "a JSON object", "see configs/deepspeed/", problems)


def _read(
    path: Path, parse: Callable[[str], object], kind: str, content: str, example: str, problems: Problems
) -> JsonObject:
    try:
        loaded = parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, json.JSONDecodeError) as error:
        problems.add(path, "(file)", str(error), f"a readable {kind}", "correct the path or file")
        return {}
    if not isinstance(loaded, dict):
        problems.add(path, "(file)", loaded, content, example)
        return {}
    return loaded


def correction(word: object, known: Iterable[str]) -> str:
    """What to do about a word that is not known: take the nearest one, or remove it."""
    near = nearest(word, known)
    return "remove it" if near is None else f"did you mean {near!r}?"


def read_section(
    cls: type[Section], values: Mapping[Any, Any], *, file: str | Path, problems: Problems
) -> Section | None:
    """Build the frozen dataclass ``cls`` from ``values``.

    Args:
        cls: Dataclass whose fields are the allowed keys. A field that is a `StrictSection` is a section of its own.
        values: The mapping found in the file.
        file: Named in the messages.
        problems: Every mistake is noted here.

    Returns:
        The dataclass, or None if a problem was noted.
    """
    adapter = TypeAdapter(cls)
    try:
        return adapter.validate_python(_with_text_keys(values))
    except ValidationError as error:
        whole = adapter.json_schema()
        for found in error.errors(include_url=False):
            kind, path, value = found["type"], found["loc"], found["input"]
            if kind == "unexpected_keyword_argument":
                known = list(_schema_at(whole, path[:-1])["properties"])
                allowed, remedy = f"the keys {', '.join(known)}", correction(path[-1], known)
            else:
                allowed, remedy = _describe(_schema_at(whole, path)), _REMEDIES.get(kind, "correct the value")
            shown = None if kind == "missing" else value  # pydantic shows the whole section
            key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
            problems.add(file, key, shown, allowed, remedy)
        return None


def _with_text_keys(values: Mapping[Any, Any]) -> JsonObject:
    """The same entries with keys of text: YAML reads ``on:`` as True and ``1:`` as a number."""
    return {str(key): _with_text_keys(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _schema_at(schema: JsonObject, path: Sequence[int | str]) -> JsonObject:
    """The part of a JSON schema that describes an entry."""
    at = schema
    for part in path:
        at = at["items"] if isinstance(part, int) else at["properties"][part]
        if "$ref" in at:
            at = schema["$defs"][at["$ref"].rpartition("/")[2]]
    return at


_REMEDIES = {"missing": "add this required key", "dataclass_type": "indent its keys below it"}
_WORDS = {
    "array": "text or a list of texts",
    "boolean": "true or false",
    "integer": "a whole number",
    "null": "null",
    "number": "a number",
    "object": "a section of keys",
    "string": "text",
}


def _describe(schema: JsonObject) -> str:
    if "anyOf" in schema:
        return ", or ".join(_describe(choice) for choice in schema["anyOf"])
    text = _WORDS[schema["type"]]
    if "maximum" in schema:
        return f"{text} from {schema['minimum']} to {schema['maximum']}"
    return f"{text}, at least {schema['minimum']}" if "minimum" in schema else text
