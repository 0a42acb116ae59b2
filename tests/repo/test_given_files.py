# SPDX-License-Identifier: Apache-2.0
"""No place in the sources but one unpickles what a file holds, and that one runs no code unless it is told to."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

FOLDERS = ("ds_blockwise", "megatron_patch", "launch", "benchmarks")
ONE_PLACE = "ds_blockwise/checkpoint/given_files.py"
# module -> the functions of it that run what a file says
LOADERS = {
    "torch": {"load"},
    "pickle": {"load", "loads", "Unpickler"},
    "cloudpickle": {"load", "loads"},
    "dill": {"load", "loads"},
    "joblib": {"load"},
    "marshal": {"load", "loads"},
    "numpy": {"load"},
    "np": {"load"},
    "shelve": {"open"},
    "yaml": {"load", "load_all", "unsafe_load", "full_load"},
}


def loads_in(source: str) -> Iterator[str]:
    """Calls that unpickle, or import a function that does; ``torch.load`` only without ``weights_only=True``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in LOADERS:
            yield from (f"from {node.module} import {n.name}" for n in node.names if n.name in LOADERS[node.module])
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        if node.func.attr not in LOADERS.get(owner, ()):
            continue
        harmless = {"torch": ("weights_only", True), "numpy": ("allow_pickle", False), "np": ("allow_pickle", False)}
        named = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        key, value = harmless.get(owner, ("", None))
        if not (key in named and named[key] is value):
            yield ast.unparse(node)


@pytest.mark.parametrize("folder", FOLDERS)
def test_one_place_unpickles(folder: str) -> None:
    found = {
        path.relative_to(ROOT).as_posix(): calls
        for path in sorted(Path(ROOT / folder).rglob("*.py"))
        if (calls := list(loads_in(path.read_text(encoding="utf-8"))))
    }
    expected = {ONE_PLACE} if folder == "ds_blockwise" else set()
    assert set(found) == expected, found


def test_the_search_can_fail() -> None:
    assert list(loads_in("import torch\ntorch.load(path, weights_only=False)"))
    assert list(loads_in("import pickle\npickle.loads(data)"))
    assert list(loads_in("from pickle import loads"))
    assert not list(loads_in("import torch\ntorch.load(path, weights_only=True)"))
