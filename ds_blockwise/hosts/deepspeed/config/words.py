# SPDX-License-Identifier: Apache-2.0
"""Mistakes in a DeepSpeed JSON, and the words for them; does not import DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ds_blockwise.values import nearest

AUTO = "auto"
"""What HF Trainer and Accelerate fill in."""

SCHEMA_KEY = "$schema"
"""Names the JSON's schema to editors, at the top of the file; nothing else reads it."""

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_MOST_KEYS = 12  # that a message lists


class Mistake(NamedTuple):
    """One mistake in a JSON.

    Attributes:
        key: dotted name of the entry.
        value: what was found there.
        allowed: what may stand there.
        remedy: what to do, as an order.
    """

    key: str
    value: object
    allowed: str
    remedy: str


def correction(word: str, known: Iterable[str]) -> str:
    """What to do about a key that is not known."""
    near = nearest(word, known)
    return "remove it" if near is None else f"did you mean {near!r}?"


def keys_allowed(what: str, known: Iterable[str]) -> str:
    """The keys that may stand in a section, or that there are many."""
    keys = sorted(known)
    return f"{what} {', '.join(keys)}" if len(keys) <= _MOST_KEYS else f"{what} (there are {len(keys)} of them)"


def word_for(kind: object) -> str:
    """What a person calls a type of JSON."""
    words: dict[object, str] = {bool: "true or false", float: "a number", str: "text"}
    is_whole = isinstance(kind, type) and issubclass(kind, int) and kind is not bool
    return "a whole number" if is_whole else words.get(kind, getattr(kind, "__name__", str(kind)))
