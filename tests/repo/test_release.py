# SPDX-License-Identifier: Apache-2.0
"""What `make release` builds: the sdist holds all that the wheel needs, and the notes are those of the version."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ds_blockwise.checkpoint.record import VERSION
from tests.helpers import ROOT
from tests.helpers.newcomer import build_wheel
from tests.helpers.wheels.release import differences, notes, unpacked


def test_the_notes_are_the_section_of_the_version() -> None:
    text = "# Changelog\n\n## 0.2.0 (unreleased)\n- new\n  more\n\n## 0.1.0\n- old\n\n## 0.1.0rc1\n"
    assert notes("0.2.0", text) == "- new\n  more\n"
    assert notes("0.1.0", text) == "- old\n"
    for version in ("0.3.0", "0.1.0rc1"):
        with pytest.raises(ValueError, match=f"no entries under ## {version}"):
            notes(version, text)
    assert notes(VERSION, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")).startswith("- ")


@pytest.mark.spawns
def test_a_wheel_from_the_sdist_is_the_wheel_from_the_repository(tmp_path: Path) -> None:
    """Also with its launchers' permissions, the kernels' sources and the templates."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path / "dist")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    inside = unpacked(sdist, tmp_path / "unpacked")
    for name in (
        "tests/repo/test_release.py",
        "docs/launch.md",
        "constraints.txt",
        ".ci/run",
        "benchmarks/provenance.py",
    ):
        assert (inside / name).is_file(), name
    (tmp_path / "own").mkdir()
    (tmp_path / "again").mkdir()
    own, again = build_wheel(tmp_path / "own"), build_wheel(tmp_path / "again", inside)
    assert differences(own, again) == []
    held = set(zipfile.ZipFile(own).namelist())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        if re.match(r"(configs|launch)/", name):
            assert f"ds_blockwise/{name}" in held, name
        elif re.match(r"(ds_blockwise|megatron_patch)/", name):
            assert name in held, name


def test_the_images_install_what_the_docs_say() -> None:
    """The two recipes are one: base, system packages, extras."""
    texts = [(ROOT / "launch/cluster" / name).read_text(encoding="utf-8") for name in ("Dockerfile", "apptainer.def")]
    for pattern in (r"nvidia/cuda:\S+", r"g\+\+ git.*venv", r'"/src\[\S+\]"', r"--constraint \S+"):
        (docker,), (apptainer,) = (set(re.findall(pattern, text)) for text in texts)
        assert docker == apptainer
    (extras,) = re.findall(r"/src\[(\S+)\]", texts[0])
    install = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    assert (
        set(extras.split(",")) == set("deepspeed,megatron,hf,launch,data".split(","))
        and "launch/cluster/Dockerfile" in install
    )
