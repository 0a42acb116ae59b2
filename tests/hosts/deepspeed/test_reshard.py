# SPDX-License-Identifier: Apache-2.0
"""Checkpoints at other topologies: every cell of the matrix in docs/checkpoints.md, on real engines and processes.

``WRITE_CHECKPOINT_MATRIX=1`` writes what was measured into ``docs/``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT
from tests.helpers.deepspeed.reshard_cells import (
    CELLS,
    TOPOLOGIES,
    Cell,
    read_table,
    result_of,
    rows_in_page,
    rows_of,
    write_table,
)
from tests.helpers.distributed import run_cases

_HOSTS_MISSING = find_spec("deepspeed") is None or find_spec("megatron") is None
needs_hosts = pytest.mark.skipif(_HOSTS_MISSING, reason="needs deepspeed and megatron")
DOCS = ROOT / "docs"
WRITE = "WRITE_CHECKPOINT_MATRIX"

Failures = dict[str, str | None]


class Matrix:
    """Runs the chosen cells in four phases: save, convert, make universal, load; one spawn per phase and world size."""

    def __init__(self, root: Path, cells: list[Cell]) -> None:
        from tests.helpers.deepspeed import reshard

        self.root = root
        self.saved = self._phase(reshard.save_case, {c.save: TOPOLOGIES[c.save].world_size for c in cells})
        for way, worker in (("convert", reshard.convert_case), ("universal", reshard.universal_case)):
            self.saved |= self._phase(
                worker, {c.save: 1 for c in cells if c.way == way and self.saved[c.save] is None}, label=way
            )
        ready = [c for c in cells if not self.failure_before(c)]
        self.loaded = self._phase(reshard.load_case, {c.name: TOPOLOGIES[c.load].world_size for c in ready})

    def _phase(self, worker: Callable[..., Any], sizes: Mapping[str, int], label: str = "") -> Failures:
        found: Failures = {}
        for size in sorted(set(sizes.values())):
            cases = {name: (self.root, name) for name, needed in sizes.items() if needed == size}
            found |= run_cases(worker, size, cases)
        return {f"{name} {label}".strip(): failure for name, failure in found.items()}

    def failure_before(self, cell: Cell) -> str | None:
        """What went wrong before the cell's engine was to load."""
        return self.saved.get(cell.save) or self.saved.get(f"{cell.save} {cell.way}")

    def failure(self, cell: Cell) -> str | None:
        """What went wrong in a cell; None if it passed."""
        return self.failure_before(cell) or self.loaded.get(cell.name, "did not run")

    def measured(self, cell: Cell) -> dict[str, Any]:
        return json.loads((self.root / f"{cell.name}.json").read_text())


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    chosen = [
        CELLS[item.callspec.params["name"]]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec") and "name" in item.callspec.params
    ]
    found = Matrix(tmp_path_factory.mktemp("matrix"), chosen)
    if os.environ.get(WRITE):
        failed = [cell.name for cell in CELLS.values() if found.failure(cell) is not None]
        assert not failed and len(chosen) == len(CELLS), f"docs/ is written when all cells pass; {failed}"
        write_table(DOCS, rows_of({cell.name: found.measured(cell) for cell in chosen}))
    return found


@needs_hosts
@pytest.mark.parametrize("name", CELLS)
def test_a_checkpoint_at_another_topology(matrix: Matrix, name: str) -> None:
    """The loaded state would differ from the saved one, or the run go on otherwise than one that never stopped."""
    failure = matrix.failure(CELLS[name])
    if failure is not None:
        pytest.fail(f"{name}\n{failure}", pytrace=False)
    measured = matrix.measured(CELLS[name])
    assert bool(CELLS[name].refused) == ("reason" in measured)


@pytest.mark.parametrize("read", [read_table, rows_in_page])
def test_the_committed_table_is_of_these_cells(read: Callable[[Path], list[tuple[str, ...]]]) -> None:
    """The table in docs/ would promise cells that no test runs, or hide some."""
    expected = [(c.save, c.way, c.load, result_of(c)) for c in CELLS.values()]
    assert [row[:4] for row in read(DOCS)] == expected, (
        f"write it anew: {WRITE}=1 pytest tests/hosts/deepspeed/test_reshard.py"
    )


def test_every_topology_of_the_table_is_explained() -> None:
    """A reader could not know what a name in the table means."""
    page = (DOCS / "checkpoints.md").read_text(encoding="utf-8")
    used = {name for cell in CELLS.values() for name in (cell.save, cell.load)}
    assert used == set(TOPOLOGIES), "a topology that no cell uses"
    assert not [part for name in used for part in name.split("-") if f"`{part}`" not in page]
