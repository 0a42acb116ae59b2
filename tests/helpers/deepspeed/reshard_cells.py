# SPDX-License-Identifier: Apache-2.0
"""The checkpoint matrix: topologies, the cells between them, and the table in ``docs/`` that says how each ended."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Topology:
    """How an engine is cut, and with which optimizer it trains."""

    stage: int
    dp: int = 1
    tp: int = 1
    dtype: str = "fp32"
    optimizer: str = "mini"
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return self.dp * self.tp


_FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
_COMPACT = {"checkpoint_format": "compact"}
_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# 400 of 3,000 elements: several sub-groups; parameters below the threshold stay whole on every rank
_SMALL_PIECES = {"sub_group_size": 400, "stage3_param_persistence_threshold": 100}

TOPOLOGIES: dict[str, Topology] = {
    "z0": Topology(0),
    "z0-dp2": Topology(0, 2),
    "z0-bf16": Topology(0, dtype="bf16"),
    "z1-dp4": Topology(1, 4),
    "z1-dp2-bf16": Topology(1, 2, dtype="bf16"),
    "bf16_optimizer-dp2": Topology(1, 2, dtype="bf16", config=_FP32_ACCUMULATION),
    "z2": Topology(2),
    "z2-dp2": Topology(2, 2),
    "z2-dp2-offload": Topology(2, 2, zero=_OFFLOAD),
    "z2-dp2-round_robin": Topology(2, 2, zero={"round_robin_gradients": True}),
    "z2-dp3": Topology(2, 3),
    "z3": Topology(3),
    "z3-dp2": Topology(3, 2),
    "z3-dp2-bf16": Topology(3, 2, dtype="bf16", zero=_SMALL_PIECES),
    "z3-dp3": Topology(3, 3),
    "z1-tp2": Topology(1, 1, 2),
    "z1-dp2": Topology(1, 2),
    "z0-tp2": Topology(0, 1, 2),
    "z2-tp2-dp2": Topology(2, 2, 2),
    "z3-tp2": Topology(3, 1, 2),
    "z2-dp2-compact": Topology(2, 2, params=_COMPACT),
    "z3-tp2-compact": Topology(3, 1, 2, params=_COMPACT),
    "z2-dp2-adamw": Topology(2, 2, optimizer="adamw"),
    "z3-tp2-adamw": Topology(3, 1, 2, optimizer="adamw"),
    "z0-adamw": Topology(0, optimizer="adamw"),
    "z2-dp2-value_tensor": Topology(2, 2, params={"granularity": {"value": "tensor", "norm": "tensor"}}),
}


@dataclass(frozen=True)
class Cell:
    """One way from a saved topology to a loading one.

    ``way`` is ``same`` (as saved, bitwise), ``direct`` (as saved, another topology: refused), ``convert`` (the
    portable checkpoint) or ``universal`` (DeepSpeed's converter). ``refused`` must be in the error, if it can't be;
    ``why`` says it shortly.
    """

    save: str
    way: str
    load: str
    refused: str = ""
    why: str = ""

    @property
    def name(self) -> str:
        return f"{self.save}>{self.way}>{self.load}"


def _cells() -> dict[str, Cell]:
    cells: list[Cell] = []

    def add(way: str, save: str, loads: str, refused: str = "", why: str = "") -> None:
        cells.extend(Cell(save, way, load, refused, why) for load in loads.split())

    for name in ("z0", "z0-bf16", "z1-dp4", "z2-dp3", "z3-dp2-bf16", "bf16_optimizer-dp2", "z2-tp2-dp2", "z3-tp2"):
        add("same", name, name)
    for name in ("z2-dp2-offload", "z2-dp2-compact", "z3-tp2-compact"):
        add("same", name, name)
    _add_direct(add)
    _add_converted(add)
    _add_universal(add)
    return {cell.name: cell for cell in cells}


def _add_direct(add: Callable[..., None]) -> None:
    why = "DeepSpeed's files fit the topology that wrote them"
    add("direct", "z2-dp2", "z2-dp3 z3-dp2 z1-tp2", "ds-blockwise convert", why)
    add("direct", "z0", "z0-tp2", "ds-blockwise convert", why)
    add("direct", "z3-tp2-compact", "z3", "ds-blockwise convert", why)


def _add_converted(add: Callable[..., None]) -> None:
    add("convert", "z0", "z0-dp2 z1-dp4 z2-tp2-dp2 z3-dp3")
    add("convert", "z0-bf16", "z1-dp2-bf16 z3-tp2")
    add("convert", "z1-dp4", "z0 z2-dp3 z3-dp2-bf16 z1-tp2")
    add("convert", "bf16_optimizer-dp2", "z0-bf16 z2-tp2-dp2")
    add("convert", "z2-dp2", "z2-dp2 z3-dp2 bf16_optimizer-dp2 z0-tp2 z3-tp2-adamw z2-dp2-value_tensor")
    add("convert", "z2-dp2-round_robin", "z2-dp3 z2-dp2-offload")
    add("convert", "z2-dp3", "z1-dp4 z3 z2-dp2-round_robin")
    add("convert", "z3-dp2-bf16", "z0-bf16 z2-dp2 z3-dp3")
    add("convert", "z3-dp3", "z2 z3-dp2-bf16 z2-tp2-dp2")
    add("convert", "z1-tp2", "z0 z3-tp2 z2-dp3")
    add("convert", "z2-tp2-dp2", "z1-dp4 z0-tp2 z3-dp2-bf16")
    add("convert", "z3-tp2", "z3 z2-dp2 z2-tp2-dp2")
    add("convert", "z2-dp2-compact", "z0 z3-tp2-compact z2-dp3")
    add("convert", "z3-tp2-compact", "z3 z1-dp4")
    add("convert", "z2-dp2-adamw", "z3-tp2-adamw z0-adamw z2-dp3")
    add("convert", "z3-tp2-adamw", "z0 z2-dp2")


def _add_universal(add: Callable[..., None]) -> None:
    add("universal", "z2-dp3", "z1-dp4 z2-dp2 z2 z1-tp2")
    add("universal", "z1-dp4", "z2-dp3 z1-dp2 z2-dp2-offload")
    add("universal", "z2-dp2", "z2-tp2-dp2 z1-dp2-bf16")
    add("universal", "bf16_optimizer-dp2", "z2-dp3 z1-dp2-bf16")
    add("universal", "z1-tp2", "z2-dp2 z2-tp2-dp2")
    add("universal", "z2-tp2-dp2", "z1-dp4 z2")
    add("universal", "z3-dp3", "z3-dp2 z3 z3-dp2-bf16")
    add("universal", "z3-tp2", "z3 z3-dp3")
    add("universal", "z2-dp2-adamw", "z2-dp3")
    ours = "ds-blockwise convert"
    add("universal", "z2-dp2", "z3-dp2", ours, "DeepSpeed cannot move one between ZeRO 1 or 2 and ZeRO 3")
    add("universal", "z3-dp2", "z2-dp2", ours, "DeepSpeed cannot move one between ZeRO 1 or 2 and ZeRO 3")
    add("universal", "z3-dp3", "z3-tp2", ours, "at ZeRO 3 DeepSpeed cuts for its own AutoTP only")
    add("universal", "z2-dp2-compact", "z2", "exp_avg_sq", "DeepSpeed's converter needs one value per element")
    why = "DeepSpeed's converter mixes up parameters under round_robin_gradients"
    add("universal", "z2-dp2-round_robin", "z2-dp3", "round_robin", why)
    add("universal", "z2-dp3", "z2-dp2-round_robin", "round_robin", why.replace("converter", "loader"))
    add("universal", "z0", "z0-dp2", "optim_states", "DeepSpeed's converter needs ZeRO's files")


CELLS = _cells()

# ------------------------------------------------------------------------------------- the table

COLUMNS = ("saved by", "way", "loaded by", "result", "state difference", "update difference", "reason")
START, END = "<!-- checkpoint matrix: written by `make checkpoint-matrix` -->", "<!-- end of the checkpoint matrix -->"


def result_of(cell: Cell) -> str:
    """``refused``, ``bitwise`` or ``exact``: what a passing cell proves."""
    return "refused" if cell.refused else "bitwise" if cell.way == "same" else "exact"


def rows_of(measured: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The table's rows from what `load_case` wrote down per cell."""
    rows = []
    for cell in CELLS.values():
        found = measured[cell.name]
        state, update = ("", "") if cell.refused else (f"{found['state']:g}", f"{found['update']:.1e}")
        rows.append((cell.save, cell.way, cell.load, result_of(cell), state, update, cell.why))
    return rows


def write_table(docs: Path, rows: Iterable[tuple[str, ...]]) -> None:
    """Write ``checkpoints.csv`` and the table between the markers of ``checkpoints.md``."""
    rows = list(rows)
    with (docs / "checkpoints.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    page = docs / "checkpoints.md"
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(START)
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    page.write_text(f"{before}{START}\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def read_table(docs: Path) -> list[tuple[str, ...]]:
    """The rows of the committed ``checkpoints.csv``."""
    with (docs / "checkpoints.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == COLUMNS
    return [tuple(row) for row in rows]


def rows_in_page(docs: Path) -> list[tuple[str, ...]]:
    """The rows of the table in ``checkpoints.md``."""
    table = (docs / "checkpoints.md").read_text(encoding="utf-8").split(START)[1].split(END)[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[2:]]
