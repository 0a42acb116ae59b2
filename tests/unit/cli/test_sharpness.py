# SPDX-License-Identifier: Apache-2.0
"""`ds-blockwise sharpness`: from a model's folder to a table, figures and multipliers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_blockwise.cli.main import main
from ds_blockwise.measure.sharpness_report import read_csv, write_csv
from tests.helpers import ROOT

transformers = pytest.importorskip("transformers", reason="models are built from Hugging Face configs")
tokenizers = pytest.importorskip("tokenizers", reason="the text is read with a tokenizer")


def make_gpt() -> torch.nn.Module:
    """For MODULE:FUNCTION: a model with weights of its own."""
    from tests.helpers.models import gpt2_conv1d

    torch.manual_seed(1)
    return gpt2_conv1d()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved LLaMA with its tokenizer, and a text."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=64,
        num_hidden_layers=2,
        max_position_embeddings=32,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    text = "the dog saw the cat and the cat saw the dog again and again " * 30
    tokenizer.train_from_iterator([text], tokenizers.trainers.BpeTrainer(vocab_size=60))
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "text.txt").write_text(text, encoding="utf-8")
    return path


def _measure(folder: Path, *more: str) -> int:
    text = ("--text", str(folder / "text.txt"), "--batches", "3", "--batch-size", "2", "--length", "8")
    return main(["sharpness", "measure", str(folder), *text, *more])


def test_a_saved_model_is_measured_shown_and_drawn(folder, tmp_path, capsys):
    path = tmp_path / "run" / "s.csv"
    path.parent.mkdir()
    assert _measure(folder, "--csv", str(path), "--level", "layer") == 0
    table = capsys.readouterr().out
    assert table.startswith("gauss_newton, 3 samples, 42 tokens")
    assert "qk in layer 1" in table
    (report,) = read_csv(path)
    assert sum(e.numel for e in report.at("type")) == 64 * 16 * 2 + 2 * (4 * 256 + 3 * 384 + 32) + 16
    assert main(["sharpness", "show", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [e["sharpness"] for e in shown["entries"]] == [e.sharpness for e in report.entries]
    assert main(["sharpness", "plot", str(path), "--output", str(tmp_path / "figures")]) == 0
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["sharpness_blocks.png"]  # no step: no curve


def test_random_weights_are_refused_or_said(folder, tmp_path, capsys):
    """Their sharpness says nothing, and nobody would notice."""
    for name in ("config.json", "tokenizer.json", "text.txt"):
        shutil.copy(folder / name, tmp_path / name)
    assert _measure(tmp_path) == 2
    assert "holds no weights" in capsys.readouterr().err
    assert _measure(tmp_path, "--random-init") == 0
    assert "these are RANDOM ones" in capsys.readouterr().err
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert _measure(tmp_path) == 2
    assert "up_proj.weight would be random" in capsys.readouterr().err


def test_other_sources_and_texts(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = ("--text", str(folder / "text.txt"), "--length", "7")
    assert (
        main(["sharpness", "measure", "tests.unit.cli.test_sharpness:make_gpt", *text, "--tokenizer", str(folder)]) == 2
    )
    assert "the model's vocabulary is 23" in capsys.readouterr().err
    assert main(["sharpness", "measure", "configs/model/tiny.yaml", *text]) == 2
    assert "launch/probe_sharpness.py --run RUN" in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("the dog", encoding="utf-8")
    assert main(["sharpness", "measure", str(folder), "--text", str(tmp_path / "short.txt")]) == 2
    assert "8 batches of 4 x 256 need 8,192" in capsys.readouterr().err
    assert _measure(folder, "--estimator", "hutchinson", "--draws", "2", "--products", "differences") == 0
    assert capsys.readouterr().out.startswith("hutchinson, 6 samples")


def _curve(folder: Path, capsys, steps=(5, 100, 300)) -> Path:
    """A CSV as a run writes it: one real measurement, at several steps."""
    from dataclasses import replace

    path = folder / "one.csv"
    if not path.exists():
        assert _measure(folder, "--csv", str(path)) == 0
        capsys.readouterr()
    (report,) = read_csv(path)
    target = folder / "curve.csv"
    write_csv([replace(report, step=step) for step in steps], target)
    return target


@pytest.mark.parametrize("head", [(), ("--head",)])
def test_ratios_are_json_for_the_optimizer(head, folder, capsys):
    """What is printed can be pasted into the JSON of an optimizer of ours; the output layer follows no sharpness."""
    from ds_blockwise import BlockwiseAdamW

    path = _curve(folder, capsys)
    sharpness = read_csv(path)[-1].by_type()
    run = ("--steps", "1000", "--not-before", "300")
    assert main(["sharpness", "ratios", str(path), *run, "--exponent", "0.5", "--max", "3", *head]) == 0
    found = json.loads(capsys.readouterr().out)["lr_multipliers"]
    assert found.keys() == sharpness.keys() >= {"head"}
    for name, value in found.items():
        measured = min(max((sharpness["norm"] / sharpness[name]) ** 0.5, 1.0), 3.0) / 8  # lr is AdamW's rate
        expected = 1.25 if name == "head" and not head else measured
        assert value == pytest.approx(expected, rel=5e-3)
    BlockwiseAdamW([torch.nn.Parameter(torch.zeros(1))], lr_multipliers=found)


def test_ratios_from_too_early_a_measurement_are_refused(folder, capsys):
    """The limit is that of "auto": update 1,000, and 2% of a long run."""
    path = _curve(folder, capsys, steps=(5, 20, 300, 999, 1000))
    ratios = ["sharpness", "ratios", str(path)]
    assert main([*ratios, "--steps", "1000", "--step", "20"]) == 2
    message = capsys.readouterr().err
    assert "measured at step 20 of 1000, before step 1000" in message
    assert "(not_before 1000, after 0.02)" in message and "--not-before N" in message
    assert main([*ratios, "--steps", "1000", "--step", "999"]) == 2
    assert main([*ratios, "--steps", "1000", "--step", "1000"]) == 0
    assert main([*ratios, "--steps", "1000", "--step", "20", "--not-before", "20"]) == 0
    capsys.readouterr()
    # a share of the run that is more than not_before
    assert main([*ratios, "--steps", "60000"]) == 2
    assert "measured at step 1000 of 60000, before step 1200" in capsys.readouterr().err
    assert main([*ratios, "--steps", "60000", "--step", "300", "--not-before", "300"]) == 2
    assert main([*ratios, "--steps", "50000"]) == 0
    assert main([*ratios, "--steps", "50000", "--not-before", "0"]) == 2
    assert "--not-before must be an integer >= 1, got 0" in capsys.readouterr().err
    assert main([*ratios, "--steps", "0"]) == 2
    assert "--steps must be an integer >= 1, got 0" in capsys.readouterr().err
    assert main(ratios) == 2
    assert "the length of the run (no run.json beside it)" in capsys.readouterr().err
    assert main([*ratios, "--force"]) == 0
    (folder / "run.json").write_text('{"steps": 60000}', encoding="utf-8")
    try:
        assert main(ratios) == 2
    finally:
        (folder / "run.json").unlink()
    capsys.readouterr()
    assert main(["sharpness", "ratios", str(folder / "one.csv"), "--steps", "10"]) == 2
    assert "does not say its step" in capsys.readouterr().err
    assert main([*ratios, "--step", "7", "--force"]) == 2
    assert "only at 5, 20, 300, 999, 1000" in capsys.readouterr().err


def test_ratios_and_auto_take_the_same_first_step(folder, capsys):
    """A proposal from a step that "auto" would not measure at contradicts it."""
    from ds_blockwise.blocks.settings.block_settings import BlockSettings
    from ds_blockwise.measure.auto_multipliers import MeasuredMultipliers

    for total in (2_000, 49_999, 50_000, 50_001, 123_456):
        auto = MeasuredMultipliers.of(BlockSettings.parse({"auto": {"total_num_steps": total}}))
        assert auto is not None
        path = _curve(folder, capsys, steps=(auto.start - 1, auto.start))
        ratios = ["sharpness", "ratios", str(path), "--steps", str(total)]
        assert main([*ratios, "--step", str(auto.start - 1)]) == 2
        assert main([*ratios, "--step", str(auto.start)]) == 0


def test_only_the_figures_need_matplotlib(folder, tmp_path, capsys):
    path = _curve(folder, capsys)
    code = "import sys; sys.modules['matplotlib'] = None; from ds_blockwise.cli.main import main; sys.exit(main())"
    for command, status, words in (("show", 0, "norm"), ("plot", 2, "pip install 'ds_blockwise[launch]'")):
        done = subprocess.run(
            [sys.executable, "-c", code, "sharpness", command, str(path)], capture_output=True, text=True
        )
        assert (done.returncode, words in done.stdout + done.stderr) == (status, True), done.stderr


def test_both_figures_of_a_run(folder, tmp_path, capsys):
    path = _curve(folder, capsys)
    assert main(["sharpness", "plot", str(path), "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for name in ("sharpness.png", "sharpness_blocks.png"):
        assert f"figure: {tmp_path / name}" in out
        assert (tmp_path / name).stat().st_size > 10_000
