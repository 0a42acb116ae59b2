# SPDX-License-Identifier: Apache-2.0
"""The cost of Python code as a count that no busy machine changes."""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Names of torch's operations inside a ``with`` block, each of them a launch on a GPU; without collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Note the name, then run it."""
        if function.namespace == "aten":
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


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
