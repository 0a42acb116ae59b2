# SPDX-License-Identifier: Apache-2.0
"""Strict reading of configuration files: every mistake is listed at once, and none is ignored.

A misspelt key that is silently ignored costs a training run. pydantic checks the entries against frozen dataclasses,
whose fields carry their limits; each problem is then one line: file, key, value, what is allowed and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from ds_blockwise.runs.reading.problems import Problems, correction
from ds_blockwise.runs.reading.whole_files import JsonObject

Section = TypeVar("Section", bound="StrictSection")
_LARGEST = 2**31 - 1


def _texts(value: object) -> object:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


# Types of fields. A truth value is no number here, and 1 is no truth value.
NotNegative = Annotated[int, Field(strict=True, ge=0, le=_LARGEST)]
Positive = Annotated[int, Field(strict=True, ge=1, le=_LARGEST)]
AtLeastTwo = Annotated[int, Field(strict=True, ge=2, le=_LARGEST)]
Flag = Annotated[bool, Field(strict=True)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]


class StrictSection:
    """Base of the dataclasses that `read_section` reads: their fields are the allowed keys."""

    __slots__ = ()
    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


def read_section(
    cls: type[Section],
    values: Mapping[Any, Any],
    *,
    file: str | Path,
    problems: Problems,
    overridden: Sequence[str] = (),
) -> Section | None:
    """Build the frozen dataclass ``cls`` from ``values``.

    Args:
        cls: Dataclass whose fields are the allowed keys. A field that is a `StrictSection` is a section of its own.
        values: The mapping found in the file.
        file: Named in the messages.
        problems: Every mistake is noted here.
        overridden: Dotted keys that ``--set`` gave; it is named for mistakes in them.

    Returns:
        The dataclass, or None if a problem was noted.
    """
    adapter = TypeAdapter(cls)
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        whole = adapter.json_schema()
        for found in error.errors(include_url=False):
            kind, path, value = found["type"], found["loc"], found["input"]
            if kind == "unexpected_keyword_argument":
                known = list(_schema_at(whole, path[:-1])["properties"])
                allowed, remedy = f"the keys {', '.join(known)}", correction(path[-1], known)
            else:
                allowed = _describe(_schema_at(whole, path), too_large=kind == "less_than_equal")
                remedy = _REMEDIES.get(kind) or _remedy(value)
            shown = None if kind == "missing" else value  # pydantic shows the whole section
            key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
            unknown = kind == "unexpected_keyword_argument"
            from_command = any(
                f"{key}.".startswith((f"{given}.", f"{given}[")) or (unknown and given.startswith(f"{key}."))
                for given in overridden
            )
            problems.add("--set" if from_command else file, key, shown, allowed, remedy)
        return None


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


def _remedy(value: object) -> str:
    if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off", "y", "n"):
        return "write true or false"
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9][0-9a-fxo_:]*", value):
        return "write its digits alone: no leading zeros, no _ and no :"
    return "correct the value"


def _describe(schema: JsonObject, too_large: bool = False) -> str:
    if "anyOf" in schema:
        return ", or ".join(_describe(choice, too_large) for choice in schema["anyOf"])
    text, least, most = _WORDS[schema["type"]], schema.get("minimum"), schema.get("maximum")
    if most is not None and (most != _LARGEST or too_large):
        return f"{text} from {least} to {most}"
    return text if least is None else f"{text}, at least {least}"
