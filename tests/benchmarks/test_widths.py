# SPDX-License-Identifier: Apache-2.0
"""The check of the width rule: its sweeps, its resume, its table on the page."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the models are Hugging Face's")

from benchmarks.compare import widths
from benchmarks.provenance import PROVENANCE, ROOT, between, read_csv


@pytest.fixture
def imagined(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str, float, int]]:
    """Trials are not trained: their losses are parabolas around a best rate, which the rule keeps where it was."""
    trained = []

    def trial(width: int, rule: str, lr: float, seed: int, text: torch.Tensor) -> dict[str, str]:
        trained.append((width, rule, lr, seed))
        best = 4e-3 if rule in widths.TRANSFER_RULES else 4e-3 * (64 / width) ** 2
        loss = 2 + math.log2(lr / best) ** 2 + 0.01 * seed - 0.1 * (rule == widths.TUNED)
        row = {"width": str(width), "rule": rule, "lr": f"{lr:g}", "seed": str(seed), "loss": f"{loss:.5f}"}
        return (
            row | {"parameters": "1", "settings": widths.SETTINGS, "cpu_seconds": "60"} | dict.fromkeys(PROVENANCE, "x")
        )

    monkeypatch.setattr(widths, "_trained", trial)
    return trained


def test_a_sweep_grows_until_its_best_lies_inside_and_nothing_is_trained_twice(
    imagined: list[tuple[int, str, float, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "widths.csv"
    widths.main(["--csv", str(path)])
    rows = read_csv(path)
    assert set(widths.losses(rows, 64, widths.OFF)) == {2e-3, 4e-3, 8e-3}
    assert set(widths.losses(rows, 256, widths.OFF)) == {1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3}
    assert [widths.best_of(rows, width, widths.OFF) for width in widths.WIDTHS] == [4e-3, 1e-3, 2.5e-4]
    assert {widths.best_of(rows, width, "mup") for width in widths.WIDTHS} == {4e-3}
    printed = capsys.readouterr().out
    assert "| off | 256 | 0.00025 | 2.015 | 18.015 | 16.000 |" in printed
    assert "| `adamw_scale` | 256 | 0.00025 | 2.015 | +0.000 | 18.015 | 16.000 |" in printed
    assert "| `tuned` | 128 | 0.001 | 1.915 | -0.100 | 5.915 | 4.000 |" in printed
    done = len(imagined)
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    widths.main(["--csv", str(path)])
    assert len(imagined) == done + 1 and read_csv(path) == rows


@pytest.mark.parametrize("rule", widths.WAYS)
def test_a_trial_trains_with_the_rule(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps of a tiny model: better than chance over bytes, and the rule reaches the optimizer."""
    monkeypatch.setattr(widths, "STEPS", 12)
    monkeypatch.setattr(widths, "WARMUP", 2)
    seen = []
    monkeypatch.setattr(widths, "BlockwiseAdamW", lambda *a, **k: seen.append(made := BUILD(*a, **k)) or made)
    text = (torch.arange(widths.VALIDATION * widths.LENGTH * 2) % 7 + 40).long()
    row = widths._trained(128, rule, 8e-3, 1, text)
    assert float(row["loss"]) < math.log(widths.VOCAB) - 0.5
    assert row.keys() == set(widths.COLUMNS)
    transfer, ratios = seen[0].block_settings.transfer, seen[0].block_settings.lr_multipliers
    assert (transfer.base_width, transfer.rule) == (64, rule) if rule in widths.TRANSFER_RULES else transfer is None
    expected = {widths.UNIFORM: (1.0, 1.0), widths.TUNED: (1.25, 1.0)}.get(rule, (1.25, 0.125))
    assert (ratios["emb"], ratios["norm"]) == expected


BUILD = widths.BlockwiseAdamW


def test_the_page_shows_the_csv() -> None:
    page = (ROOT / "docs/rates.md").read_text(encoding="utf-8")
    rows = read_csv(widths.CSV)
    assert between(page, "widths") == widths.markdown(rows)
    assert between(page, "widths presets") == widths.preset_table(rows)
