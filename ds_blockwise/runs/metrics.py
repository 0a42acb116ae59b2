# SPDX-License-Identifier: Apache-2.0
"""`metrics.csv`: every number that a run wrote down while it trained, a row for each: step, metric, value."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from ds_blockwise.atomic_files import replace_text

METRICS_CSV = "metrics.csv"
EARLIER = "csv"  # folder with a file for each metric, as runs had it before
_COLUMNS = ["step", "metric", "value"]
_OF_DEEPSPEED = "Train/Samples/"  # counts samples instead of steps, and repeats what the job writes

Events = Iterable[tuple[str, float, int]]
Points = dict[int, float]


class MetricsFile:
    """A monitor as DeepSpeed calls them, in one file.

    Args:
        path: of the file; made at once. What is in it up to ``step`` stays.
        step: optimizer steps of the checkpoint that the run goes on from; later ones are done again.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        kept = [row for row in _rows(path) if row[0] <= step] if step else []
        lines = [",".join(_COLUMNS), *(f"{at},{metric},{value}" for at, metric, value in kept)]
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, "\n".join(lines) + "\n")
        self._path = path

    def write_events(self, events: Events) -> None:
        """Append a row for each (metric, value, step)."""
        lines = [f"{step},{name},{float(value)!r}\n" for name, value, step in events if _OF_DEEPSPEED not in name]
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


def read_metric(output: Path, metric: str) -> Points:
    """The values of a metric by step; empty if the run has none.

    Args:
        output: folder of a run, of this version or an earlier one.
        metric: such as ``loss/validation``.

    Returns:
        Of a step that was done twice, because the run was killed, the last value.
    """
    points: Points = {}
    earlier = output / EARLIER / f"{metric.replace('/', '_')}.csv"
    if earlier.is_file():
        with earlier.open(newline="", encoding="utf-8") as file:
            # the header came again at every start
            points = {int(row[0]): float(row[1]) for row in csv.reader(file) if len(row) == 2 and row[0].isdecimal()}
    return points | {step: value for step, name, value in _rows(output / METRICS_CSV) if name == metric}


def metric_names(output: Path) -> list[str]:
    """The metrics in a run's file, in the order in which they came."""
    return list(dict.fromkeys(name for _, name, _ in _rows(output / METRICS_CSV)))


def _rows(path: Path) -> list[tuple[int, str, float]]:
    """The rows of a file; the last one is left out if a kill has cut it."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [(int(step), metric, float(value)) for step, metric, value in list(csv.reader(whole.splitlines()))[1:]]
