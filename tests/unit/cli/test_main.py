# SPDX-License-Identifier: Apache-2.0
"""The command as a whole: its exit status, and what it says where a package is missing."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ds_blockwise
from ds_blockwise.cli.main import main
from ds_blockwise.runs.model_shape import GPTShape
from tests.helpers import ROOT

RUN = str(ROOT / "configs" / "run" / "tiny.yaml")
_BASE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from ds_blockwise.cli.main import main
for arguments in {commands!r}:
    print(main(arguments), flush=True)
    print("--", file=sys.stderr, flush=True)
"""
ABSENT = (
    "deepspeed",
    "matplotlib",
    "megatron",
    "numpy",
    "pydantic",
    "safetensors",
    "tokenizers",
    "transformers",
    "yaml",
)


def test_a_base_install_says_which_extra_to_install(tmp_path: Path) -> None:
    """`pip install ds_blockwise` brings torch alone."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "s.csv").write_text("", encoding="utf-8")
    text = str(tmp_path / "config.json")
    expected = {
        ("plan", RUN): "`ds-blockwise plan` needs {package}: pip install 'ds_blockwise[launch]'",
        ("check", RUN): "checking a run file needs {package}: pip install 'ds_blockwise[launch]'",
        (
            "blocks",
            str(ROOT / "configs/model/tiny.yaml"),
        ): "this model needs {package}: pip install 'ds_blockwise[meg",
        (
            "sharpness",
            "plot",
            str(tmp_path / "s.csv"),
        ): "drawing needs matplotlib: pip install 'ds_blockwise[launch]'",
        ("blocks", str(tmp_path)): "this model needs transformers: pip install 'ds_blockwise[hf]'",
        ("sharpness", "measure", str(tmp_path), "--text", text): "this model needs transformers: pip install",
    }
    code = _BASE.format(absent=ABSENT, commands=[list(command) for command in expected])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2"] * len(expected), done.stderr
    for words, found in zip(expected.values(), done.stderr.split("--\n"), strict=False):
        assert any(words.format(package=package) in found for package in ABSENT), found
        assert found.count("\n") == 1  # nor a warning, such as torch's of NumPy


def test_a_package_that_no_command_names(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Never the bare `No module named`, wherever the import stands; but a fault of our own stays one."""

    def lacks(name: str) -> None:
        def run(args: argparse.Namespace) -> tuple[str, int]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr("ds_blockwise.cli.init.run_init", run)

    lacks("safetensors.torch")
    assert main(["init", "anywhere"]) == 2
    said = capsys.readouterr().err
    assert said.endswith("needs safetensors, which is not installed: pip install 'ds_blockwise[deepspeed]'\n")
    lacks("somewhere.else")
    assert main(["init", "anywhere"]) == 2
    assert "needs somewhere, which is not installed: pip install somewhere\n" in capsys.readouterr().err
    lacks("ds_blockwise.nothing")
    with pytest.raises(ModuleNotFoundError):
        main(["init", "anywhere"])


def test_a_fault_of_our_own_is_not_called_a_missing_package() -> None:
    """`needs` must not hide a misspelt import of this package."""
    from ds_blockwise.cli.extras import needs

    with pytest.raises(ModuleNotFoundError, match=r"ds_blockwise\.nothing"), needs("launch", "this"):
        import ds_blockwise.nothing  # noqa: F401


def test_a_reader_that_has_seen_enough() -> None:
    """``ds-blockwise ... | head -1`` ends without a complaint, whether Python buffers its output or not."""
    code = "from ds_blockwise.cli.main import main; raise SystemExit(main())"
    for unbuffered in ({}, {"PYTHONUNBUFFERED": "1"}):
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"} | unbuffered
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-c", code, "check", RUN],
            stdout=writer,
            stderr=subprocess.PIPE,
            env=environment,
            check=False,
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (0, b"")


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ((), ("blocks",), ("convert",), ("check",), ("plan",), ("sharpness",), ("sharpness", "measure")):
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--help"])
        assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("blocks", "convert", "check", "plan", "sharpness", "--trust", "--gpu"))


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert (stopped.value.code, capsys.readouterr().out) == (0, f"ds-blockwise {ds_blockwise.__version__}\n")


@pytest.mark.parametrize("command", ["check", "plan"])
def test_a_model_file_is_no_run_file(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It was told to remove each of its keys."""
    path = ROOT / "configs" / "model" / "tiny.yaml"
    assert main([command, str(path)]) != 0
    said = "".join(capsys.readouterr())
    assert "this is a model file" in said
    assert "remove" not in said


def test_a_run_file_is_no_model_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("base: other.yaml\nmodel: sizes.yaml\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"this is a run file; give its model file, .*sizes\.yaml") as error:
        GPTShape.load(tmp_path / "run.yaml")
    assert str(error.value).count("\n") == 1


def test_problems_are_exit_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2 is for what could not be done at all."""
    (tmp_path / "run.yaml").write_text("name: 5\n", encoding="utf-8")
    assert main(["check", str(tmp_path / "run.yaml"), "--json"]) == 1
    assert any("name = 5" in line for line in json.loads(capsys.readouterr().out)["problems"])
    assert main(["check", str(tmp_path / "absent")]) == 2
