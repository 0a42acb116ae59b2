# SPDX-License-Identifier: Apache-2.0
"""The cost of Python code as a count that no busy machine changes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
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


class Traffic(TorchDispatchMode):
    """What torch's operations do inside a ``with`` block to tensors of a size or more; our kernels are not theirs.

    Args:
        least: elements of the smallest tensor that is counted.

    Attributes:
        bytes: read and written.
        operations: names of those that read or wrote any.
    """

    def __init__(self, least: int) -> None:
        super().__init__()
        self._least, self.bytes = least, 0
        self.operations: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Count what goes in and, but for views, what comes out; a copy's target goes in without being read."""
        out = function(*args, **(kwargs or {}))
        if function.namespace == "aten" and not function.is_view:
            read = args[1:] if function.overloadpacket is torch.ops.aten.copy_ else args
            found = sum(t.nbytes for t in _tensors([read, out]) if t.numel() >= self._least)
            self.bytes += found
            self.operations += [str(function)] if found else []
        return out


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (list, tuple)):
        for one in found:
            yield from _tensors(one)


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
