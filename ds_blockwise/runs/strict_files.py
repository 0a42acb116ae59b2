# SPDX-License-Identifier: Apache-2.0
"""Strict reading of configuration files into frozen dataclasses.

A misspelt key that is silently ignored costs a training run, so every unknown key, wrong type and
value out of range is collected, and one `ValueError` lists them all: file, key, value, what is
allowed and what to do. The limits of a field stand beside it, in the dataclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

Section = TypeVar("Section")

LOW = "low"  # metadata keys of a field: inclusive limits of a number
HIGH = "high"


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
        text = repr(value)
        shown = text if len(text) <= 120 else text[:117] + "..."
        self.lines.append(f"{file}: {key} = {shown}: allowed: {allowed}; {remedy}")

    def raise_if_any(self) -> None:
        """Raise one `ValueError` that lists everything noted.

        Raises:
            ValueError: At least one problem was noted.
        """
        if self.lines:
            count = f"{len(self.lines)} problem" + ("s" if len(self.lines) > 1 else "")
            raise ValueError(f"{count} in the configuration:\n- " + "\n- ".join(self.lines))


def nearest(word: str, known: list[str]) -> str:
    """A remedy for an unknown word: the closest known one, or all of them."""
    matches = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {matches[0]!r}?" if matches else "remove it"


def read_yaml(path: Path, problems: Problems) -> dict[str, Any]:
    """The mapping in a YAML file; an empty one (with the problem noted) if there is none.

    Args:
        path: File to read.
        problems: Where an unreadable file is noted.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.add(path, "(file)", str(error), "a readable YAML file", "correct the path or file")
        return {}
    if not isinstance(loaded, dict):
        problems.add(path, "(file)", loaded, "a mapping of keys to values", "see configs/")
        return {}
    return loaded


def read_json(path: Path, problems: Problems) -> dict[str, Any]:
    """The object in a JSON file; a key that stands twice is a problem, as in DeepSpeed.

    Args:
        path: File to read.
        problems: Where an unreadable file is noted.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key in {key for key, _ in pairs}:
            if sum(other == key for other, _ in pairs) > 1:
                problems.add(path, key, "(twice)", "each key once", "remove one of them")
        return dict(pairs)

    try:
        loaded = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        problems.add(path, "(file)", str(error), "a readable JSON file", "correct the path or file")
        return {}
    if not isinstance(loaded, dict):
        problems.add(path, "(file)", loaded, "a JSON object", "see configs/deepspeed/")
        return {}
    return loaded


def read_section(
    cls: type[Section],
    values: Mapping[str, Any],
    *,
    file: str | Path,
    problems: Problems,
    prefix: str = "",
) -> Section | None:
    """Build the frozen dataclass ``cls`` from ``values``.

    Supported field types: int, float, bool, str, ``tuple[str, ...]`` and each of them with
    ``| None``. A number's limits are the field's metadata ``low`` and ``high`` (inclusive).

    Args:
        cls: Dataclass whose fields are the allowed keys.
        values: The mapping found in the file.
        file: Named in the messages.
        problems: Every mistake is noted here.
        prefix: Dotted name of the section, ending with a dot, or empty.

    Returns:
        The dataclass, or None if a problem was noted.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    found = len(problems.lines)
    for key in values:
        if key not in fields:
            known = ", ".join(fields)
            remedy = nearest(str(key), list(fields))
            problems.add(file, f"{prefix}{key}", values[key], f"the keys {known}", remedy)
    read: dict[str, Any] = {}
    for name, field in fields.items():
        if name in values:
            limits = dict(field.metadata)
            read[name] = _read_value(values[name], hints[name], limits, file, f"{prefix}{name}", problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            allowed = _describe(hints[name], dict(field.metadata))
            problems.add(file, f"{prefix}{name}", None, allowed, "add this required key")
    return cls(**read) if len(problems.lines) == found else None


def _read_value(
    value: Any,
    hint: Any,
    limits: dict[str, Any],
    file: str | Path,
    key: str,
    problems: Problems,
) -> Any:
    converted = _convert(value, hint)
    if converted is _REFUSED or not _within(converted, limits):
        allowed = _describe(hint, limits)
        problems.add(file, key, value, allowed, "correct the value")
        return None
    return converted


_REFUSED = object()


def _convert(value: Any, hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        members = typing.get_args(hint)
        if value is None and type(None) in members:
            return None
        candidates = (_convert(value, m) for m in members if m is not type(None))
        return next((c for c in candidates if c is not _REFUSED), _REFUSED)
    if typing.get_origin(hint) is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list) and items and all(isinstance(item, str) for item in items):
            return tuple(items)
        return _REFUSED
    if hint is float:
        # YAML 1.1 reads 5e-4 (no dot) as text.
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                return _REFUSED
        return float(value) if type(value) in (int, float) else _REFUSED
    return value if type(value) is hint else _REFUSED  # bool is not an int here


def _within(value: Any, limits: dict[str, Any]) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return True
    if not math.isfinite(value):
        return False
    return bool(limits.get(LOW, value) <= value <= limits.get(HIGH, value))


def _describe(hint: Any, limits: dict[str, Any]) -> str:
    if isinstance(hint, types.UnionType):
        names = [_describe(m, {}) for m in typing.get_args(hint) if m is not type(None)]
        text = " or ".join(names) + " or null"
    elif typing.get_origin(hint) is tuple:
        text = "text or a list of texts"
    else:
        text = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
    if LOW in limits and HIGH in limits:
        return f"{text} from {limits[LOW]} to {limits[HIGH]}"
    return f"{text}, at least {limits[LOW]}" if LOW in limits else text
