# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise suggest``: what it counts, what it says of the rules, and whether its JSON is taken."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="models are Hugging Face's")

from benchmarks.provenance import between
from ds_blockwise.cli.main import main
from ds_blockwise.hosts.deepspeed.config.check import json_mistakes
from ds_blockwise.optimizers.registry import OPTIMIZERS, SCHEDULES
from ds_blockwise.runs.rates.scaling_rules import StepLaw, TrainingSize
from ds_blockwise.runs.rates.suggestion import SAME_AS_ADAMW
from tests.helpers import ROOT
from tests.helpers.models import hf_sizes

PAGE = (ROOT / "docs/rates.md").read_text(encoding="utf-8")
LENGTH = ["--tokens", "1.6M", "--batch", "16x128"]


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A Hugging Face LLaMA: 37 x 12 in each table, 2 layers of 2 heads, one for keys and values."""
    from transformers import LlamaConfig

    sizes = hf_sizes(hidden_size=12, num_attention_heads=2, num_key_value_heads=1)
    LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["suggest", *arguments, "--quiet"]) == 0
    return capsys.readouterr().out


def test_parameters_steps_and_every_rule_with_its_range(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    table, layers = 37 * 12, 2 * (12 * (12 + 6 + 6 + 12) + 3 * 12 * 21 + 2 * 12) + 12
    text = printed(capsys, config, *LENGTH)
    assert f"{2 * table + layers:,} parameters: {layers:,} in layers, {table:,} in embeddings, {table:,}" in text
    assert "1,600,000 tokens = 782 steps of 2,048 tokens (16 x 128)" in text
    for source in ("2503.04715", "2401.02954", "2406.19146"):
        assert re.search(rf"arXiv {source}\) .* OUTSIDE the fit: .* not in ", text)
    assert "No rule was fitted on such runs" in text
    assert all(re.search(rf"^  {name} +[\d.]+  [\d.]+$", text, flags=re.MULTILINE) for name in SAME_AS_ADAMW)


def test_the_rates_of_ours_are_adamws_and_an_eighth_in_the_papers_unit(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, config, *LENGTH)
    (start,) = re.findall(r"^start: lr ([\d.e-]+) ", text, flags=re.MULTILINE)
    for name in SAME_AS_ADAMW:
        (own, paper) = re.findall(rf"^  {name} +(\S+)  (\S+)$", text, flags=re.MULTILINE)[0]
        assert own == start and float(paper) == pytest.approx(float(own) / 8, rel=0.05)


def test_a_run_inside_a_fit_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model of the size that Step Law was fitted on; its batch is far from the rule's."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 1280, "intermediate_size": 9472, "num_hidden_layers": 10, "num_attention_heads": 10}
    LlamaConfig(**sizes, vocab_size=65536, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    text = printed(capsys, str(tmp_path), "--tokens", "50B", "--batch", "0.1M", "--gpu", "h100-80g")
    assert "429,287,680 in layers" in text  # theirs has 429,260,800: norms are left out there
    assert re.search(r"Step Law.* inside the fit: N 4.3e8 in 2.1e8 to 1.1e9; D 5.0e10 in", text)
    assert "No rule was fitted" not in text
    assert "Your batch is 0.13 times the one that goes with it" in text and "a lower rate" in text
    assert re.search(r"4 complete runs: 200,000,000,000 tokens, .* FLOPs, [\d,]+ to [\d,]+ GPU-hours on h100", text)


def test_the_json_is_taken_by_everyone_who_reads_it(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By the check of JSONs, by the optimizer, by the schedule: peak, floor and lengths are the suggested ones."""
    for name in SAME_AS_ADAMW:
        made = json.loads(printed(capsys, config, *LENGTH, "--json", "--optimizer", name))
        assert json_mistakes(made) == [] and made["train_batch_size"] == 16
        params, schedule = made["optimizer"]["params"], made["scheduler"]
        optimizer = OPTIMIZERS[made["optimizer"]["type"]]([torch.nn.Parameter(torch.zeros(2))], **params)
        shape = SCHEDULES[schedule["type"]](optimizer, **schedule["params"])
        assert schedule["params"]["total_num_steps"] == 782 and schedule["params"]["warmup_num_steps"] == 156
        rates = []
        for _ in range(783):
            rates.append(shape.get_last_lr()[0])
            optimizer.step()
            shape.step()
        assert rates[0] == 0 and max(rates) == rates[156] == params["lr"]
        assert rates[-1] == pytest.approx(schedule["params"]["min_lr"]) and 0 < rates[-1] < params["lr"] / 10


@pytest.mark.usefixtures("ends_process_groups")
def test_the_json_of_a_run_file_passes_its_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the launcher writes (batch, lengths) is left out, what the run's JSON has beside it stays."""
    pytest.importorskip("megatron.core", reason="model files are Megatron-core's")
    run, made = str(ROOT / "configs/run/tiny.yaml"), tmp_path / "made.json"
    text = printed(capsys, run, "--output", str(made))
    assert f"written to {made}" in text and f"ds-blockwise check {run} --deepspeed-config {made}" in text
    assert "1,262,720 parameters: 738,432 in layers" in text and "600 steps of 4,096 tokens (32 x 128)" in text
    assert main(["check", run, "--deepspeed-config", str(made), "--quiet"]) == 0, capsys.readouterr().out
    kept = json.loads(made.read_text(encoding="utf-8"))
    before = json.loads((ROOT / "configs/deepspeed/blockwise_adam_mini.json").read_text(encoding="utf-8"))
    assert kept["zero_optimization"] == before["zero_optimization"]
    assert kept["optimizer"]["params"]["telemetry"] == before["optimizer"]["params"]["telemetry"]
    longer = printed(capsys, run, "--tokens", "8192000")
    assert "--set training.steps=2000" in longer


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "1M"], "--batch missing: a rate depends on the length of the run and on the batch"),
        ([], "--tokens and --batch missing"),
        ([*LENGTH, "--gpu", "b300"], "unknown gpu 'b300'"),
        ([*LENGTH, "--optimizer", "AdamW"], "no published rule gives a rate for optimizer 'AdamW'"),
        ([*LENGTH, "--set", "training.steps=5"], "--set changes a run file"),
        (["--tokens", "1M", "--batch", "2M"], "batch 2,000,000 must be at least 1 token and at most the run's"),
    ],
)
def test_mistakes_are_named(config: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suggest", config, *arguments, "--quiet"]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "many", "1e99", "5q", "x128", "16x", "4x4x4"])
def test_a_number_of_tokens_is_a_number(config: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["suggest", config, "--tokens", "1M", f"--batch={value}"])
    assert "allowed: a number of tokens, such as 26B" in capsys.readouterr().err


def test_nothing_is_overwritten(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "there.json"
    there.write_text("mine", encoding="utf-8")
    assert main(["suggest", config, *LENGTH, "--quiet", "--output", str(there)]) == 2
    assert "is there already, and nothing is overwritten" in capsys.readouterr().err
    assert there.read_text(encoding="utf-8") == "mine"


@pytest.mark.usefixtures("ends_process_groups")
def test_the_page_shows_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`docs/rates.md` quotes it, without the JSON at its end."""
    pytest.importorskip("megatron.core", reason="model files are Megatron-core's")
    monkeypatch.chdir(ROOT)
    shown, _, made = printed(capsys, "configs/run/llama_2b/nodes_8.yaml").partition("\nDeepSpeed JSON")
    assert json.loads(made[made.index("{") :])
    quoted = f"```\n$ ds-blockwise suggest configs/run/llama_2b/nodes_8.yaml\n{shown.rstrip()}\n```"
    assert between(PAGE, "suggest") == quoted


def test_the_page_compares_step_law_with_our_sweeps() -> None:
    """Both of our sizes, 800 steps of 2,048 tokens; the best rates are those of docs/comparisons.md."""
    sizes = {"1.26M": (738_432, 262_144), "5.05M": (2_951_424, 1_048_576)}
    comparisons = (ROOT / "docs/comparisons.md").read_text(encoding="utf-8")
    best_rates = set(re.findall(r"^\| AdamW \(torch\) \| ([\d.]+) \|", comparisons, flags=re.MULTILINE))
    row = re.compile(r"^\| (\S+M) \| 1.64M \| \d+% \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", flags=re.MULTILINE)
    found = row.findall(PAGE)
    assert [size for size, *_ in found] == ["1.26M", "1.26M", "5.05M"]
    for size, predicted, best, ratio in found:
        layers, table = sizes[size]
        lr = StepLaw().lr(TrainingSize(layers, table, table, 800 * 2048, 2048))
        assert float(predicted) == float(f"{lr:.2g}") and best in best_rates
        assert float(ratio) == pytest.approx(lr / float(best), abs=0.05)
