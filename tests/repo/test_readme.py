# SPDX-License-Identifier: Apache-2.0
"""The README cannot drift: its commands exist, its JSON is accepted, its result is the one of the CSVs.

`test_newcomer.py` runs its scripts and commands, `test_docs.py` follows its links.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_blockwise.optimizers.registry import OPTIMIZERS
from tests.helpers import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["docs/install.md", "docs/checkpoints.md"]  # others: test_newcomer.py
BIN = Path(sys.executable).parent


def blocks(text, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands():
    """Every line of a shell block, once."""
    found = {}
    for page in PAGES:
        for code in blocks((ROOT / page).read_text(encoding="utf-8"), "bash"):
            found |= dict.fromkeys(line for line in code.splitlines() if line.strip())
    return list(found)


def run(command, cwd):
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_it_is_short():
    """It was 419 lines: install stood behind two tables and a figure."""
    lines = TEXT.splitlines()
    assert len(lines) <= 150
    assert lines.index("## Install") <= 40
    assert {"make setup", "make train"} <= set(lines)


def test_pages_are_links():
    """A page in backticks is one that a reader has to look for."""
    assert re.findall(r"`(?:docs/[\w./]+|\w+\.md)`", TEXT) == []


def test_the_changed_lines_of_the_json_are_right():
    """The first thing that is pasted: accepted, and nothing but the type differs."""
    (diff,) = blocks(TEXT, "diff")
    assert len(diff.splitlines()) == 3
    before, after = (
        json.loads("{" + "".join(line[1:] for line in diff.splitlines() if not line.startswith(other)) + "}")
        for other in ("+", "-")
    )
    assert (before["optimizer"]["type"], after["optimizer"]["type"]) == ("AdamW", "BlockwiseAdamMini")
    OPTIMIZERS["BlockwiseAdamMini"]([torch.nn.Parameter(torch.ones(1))], **after["optimizer"]["params"])
    assert before["optimizer"]["params"] == after["optimizer"]["params"] and "lr" in after["optimizer"]["params"]


@pytest.mark.parametrize("line", commands())
def test_commands_exist_and_are_understood(line):
    """Dry runs of make, --help of scripts, and the ds-blockwise command for real."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert run(["make", "--dry-run", "--always-make", *words[1:]], ROOT)
    elif words[0] == "ds-blockwise":
        expected = {"check": "no problems", "blocks": "total:"}
        assert ("usage" if words[-1] == "--help" else expected[words[1]]) in run(words, ROOT)
    elif words[0] == "python":
        assert words[-1] == "--help" and "usage" in run([sys.executable, *words[1:]], ROOT)
    else:
        assert words[:2] == ["pip", "install"]
        for extra in re.findall(r"\w+", words[2]):
            assert f'"{extra}"' in (ROOT / "setup.py").read_text()


def test_the_results_are_those_of_the_csv():
    """Every number in the tables follows from a file that a script wrote."""
    pytest.importorskip("matplotlib", reason="the comparison draws with matplotlib, in the extra 'dev'")
    from benchmarks.compare import report, summary
    from benchmarks.compare.results import arm_results
    from benchmarks.compare.trials import PUBLISHED_PLANS, QUICK
    from benchmarks.provenance import between

    evidence, comparisons = (path.read_text(encoding="utf-8") for path in (report.EVIDENCE, report.COMPARISONS))
    assert summary.line() == between(TEXT, summary.LINE)
    assert summary.table() == between(evidence, summary.TABLE)
    for name, plan in PUBLISHED_PLANS.items():
        shown = [between(comparisons, f"{name} {part}") for part in ("results", "ablations")]
        path = ROOT / f"docs/compare/{name}.csv"
        if not path.is_file():
            assert {text.strip() for text in shown} == {"Not run yet."}, name
            continue
        results = report.read_csv(path, plan)
        rows = arm_results(results, plan)
        table = report.table(rows, results, plan)
        ablations = report.ablation_table(results, plan, {row.arm: row.lr for row in rows})
        assert table in shown[0] and ablations in shown[1], name
    quick = report.read_csv(ROOT / "docs/compare/quick.csv", QUICK)
    table = report.table(arm_results(quick, QUICK), quick, QUICK)
    assert table in between(comparisons, "quick results")
