# SPDX-License-Identifier: Apache-2.0
"""What pip offers of a package, and one release of it in a folder of its own, without what it needs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers import ROOT

Release = tuple[int, ...]
MARKERS = "not gpu and not slow and not faults and not hosts"


def numbers(version: str) -> Release:
    return tuple(int(part) for part in version.split("."))


@dataclass(frozen=True)
class Result:
    """What came of tests: how many passed, and why others were skipped."""

    passed: int
    skipped: frozenset[str]


def run_tests(python: str | Path, environment: Mapping[str, str], folder: Path, *arguments: str) -> Result:
    """Run the tests that `make test` takes.

    Args:
        python: that runs them.
        environment: of its process.
        folder: where it starts.
        *arguments: files and options of pytest.

    Raises:
        RuntimeError: one failed, or none ran.
    """
    with tempfile.TemporaryDirectory() as reports:
        report = Path(reports) / "report.xml"
        command = [str(python), "-m", "pytest", "--quiet", "--no-showlocals", "-m", MARKERS, *arguments]
        done = subprocess.run(
            [*command, f"--junit-xml={report}"],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stdout[-10000:] + done.stderr[-3000:])
        (suite,) = ElementTree.parse(report).iter("testsuite")
    passed = int(suite.get("tests", 0)) - int(suite.get("skipped", 0))
    return Result(passed, frozenset(skip.get("message", "") for skip in suite.iter("skipped")))


def try_each(title: str, versions: Sequence[str], tried: Callable[[str], str]) -> int:
    """Try versions one after the other; print what came of each.

    Args:
        title: what the output calls them.
        versions: to try.
        tried: says what came of one, or raises a `RuntimeError`.

    Returns:
        The exit status: 1 if one failed.
    """
    failed = 0
    for version in versions:
        try:
            print(f"{title} {version}: {tried(version)}", flush=True)
        except RuntimeError as error:
            failed = 1
            print(f"{title} {version} FAILED: {error}", flush=True)
    return failed


@dataclass(frozen=True)
class Package:
    """A package of which several releases are tried."""

    name: str
    title: str  # what the output calls it
    options: Sequence[str] = ()  # of ``pip index`` and ``pip install``
    build: Sequence[str] = ()  # of ``pip install`` alone
    every_patch: bool = False  # or only the newest of each minor version
    variables: Mapping[str, str] = field(default_factory=dict)  # of the environment of ``pip install``

    @property
    def folder(self) -> Path:
        return ROOT / "build" / self.name

    def promised(self) -> tuple[Release, Release | None]:
        """The range in setup.py: the oldest release, and the one that is too new."""
        text = (ROOT / "setup.py").read_text(encoding="utf-8")
        ((oldest, too_new),) = re.findall(rf"[\"']{self.name}>=([\d.]+)(?:,<([\d.]+))?", text)
        return numbers(oldest), numbers(too_new) if too_new else None

    def offered(self) -> list[str]:
        """What pip offers in the promised range, oldest first."""
        command = [sys.executable, "-m", "pip", "index", "versions", *self.options, self.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        (line,) = re.findall(r"^Available versions: (.+)$", text, re.M)
        oldest, too_new = self.promised()
        newest: dict[Release, str] = {}
        for version in sorted(re.findall(r"[\d.]+(?=,|$)", line), key=numbers):
            if numbers(version) >= oldest and (too_new is None or numbers(version) < too_new):
                newest[numbers(version)[: 3 if self.every_patch else 2]] = version
        return list(newest.values())

    def installed(self, version: str) -> Path:
        """The folder of this release; fetched once."""
        folder = self.folder / version
        if not folder.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as partial:
                target = Path(partial) / version
                command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *self.options, *self.build]
                environment = {**os.environ, **self.variables}
                command += ["--target", str(target), f"{self.name}=={version}"]
                subprocess.run(command, check=True, env=environment)
                target.rename(folder)
        return folder

    def before(self, version: str) -> dict[str, str]:
        """An environment in which this release is found first, then the repository."""
        return {**os.environ, "PYTHONPATH": os.pathsep.join((str(self.installed(version)), str(ROOT)))}

    def check_found_first(self, version: str, module: str) -> None:
        """Make sure that `before` does what it says; the module is not imported.

        Raises:
            RuntimeError: a module of this name is found elsewhere.
        """
        asked = f"from importlib.util import find_spec; print(find_spec({module!r}).origin)"
        command = [sys.executable, "-c", asked]
        found = subprocess.run(command, env=self.before(version), capture_output=True, text=True, check=True).stdout
        if not Path(found.strip()).is_relative_to(self.installed(version)):
            raise RuntimeError(f"{found.strip()} was found first")

    def passed_tests(self, version: str, tests: Sequence[str], *options: str) -> int:
        """How many tests of some files pass under this release; options are pytest's. Raises as `run_tests` does."""
        return run_tests(sys.executable, self.before(version), ROOT, *options, *tests).passed

    def try_each(self, arguments: Sequence[str], tried: Callable[[str], str]) -> int:
        """Try the releases named as arguments (``oldest`` and ``newest`` are names too), or all that are offered.

        Args:
            arguments: of the command line.
            tried: says what came of one release, or raises a `RuntimeError`.

        Returns:
            The exit status: 1 if one failed.
        """
        every = self.offered()
        named = {"oldest": every[0], "newest": every[-1]}
        return try_each(self.title, [named.get(argument, argument) for argument in arguments] or every, tried)
