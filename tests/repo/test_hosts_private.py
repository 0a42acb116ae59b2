# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's private attributes are used in ds_blockwise/hosts/deepspeed/ and nowhere else."""

from __future__ import annotations

import argparse
import ast
import functools
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT

HOST = ROOT / "ds_blockwise" / "hosts" / "deepspeed"
SOURCES = [
    path
    for folder in ("ds_blockwise", "launch", "megatron_patch", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.is_relative_to(HOST)
]
# of DeepSpeed: where the classes are defined whose objects we meet
ROOMS = ("accelerator", "checkpoint", "comm", "moe", "module_inject", "monitor", "ops/adam", "runtime", "utils")
# names that DeepSpeed shares with what its classes inherit from, or with the standard library
COMMON = {
    name
    for thing in (
        torch.nn.Module(),
        torch.Tensor,
        torch.optim.Optimizer,
        torch.distributed,
        argparse.ArgumentParser,
        os,
    )
    for name in dir(thing)
}
COPIED = "activation_checkpointing"  # Megatron's, names included

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and len(name) > 2


def defined_in(tree: ast.AST) -> Iterator[str]:
    """Private names that a file defines: functions, methods, class attributes, attributes of objects."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            yield node.attr


def is_own(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


@functools.cache
def names_of_deepspeed() -> frozenset[str]:
    """Every private name that DeepSpeed's classes and modules define, from its source."""
    spec = find_spec("deepspeed")
    assert spec is not None and spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    files = [path for room in ROOMS for path in sorted((package / room).rglob("*.py")) if COPIED not in path.parts]
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in files)
    return frozenset(name for tree in trees for name in defined_in(tree) if is_private(name)) - COMMON


def private_uses(source: str, names: frozenset[str]) -> list[str]:
    """Where a file names private attributes of others: ``x._name``, or the name as a text for getattr and its like."""
    tree = ast.parse(source)
    foreign = names - set(defined_in(tree))
    pieces = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not is_own(node.value):
            name = node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in pieces:
            name = node.value
        else:
            continue
        if name in foreign:
            found.append(f"line {node.lineno}: {name}")
    return found


@needs_deepspeed
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_private_attributes_of_deepspeed_stay_in_the_host(path: Path) -> None:
    """A private name changes without notice: one folder has to be read again for a new DeepSpeed, not the house."""
    assert private_uses(path.read_text(encoding="utf-8"), names_of_deepspeed()) == []


@needs_deepspeed
def test_the_host_itself_would_be_caught() -> None:
    """The list of names is the right one: it has every private name that the host uses."""
    used = {
        use.split(": ")[1]
        for path in sorted(HOST.rglob("*.py"))
        for use in private_uses(path.read_text(encoding="utf-8"), names_of_deepspeed())
    }
    assert {
        "_configure_optimizer",
        "_is_gradient_accumulation_boundary",
        "_global_grad_norm",
        "_get_buffer_names",
        "_get_max_expert_size",
        "_hp_optimizer_states_linked",
    } <= used


@pytest.mark.parametrize(
    ("source", "uses"),
    [
        ("engine._boundary = True", 1),
        ("def f(engine):\n    return engine.optimizer._boundary", 1),
        ("getattr(engine, '_boundary', None)", 1),
        ("LEFT = ('overflow', '_boundary')\n[getattr(engine, name) for name in LEFT]", 1),
        ("engine.boundary()", 0),
        ("self._boundary", 0),
        ("class Own:\n    def __init__(self):\n        self._boundary = 1\n\nOwn()._boundary", 0),
        ("other._unknown", 0),
        ("engine.__dict__", 0),
        ("f'{key}_boundary'", 0),
    ],
)
def test_the_gate_can_fail(source: str, uses: int) -> None:
    """A gate that finds nothing in a file that breaks the rule is worth nothing."""
    assert len(private_uses(source, frozenset({"_boundary"}))) == uses
