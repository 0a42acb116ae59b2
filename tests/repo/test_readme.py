# SPDX-License-Identifier: Apache-2.0
"""The README cannot drift: its code runs, its commands and paths exist, its settings are accepted."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ds_blockwise.optimizers.registry import OPTIMIZERS
from tests.helpers import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
PYTHON = [code for kind, code in BLOCKS if kind == "python"]
JSON = [json.loads(code) for kind, code in BLOCKS if kind == "json"]
SHELL = [line for kind, code in BLOCKS if kind == "bash" for line in code.splitlines() if line.strip()]
BIN = Path(sys.executable).parent


def run(command, cwd, **variables):
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_the_deepspeed_script_runs_with_the_launcher(tmp_path):
    """The promise of the first screen: one import and one word in the JSON. Also with AdamW's name, for comparison."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    script = next(code for code in PYTHON if "deepspeed.initialize" in code)
    (tmp_path / "train.py").write_text(script)
    command = shlex.split(next(line for line in SHELL if line.endswith("train.py")))
    command[1:1] = ["--master_port", free_port()]
    settings = next(config for config in JSON if "zero_optimization" in config)
    # DeepSpeed compiles an operation here; a compilation that somebody killed leaves a lock that waits for ever
    compiled = str(tmp_path / "torch_extensions")
    finals = {}
    for name in (*OPTIMIZERS, "AdamW"):
        settings["optimizer"]["type"] = name
        settings["optimizer"]["params"]["torch_adam"] = True  # DeepSpeed's own kernel would be compiled here
        (tmp_path / "ds_config.json").write_text(json.dumps(settings))
        out = run(command, tmp_path, TORCH_EXTENSIONS_DIR=compiled)
        finals[name] = re.findall(r"rank \d: loss ([0-9.]+), lr ([0-9.e-]+)", out)
        assert len(finals[name]) == 2, out
    assert all(float(loss) < 5.4 for name in finals for loss, _ in finals[name]), finals
    assert len({loss for name in finals for loss, _ in finals[name]}) >= 3, "the optimizers must differ"


def test_the_pytorch_example_runs(tmp_path):
    """Plain PyTorch, whole tensors."""
    (script,) = [code for code in PYTHON if "deepspeed" not in code]
    assert "total:" in run([sys.executable, "-c", script], tmp_path)


@pytest.mark.parametrize("line", [line for line in SHELL if not line.endswith("train.py")])
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
        extra = re.search(r"\[(\w+)\]", words[2]).group(1)
        assert f'"{extra}"' in (ROOT / "setup.py").read_text()


def test_the_results_are_those_of_the_csv():
    """Every number in the tables follows from a file that a script wrote."""
    pytest.importorskip("matplotlib", reason="the comparison draws with matplotlib, in the extra 'dev'")
    from benchmarks.compare import report, summary
    from benchmarks.compare.results import arm_results
    from benchmarks.compare.trials import PUBLISHED_PLANS, QUICK
    from benchmarks.provenance import between

    evidence = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    assert summary.line() == between(TEXT, summary.LINE)
    assert summary.table() == between(evidence, summary.TABLE)
    for name, plan in PUBLISHED_PLANS.items():
        shown = [between(evidence, f"{name} {part}") for part in ("results", "ablations")]
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
    assert table in between(evidence, "quick results")
