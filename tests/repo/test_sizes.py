# SPDX-License-Identifier: Apache-2.0
"""A number of parameters in the docs is one that a model of this repository has today."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from benchmarks.costs import end_to_end
from ds_blockwise.runs.model_shape import GPTShape
from tests.helpers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Of models that are not ours: page, words, whose.
OTHERS = {
    ("docs/evidence.md", "350M parameters"): "the paper's smaller one",
    ("docs/benchmarks.md", "26M parameters a rank"): "tensors of a benchmark, not a model",
}
UNITS = {"M": 10**6, " million": 10**6, "B": 10**9, " billion": 10**9}
EXACT = re.compile(r"\b(\d{1,3}(?:,\d{3})+) parameters")
ROUNDED = re.compile(r"\b(\d+(?:\.\d+)?)(M|B| million| billion) parameters( a rank)?")


def sizes() -> dict[str, int]:
    """Every model file, and the model that the end-to-end benchmark makes for itself."""
    found = {path.name: GPTShape.load(path).count_parameters() for path in (ROOT / "configs/model").glob("*.yaml")}
    return found | {"end_to_end": GPTShape(**end_to_end.MODEL).count_parameters()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_sizes_on_a_page(page: Path) -> None:
    known, text, name = sizes(), page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
    for number in EXACT.findall(text):
        assert int(number.replace(",", "")) in known.values(), f"no model has {number} parameters"
    for match in ROUNDED.finditer(text):
        if (name, match[0]) in OTHERS:
            continue
        decimals = len(match[1].partition(".")[2])
        rounded = {round(size / UNITS[match[2]], decimals) for size in known.values()}
        assert float(match[1]) in rounded, f"no model has {match[0]}"


def test_no_exception_outlives_its_sentence() -> None:
    for name, words in OTHERS:
        assert words in (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "configs/model").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_model_file_states_its_size(path: Path) -> None:
    """`GPTShape.load` compares it with the sizes; a file without it could change unseen."""
    assert "num_parameters" in yaml.safe_load(path.read_text(encoding="utf-8"))
