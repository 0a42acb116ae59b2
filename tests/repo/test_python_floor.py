# SPDX-License-Identifier: Apache-2.0
"""No source needs a newer Python than `setup.py` asks for, whatever Python runs the tests.

mypy (for the packages) and ruff (for the syntax) are set to the same version. What they do not see is looked up in the
stubs of the standard library that come with mypy: each name stands there with the version that brought it.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

mypy = pytest.importorskip("mypy", reason="its stubs say which Python brought which name")

STUBS = Path(mypy.__file__).parent / "typeshed" / "stdlib"
FOLDERS = ("ds_blockwise", "megatron_patch", "launch", "benchmarks", "tests")
SOURCES = [ROOT / "setup.py", *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))]


def floor() -> tuple[int, int]:
    major, minor = re.findall(r'python_requires=">=(\d+)\.(\d+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))[0]
    return int(major), int(minor)


@functools.cache
def newer_modules(version: tuple[int, int]) -> set[str]:
    """Modules of the standard library that came after a version."""
    lines = (STUBS / "VERSIONS").read_text(encoding="utf-8").splitlines()
    found = re.findall(r"^([\w.]+): (\d+)\.(\d+)-", "\n".join(lines), flags=re.MULTILINE)
    return {name for name, major, minor in found if (int(major), int(minor)) > version}


def names_of(body: list[ast.stmt], version: tuple[int, int]) -> set[str]:
    """Names that the statements of a stub define for a version."""
    found: set[str] = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.If):
            since = re.fullmatch(r"sys\.version_info >= \((\d+), (\d+)\)", ast.unparse(node.test))
            branches = [*node.body, *node.orelse]  # of another condition, such as the platform
            if since:
                branches = node.body if version >= tuple(map(int, since.groups())) else node.orelse
            found |= names_of(branches, version)
    return found


@functools.cache
def newer_names(module: str, version: tuple[int, int]) -> set[str]:
    """Names of a module of the standard library that came after a version; none for other modules."""
    path = STUBS.joinpath(*module.split("."))
    path = path / "__init__.pyi" if path.is_dir() else path.with_suffix(".pyi")
    if not path.is_file():
        return set()
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return names_of(body, (9, 0)) - names_of(body, version)


def used(tree: ast.Module) -> Iterator[tuple[str, str, int]]:
    """Module, name (empty for the module itself) and line of everything that a file takes from modules."""
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, "", node.lineno
                modules[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, "", node.lineno
            yield from ((node.module, alias.name, node.lineno) for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
            yield modules[ast.unparse(node.value)], node.attr, node.lineno


def too_new(source: str, version: tuple[int, int]) -> list[str]:
    """What a source takes from the standard library that a version does not have, as ``line: module.name``."""
    modules = newer_modules(version)
    return [
        f"{line}: {module}.{name}".rstrip(".")
        for module, name, line in used(ast.parse(source))
        if module in modules or name in newer_names(module, version)
    ]


def test_the_check_finds_what_is_too_new() -> None:
    source = "import hashlib, tomllib\nfrom enum import StrEnum, Enum\nhashlib.file_digest\nhashlib.sha256\n"
    assert too_new(source, (3, 10)) == ["1: tomllib", "2: enum.StrEnum", "3: hashlib.file_digest"]
    assert too_new(source, (3, 11)) == []


def test_every_source_runs_on_the_oldest_python() -> None:
    found = {path: too_new(path.read_text(encoding="utf-8"), floor()) for path in SOURCES}
    assert {str(path.relative_to(ROOT)): names for path, names in found.items() if names} == {}


def test_the_linters_look_at_the_same_version() -> None:
    """mypy then refuses newer methods and arguments, ruff newer syntax."""
    major, minor = floor()
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'target-version = "py{major}{minor}"' in text
    assert f'python_version = "{major}.{minor}"' in text
