# SPDX-License-Identifier: Apache-2.0
"""The part of `docs/support.md` on training tools, from docs/tools.csv, which ``make test-tools`` writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from benchmarks.provenance import read_csv, write_csv
from tests.helpers import ROOT

TABLE = ROOT / "docs" / "tools.csv"
HEADING = "## Training tools"
HEAD = ("tool", "version", "with", "engines", "result", "command", "date")


def read_rows() -> list[dict[str, str]]:
    """The rows of docs/tools.csv; none if it was never written."""
    return read_csv(TABLE) if TABLE.exists() else []


def write_rows(rows: Iterable[Mapping[str, str]]) -> None:
    """Put rows into docs/tools.csv in the place of those of the same tool."""
    known = {row["tool"]: row for row in [*read_rows(), *map(dict, rows)]}
    write_csv(TABLE, HEAD, [row for _, row in sorted(known.items())])


def section(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """The lines of the part, from an empty one on.

    Args:
        rows: as `read_rows` has them.
    """
    lines = [
        "",
        HEADING,
        "",
        "Written by `make test-tools`, which follows each tool's page on two ranks of a CPU, in an environment of its"
        " own (BlockwiseAdamMini, a LLaMA of two layers).",
        "",
        "| tool | version | with | engines | result | command | date |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        tool = f"[{row['tool']}](tools/{row['tool'].replace('-', '_')}.md)"
        cells = (tool, row["version"], row["with"], row["engines"], row["result"], f"`{row['command']}`", row["date"])
        lines.append(f"| {' | '.join(cells)} |")
    return lines
