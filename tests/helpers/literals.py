# SPDX-License-Identifier: Apache-2.0
"""The texts in a file of code, for pages that quote errors."""

from __future__ import annotations

import ast
from pathlib import Path


def literals_of(path: Path) -> list[str]:
    """Every text in a file's code, joined over line ends, with {} for what is filled in."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts
