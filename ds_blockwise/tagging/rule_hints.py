# SPDX-License-Identifier: Apache-2.0
"""The message about all parameters of a model that need a rule, and the rules to paste, in the form for the place.

Layers are alike, so their parameters share a problem and a rule: numbers in names become ``\\d+`` wherever the pattern
then still matches these parameters only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ds_blockwise.blocks.rule_needed import CHOOSE, RuleNeeded, exact_pattern
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.tagging.registered import RegisteredParameter

Place = Literal["json", "python", "megatron"]
"""Where the user writes rules: an optimizer's JSON, the argument of a Python call, or Megatron's two ways."""

_LISTED = 20
_WHERE: dict[Place, tuple[str, str]] = {
    "json": ('to the optimizer\'s "params"', '"rules": '),
    "python": ("to the call", "rules="),
    "megatron": ("to convert_, or the list as JSON to --blockwise-rules", "rules="),
}
_COUNTS = {
    "num_heads": "how many heads the weight has",
    "num_kv_heads": "how many key and value heads it has",
    "width": "the width of the residual stream, a whole number",
}


@dataclass(frozen=True)
class _Group:
    """Parameters with one problem and one rule."""

    errors: tuple[RuleNeeded, ...]
    patterns: tuple[str, ...]

    def line(self, settings: BlockSettings) -> str:
        first = self.errors[0]
        others = len(self.errors) - 1
        more = f" ({len(self.errors)} parameters like it: {self.patterns[0]})" if others else ""
        text = first.says(more)
        taken = next((rule.match for rule in settings.rules if rule.matches(first.fqn)), None)
        if taken is None:
            return text
        return (
            f"{text} Your rule {taken!r} matches it too, and one rule only may match a parameter: put what is missing "
            f'into that rule, or change its "match".'
        )

    def rules(self) -> Iterator[dict[str, object]]:
        for pattern in self.patterns:
            yield {"match": pattern, **self.errors[0].rule}


def refusal(
    problems: Sequence[ValueError],
    every: Iterable[RegisteredParameter],
    settings: BlockSettings,
    place: Place,
    *,
    is_stage: bool = False,
) -> str:
    """One message about all problems of a model: each kind once, then the rules that would solve them.

    Args:
        problems: what was found; those that are no `RuleNeeded` are listed as they are.
        every: all parameters of the model; a proposed pattern matches none but those that need the rule.
        settings: the user's rules, which may match a parameter already.
        place: where the user writes rules.
        is_stage: other stages have parameters too, so a pattern names the numbers that it is for.
    """
    groups = _groups([error for error in problems if isinstance(error, RuleNeeded)], list(every), is_stage)
    lines = [str(error) for error in problems if not isinstance(error, RuleNeeded)]
    lines += [group.line(settings) for group in groups]
    listed = "".join(f"\n  - {line}" for line in lines[:_LISTED])
    more = f"\n  ... and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    return f"cannot cut the model into blocks:{listed}{more}{_rules_to_add(groups, place)}"


def _groups(errors: Sequence[RuleNeeded], every: Sequence[RegisteredParameter], is_stage: bool) -> list[_Group]:
    alike: dict[tuple[object, ...], list[RuleNeeded]] = {}
    for error in errors:
        owner, _, _ = error.fqn.rpartition(".")
        key = (_without_numbers(owner), error.problem, json.dumps(error.rule))
        alike.setdefault(key, []).append(error)
    aliases = {fqn: named for named in every for fqn in named.fqns}
    found = []
    for same in alike.values():
        params = {id(aliases[error.fqn]) for error in same if error.fqn in aliases}
        foreign = [fqn for fqn, named in aliases.items() if id(named) not in params]
        found.append(_Group(tuple(same), _patterns([error.fqn for error in same], foreign, is_stage)))
    return found


def _without_numbers(path: str) -> tuple[str | None, ...]:
    return tuple(None if part.isdecimal() else part for part in path.split("."))


def _patterns(fqns: Sequence[str], foreign: Sequence[str], is_stage: bool) -> tuple[str, ...]:
    """The shortest patterns for names that differ in numbers and in their last component, and for no ``foreign`` one.

    Either one pattern with any number, one with the numbers that occur, or one for each name.
    """
    columns = [list(dict.fromkeys(column)) for column in zip(*(fqn.split(".") for fqn in fqns), strict=True)]
    exact = [_one_of(column) for column in columns]
    any_number = [r"\d+" if column[0].isdecimal() and len(column) > 1 else _one_of(column) for column in columns]
    for parts in (exact,) if is_stage else (any_number, exact):
        pattern = "^" + r"\.".join(parts) + "$"
        if not any(re.search(pattern, fqn) for fqn in foreign):
            return (pattern,)
    return tuple(exact_pattern(fqn) for fqn in fqns)


def _one_of(parts: Sequence[str]) -> str:
    escaped = [re.escape(part) for part in parts]
    return escaped[0] if len(escaped) == 1 else f"(?:{'|'.join(escaped)})"


def _rules_to_add(groups: Sequence[_Group], place: Place) -> str:
    rules = [rule for group in groups for rule in group.rules() if group.errors[0].rule]
    if not rules:
        return ""
    where, opening = _WHERE[place]
    body = ",\n".join(f"    {_literal(rule, place)}" for rule in rules)
    return f"\nAdd {where}:\n  {opening}[\n{body}\n  ]{_choices(groups)}"


def _literal(rule: Mapping[str, object], place: Place) -> str:
    if place == "json":
        return json.dumps(rule)
    items = (f'"{key}": {_python(value)}' for key, value in rule.items())
    return f"{{{', '.join(items)}}}"


def _python(value: object) -> str:
    text = json.dumps(value)  # a number, or a string without anything that Python writes otherwise
    raw = isinstance(value, str) and "\\" in value and '"' not in value
    return f'r"{value}"' if raw else text


def _choices(groups: Sequence[_Group]) -> str:
    options: dict[str, dict[str, str]] = {}
    for error in (group.errors[0] for group in groups):
        for key, value in error.rule.items():
            if value == CHOOSE:
                options.setdefault(key, {}).update(error.choices.get(key, {}))
    lines = []
    for key, meanings in options.items():
        lines.append(f'\nIn place of "{key}": "{CHOOSE}" write {_COUNTS.get(key, "one of")}')
        lines += [f"\n  {name}: {meaning}" for name, meaning in meanings.items()]
    return "".join(lines)
