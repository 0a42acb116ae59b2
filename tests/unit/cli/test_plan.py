# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise plan``: what a user sees before the first GPU-hour."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="blocks are counted on Megatron-core's model")

from ds_blockwise.cli.main import main
from ds_blockwise.cli.plan import short_count
from tests.helpers import ROOT

pytestmark = pytest.mark.usefixtures("ends_process_groups")

FOLDER = ROOT / "configs" / "run" / "llama_2b"


def test_the_command_prints_a_table_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both optimizers side by side, every number of nodes, the figure."""
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(FOLDER), "--nodes", "8"]) == 0
    printed = capsys.readouterr().out
    assert "8 nodes x 8 h100-80g = tensor 1 x data 64" in printed
    assert re.search(r"peak on the GPU +\d+\.\d+ +\d+\.\d+", printed)
    assert re.findall(r"^ +(\d+)   [\d,]+ to", printed, flags=re.MULTILINE) == ["1", "2", "4", "8", "16", "32", "64"]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """For scripts; without a figure."""
    assert main(["plan", str(FOLDER / "nodes_4.yaml"), "--json", "--plot", ""]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["dp"] == 32
    memory = found["plan"]["memory"]
    assert memory["BlockwiseAdamMini"]["on_gpu"] < memory["AdamW"]["on_gpu"]
    assert [p["nodes"] for p in found["over_nodes"]] == [1, 2, 4, 8, 16, 32, 64]
    assert found["plan"]["mfu"][0] > found["plan"]["mfu"][1] > 0


def test_what_muons_matrices_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """16 layers of 20 heads of q, k and v, attention's output, gate, up and down over 2 x 256 ranks."""
    muon = ["--deepspeed-config", str(ROOT / "configs" / "deepspeed" / "blockwise_muon.json")]
    run = [str(FOLDER / "nodes_64.yaml"), "--plot", "", *muon]
    assert main(["plan", *run]) == 0
    printed = capsys.readouterr().out
    assert "of Newton-Schulz on the GPU that has most" in printed and "512 of 512 GPUs have some" in printed
    assert main(["plan", *run, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    m, n = 2560, 10240  # the largest
    assert plan["muon"]["flops"] == 5 * (4 * m * m * n + 2 * m**3)
    assert plan["muon"]["transient_bytes"] == (5 + 2) * 4 * m * n
    assert plan["memory"]["BlockwiseMuon"]["matrices"] == plan["muon"]["transient_bytes"]
    assert plan["memory"]["AdamW"]["matrices"] == 0
    travel = 16 * (m * m + 3 * m * n)  # heads lie whole on a tensor-parallel rank
    assert plan["muon"]["tp_bytes"] == pytest.approx(2 * 4 * travel / 512 / 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "b300"], "gpu 'b300' is not known; allowed: a100-40g"),
        (["--nodes", "3"], "cannot be shared by 24 data-parallel ranks"),
        (["--set", "training.global_batch_size=500"], "global_batch_size = 500"),
    ],
)
def test_a_plan_that_cannot_be_is_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(FOLDER / "nodes_1.yaml"), "--plot", "", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_run_for_cpus_says_which_gpu_to_name(capsys: pytest.CaptureFixture[str]) -> None:
    """The run file that a newcomer has; the empty name of a GPU was "not known"."""
    tiny = str(ROOT / "configs" / "run" / "tiny.yaml")
    assert main(["plan", tiny, "--plot", ""]) == 2
    said = capsys.readouterr().err
    assert f"{tiny} names no GPU" in said
    assert "--gpu h100-80g" in said and "a100-40g, a100-80g" in said
    assert "''" not in said
    assert main(["plan", tiny, "--plot", "", "--gpu", "h100-80g"]) == 0
    assert "1 node x 2 h100-80g" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "text"), [(1_262_720, "1.26M"), (134_105_856, "0.13B"), (99_999_999, "100M"), (1_937_000_000, "1.94B")]
)
def test_sizes_are_in_the_unit_that_people_use(count: int, text: str) -> None:
    """A title said 0.00B."""
    assert short_count(count) == text


def test_a_run_that_does_not_fit_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first GPU-hour."""
    settings = ["--set", "training.micro_batch_size=64", "--set", "training.activation_checkpointing=none"]
    assert main(["plan", str(FOLDER / "nodes_1.yaml"), "--plot", "", "--gpu", "a100-40g", *settings]) == 0
    assert "fits in 40 GB with BlockwiseAdamMini: NO" in capsys.readouterr().out


def test_the_page_shows_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`docs/scaling.md` quotes the planner; a change of its model must change the page."""
    monkeypatch.chdir(ROOT)
    assert main(["plan", "configs/run/llama_2b", "--nodes", "8", "--plot", str(tmp_path / "plan.png")]) == 0
    printed = capsys.readouterr().out.replace(str(tmp_path / "plan.png"), "docs/scaling/llama_2b.png")
    assert printed.strip() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
