# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise init``: files that pass the check, the same as the shipped ones, also from a built package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_blockwise.cli.init import FILES
from ds_blockwise.cli.main import main
from tests.helpers import ROOT


def test_the_files_pass_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pydantic", reason="run files need the extra 'launch'")
    folder = tmp_path / "a new" / "run: 1"
    assert main(["init", str(folder)]) == 0
    said = capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert main(["check", str(folder / "run.yaml")]) == 0, capsys.readouterr()
    assert "no problems" in capsys.readouterr().out
    assert f"ds-blockwise check '{folder}/run.yaml'" in said
    assert f"{ROOT}/launch/cluster/local.sh run.yaml" in said


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hostfile").write_text("node1 slots=8\n", encoding="utf-8")
    assert main(["init", str(tmp_path)]) == 2
    assert f"{tmp_path} holds hostfile already, and nothing is overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hostfile"]
    assert main(["init", str(tmp_path / "hostfile")]) == 2
    assert "is a file: give a folder" in capsys.readouterr().err


def test_they_are_the_shipped_ones() -> None:
    """The tiny run, which the documentation and its figures are about."""
    templates = ROOT / "ds_blockwise" / "cli" / "templates"
    for name, shipped in (("model.yaml", "model/tiny.yaml"), ("deepspeed.json", "deepspeed/blockwise_adam_mini.json")):
        assert (templates / name).read_text() == (ROOT / "configs" / shipped).read_text(), name
    yaml = pytest.importorskip("yaml", reason="run files need the extra 'launch'")
    ours, tiny = (yaml.safe_load(path.read_text()) for path in (templates / "run.yaml", ROOT / "configs/run/tiny.yaml"))
    for section in ("parallel", "cluster", "training"):
        assert ours[section] == tiny[section], section


def test_a_built_package_brings_them(tmp_path: Path) -> None:
    """Without the repository beside it, as a wheel installs it."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "-d", str(tmp_path / "lib")],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=120,
    )
    code = "from ds_blockwise.cli.main import main; raise SystemExit(main(['init', 'made']))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "lib")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == sorted(FILES)
    assert "the main job is in the repository's folder launch/" in done.stdout
    assert json.loads((tmp_path / "made" / "deepspeed.json").read_text())["optimizer"]["type"] == "BlockwiseAdamMini"
    # the placeholder of the Slurm script is refused in a line
    job = subprocess.run(["bash", "slurm.sbatch"], cwd=tmp_path / "made", capture_output=True, text=True, check=False)
    assert job.returncode == 2
    assert job.stderr == "slurm.sbatch: /path/to/checkout is no checkout of ds_blockwise: correct the line checkout=\n"
