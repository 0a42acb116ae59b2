# SPDX-License-Identifier: Apache-2.0
"""Our registration with DeepSpeed after its import, whoever imports it, with and without a line of ours."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

from ds_blockwise_autoload import SWITCH, activate, after_import


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package that can be imported once in this test, and is forgotten after it."""
    name = "imported_later"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("complete = False\nfrom . import part\ncomplete = True\n")
    (tmp_path / name / "part.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for module in (name, f"{name}.part"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    yield name
    for module in (name, f"{name}.part"):
        sys.modules.pop(module, None)


def test_the_call_comes_once_when_the_package_is_complete(package: str) -> None:
    """Registering with half of DeepSpeed fails; registering twice would hook an engine twice."""
    seen: list[bool] = []
    finders = list(sys.meta_path)
    after_import(package, lambda: seen.append(sys.modules[package].complete))
    assert package not in sys.modules
    assert find_spec(package) is not None  # what transformers does to see whether it is installed
    assert seen == []
    importlib.import_module(package)
    assert seen == [True]
    assert sys.meta_path == finders
    importlib.reload(sys.modules[package])
    assert seen == [True]


def test_a_package_that_is_imported_already_is_not_waited_for(package: str) -> None:
    """``import deepspeed`` may stand before ``import ds_blockwise``."""
    importlib.import_module(package)
    seen: list[int] = []
    after_import(package, lambda: seen.append(1))
    assert seen == [1]


def test_a_package_that_is_not_installed_is_still_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain PyTorch users have no DeepSpeed: its absence must look as it does without us."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    after_import("not_installed_at_all", lambda: pytest.fail("called"))
    assert find_spec("not_installed_at_all") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("not_installed_at_all")


def test_what_the_call_raises_comes_out_of_the_import(package: str) -> None:
    """A DeepSpeed that we do not know is named when it is imported, not when a run starts."""

    def fail() -> None:
        raise ImportError("unknown version")

    after_import(package, fail)
    with pytest.raises(ImportError, match="unknown version"):
        importlib.import_module(package)


@pytest.mark.parametrize("first", ["ds_blockwise", "deepspeed"])
def test_registration_does_not_depend_on_the_order_of_imports(first: str) -> None:
    """HF Trainer imports DeepSpeed late; users put our import wherever they like. Importing us must not import it."""
    second = "deepspeed" if first == "ds_blockwise" else "ds_blockwise"
    code = f"""
import importlib.util, sys, {first}
importlib.util.find_spec("deepspeed")  # what transformers does to see whether it is installed
assert {first == "deepspeed"} or "deepspeed" not in sys.modules
import {second}, torch, ds_blockwise
from deepspeed.runtime import lr_schedules
assert torch.optim.BlockwiseAdamMini is ds_blockwise.BlockwiseAdamMini
assert lr_schedules.BlockwiseCosineLR is ds_blockwise.BlockwiseCosineLR
"""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", ["deepspeed", "ds_blockwise", "ds_blockwise.hosts.deepspeed.attach"])
def test_any_order_of_imports_registers(first: str) -> None:
    """A host file that is imported first imports DeepSpeed, whose import asks for us while the file is incomplete."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    code = f"import {first}, ds_blockwise, deepspeed, torch; print(torch.optim.BlockwiseAdamW.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip().endswith("BlockwiseAdamW"), done.stderr


def test_a_package_that_is_being_imported_is_waited_for(package: str, tmp_path: Path) -> None:
    """`import deepspeed` imports torch in its first lines, and torch calls us: half of DeepSpeed is there."""
    seen: list[bool] = []
    (tmp_path / package / "part.py").write_text("import sys\nsys.called_by_part()\n")
    sys.called_by_part = lambda: after_import(package, lambda: seen.append(sys.modules[package].complete))  # type: ignore[attr-defined]
    try:
        module = importlib.import_module(package)
    finally:
        del sys.called_by_part  # type: ignore[attr-defined]
    assert seen == [True]
    assert type(module.__spec__).__name__ == "ModuleSpec" and not module.__spec__._initializing


def test_an_import_that_fails_is_not_an_import(package: str, tmp_path: Path) -> None:
    """Its own error must come out, and ours must not follow a broken DeepSpeed."""
    (tmp_path / package / "part.py").write_text("import sys\nsys.called_by_part()\nraise OSError('broken')\n")
    sys.called_by_part = lambda: after_import(package, lambda: pytest.fail("called"))  # type: ignore[attr-defined]
    try:
        with pytest.raises(OSError, match="broken"):
            importlib.import_module(package)
    finally:
        del sys.called_by_part  # type: ignore[attr-defined]


def installed_entry_points() -> list[str]:
    return [point.value for point in entry_points(group="torch.backends") if point.name == "ds_blockwise"]


def run_script(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    assert installed_entry_points() == ["ds_blockwise_autoload:activate"], "not installed: make setup"
    variables = {**os.environ, "DS_ACCELERATOR": "cpu", **environment}
    return subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("first", ["torch", "deepspeed"])
def test_the_switch_registers_without_an_import_line(first: str) -> None:
    """LLaMA-Factory, axolotl and `accelerate launch` take a DeepSpeed JSON and have no place for a line of Python."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    code = (
        f"import {first}, deepspeed, sys, torch\n"
        "print('ds_blockwise' in sys.modules, hasattr(torch.optim, 'BlockwiseMuon'))"
    )
    for value, expected in (("1", "True True"), ("0", "False False")):
        done = run_script(code, **{SWITCH: value})
        assert done.stdout.splitlines()[-1:] == [expected], done.stderr


def test_a_program_without_deepspeed_pays_for_one_small_file() -> None:
    """Every `import torch` of the environment calls us: counted in modules, switched on or off."""
    code = (
        "import importlib, sys, importlib.util, importlib.abc, importlib.machinery, os, collections.abc, types\n"
        "before = set(sys.modules)\n"
        "import ds_blockwise_autoload; ds_blockwise_autoload.activate()\n"
        "print(sorted(set(sys.modules) - before))"
    )
    for value in ("1", "0"):
        done = run_script(code, **{SWITCH: value})
        assert done.stdout.strip() == "['ds_blockwise_autoload']", done.stderr


def test_another_value_of_the_switch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "yes")
    with pytest.raises(ValueError, match=r"DS_BLOCKWISE_AUTOLOAD is 'yes'. Allowed: 1 \(on\) and 0 \(off\)"):
        activate()
