# SPDX-License-Identifier: Apache-2.0
"""A schedule as a file: CSV with the columns ``fraction`` and ``factor``, straight lines between its rows.

``fraction`` is the part of the updates between the end of warm-up and the end of the run that is done, ``factor`` the
height between ``min_lr`` (0) and the peak (1).
"""

from __future__ import annotations

import csv
import math
import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ds_blockwise.atomic_files import replace_text

COLUMNS = ("fraction", "factor")
_EXAMPLE = f"{','.join(COLUMNS)}\n0,1\n0.8,1\n1,0"


@dataclass(frozen=True)
class Table:
    """Heights by fraction.

    Attributes:
        fractions: rising from 0 to 1.
        factors: from 0 to 1, one for each fraction.
    """

    fractions: tuple[float, ...]
    factors: tuple[float, ...]

    def at(self, fraction: float) -> float:
        """The height at a fraction from 0 to 1, on the straight line between the two rows around it."""
        right = min(bisect_right(self.fractions, fraction), len(self.fractions) - 1)
        x0, x1 = self.fractions[right - 1 : right + 1]
        y0, y1 = self.factors[right - 1 : right + 1]
        return y0 + (y1 - y0) * ((fraction - x0) / (x1 - x0))


def table_text(table: Table) -> str:
    """The text of a table's file, from which the same numbers are read."""
    rows = (f"{fraction!r},{factor!r}" for fraction, factor in zip(table.fractions, table.factors, strict=True))
    return "\n".join([",".join(COLUMNS), *rows]) + "\n"


def write_table(path: Path, table: Table) -> None:
    """Write a table whole or not at all."""
    replace_text(path, table_text(table))


def read_table(path: object) -> Table:
    """Read and check a table.

    Args:
        path: of the file; a relative one begins where the process was started.

    Raises:
        TypeError: it is no path.
        ValueError: the file cannot be read or is no table; the message names file, line and what is wrong.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f'table must be the path of a CSV file such as "schedule.csv", got {path!r}')
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        place = "" if Path(path).is_absolute() else f" from {Path.cwd()}"
        raise ValueError(f"table {str(path)!r} cannot be read{place}: {error}") from error
    try:
        return _checked(lines)
    except ValueError as error:
        raise ValueError(f"table {str(path)!r}: {error}. It should look like\n{_EXAMPLE}") from error


def _checked(lines: Iterable[str]) -> Table:
    rows = csv.reader(lines)
    header = tuple(next(rows, ()))
    if header != COLUMNS:
        raise ValueError(f"line 1 is {','.join(header)!r} instead of {','.join(COLUMNS)!r}")
    fractions: list[float] = []
    factors: list[float] = []
    for row in rows:
        numbers = [_number(text) for text in row]
        if len(numbers) != len(COLUMNS) or not all(0.0 <= value <= 1.0 for value in numbers):
            raise ValueError(f"line {rows.line_num} is {','.join(row)!r} instead of two numbers from 0 to 1")
        if fractions and numbers[0] <= fractions[-1]:
            raise ValueError(f"line {rows.line_num} has fraction {row[0]}, which is not above the one before it")
        fractions.append(numbers[0])
        factors.append(numbers[1])
    if len(fractions) < 2 or fractions[0] != 0.0 or fractions[-1] != 1.0:
        raise ValueError("the fractions must go from 0 to 1")
    return Table(tuple(fractions), tuple(factors))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
