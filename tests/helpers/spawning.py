# SPDX-License-Identifier: Apache-2.0
"""Which tests start processes: ``make test-quick`` leaves them out."""

from __future__ import annotations

import multiprocessing
import subprocess
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import pytest
import torch.multiprocessing

FOLDERS = ("hosts/", "launch/")  # what these rooms are about needs several processes
_STARTERS = (subprocess, multiprocessing, torch.multiprocessing)


def starts_processes(item: pytest.Item) -> bool:
    """Whether a test is in one of `FOLDERS`, or names a module that starts processes, itself or through helpers."""
    if item.nodeid.removeprefix("tests/").startswith(FOLDERS):
        return True
    fixtures = getattr(item, "_fixtureinfo", None)
    definitions = () if fixtures is None else fixtures.name2fixturedefs.values()
    functions = [getattr(item, "function", None), *(found[-1].func for found in definitions if found)]
    seen: set[Any] = set()
    return any(_reaches_a_starter(function, seen) for function in functions if function is not None)


def _reaches_a_starter(function: Callable[..., Any], seen: set[Any]) -> bool:
    """Follows functions and classes of ``tests`` by the names in their code."""
    if function in seen:
        return False
    seen.add(function)
    if isinstance(function, type):
        return any(_reaches_a_starter(f, seen) for f in vars(function).values() if isinstance(f, FunctionType))
    function = getattr(function, "__wrapped__", function)
    if not isinstance(function, FunctionType):
        return False
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        if any(value is starter for starter in _STARTERS):
            return True
        ours = isinstance(value, FunctionType | type) or hasattr(value, "__wrapped__")
        if ours and str(getattr(value, "__module__", "")).startswith("tests.") and _reaches_a_starter(value, seen):
            return True
    return False


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
