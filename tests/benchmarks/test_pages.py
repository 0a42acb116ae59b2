# SPDX-License-Identifier: Apache-2.0
"""docs/benchmarks.md shows the CSVs, the CSVs hold what was promised, and writing a table keeps the page."""

from __future__ import annotations

import csv
import itertools
import re
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="the benchmarks cut shards with the DeepSpeed host: extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="the benchmarks count on Megatron-core's model: extra 'megatron'")

from benchmarks.costs import (
    checkpoints,
    communication,
    communication_overhead,
    end_to_end,
    fused_step,
    muon_traffic,
    safety_checks,
)
from benchmarks.provenance import BENCHMARKS_PAGE, between, read_csv, write_between
from benchmarks.step import muon, small, tables
from benchmarks.step.run import ELSEWHERE
from benchmarks.step.shapes import LAYOUTS
from ds_blockwise.runs.model_shape import GPTShape
from tests.helpers import ROOT
from tests.helpers.benchmark_runs import COMPILED

TEXT = BENCHMARKS_PAGE.read_text(encoding="utf-8")


def _kernels(rows: list[dict[str, str]]) -> str:
    return tables.markdown(rows, f"bench/kernels_{rows[0]['device']}.png")


def _limits(elsewhere: list[dict[str, str]]) -> str:
    return tables.limits([read_csv(ROOT / "docs/bench/kernels_cpu.csv"), elsewhere])


# section of the page: file below docs/bench, what makes the table of it, what measures it
TABLES = {
    "bench": ("kernels_cpu.csv", _kernels, "bench-kernels"),
    "bench-limits": (ELSEWHERE.name, _limits, "bench-kernels"),
    "bench-gpu": ("kernels_cuda.csv", _kernels, "bench-gpu"),
    "small-tensors": ("small_tensors.csv", small.markdown, "bench-small"),
    "muon-step": ("muon_step.csv", muon.markdown, "bench-muon"),
    "communication": ("communication.csv", communication.markdown, "bench-communication"),
    "communication-overhead": ("communication_overhead.csv", communication_overhead.markdown, "bench-communication"),
    "muon-traffic": ("muon_traffic.csv", muon_traffic.markdown, "bench-communication"),
    "end-to-end": ("end_to_end.csv", end_to_end.markdown, "bench-end-to-end"),
    "checkpoints": ("checkpoints.csv", checkpoints.markdown, "bench-checkpoints"),
    "fused-step": ("fused_step.csv", fused_step.markdown, "bench-fused-step"),
    "safety-checks": ("safety_checks.csv", safety_checks.markdown, "bench-safety-checks"),
}


@pytest.mark.parametrize("section", TABLES)
def test_the_page_shows_what_was_measured(section: str) -> None:
    """A figure that no file holds, one that is older than its file, or a table that is empty without a word."""
    name, markdown, target = TABLES[section]
    results = ROOT / "docs/bench" / name
    absent = f"Not measured yet: `make {target}` writes this table."
    assert between(TEXT, section) == (markdown(read_csv(results)) if results.is_file() else absent)
    assert f"\n{target}: setup\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_section_of_the_page_is_compared() -> None:
    """A new table would be shown without a file, and a script would look for marks that are not there."""
    assert sorted(re.findall(r"<!-- (\S+):begin -->", TEXT)) == sorted(TABLES)
    files = {name for name, _, _ in TABLES.values()}
    listed = {name for row in re.findall(r"^\|(.+?)\|", TEXT, flags=re.M) for name in re.findall(r"\w+\.csv", row)}
    assert listed == files


def test_committed_figures_are_of_everything_that_was_promised() -> None:
    """A table of fewer sizes, layouts or arms than issue 3 asks for."""
    rows = read_csv(ROOT / "docs/bench/kernels_cpu.csv")
    measured = {(row["size"], row["layout"]) for row in rows if row["contender"] == COMPILED and row["median_ms"]}
    assert measured == {(s, layout) for s in ("1M", "5M", "25M", "67M", "200M") for layout in LAYOUTS}
    counted = {(r["zero_stage"], r["dp"], r["tp"]) for r in read_csv(ROOT / "docs/bench/communication.csv")}
    heads = GPTShape.load(communication.LLAMA_2B).num_heads
    tps = [str(tp) for tp in (1, 2, 4, 8) if heads % tp == 0]  # no rank holds a part of a head
    assert counted == set(itertools.product(communication.STAGES, [str(1 << k) for k in range(11)], tps))
    assert all(communication.within_limits(row) for row in read_csv(ROOT / "docs/bench/communication.csv"))
    assert {row["arm"] for row in read_csv(ROOT / "docs/bench/end_to_end.csv")} == set(end_to_end.ARMS)
    with open(ROOT / "docs/bench/end_to_end.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    again = [dict(row) for row in rows]
    end_to_end.compare(again)
    assert again == rows, "the ratios are not those of the times"


def test_writing_between_markers_keeps_the_rest(tmp_path: Path) -> None:
    """A script would eat the page, or write nowhere and say nothing."""
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- x:begin -->\nold\n<!-- x:end -->\nafter\n")
    write_between(path, "x", r"new \1 line")
    assert path.read_text() == "before\n<!-- x:begin -->\nnew \\1 line\n<!-- x:end -->\nafter\n"
    with pytest.raises(ValueError, match="has no lines <!-- y:begin -->"):
        write_between(path, "y", "text")
