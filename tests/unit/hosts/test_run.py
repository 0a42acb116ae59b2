# SPDX-License-Identifier: Apache-2.0
"""`python -m ds_blockwise.run`: somebody else's script with our optimizers, as launchers start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

SCRIPT = """
import sys
import beside
print(__name__, "ds_blockwise" in sys.modules, sys.argv[1:], beside.WORD)
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "scripts").mkdir(exist_ok=True)
    for place in (folder, folder / "scripts"):
        (place / "train.py").write_text(SCRIPT)
        (place / "beside.py").write_text("WORD = 'found'\n")
    command = [sys.executable, "-m", "ds_blockwise.run", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (["scripts/train.py", "--deepspeed", "x.json"], "['--deepspeed', 'x.json']"),
        (["--local_rank=1", "scripts/train.py", "-m", "--x"], "['--local_rank=1', '-m', '--x']"),
        (["-m", "train", "a"], "['a']"),
    ],
)
def test_a_script_runs_as_the_main_module_with_its_own_arguments(
    tmp_path: Path, arguments: list[str], seen: str
) -> None:
    """DeepSpeed's launcher writes --local_rank before the script; modules beside the script must be found."""
    done = run(tmp_path, *arguments)
    assert done.stdout.strip() == f"__main__ True {seen} found", done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "usage: "), (["--verbose", "train.py"], "usage: "), (["nowhere.py"], "no file nowhere.py")],
)
def test_what_cannot_run_is_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
