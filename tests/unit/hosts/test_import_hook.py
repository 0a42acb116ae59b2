# SPDX-License-Identifier: Apache-2.0
"""Running something after another package's first import, and our registration with DeepSpeed, which uses it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from ds_blockwise.hosts.deepspeed.import_hook import after_import


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
