# SPDX-License-Identifier: Apache-2.0
"""A package ``apex`` that is not NVIDIA's is recognised; NVIDIA's own is welcome."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_blockwise.kernels.foreign_apex import foreign_apex
from tests.helpers import ROOT

PACKAGES = {
    "nvidia": ("apex/__init__.py", "apex/optimizers/__init__.py", "apex/multi_tensor_apply/__init__.py"),
    "foreign": ("apex/__init__.py", "apex/lib/__init__.py", "apex/lib/flash.py"),  # as PyPI's apex 0.9.10
}


def write_package(folder: Path, name: str) -> None:
    for path in PACKAGES[name]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


@pytest.fixture
def without_apex(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No such package in this process, and none left behind."""

    def forget() -> None:
        for module in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
            del sys.modules[module]

    forget()
    yield monkeypatch
    forget()


def test_the_other_apex_is_recognised(without_apex: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`pip install apex` brings a web toolkit."""
    assert foreign_apex() is None
    write_package(tmp_path, "foreign")
    without_apex.syspath_prepend(tmp_path)
    said = foreign_apex()
    assert said is not None and "pip uninstall apex" in said


def test_nvidias_apex_is_welcome(without_apex: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_package(tmp_path, "nvidia")
    without_apex.syspath_prepend(tmp_path)
    assert foreign_apex() is None


def test_megatron_patch_names_the_other_apex(tmp_path: Path) -> None:
    """Megatron-core would say that Apex must be installed to use FusedLayerNorm, to somebody who has installed it."""
    write_package(tmp_path, "foreign")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", "import megatron_patch"]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode != 0
    assert "pip uninstall apex" in ended.stderr.splitlines()[-1]
