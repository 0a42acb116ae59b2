# SPDX-License-Identifier: Apache-2.0
"""From docstrings to Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence


def described(cls: type, section: str) -> dict[str, str]:
    """What the ``Args:`` or ``Attributes:`` of a class' docstring say about each name, each on one line.

    Args:
        cls: The class.
        section: ``Args`` or ``Attributes``.
    """
    lines = inspect.cleandoc(cls.__doc__ or "").splitlines()
    if f"{section}:" not in lines:
        return {}
    found: dict[str, list[str]] = {}
    texts: list[str] = []
    for line in lines[lines.index(f"{section}:") + 1 :]:
        if line and not line.startswith("    "):
            break
        if (entry := re.fullmatch(r"    (\w+): (.*)", line)) is not None:
            texts = found.setdefault(entry[1], [entry[2]])
        else:
            texts.append(line.strip())
    return {name: markdown(" ".join(filter(None, texts))) for name, texts in found.items()}


def markdown(text: str) -> str:
    """Text of a docstring or a help, for a page of `docs/reference`: code in single backticks, pages as links."""
    return re.sub(r"\bdocs/([\w/]+)\.md", r"[\1](../\1.md)", text.replace("``", "`"))


def cell(text: str) -> str:
    """Text that may stand in a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def sentence(text: str) -> str:
    """The text with a capital, unless it begins with code or the name of a file, and a full stop."""
    text = text.strip()
    if not text:
        return text
    begins = text[0].upper() + text[1:] if re.match(r"[a-z]['a-z-]*(?![\w.])", text) else text
    return begins + ("" if text.endswith((".", "!", "?")) else ".")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, with an empty line behind it."""
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return [*lines, *(f"| {' | '.join(map(cell, row))} |" for row in rows), ""]
