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
    """Without the repository beside it, as a wheel installs it: the main job and the configs lie inside the package."""
    pytest.importorskip("pydantic", reason="run files need the extra 'launch'")
    lib = tmp_path / "lib"
    build = [sys.executable, "setup.py", "-q", "build_py", "-d", str(lib)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    code = """
from ds_blockwise.cli.main import main
for line in ("init made", "configs", "configs llama_2b/nodes_8 --to own", "check own/run/llama_2b/nodes_8.yaml"):
    assert main(line.split()) == 0, line
    print("--")
"""
    environment = os.environ | {"PYTHONPATH": str(lib)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    init, listed, copied, checked = done.stdout.split("--\n")[:4]
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == sorted(FILES)
    assert json.loads((tmp_path / "made" / "deepspeed.json").read_text())["optimizer"]["type"] == "BlockwiseAdamMini"
    launch = lib / "ds_blockwise" / "launch"
    assert f"python {launch}/prepare_data.py --run run.yaml" in init
    assert f"{launch}/cluster/local.sh run.yaml" in init
    assert f"checkout={lib}/ds_blockwise " in (tmp_path / "made" / "slurm.sbatch").read_text()
    for name in ("job/trainer.py", "data/corpus.py", "cluster/slurm_task.sh"):
        assert (launch / name).is_file(), name
    assert os.access(launch / "cluster" / "local.sh", os.X_OK)
    assert "run/tiny.yaml" in listed and "deepspeed/blockwise_muon.json" in listed
    assert "own/model/llama_2b.yaml" in copied and "no problems" in checked


def test_a_wrong_place_in_the_slurm_script_is_refused_in_a_line(tmp_path: Path) -> None:
    assert main(["init", str(tmp_path / "made")]) == 0
    script = tmp_path / "made" / "slurm.sbatch"
    script.write_text(script.read_text().replace(f"checkout={ROOT}", "checkout=/elsewhere"), encoding="utf-8")
    job = subprocess.run(["bash", "slurm.sbatch"], cwd=script.parent, capture_output=True, text=True, check=False)
    assert job.returncode == 2
    assert (
        job.stderr == "slurm.sbatch: /elsewhere holds no launch/cluster of ds_blockwise: correct the line checkout=\n"
    )
