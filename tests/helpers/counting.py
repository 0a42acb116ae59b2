# SPDX-License-Identifier: Apache-2.0
"""The cost of Python code as a count that no busy machine changes."""

from __future__ import annotations

import sys
from collections.abc import Callable


def count_calls(function: Callable[[], object]) -> int:
    """Calls of Python and of C functions that ``function`` makes, every torch operation among them.

    The smallest count of three, because the garbage collector may call finalizers of others in between.
    """
    counts = []
    for _ in range(3):
        found = 0

        def hook(_frame: object, event: str, _argument: object) -> None:
            nonlocal found
            found += event in ("call", "c_call")

        before = sys.getprofile()
        sys.setprofile(hook)
        try:
            function()
        finally:
            sys.setprofile(before)
        counts.append(found)
    return min(counts)
