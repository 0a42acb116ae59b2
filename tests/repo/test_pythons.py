# SPDX-License-Identifier: Apache-2.0
"""Every Python that setup.py names is one that `make test-pythons` runs, and docs/versions.csv has its run."""

from __future__ import annotations

import re

import pytest

from tests.helpers import ROOT
from tests.helpers.support_page.versions import read_rows
from tests.helpers.versions import pythons
from tests.repo.test_python_floor import floor

SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
NAMED = re.findall(r'"Programming Language :: Python :: (\d+\.\d+)"', SETUP)


def test_every_python_that_is_named_was_run() -> None:
    run = {row["python"].rpartition(".")[0] for row in read_rows() if row["host"] == "DeepSpeed"}
    assert NAMED and set(NAMED) <= run
    assert ".".join(map(str, floor())) in NAMED


def test_the_target_takes_the_pythons_that_are_named() -> None:
    assert set(NAMED) <= set(pythons.CORNERS)


def test_a_python_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYENV_ROOT", str(ROOT / "none"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match=r"no Python 3\.10 is found: put python3\.10 on PATH"):
        pythons.interpreter("3.10")
