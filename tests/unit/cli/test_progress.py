# SPDX-License-Identifier: Apache-2.0
"""What a command says while it takes long: what is awaited and how far it is, on stderr, and nothing if it is quick."""

from __future__ import annotations

import time

import pytest

from ds_blockwise.cli import progress
from ds_blockwise.cli.progress import waiting


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_IN_LOG_S", (0.02, 0.02))


def _until_said(capsys: pytest.CaptureFixture[str], words: str) -> str:
    said, deadline = "", time.monotonic() + 30
    while words not in said and time.monotonic() < deadline:
        time.sleep(0.01)
        captured = capsys.readouterr()
        assert captured.out == ""  # the result's place
        said += captured.err
    return said


def test_a_long_wait(impatient: None, capsys: pytest.CaptureFixture[str]) -> None:
    with waiting("converting x") as made:
        assert "converting x: 0 s ...\n" in _until_said(capsys, "converting x")
        for item in made.each("abc"):
            if item == "c":
                assert ", 2 of 3 ...\n" in _until_said(capsys, "2 of 3")
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_quick_or_quiet(impatient: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with waiting("x", quiet=True) as made:
        time.sleep(0.1)
        assert list(made.each([1, 2])) == [1, 2]
    monkeypatch.setattr(progress, "_IN_LOG_S", (60.0, 60.0))
    with waiting("x"):
        pass
    assert capsys.readouterr().err == ""


def test_an_error_passes_through(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="mistake"), waiting("x"):
        raise ValueError("mistake")
