# SPDX-License-Identifier: Apache-2.0
"""``make test-pythons``: our wheel beside DeepSpeed on each promised Python, in an environment of its own.

The tests come along as a copy, so that nothing but the wheel is found as ``ds_blockwise``. An environment holds up to
7 GB, as pip's torch may be a CUDA build, and is deleted after its tests; KEEP=1 keeps it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import ROOT
from tests.helpers.newcomer import build_wheel, without_checkout
from tests.helpers.support_page import versions
from tests.helpers.versions.deepspeed import DEEPSPEED
from tests.helpers.versions.overlay import Package, run_tests, try_each

FOLDER = ROOT / "build" / "pythons"
TORCH = Package("torch", "torch")
TEST_TOOLS = ("adam-mini", "pytest", "pytest-timeout")
_OPTIMIZERS = "tests/unit/optimizers/"
TESTS = (
    *(_OPTIMIZERS + name for name in ("test_oracle.py", "test_lion.py", "test_muon.py", "test_muon_published.py")),
    "tests/unit/kernels/test_base.py",
    "tests/unit/kernels/test_close_look.py",
    "tests/hosts/deepspeed/test_parity.py",
)
# Triton has a target of its own; of the engines' tests, every optimizer in ZeRO-2 on two ranks
CHOSEN = "not triton and (not test_parity or (z2 and dp2 and (grid or test_lion or test_muon)))"
COPIED = ("tests", "benchmarks", "pyproject.toml", "docs/versions.csv", "docs/tools.csv")


@dataclass(frozen=True)
class Corner:
    """One Python, and what is installed for it beside the wheel."""

    oldest_torch: bool
    packages: tuple[str, ...] = ()


CORNERS = {
    "3.10": Corner(oldest_torch=True),
    "3.11": Corner(oldest_torch=True),
    "3.12": Corner(oldest_torch=False, packages=("emerging-optimizers==0.3.0",)),
    "3.13": Corner(oldest_torch=False),
}


def interpreter(version: str) -> str:
    """A Python of a minor version: the one on PATH, or one that pyenv has installed.

    Raises:
        RuntimeError: there is none.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [f"python{version}", *sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/python")), reverse=True)]
    asked = "import sys; print(*sys.version_info[:2], sep='.')"
    for python in found:
        # pyenv puts a python3.12 on PATH that refuses to start
        if shutil.which(python) and _output([python, "-c", asked], check=False) == version:
            return python
    raise RuntimeError(f"no Python {version} is found: put python{version} on PATH, or install it with pyenv")


def _output(command: list[str], *, check: bool = True) -> str:
    """What a command prints.

    Raises:
        RuntimeError: it fails; only if ``check``.
    """
    done = subprocess.run(
        command, cwd=tempfile.gettempdir(), env=without_checkout(), capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done.stdout.strip()


def environment_of(version: str, wheel: Path) -> Path:
    """The Python of a corner's virtual environment, with the wheel and all that its tests need.

    Raises:
        RuntimeError: something cannot be installed.
    """
    corner, folder = CORNERS[version], FOLDER / version / "environment"
    oldest = ".".join(map(str, TORCH.promised()[0]))
    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        _output([interpreter(version), "-m", "venv", str(folder)])
    pip = ["env", *(f"{name}={value}" for name, value in DEEPSPEED.variables.items())]
    pip += [python, "-m", "pip", "install", "--quiet"]
    torch = f"torch=={oldest}" if corner.oldest_torch else "torch"
    _output([*pip, torch, f"{wheel}[deepspeed,hf]", *TEST_TOOLS, *corner.packages])
    _output([*pip, "--no-deps", "--force-reinstall", str(wheel)])  # a kept environment has an older one
    return folder / "bin" / "python"


def copy_tests(folder: Path) -> Path:
    """The tests, in a folder without the package."""
    for name in COPIED:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, target)
    return folder


def tested_on(version: str, wheel: Path) -> str:
    """Install, run the tests, and put what came of them into docs/versions.csv.

    Raises:
        RuntimeError: something cannot be installed, a test fails, or another package than the wheel is found.
    """
    begin = time.monotonic()
    python = environment_of(version, wheel)
    asked = "import importlib.metadata as m, json, platform, ds_blockwise, torch; print(json.dumps({"
    asked += "'file': ds_blockwise.__file__, 'python': platform.python_version(), 'torch': torch.__version__,"
    asked += "'deepspeed': m.version('deepspeed')}))"
    found = json.loads(_output([str(python), "-c", asked]))
    if not Path(found["file"]).is_relative_to(python.parents[1]):
        raise RuntimeError(f"{found['file']} was found instead of the wheel")
    _output([str(python.with_name("ds-blockwise")), "configs"])
    installed = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        variables = {
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "TORCH_EXTENSIONS_DIR": str(Path(folder) / "kernels"),  # compiled by this torch and Python
        }
        copied = copy_tests(Path(folder) / "copy")
        result = run_tests(python, without_checkout() | variables, copied, "-k", CHOSEN, *TESTS)
    command = f'make test-pythons ONLY="{version}"'
    of_run = {"python": found["python"], "with_torch": found["torch"]}
    versions.add_row(DEEPSPEED.title, found["deepspeed"], result.passed, command, **of_run)
    seconds = f"{installed - begin:.0f} s to install, {time.monotonic() - installed:.0f} s to test"
    skipped = "".join(f"\n  skipped: {reason}" for reason in sorted(result.skipped))
    return f"{result.passed} tests passed with torch {found['torch']} ({seconds}){skipped}"


def main() -> int:
    """The corners named as arguments, or all of them; 1 if one failed."""
    chosen = sys.argv[1:] or list(CORNERS)
    unknown = sorted(set(chosen) - set(CORNERS))
    if unknown:
        sys.exit(f"ONLY={' '.join(unknown)} is none of {', '.join(CORNERS)}")
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(Path(folder))

        def tried(version: str) -> str:
            try:
                return tested_on(version, wheel)
            finally:
                if not os.environ.get("KEEP"):
                    shutil.rmtree(FOLDER / version, ignore_errors=True)

        return try_each("Python", chosen, tried)


if __name__ == "__main__":
    sys.exit(main())
