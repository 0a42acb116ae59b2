# SPDX-License-Identifier: Apache-2.0
"""Checks of single values that a user gives: each error names the key, the value and what is allowed."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch


def nearest(word: object, known: Iterable[str], *, likeness: float = 0.5) -> str | None:
    """The known word that a misspelt one is most like; None if it is like none of them.

    Args:
        word: what was given.
        known: what is allowed.
        likeness: least ratio of matching letters, from 0 to 1: `difflib.SequenceMatcher.ratio`.
    """
    return next(iter(difflib.get_close_matches(str(word), list(known), n=1, cutoff=likeness)), None)


def suggest(word: object, known: Iterable[str]) -> str:
    """The end of an error's sentence: ``; did you mean 'x'?``, or nothing if no known word is near."""
    near = nearest(word, known)
    return "" if near is None else f"; did you mean {near!r}?"


def unknown(what: str, word: object, known: Iterable[str]) -> str:
    """The words of an error: ``unknown key 'foo'; did you mean 'x'? Allowed: x, y``."""
    known = tuple(known)
    return f"unknown {what} {word!r}{suggest(word, known) or '.'} Allowed: {', '.join(known)}"


def as_mapping(name: str, value: object) -> Mapping[str, object]:
    """The mapping that was given; an empty one for None.

    Raises:
        TypeError: it is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping, got {value!r}")
    return value


def check_keys(name: str, keys: Iterable[str], allowed: Sequence[str]) -> None:
    """Refuse a key that is not allowed, with the nearest one that is.

    Raises:
        ValueError: a key is not allowed.
    """
    for key in keys:
        if key not in allowed:
            raise ValueError(f"{name} has an {unknown('key', key, allowed)}")


def is_finite(value: float) -> bool:
    """Whether a number is finite and no integer beyond all floats, which ``math.isfinite`` cannot take."""
    return abs(value) <= sys.float_info.max


def as_multiplier(name: str, value: object) -> float:
    """A finite number of at least 0.

    Raises:
        TypeError: it is not a number.
        ValueError: it is negative or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number >= 0, got {value!r}")
    if not is_finite(value) or value < 0:
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")
    return float(value)


def as_count(name: str, value: object, *, low: int = 1) -> int:
    """An integer of at least ``low``. A whole float counts as one: JSON reads 5e4 as 50000.0.

    Raises:
        ValueError: it is something else.
    """
    count = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(count, bool) or not isinstance(count, int) or count < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
    return count


def if_given(check: Callable[[str, object], Checked], name: str, value: object) -> Checked | None:
    """``check(name, value)``, or None where nothing was given."""
    return None if value is None else check(name, value)


Checked = TypeVar("Checked")
Choice = TypeVar("Choice")


def number(name: str, value: object, *, low: float, below: float = math.inf) -> float:
    """Return ``value`` as a float in ``[low, below)``.

    Raises:
        TypeError: not a number. The string "auto" is filled in by HF Trainer and Accelerate only.
        ValueError: outside the range or not finite.
    """
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, str) and value == "auto":
        raise TypeError(f'{name} is "auto", which only HF Trainer and Accelerate fill in. Give a number.')
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (is_finite(value) and low <= value < below):
        upper = f" and < {below:g}" if below < math.inf else " and finite"
        raise ValueError(f"{name} must be >= {low:g}{upper}, got {value!r}")
    return float(value)


def one_of(name: str, value: object, allowed: tuple[Choice, ...]) -> Choice:
    """The allowed value that ``value`` equals.

    Raises:
        ValueError: it equals none of them.
    """
    for known in allowed:
        if value == known:
            return known
    raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
