# SPDX-License-Identifier: Apache-2.0
"""The part of `docs/support.md` on releases of hosts, from docs/versions.csv, which their targets write."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterable, Mapping

import torch

from benchmarks.provenance import read_csv, write_csv
from tests.helpers import ROOT

TABLE = ROOT / "docs" / "versions.csv"
HEADING = "## Releases of hosts"
HEAD = ("host", "release", "python", "torch", "tests passed", "command", "date")
PAGE = ROOT / "docs" / "support.md"


def read_rows() -> list[dict[str, str]]:
    """The rows of docs/versions.csv; none if it was never written."""
    return read_csv(TABLE) if TABLE.exists() else []


def add_row(
    host: str, release: str, passed: int, command: str, *, python: str | None = None, with_torch: str | None = None
) -> None:
    """Put one run into docs/versions.csv and the page, in the place of an older one.

    Args:
        host: what was run with ours.
        release: of it.
        passed: how many tests.
        command: that runs them again.
        python: the Python that ran them; None: this one.
        with_torch: the torch; None: this one.
    """
    date = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    of_run = (python or platform.python_version(), with_torch or torch.__version__)
    values = (host, release, *of_run, str(passed), command, date)
    new = dict(zip(HEAD, values, strict=True))
    rows = [row for row in read_rows() if any(row[key] != new[key] for key in HEAD[:4])]
    rows.append(new)
    rows.sort(key=lambda row: (row["host"], _numbers(row["release"]), _numbers(row["python"])))
    write_csv(TABLE, HEAD, rows)
    before, _, after = PAGE.read_text(encoding="utf-8").partition(f"\n{HEADING}\n")
    _, following, rest = after.partition("\n## ")
    PAGE.write_text("\n".join([before.rstrip("\n"), *section(rows)]) + "\n" + following + rest, encoding="utf-8")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def section(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """The lines of the part, from an empty one on.

    Args:
        rows: as `read_rows` has them.
    """
    lines = [
        "",
        HEADING,
        "",
        "How many tests passed with a release; one that is not listed was not run. Of DeepSpeed: values in every ZeRO"
        " stage, resume, save and load, on two ranks. Of Megatron-core: layers, optimizers, tensor parallelism."
        " `make test-pythons`: our wheel on another Python and torch; every optimizer's values in plain PyTorch and in"
        " ZeRO-2 on two ranks, and the C++ kernels.",
        "",
        "| host | release | Python | torch | tests passed | command | date |",
        "|---|---|---|---|---:|---|---|",
    ]
    for row in rows:
        cells = [f"`{row[key]}`" if key == "command" else row[key] for key in HEAD]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
