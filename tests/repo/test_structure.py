# SPDX-License-Identifier: Apache-2.0
"""The shape of the code that no linter checks; which room may import which stands in pyproject.toml (`make lint`)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

PACKAGE = sorted((ROOT / "ds_blockwise").rglob("*.py"))
SOURCES = sorted(
    path
    for folder in ("ds_blockwise", "megatron_patch", "launch", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
LONGEST = 400
LONG_FOR_A_REASON = {
    "ds_blockwise/optimizers/base.py": "one class: its settings, what is bound to it, its step",
    "tests/hosts/deepspeed/test_checkpoint_guard.py": "the checks of one start of the ranks",
    "tests/launch/test_token_files.py": "one set of prepared files, which all its tests compare with",
}
FULLEST = 12  # modules in a folder that a newcomer enters
FULLEST_OF_TESTS = 22
# what may be imported in a folder (or file) and below it, and nowhere else in ds_blockwise
ONLY_IN = {
    "torch.distributed": ("parallel", "hosts"),
    "triton": ("kernels/triton",),
    "yaml": ("runs", "cli"),
    "pydantic": ("runs", "hosts/deepspeed/config/models.py"),
    "matplotlib": ("figure_style.py", "measure/sharpness_plot.py", "runs/plan_plot.py"),
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth of its code, but for the type checker alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    skipped = {id(child) for node in typing_only for child in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_hosts_and_communication_stay_in_their_rooms(path: Path) -> None:
    """`pip install ds_blockwise` needs torch alone, and only `parallel` and the hosts decide what travels."""
    inside = path.relative_to(ROOT / "ds_blockwise").as_posix()
    for name in imports(path):
        for package, rooms in ONLY_IN.items():
            if f"{name}.".startswith(package + "."):
                assert any(inside == room or inside.startswith(room + "/") for room in rooms), f"imports {name}"


def test_no_circle_of_files_in_the_whole_repository() -> None:
    """Two files that need each other are one file, or three."""
    names = {_module_name(path): path for path in SOURCES}

    def file_of(name: str) -> Path | None:
        return names.get(name) or names.get(name.rpartition(".")[0])  # the module, or what holds the name

    graph = {
        path: sorted({found for name in imports(path) if (found := file_of(name)) is not None and found != path})
        for path in SOURCES
    }
    done: set[Path] = set()

    def visit(path: Path, way: list[Path]) -> None:
        assert path not in way, "a circle: " + " -> ".join(map(relative, [*way[way.index(path) :], path]))
        if path not in done:
            for target in graph[path]:
                visit(target, [*way, path])
            done.add(path)

    for path in SOURCES:
        visit(path, [])


def _module_name(path: Path) -> str:
    """The name under which other files import it: the scripts of launch/ import their neighbours by bare name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "launch" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_folders_are_rooms_and_not_halls() -> None:
    """A newcomer sees what a folder holds at one look."""
    counts = Counter(path.parent for path in SOURCES if path.name != "__init__.py")
    for folder, count in counts.items():
        limit = FULLEST_OF_TESTS if "tests" in folder.relative_to(ROOT).parts else FULLEST
        assert count <= limit, f"{relative(folder)} holds {count} modules"


@pytest.mark.parametrize("path", [p for p in PACKAGE if p.name == "__init__.py" and p.parent.name != "ds_blockwise"])
def test_a_room_says_its_purpose_in_one_sentence_and_exports_nothing(path: Path) -> None:
    """Names are imported from the module that holds them, so that a reader finds it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    text = ast.get_docstring(tree)
    assert text and len(text) <= 120 and text.endswith(".")
    assert len(tree.body) == 1


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_are_short_and_licensed(path: Path) -> None:
    """At most 400 lines: a file that one person can hold in mind. A class is not torn for it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST or relative(path) in LONG_FOR_A_REASON, f"{len(lines)} lines"
    assert any("SPDX-License-Identifier: Apache-2.0" in line for line in lines[:2])


def test_no_reason_for_a_long_file_outlives_it() -> None:
    for name in LONG_FOR_A_REASON:
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) > LONGEST


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_public_names_are_documented(path: Path) -> None:
    """Users read docstrings; a public name without one is not finished."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_no_path_of_a_machine_is_in_the_sources() -> None:
    """Someone else's home folder in a file fails on every other machine."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        for word in ("/home" + "/", "/root" + "/", "/work" + "/"):
            assert word not in text, f"{path}: {word}"


def test_any_module_may_be_imported_first() -> None:
    """Importing DeepSpeed imports our host files; a module that brings DeepSpeed in must not be needed by them."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    script = """
import importlib, os, sys, torch
for name in sys.argv[1:]:
    if (child := os.fork()) == 0:
        importlib.import_module(name)
        os._exit(0 if hasattr(torch.optim, "BlockwiseAdamW") else 1)
    assert os.waitpid(child, 0)[1] == 0, name
"""
    names = sorted(
        _module_name(path)
        for path in (ROOT / "ds_blockwise" / "hosts" / "deepspeed").rglob("*.py")
        if any(name.split(".")[0] == "deepspeed" for name in imports(path))
    )
    assert len(names) > 5
    command = [sys.executable, "-c", script, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
