# SPDX-License-Identifier: Apache-2.0
"""Published rules against what their authors published beside them, and what a suggestion makes of them."""

from __future__ import annotations

import pytest

pytest.importorskip("pydantic", reason="the table of GPUs stands with the run files")

from ds_blockwise.runs.plan import GPUS
from ds_blockwise.runs.rates.scaling_rules import RULES, DeepSeekLaw, PorianLaw, StepLaw, TrainingSize, rule_for
from ds_blockwise.runs.rates.suggestion import AROUND, UPWARD, deepspeed_json, suggest_for


def run(layers: float, tokens: float, *, output: float = 0, embedding: float = 0, batch: float = 1) -> TrainingSize:
    return TrainingSize(int(layers), int(output), int(embedding), int(tokens), int(batch))


@pytest.mark.parametrize(
    ("layers", "tokens", "best_lr", "best_batch"),
    [  # the best of the runs of one size and length in github.com/step-law/steplaw, data/dense_lr_bs_loss.csv
        (214_663_680, 11.4e9, 0.002762, 393_216),
        (268_304_384, 80e9, 0.003906, 1_048_576),
        (429_260_800, 22.7e9, 0.00195, 393_216),
        (536_872_960, 28.4e9, 0.00195, 393_216),
        (1_073_741_824, 56.9e9, 0.001381, 524_288),
    ],
)
def test_step_law_meets_the_optima_of_its_own_runs(layers: int, tokens: float, best_lr: float, best_batch: int) -> None:
    """Their grid has steps of the root of 2: the rule is not further off."""
    size = run(layers, tokens)
    assert StepLaw().lr(size) == pytest.approx(best_lr, rel=0.15)
    assert 0.7 < StepLaw().batch(size) / best_batch < 1.6
    assert not StepLaw().outside(size) and isinstance(rule_for(size), StepLaw)


def test_deepseek_law_gives_the_rates_of_its_models() -> None:
    """Of the 7B model, table 2 has 4.2e-4 and 2304 x 4096 tokens; its formula takes C = 4.23e10 x 2e12 FLOPs."""
    seven = run(4.23e10 / 6, 2e12)
    assert DeepSeekLaw().lr(seven) == pytest.approx(4.2e-4, rel=0.02)
    assert DeepSeekLaw().batch(seven) == pytest.approx(2304 * 4096, rel=0.03)
    (outside,) = DeepSeekLaw().outside(seven)
    assert outside.name == "C" and outside.value == pytest.approx(8.46e22)


def test_porian_law_gives_the_largest_model_its_rate() -> None:
    """The 901M model: 0.0024 and 640 sequences of 2048 tokens, prescribed by the fit to smaller ones."""
    size = run(850e6, 20 * 901e6, output=51e6)
    assert PorianLaw().lr(size) == pytest.approx(0.0024, rel=0.1)
    assert PorianLaw().batch(size) == pytest.approx(640 * 2048, rel=0.15)
    assert [found.name for found in PorianLaw().outside(size)] == ["N"]
    assert not PorianLaw().outside(run(80e6, 2e9, output=20e6))


def test_a_rule_that_was_fitted_on_such_runs_comes_first() -> None:
    assert isinstance(rule_for(run(50e6, 3e9)), DeepSeekLaw)  # 9e17 FLOPs, but too small for Step Law
    assert isinstance(rule_for(run(100e6, 2e9, output=10e6)), DeepSeekLaw)
    assert rule_for(run(1e6, 1e6)) is RULES[0]  # outside of all


def test_what_a_run_counts_as() -> None:
    size = run(700, 1000, output=200, embedding=100, batch=300)
    assert (size.parameters, size.multiplying, size.flops, size.steps) == (1000, 900, 6 * 900 * 1000, 4)
    assert run(700, 1000, embedding=100).multiplying == 800  # a tied output layer


def test_small_models_are_bracketed_and_large_ones_go_upward() -> None:
    small, large = suggest_for(run(40e6, 2e9, batch=2e5)), suggest_for(run(4e8, 1e10, batch=5e5))
    assert [lr / small.lr for lr in small.bracket] == pytest.approx(AROUND, rel=0.03)
    assert [lr / large.lr for lr in large.bracket] == pytest.approx(UPWARD, rel=0.03)
    assert small.bracket_flops == 3 * small.size.flops and large.bracket_flops == 4 * large.size.flops
    assert float(f"{large.lr:.1e}") == large.lr


def test_hours_follow_the_peak_of_the_gpu() -> None:
    found = suggest_for(run(4e8, 1e10, batch=5e5))
    best, worst = found.gpu_hours("h100-80g")
    assert best == pytest.approx(found.bracket_flops / (0.55 * 989e12 * 3600)) and worst == pytest.approx(
        best * 55 / 40
    )
    assert found.gpu_hours("a100-80g")[0] == pytest.approx(best * 989 / 312)
    with pytest.raises(ValueError, match=f"unknown gpu 'h100'.*did you mean.*{', '.join(GPUS)}"):
        found.gpu_hours("h100")


@pytest.mark.parametrize(("steps", "warmup"), [(4, 0), (800, 160), (50_000, 2000)])
def test_a_short_run_has_a_warm_up_of_a_fifth(steps: int, warmup: int) -> None:
    found = suggest_for(run(1e6, steps * 10, batch=10))
    assert found.size.steps == steps and found.warmup_steps == warmup


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (run(0, 1e6, output=5, batch=10), "no parameters beside its embeddings"),
        (run(1e6, 100, batch=101), "batch 101 must be at least 1 token and at most the run's 100"),
        (run(1e6, 100, batch=0), "batch 0 must be at least 1 token"),
    ],
)
def test_a_run_that_cannot_be_is_named(size: TrainingSize, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        suggest_for(size)


def test_a_batch_is_whole_sequences() -> None:
    found = suggest_for(run(1e6, 1e6, batch=2048))
    assert deepspeed_json(found, "BlockwiseAdamW", sequence_length=128)["train_batch_size"] == 16
    assert "train_batch_size" not in deepspeed_json(found, "BlockwiseAdamW")
    with pytest.raises(ValueError, match=r"2,048 tokens is no whole number of 100"):
        deepspeed_json(found, "BlockwiseAdamW", sequence_length=100)
