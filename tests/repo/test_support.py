# SPDX-License-Identifier: Apache-2.0
"""`docs/support.md` claims what the tests show, and nothing else."""

import ast
import re

import pytest

from tests.helpers import ROOT
from tests.helpers.literals import literals_of
from tests.helpers.optimizers import ALL_NAMES
from tests.helpers.support_page import claims
from tests.helpers.support_page.claims import (
    PAGE,
    TABLE,
    Outcomes,
    Refused,
    Untested,
    Works,
    mixed,
    page,
    patterns_of,
    read_counts,
    table,
)
from tests.helpers.support_page.rows import ROWS

SOURCES = [p for folder in ("ds_blockwise", "megatron_patch") for p in (ROOT / folder).rglob("*.py")]
CELLS = [
    pytest.param(cell, name, id=f"{row.host}, {row.layout}, {name}")
    for row in ROWS
    for name, cell in zip(ALL_NAMES, row.cells, strict=True)
]


def functions_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


LITERALS = [text for path in SOURCES for text in literals_of(path)]


@pytest.mark.parametrize(("cell", "name"), CELLS)
def test_a_claim_names_tests_that_exist(cell, name):
    """A test that is renamed would leave its claim standing for ever."""
    for pattern in patterns_of(cell, name):
        file, _, function = pattern.partition("::")
        start = re.split(r"[\[*]", function)[0]
        assert any(f.startswith(start) for f in functions_in(file)), pattern


@pytest.mark.parametrize(("cell", "name"), CELLS)
def test_a_refusal_is_in_the_code(cell, name):
    """The page quotes the error."""
    if isinstance(cell, Refused):
        assert any(cell.says in text for text in LITERALS), cell.says


def test_the_page_has_the_rows():
    """A row that was added without `make support` is a claim that nobody has checked."""
    counts = read_counts(TABLE.read_text(encoding="utf-8"))
    assert all(counts.values())
    text = PAGE.read_text(encoding="utf-8")
    run = next(line for line in text.splitlines() if line.startswith(("Linux", "Darwin", "Windows")))
    assert text == page(ROWS, counts, run)
    assert TABLE.read_text(encoding="utf-8") == table(ROWS, counts)


@pytest.mark.parametrize("outcome", ["failed", "skipped", None])
def test_a_claim_without_a_passed_test_is_not_written(outcome, monkeypatch, tmp_path):
    """Neither a failure, nor a skip, nor a test that is gone may become "works"."""
    outcomes = Outcomes()
    outcomes._of = {"test_a.py::test_b[z1-mini]": "passed", "test_a.py::test_b[z1-adamw]": "passed"}
    monkeypatch.setattr(claims, "OUTCOMES", outcomes)
    monkeypatch.setattr(claims, "PAGE", tmp_path / "support.md")
    monkeypatch.setattr(claims, "TABLE", tmp_path / "support.csv")
    row = mixed("host", "layout", Works(("test_a.py::test_b[z1-{o}]",)), Untested("no reason"))
    assert claims.write([row]) == []
    assert (
        "| layout | **works** (1) | **untested**: no reason | **untested**: not run with it | **un"
        in claims.PAGE.read_text(encoding="utf-8")
    )
    assert "host,layout,BlockwiseAdamW,works,test_a.py::test_b[z1-adamw],1" in claims.TABLE.read_text(encoding="utf-8")
    claims.PAGE.unlink()
    if outcome is None:
        outcomes._of = {}
    else:
        outcomes._of["test_a.py::test_b[z1-adamw]"] = outcome
    (problem,) = claims.write([row])
    assert "test_a.py::test_b[z1-adamw]" in problem
    assert not claims.PAGE.exists()
