# SPDX-License-Identifier: Apache-2.0
"""The rules that an error message tells its reader to paste, read as the place where they go would read them."""

from __future__ import annotations

import ast
import json
import re
from typing import Any


def proposed_rules(message: str) -> list[dict[str, Any]]:
    """The list of rules in a message: an argument of a Python call, or part of a JSON. Empty if it has none."""
    python = re.search(r"\n  rules=(\[\n.*?\n  \])", message, re.DOTALL)
    in_json = re.search(r'\n  "rules": (\[\n.*?\n  \])', message, re.DOTALL)
    if python is not None:
        return list(ast.literal_eval(python[1]))
    return [] if in_json is None else list(json.loads(in_json[1]))
