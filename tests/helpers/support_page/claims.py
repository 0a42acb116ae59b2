# SPDX-License-Identifier: Apache-2.0
"""`docs/support.md`: optimizer x host x parallelism; `docs/support.csv` beside it has the tests that show each cell.

What is claimed stands in `rows`; whether it holds comes from the outcomes of a test run: ``make support`` runs
the suite and writes both files, and fails if a claimed test failed, was skipped or does not exist.
"""

from __future__ import annotations

import csv
import datetime
import fnmatch
import importlib.metadata
import io
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pytest

from tests.helpers import ROOT
from tests.helpers.optimizers import ALL_NAMES
from tests.helpers.support_page import tools, versions

PAGE = ROOT / "docs" / "support.md"
TABLE = ROOT / "docs" / "support.csv"
_PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers", "accelerate", "peft")


@dataclass(frozen=True)
class Works:
    """Shown by tests, all of which must pass.

    Attributes:
        tests: ``folder/test_file.py::pattern`` below ``tests/``; ``{o}`` is adamw, mini, lion or muon,
            ``{O}`` the class.
    """

    tests: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """An error before the first step that contains ``says``; shown by tests."""

    says: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Untested:
    """Nothing is claimed, for a reason."""

    reason: str


Cell = Works | Refused | Untested


@dataclass(frozen=True)
class Row:
    """One combination; a cell for each optimizer, in the order of `ALL_NAMES`."""

    host: str
    layout: str
    cells: tuple[Cell, Cell, Cell, Cell]


NOT_RUN = Untested("not run with it")
SAME = ("as for Adam",)  # the tests of the two of Adam's update, whose names have ``{o}`` or ``{O}``, or ask for none
Tests = Sequence[str] | None


def mixed(host: str, layout: str, adamw: Cell, mini: Cell, *, lion: Cell = NOT_RUN, muon: Cell = NOT_RUN) -> Row:
    """A row whose cells differ."""
    return Row(host, layout, (adamw, mini, lion, muon))


def works(host: str, layout: str, *tests: str, lion: Tests = None, muon: Tests = None) -> Row:
    """Both optimizers of Adam's update work, and Lion and Muon where tests of theirs are named."""
    cells = [NOT_RUN if own is None else Works(tests if own is SAME else tuple(own)) for own in (lion, muon)]
    return mixed(host, layout, Works(tests), Works(tests), lion=cells[0], muon=cells[1])


def refused(host: str, layout: str, says: str, *tests: str, lion: Tests = None, muon: Tests = None) -> Row:
    """Both optimizers of Adam's update are refused, and Lion and Muon where tests of theirs are named."""
    cells = [NOT_RUN if own is None else Refused(says, tests if own is SAME else tuple(own)) for own in (lion, muon)]
    return mixed(host, layout, Refused(says, tests), Refused(says, tests), lion=cells[0], muon=cells[1])


def untested(host: str, layout: str, reason: str) -> Row:
    """None was run."""
    return Row(host, layout, (Untested(reason),) * 4)


def patterns_of(cell: Cell, optimizer: str) -> list[str]:
    """The cell's test patterns for one optimizer."""
    tests = () if isinstance(cell, Untested) else cell.tests
    return [test.replace("{o}", ALL_NAMES[optimizer]).replace("{O}", optimizer) for test in tests]


class Outcomes:
    """How each test of this session ended, by node id below ``tests/``."""

    def __init__(self) -> None:
        self._of: dict[str, str] = {}

    def note(self, report: pytest.TestReport) -> None:
        """Keep the worst outcome of a test's phases; a skip counts as one that did not pass."""
        name = report.nodeid.removeprefix("tests/")
        if report.outcome != "passed" or report.when == "call":
            self._of[name] = report.outcome if self._of.get(name, "passed") == "passed" else self._of[name]

    def of(self, pattern: str) -> dict[str, str]:
        """Outcomes of the tests that match; square brackets in a pattern are meant literally."""
        literal = pattern.replace("[", "\0").replace("]", "[]]").replace("\0", "[[]")
        return {name: outcome for name, outcome in self._of.items() if fnmatch.fnmatchcase(name, literal)}


OUTCOMES = Outcomes()


def write(rows: Iterable[Row]) -> list[str]:
    """Write the page from this session's outcomes; returns what contradicts the claims (then nothing is written)."""
    rows = list(rows)
    problems, counts = [], {}
    for row in rows:
        for optimizer, cell in zip(ALL_NAMES, row.cells, strict=True):
            for pattern in patterns_of(cell, optimizer):
                found = OUTCOMES.of(pattern)
                counts[pattern] = len(found)
                if not found:
                    problems.append(f"{row.host}, {row.layout}: no test of this run matches {pattern}")
                problems += [f"{row.host}, {row.layout}: {n} {o}" for n, o in found.items() if o != "passed"]
    if not problems:
        PAGE.write_text(page(rows, counts, run_today()), encoding="utf-8")
        TABLE.write_text(table(rows, counts), encoding="utf-8")
    return problems


def run_today() -> str:
    """What the outcomes of this session were measured with."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    today = datetime.date.today().isoformat()
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, no GPU, Python"
        f" {platform.python_version()}, {versions}, {today}. GPU, NCCL and fp16 on a GPU were not run."
    )


def page(rows: Iterable[Row], counts: Mapping[str, int], run: str) -> str:
    """The page's text.

    Args:
        rows: What is claimed.
        counts: Number of passed tests by pattern.
        run: What they were run with, from `run_today`.
    """
    lines = [
        "# What works, what is refused, what is untested",
        "",
        "- **works** (*n*): *n* tests passed. They compare values: updates divided by lr against an independent"
        " implementation on unsharded tensors, or bits where the design says so.",
        "- **refused**: an error on every rank before the first step. The page quotes it.",
        "- **untested**: nothing is claimed.",
        "",
        "Written by `make support` from a run of the test suite. "
        f"[{TABLE.name}]({TABLE.name}) names the tests behind each cell.",
        "",
        run,
    ]
    host = None
    for row in rows:
        if row.host != host:
            host = row.host
            lines += ["", f"## {host}", "", f"| | {' | '.join(ALL_NAMES)} |", "|---" * (1 + len(ALL_NAMES)) + "|"]
        texts = [_text(cell, o, counts) for o, cell in zip(ALL_NAMES, row.cells, strict=True)]
        lines.append(f"| {row.layout} | {' | '.join(texts)} |")
    lines += [*versions.section(versions.read_rows()), *tools.section(tools.read_rows())]
    return "\n".join(lines) + "\n"


def table(rows: Iterable[Row], counts: Mapping[str, int]) -> str:
    """The tests behind each cell, as CSV.

    Args:
        rows: What is claimed.
        counts: Number of passed tests by pattern.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("host", "layout", "optimizer", "status", "tests", "passed"))
    for row in rows:
        for optimizer, cell in zip(ALL_NAMES, row.cells, strict=True):
            status = type(cell).__name__.lower()
            for pattern in patterns_of(cell, optimizer):
                writer.writerow((row.host, row.layout, optimizer, status, pattern, counts.get(pattern, 0)))
    return text.getvalue()


def read_counts(text: str) -> dict[str, int]:
    """Number of passed tests by pattern, as `table` wrote them."""
    return {line["tests"]: int(line["passed"]) for line in csv.DictReader(io.StringIO(text))}


def _text(cell: Cell, optimizer: str, counts: Mapping[str, int]) -> str:
    if isinstance(cell, Works):
        return f"**works** ({sum(counts.get(pattern, 0) for pattern in patterns_of(cell, optimizer))})"
    if isinstance(cell, Refused):
        return f"**refused**: “{cell.says}”"
    return f"**untested**: {cell.reason}"
