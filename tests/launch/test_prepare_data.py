# SPDX-License-Identifier: Apache-2.0
"""The command line of `prepare_data.py`: text without a run file, and mistakes in a line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="token files are Megatron-core's")

import prepare_data
from tests.helpers.launch.project import make_project


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path)


def _run(*arguments: object) -> None:
    prepare_data._without_traceback(lambda: prepare_data.main([*map(str, arguments), "--workers", "1"]))


def test_own_text_without_a_run_file(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And a file that is not UTF-8 is counted where the user looks."""
    (project / "texts" / "latin.txt").write_bytes("Stra\u00dfe".encode("latin-1"))
    out = project / "out"
    caplog.set_level(logging.INFO)
    _run(project / "texts", "--output", out, "--vocab-size", 300, "--validation-fraction", 0.2)
    metadata = json.loads((out / "metadata.json").read_text(encoding="utf-8"))
    assert metadata["tokenizer"]["vocab_size"] == 300
    assert metadata["splits"]["validation"]["documents"] > 0
    assert f"1 of {metadata['files']} files left out, because they are not UTF-8: " in caplog.text
    assert "latin.txt" in caplog.text
    caplog.clear()
    _run("--check", "--output", out)
    assert "no damage found" in caplog.text
    # the same tokenizer for more text; any size of it will do
    _run(project / "texts", "--output", project / "more", "--tokenizer", out, "--validation-fraction", 0.2)
    assert (project / "more" / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--source", "nowhere/"), "data.source = 'nowhere/': allowed: 'stdlib'"),
        (("--text-key", "txet"), "txet"),
        (("--tokenizer", "none.json"), "data.tokenizer = 'none.json'"),
        (("--set", "training.stpes=1"), "training.stpes"),
        (("--run", "none.yaml"), "none.yaml"),
    ],
)
def test_mistakes_are_said_without_a_traceback(
    project: Path, arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        _run("--run", project / "run.yaml", *arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("prepare_data.py: error: ")
    assert words in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give a run file (--run RUN), or text and a folder for its tokens: TEXT --output DIR"),
        (("texts",), "give a run file"),
        (("texts", "--source", "texts", "--output", "out"), "TEXT and --source are the same"),
        (("texts", "--output", "out", "--set", "a.b=1"), "--set changes a run file"),
        (("--run", "run.yaml", "--vocab-size", "9"), "--vocab-size goes without --run"),
        (("texts", "--output", "out", "--validation-fraction", "0.9"), "allowed: from 0.001 to 0.5"),
    ],
)
def test_what_does_not_go_together(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _run(*arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
