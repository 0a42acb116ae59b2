# SPDX-License-Identifier: Apache-2.0
"""The first ten minutes: the blocks of the README and of the guide for PyTorch work after the install line above."""

from __future__ import annotations

import re
import shlex
import socket
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.helpers.newcomer import Environment, build_wheel

pytestmark = pytest.mark.spawns
PAGES = ("README.md", "docs/guides/pytorch.md")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("page", PAGES)
def test_every_block_works_after_its_install_line(page: str, wheel: Path, tmp_path: Path) -> None:
    """The quick start needed transformers, which its install line did not bring: it worked for us alone."""
    environment, ran = None, 0
    work = tmp_path / "work"
    work.mkdir()
    text = (ROOT / page).read_text(encoding="utf-8")
    for kind, code in re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        if kind == "python":
            name = re.match(r"# (\w+\.py)\n", code)
            assert name is not None, "the first line of a script names its file"
            (work / name[1]).write_text(code, encoding="utf-8")
            continue
        for words in (shlex.split(line, comments=True) for line in code.splitlines() if kind == "bash"):
            if words[:2] == ["pip", "install"]:
                found = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[2])
                assert found is not None, words
                environment = Environment(
                    tmp_path / f"environment{ran}", wheel, filter(None, (found[1] or "").split(","))
                )
            elif words[0] in ("python", "deepspeed"):
                assert environment is not None, "no install line above it"
                if words[0] == "deepspeed":
                    words[1:1] = ["--master_port", free_port()]
                done = environment.run(words, work)
                assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
                losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
                assert len(losses) == 3 and losses == sorted(losses, reverse=True), done.stdout
                ran += 1
            else:
                assert words[0] in ("make", "ds-blockwise"), words  # test_readme.py runs these
    assert ran == 1


def test_the_environment_has_only_what_was_asked_for(wheel: Path, tmp_path: Path) -> None:
    """Else the test above says nothing."""
    environment = Environment(tmp_path / "environment", wheel)
    done = environment.run(["python", "-c", "import ds_blockwise, torch; print(ds_blockwise.__file__)"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(environment.site)
    for name in ("deepspeed", "transformers", "yaml", "pytest", "launch"):
        assert environment.run(["python", "-c", f"import {name}"], tmp_path).returncode == 1
