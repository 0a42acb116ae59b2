# SPDX-License-Identifier: Apache-2.0
"""What a sharpness measurement found: by block type, role, layer and parameter, as a table, CSV and JSON.

Average sharpness of a block is the trace of the loss's curvature matrix over the block's diagonal, divided by the
number of its parameters (arXiv 2502.19002, section 3).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_blockwise.atomic_files import replace_text
from ds_blockwise.blocks.roles import BLOCK_TYPES, BlockType, Role
from ds_blockwise.measure.role_sums import RoleOf

_SetKey = tuple[BlockType, Role | None, int | None, str | None]  # block type, role, layer, parameter
_ReportKey = tuple[int | None, str, int, int, int]  # step, estimator, tokens, samples, skipped
LEVELS = ("type", "role", "layer", "parameter")
ESTIMATORS = ("gauss_newton", "fisher", "hutchinson")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_COLUMNS = (
    *("step", "estimator", "tokens", "samples", "skipped", "level", "block_type", "role", "layer", "parameter"),
    *("numel", "sharpness", "standard_error"),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One estimate of every trace: of one batch, for one draw of labels or of directions.

    Attributes:
        tokens: predictions in the mean loss, which weigh the sample.
        traces: estimated trace by role of each parameter.
    """

    tokens: int
    traces: Mapping[RoleOf, float]


@dataclass(frozen=True, slots=True)
class SharpnessEntry:
    """Average sharpness of one set of parameters.

    Attributes:
        level: one of `LEVELS`: a block type, a role, a block type in one layer, a role in one parameter.
        block_type: every entry has one.
        role: of the levels ``role`` and ``parameter``, else None.
        layer: of the levels ``layer`` and ``parameter``; None there for parameters outside of the layers.
        parameter: fully qualified name, of the level ``parameter`` only.
        numel: parameters in the set.
        sharpness: trace / numel.
        standard_error: of ``sharpness``, from the spread of the samples; NaN if there was one only.
    """

    level: str
    block_type: BlockType
    role: Role | None
    layer: int | None
    parameter: str | None
    numel: int
    sharpness: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class SharpnessReport:
    """One measurement; ``str()`` is a table of the block types.

    Attributes:
        step: optimizer steps before it; None if unknown.
        estimator: one of `ESTIMATORS`.
        tokens: predictions seen, over all samples.
        samples: estimates that the means are taken over (batches x draws).
        skipped: further estimates that were left out because a gradient was not finite.
        entries: of all levels.
    """

    step: int | None
    estimator: str
    tokens: int
    samples: int
    skipped: int
    entries: tuple[SharpnessEntry, ...]

    def at(self, level: str) -> tuple[SharpnessEntry, ...]:
        """The entries of one of `LEVELS`."""
        return tuple(entry for entry in self.entries if entry.level == level)

    def by_type(self) -> dict[BlockType, float]:
        """Average sharpness by block type."""
        return {entry.block_type: entry.sharpness for entry in self.at("type")}

    def rows(self) -> list[dict[str, object]]:
        """An entry each, with the measurement's own columns; None where a column does not apply."""
        own = {name: getattr(self, name) for name in ("step", "estimator", "tokens", "samples", "skipped")}
        return [{**own, **dataclasses.asdict(entry)} for entry in self.entries]

    def to_json(self) -> str:
        """All entries as JSON; a standard error that one sample cannot have is null."""
        rows = [dataclasses.asdict(entry) for entry in self.entries]
        for row in rows:
            row["standard_error"] = None if math.isnan(row["standard_error"]) else row["standard_error"]
        own = {name: getattr(self, name) for name in ("step", "estimator", "tokens", "samples", "skipped")}
        return json.dumps({**own, "entries": rows}, indent=2)

    def table(self, level: str = "type") -> str:
        """Entries of one of `LEVELS` as text.

        Raises:
            ValueError: there is no such level.
        """
        if level not in LEVELS:
            raise ValueError(f"level = {level!r}: allowed: {', '.join(LEVELS)}")
        when = "" if self.step is None else f"step {self.step}: "
        left_out = f", {self.skipped} left out (a gradient was not finite)" if self.skipped else ""
        lines = [f"{when}{self.estimator}, {self.samples} samples, {self.tokens:,} tokens{left_out}"]
        entries = self.at(level)
        names = [_name_of(entry) for entry in entries]
        width = max(map(len, [level, *names]))
        norm = self.by_type().get("norm")
        lines.append(f"{level:<{width}}  {'parameters':>14}  {'sharpness':>10}  {'+- s.e.':>9}  norm / this")
        for name, entry in zip(names, entries, strict=True):
            ratio = f"{norm / entry.sharpness:.2f}" if norm and entry.sharpness else "-"
            error = "-" if math.isnan(entry.standard_error) else f"{entry.standard_error:.2e}"
            lines.append(f"{name:<{width}}  {entry.numel:>14,}  {entry.sharpness:>10.3e}  {error:>9}  {ratio:>11}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def layer_of(fqn: str) -> int | None:
    """The first number among the parts of a parameter's name: its layer; None outside of the layers."""
    found = _LAYER.search(fqn)
    return None if found is None else int(found.group(1))


def build_report(
    samples: Sequence[Sample], numels: Mapping[RoleOf, int], *, estimator: str, step: int | None, skipped: int = 0
) -> SharpnessReport:
    """Means and standard errors over samples, at every level.

    A sample's weight is its share of the tokens: the mean is then the trace for the mean loss over all of them.

    Args:
        samples: at least one.
        numels: elements of each role of each parameter; what a sample lacks has no trace, 0.
        estimator: for the report.
        step: for the report.
        skipped: for the report.

    Raises:
        FloatingPointError: there is no sample.
    """
    if not samples:
        raise FloatingPointError(
            f"no sharpness: all {skipped} samples had a gradient that was not finite. Look at the loss; with fp16 the "
            f"loss scale may still be settling, so measure a few steps later."
        )
    total = sum(sample.tokens for sample in samples)
    weights = [sample.tokens / total for sample in samples]

    def entries(level: str, key_of: Callable[[RoleOf], _SetKey]) -> Iterable[SharpnessEntry]:
        sets: dict[_SetKey, list[RoleOf]] = {}
        for of in numels:
            sets.setdefault(key_of(of), []).append(of)
        for (block_type, role, layer, parameter), members in sets.items():
            numel = sum(numels[of] for of in members)
            values = [math.fsum(s.traces.get(of, 0.0) for of in members) / numel for s in samples]
            mean, error = _mean_and_error(values, weights)
            yield SharpnessEntry(level, block_type, role, layer, parameter, numel, mean, error)

    found = [
        *entries("type", lambda of: (of.block_type, None, None, None)),
        *entries("role", lambda of: (of.block_type, of.role, None, None)),
        *entries("layer", lambda of: (of.block_type, None, layer_of(of.fqn), None)),
        *entries("parameter", lambda of: (of.block_type, of.role, layer_of(of.fqn), of.fqn)),
    ]
    found.sort(key=_order)
    return SharpnessReport(step, estimator, total, len(samples), skipped, tuple(found))


def _mean_and_error(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(w * v for w, v in zip(weights, values, strict=True))
    if len(values) < 2:
        return mean, math.nan
    spread = math.fsum((w * (v - mean)) ** 2 for w, v in zip(weights, values, strict=True))
    return mean, math.sqrt(spread * len(values) / (len(values) - 1))


def _order(entry: SharpnessEntry) -> tuple[int, int, float, str, str]:
    role = "" if entry.role is None else entry.role.value
    layer = math.inf if entry.layer is None else entry.layer
    return (LEVELS.index(entry.level), BLOCK_TYPES.index(entry.block_type), layer, entry.parameter or "", role)


def _name_of(entry: SharpnessEntry) -> str:
    if entry.level == "parameter":
        assert entry.role is not None
        return f"{entry.parameter} ({entry.role.value})"
    if entry.level == "role":
        assert entry.role is not None
        return entry.role.value
    if entry.level == "layer":
        return f"{entry.block_type} {'outside' if entry.layer is None else f'in layer {entry.layer}'}"
    return entry.block_type


# ------------------------------------------------------------------------------------------------ files


def write_csv(reports: Iterable[SharpnessReport], path: str | Path) -> None:
    """Write measurements, a row for each entry; floats keep every bit. The file is whole, or as it was before.

    Args:
        reports: in any order.
        path: of the file.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for report in reports:
        for row in report.rows():
            role = row["role"]
            writer.writerow({**row, "role": role.value if isinstance(role, Role) else None})
    replace_text(Path(path), text.getvalue())


def read_csv(path: str | Path) -> list[SharpnessReport]:
    """Read what `write_csv` wrote, in its order.

    Raises:
        ValueError: the file is no such CSV, or a row of it cannot be read; names the line.
        OSError: the file cannot be read.
    """
    found: dict[_ReportKey, dict[tuple[object, ...], SharpnessEntry]] = {}
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != _COLUMNS:
            raise ValueError(
                f"{path} is no sharpness CSV: its columns are {reader.fieldnames}, not {', '.join(_COLUMNS)}. Give "
                f"the file that the main job or `ds-blockwise sharpness measure --csv` wrote."
            )
        for row in reader:
            try:
                key, entry = _read_row(row)
                of = (entry.level, entry.block_type, entry.role, entry.layer, entry.parameter)
                if of in found.setdefault(key, {}):
                    raise ValueError(f"{_name_of(entry)} of step {row['step']} stands in the file twice")
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error!r}; delete the line or restore it") from error
            found[key][of] = entry
    return [
        SharpnessReport(step, estimator, tokens, samples, skipped, tuple(entries.values()))
        for (step, estimator, tokens, samples, skipped), entries in found.items()
    ]


def _read_row(row: Mapping[str, str]) -> tuple[_ReportKey, SharpnessEntry]:
    if row["level"] not in LEVELS or row["block_type"] not in BLOCK_TYPES:
        raise ValueError(f"unknown level {row['level']!r} or block type {row['block_type']!r}")
    entry = SharpnessEntry(
        row["level"],
        next(t for t in BLOCK_TYPES if t == row["block_type"]),
        Role(row["role"]) if row["role"] else None,
        int(row["layer"]) if row["layer"] else None,
        row["parameter"] or None,
        int(row["numel"]),
        float(row["sharpness"]),
        float(row["standard_error"]),
    )
    step = int(row["step"]) if row["step"] else None
    return (step, row["estimator"], int(row["tokens"]), int(row["samples"]), int(row["skipped"])), entry
