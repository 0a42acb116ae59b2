# SPDX-License-Identifier: Apache-2.0
"""The mistakes in a configuration, all listed at once: file, key, value, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ds_blockwise.values import nearest

_LONGEST = 120  # characters of a value or a key that a message shows


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
        line = f"{file}: {_shortened(key)} = {_shortened(repr(value))}: {reason}"
        # control characters and halves of surrogate pairs come from files, and a terminal cannot show them
        self.lines.append("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))

    def raise_if_any(self) -> None:
        """Raise one `ValueError` that lists everything noted.

        Raises:
            ValueError: At least one problem was noted.
        """
        if self.lines:
            count = f"{len(self.lines)} problem" + ("s" if len(self.lines) > 1 else "")
            raise ValueError(f"{count} in the configuration:\n- " + "\n- ".join(self.lines))


def correction(word: object, known: Iterable[str]) -> str:
    """What to do about a word that is not known: take the nearest one, or remove it."""
    near = nearest(word, known)
    return "remove it" if near is None else f"did you mean {near!r}?"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
