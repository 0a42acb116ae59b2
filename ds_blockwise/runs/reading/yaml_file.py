# SPDX-License-Identifier: Apache-2.0
"""YAML as people read it: the numbers, truth values and nulls of YAML 1.2, each key once, nothing shared.

YAML 1.1, which PyYAML reads, takes ``010`` for 8, ``1:30`` for 90, ``no`` for false, a day for a date and ``1e-3`` for
text. Here the last is a number and the others are text, which a field of numbers refuses; so are numbers without end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.error import MarkedYAMLError
from yaml.events import AliasEvent, Event
from yaml.nodes import MappingNode, Node, ScalarNode

from ds_blockwise.runs.reading.problems import Problems
from ds_blockwise.runs.reading.whole_files import (
    DEEPEST,
    JsonObject,
    Twice,
    check_values,
    read_text,
    unreadable,
    whole_number,
)

_LONGEST_YAML = 1 << 17  # bytes: PyYAML reads a megabyte in half a minute
_TAG = "tag:yaml.org,2002:"
_PLAIN = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+0123456789.")),
}


def _refusal(reason: str, at: Event | Node) -> MarkedYAMLError:
    return MarkedYAMLError(problem=reason, problem_mark=at.start_mark)  # type: ignore[arg-type] # stubs: one of 2 marks


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.twice: Twice = {}

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event: Event = self.peek_event()  # type: ignore[no-untyped-call] # PyYAML's stubs lack it
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _refusal("anchors (&) and aliases (*) are not read here: write the value out", event)
        tag = getattr(event, "tag", None)
        if tag not in (None, "!"):
            raise _refusal(f"the tag {tag} is not read here: remove it", event)
        if self.depth > DEEPEST:
            raise _refusal(f"more than {DEEPEST} lists and sections in each other", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Node, deep: bool = False) -> dict[Hashable, Any]:
        assert isinstance(node, MappingNode)
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise _refusal("a key that is a list or a section", key)
        found: dict[Hashable, Any] = {}
        for key, value in node.value:
            # as written: `on`, `1` and `null` are keys, too
            if key.value in found:
                self.twice.setdefault(id(found), (found, []))[1].append(key.value)
            found[key.value] = self.construct_object(value, deep=True)
        return found

    def construct_yaml_map(self, node: Node) -> Any:
        yield self.construct_mapping(node)

    def construct_number(self, node: Node) -> float | str:
        assert isinstance(node, ScalarNode)
        text = str(node.value)
        if node.tag == f"{_TAG}int":
            return whole_number(text)
        number = float(text)
        return number if math.isfinite(number) else text  # no field takes it


_Loader.yaml_implicit_resolvers = {}  # none of YAML 1.1's
for _name, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor(f"{_TAG}map", _Loader.construct_yaml_map)
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_number)
_Loader.add_constructor(f"{_TAG}float", _Loader.construct_number)


def read_yaml(path: Path, problems: Problems) -> JsonObject:
    """The mapping in a YAML file; an empty one if there is none, which is then noted in ``problems``."""
    kind = "YAML file"
    text = read_text(path, kind, _LONGEST_YAML, problems)
    if text is None:
        return {}
    try:
        loaded, twice = _parse(text)
    except yaml.YAMLError as error:
        unreadable(path, kind, _reason(error), problems)
        return {}
    if not isinstance(loaded, dict):
        problems.add(path, "(file)", loaded, "a mapping of keys to values", "see configs/")
        return {}
    return loaded if check_values(path, loaded, problems, twice) else {}


def apply_override(values: JsonObject, override: str, problems: Problems) -> None:
    """Put the value of a ``--set section.key=value`` into what a file holds.

    Args:
        values: The file's entries; sections that are missing are made.
        override: Of the command line; the value is YAML.
        problems: Every mistake is noted here.
    """
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        problems.add("--set", override, None, "section.key=value", "write both key and value")
        return
    target = values
    *parents, last = key.split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            problems.add("--set", key, text, "a key of a section", "correct the dotted name")
            return
    known = len(problems.lines)
    value = _parse_value("--set", key, text, problems)
    if len(problems.lines) == known:
        target[last] = value


def _parse_value(file: str, key: str, text: str, problems: Problems) -> object:
    """The value that a command line gives for a key, in YAML; None if a problem was noted.

    Args:
        file: Option of the command line, for messages.
        key: Dotted name of the entry.
        text: The value as given.
        problems: Every mistake is noted here.
    """
    try:
        if len(text) > _LONGEST_YAML:
            raise yaml.YAMLError(f"more than {_LONGEST_YAML} characters")
        value, twice = _parse(text)
    except yaml.YAMLError as error:
        problems.add(file, key, text, f"a value in YAML ({_reason(error)})", "put it in quotes if it is text")
        return None
    known = len(problems.lines)
    check_values(file, {key: value}, problems, twice)
    return None if len(problems.lines) > known else value


def _parse(text: str) -> tuple[Any, Twice]:
    loader = _Loader(text)
    try:
        return loader.get_single_data(), loader.twice
    finally:
        loader.dispose()


def _reason(error: yaml.YAMLError) -> str:
    """What is wrong, on one line, with its place."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    return f"{problem}, line {mark.line + 1}, column {mark.column + 1}" if mark is not None else str(problem)
