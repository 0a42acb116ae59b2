# SPDX-License-Identifier: Apache-2.0
"""Somebody who installs the package: a built wheel in an environment with what its install line brings, and no more."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers import ROOT

_SOURCES = (
    *("setup.py", "pyproject.toml", "README.md", "LICENSE"),
    *("ds_blockwise", "ds_blockwise_autoload.py", "megatron_patch", "configs", "launch"),
)


def build_wheel(folder: Path, root: Path = ROOT, *, compiled: bool = False) -> Path:
    """Build the wheel from a copy of the sources, so that the checkout gets no build folder.

    Args:
        folder: an empty one.
        root: of the repository, or of an unpacked sdist.
        compiled: with compiled CPU kernels.

    Returns:
        Path of the wheel.
    """
    sources = folder / "sources"
    sources.mkdir()
    for name in _SOURCES:
        if (root / name).is_dir():
            shutil.copytree(root / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(root / name, sources / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    environment = os.environ | ({"DS_BLOCKWISE_COMPILE_KERNELS": "1"} if compiled else {})
    subprocess.run([*command, "--wheel-dir", str(folder), str(sources)], check=True, timeout=900, env=environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def blocks_of(page: Path) -> Iterator[tuple[str, str]]:
    """Headings (as kind ``heading``) and code blocks of a page, in its order: kind and text."""
    text = page.read_text(encoding="utf-8")
    for kind, code, heading in re.findall(r"^```(\w+)\n(.*?)^```|^(## [^\n]+)", text, flags=re.MULTILINE | re.DOTALL):
        yield (kind, code) if kind else ("heading", heading)


def set_up_extras() -> list[str]:
    """What `make setup` installs."""
    found = re.search(r'--editable "\.\[([\w,]+)\]"', (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert found is not None
    return found[1].split(",")


class Environment:
    """A virtual environment with our wheel and links to what it requires, taken from the present environment.

    Packages that the wheel does not ask for cannot be imported there, whatever is installed here.
    """

    def __init__(self, folder: Path, wheel: Path, extras: Iterable[str] = ()) -> None:
        venv.create(folder, with_pip=False)
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")
        # pip of the present environment installs into the new one
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(self.python),
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
        ]
        subprocess.run([*pip, str(wheel)], check=True, timeout=300, env=without_checkout())
        (own,) = self.site.glob("ds_blockwise-*.dist-info")
        self.packages: set[str] = set()
        self._bring(metadata.Distribution.at(own).requires or [], set(extras))

    def run(self, command: Sequence[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command as somebody does who has activated the environment; stdout and stderr are captured."""
        environment = without_checkout() | {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        program = shutil.which(command[0], path=str(self.bin)) or command[0]
        return subprocess.run(
            [program, *command[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )

    def _bring(self, requirements: Iterable[str], extras: set[str]) -> None:
        for requirement in map(Requirement, requirements):
            wanted = (
                any(requirement.marker.evaluate({"extra": extra}) for extra in extras | {""})
                if requirement.marker
                else True
            )
            name = canonicalize_name(requirement.name)
            if not wanted or name in self.packages:
                continue
            self.packages.add(name)
            distribution = metadata.distribution(name)
            self._link(distribution)
            self._bring(distribution.requires or [], set(requirement.extras))

    def _link(self, distribution: metadata.Distribution) -> None:
        files = distribution.files or []
        for file in files:
            source = Path(str(distribution.locate_file(file)))
            if file.parts[0] != "..":
                top = Path(str(distribution.locate_file(file.parts[0])))
                if not (self.site / top.name).exists():
                    (self.site / top.name).symlink_to(top)
            elif source.resolve().parent == Path(sys.executable).parent.resolve() and source.is_file():
                text = source.read_bytes()
                if text.startswith(b"#!") and b"python" in text.splitlines()[0]:
                    target = self.bin / source.name
                    target.write_bytes(b"#!" + bytes(self.python) + b"\n" + text.partition(b"\n")[2])
                    target.chmod(0o755)


def without_checkout() -> dict[str, str]:
    """The environment without what makes this checkout importable."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
