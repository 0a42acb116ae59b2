# SPDX-License-Identifier: Apache-2.0
"""Reading a configuration file whole: what is no file of text, too long, too deep or says a thing twice is refused.

Nothing that a person writes comes near the limits; what does would take minutes to read, or end Python's stack.
"""

from __future__ import annotations

import json
import math
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ds_blockwise.runs.reading.problems import Problems

JsonObject: TypeAlias = dict[str, Any]
Twice: TypeAlias = dict[int, tuple[object, list[str]]]
"""By the identity of a mapping: the mapping, so that it keeps its identity, and the keys that came more than once."""

LONGEST_FILE = 1 << 20  # bytes
DEEPEST = 32  # lists and objects in each other
_DIGITS = 18  # of a whole number: such numbers fit into 64 bits


class LongNumber(str):
    """The digits of a whole number that is too long."""

    __slots__ = ()


def whole_number(digits: str) -> int | LongNumber:
    """The number, or its digits if there are too many."""
    return int(digits) if len(digits) <= _DIGITS else LongNumber(digits)


def read_json(path: Path, problems: Problems) -> JsonObject:
    """The object in a JSON file; an empty one if there is none, which is then noted in ``problems``.

    A key that stands twice is a problem, as in DeepSpeed.
    """
    kind = "JSON file"
    text = read_text(path, kind, LONGEST_FILE, problems)
    if text is None:
        return {}
    twice: Twice = {}

    def unique(pairs: list[tuple[str, Any]]) -> JsonObject:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice[id(found)] = (found, [key for key, count in counts.items() if count > 1])
        return found

    try:
        loaded = json.loads(text, object_pairs_hook=unique, parse_int=whole_number)
    except json.JSONDecodeError as error:
        unreadable(path, kind, str(error), problems)
        return {}
    except RecursionError:
        problems.add(path, "(file)", "...", f"at most {DEEPEST} lists and objects in each other", "take some out")
        return {}
    if not isinstance(loaded, dict):
        problems.add(path, "(file)", type(loaded).__name__, "a JSON object", "see configs/deepspeed/")
        return {}
    return loaded if check_values(path, loaded, problems, twice) else {}


def read_text(path: Path, kind: str, longest: int, problems: Problems) -> str | None:
    """The text of a file; None if it can't be read, which is noted.

    Args:
        path: A regular file in UTF-8, with or without a byte order mark.
        kind: Of the file, for messages.
        longest: Bytes that it may have.
        problems: Every mistake is noted here.
    """
    try:
        found = path.stat()
        # opening a pipe would wait for whoever writes into it
        if not stat.S_ISREG(found.st_mode):
            unreadable(path, kind, "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device", problems)
            return None
        with path.open("rb") as file:
            content = file.read(longest + 1)
        if len(content) > longest:
            problems.add(path, "(file)", f"{found.st_size} bytes", f"at most {longest} bytes", "take some out")
            return None
        return content.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name with a NUL
        unreadable(path, kind, str(error), problems)
        return None


def unreadable(path: Path, kind: str, reason: str, problems: Problems) -> None:
    """Note that a file is not what it should be."""
    problems.add(path, "(file)", reason, f"a readable {kind}", "correct the path or file")


def check_values(file: str | Path, values: Mapping[str, object], problems: Problems, twice: Twice) -> bool:
    """Note every value that no setting has, wherever it stands.

    Args:
        file: Named in the messages.
        values: What was read.
        problems: Every mistake is noted here.
        twice: See `Twice`.

    Returns:
        Whether the values can be looked at without care: none is nested too deep.
    """
    for key, value, depth in _entries("", values, 0):
        if depth > DEEPEST:
            allowed = f"at most {DEEPEST} lists and objects in each other"
            problems.add(file, key, "...", allowed, "take some out")
            return False
        for repeated in twice.get(id(value), (None, []))[1]:
            name = f"{key}.{repeated}" if key else repeated
            problems.add(file, name, "(twice)", "each key once", "remove one of them")
        if isinstance(value, LongNumber):
            allowed = f"a whole number of at most {_DIGITS} digits"
            problems.add(file, key, value, allowed, "correct the value")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.add(file, key, value, "a finite number", "correct the value")
        elif isinstance(value, str) and not value.isprintable() and not _is_text(value):
            problems.add(file, key, value, "text of whole characters, without control characters", "correct the text")
    return True


def _entries(key: str, value: object, depth: int) -> Iterator[tuple[str, object, int]]:
    """Every value with its dotted key and its depth, down to one level more than is allowed."""
    yield key, value, depth
    if depth > DEEPEST:
        return
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _entries(f"{key}.{name}" if key else str(name), entry, depth + 1)
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _entries(f"{key}[{index}]", entry, depth + 1)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return all(c.isprintable() or c in "\n\t" or ord(c) > 0x9F for c in value)
