# SPDX-License-Identifier: Apache-2.0
"""The presets of multipliers: what `lr` means under each, and that "paper" is what it was before there were presets."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ds_blockwise import BlockwiseCosineLR, tag_parameters
from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.checkpoint.record import settings_of
from ds_blockwise.checkpoint.record_changes import differences
from ds_blockwise.measure.auto_multipliers import MeasuredMultipliers
from ds_blockwise.optimizers.registry import OPTIMIZERS

BEFORE = Path(__file__).parents[2] / "data" / "updates"  # `trained(cls, lr=1e-3, min_lr=1e-4)` without presets
STEPS = 6
BEFORE_PRESETS = pytest.mark.parametrize("name", ["BlockwiseAdamW", "BlockwiseAdamMini"])


class Layer(nn.Module):
    """One parameter of each block type, by LLaMA's names."""

    def __init__(self, dim: int = 12, vocab: int = 11) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, dim)
        self.self_attn = nn.Module()
        self.self_attn.num_heads = 3
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.self_attn.add_module(name, nn.Linear(dim, dim, bias=name == "q_proj"))
        self.mlp = nn.Module()
        self.mlp.up_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, vocab, bias=False)


def trained(cls: type, lr: float, min_lr: float, **settings: object) -> dict[str, torch.Tensor]:
    """The weights after a few updates with injected gradients and the paper's schedule."""
    model = Layer()
    weights, gradients = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02, generator=weights)
    tag_parameters(model)
    optimizer = cls(model.parameters(), lr=lr, weight_decay=0.1, backend="reference", **settings)
    schedule = BlockwiseCosineLR(optimizer, total_num_steps=STEPS + 2, warmup_num_steps=2, min_lr=min_lr)
    for _ in range(STEPS):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=gradients)
        optimizer.step()
        schedule.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@BEFORE_PRESETS
def test_paper_is_what_the_default_was(name):
    """A run of the paper's would end elsewhere after an upgrade, although its JSON says ``"paper"``."""
    now = trained(OPTIMIZERS[name], lr=1e-3, min_lr=1e-4, lr_multipliers="paper")
    before = load_file(BEFORE / f"{name}.safetensors")
    # processors differ in the last bits of normal random numbers; other multipliers move weights by 1e-4 and more
    torch.testing.assert_close(now, before, rtol=4e-7, atol=2e-9)


@BEFORE_PRESETS
def test_eight_times_the_rate_in_adamw_s_unit_is_the_same_run(name):
    """The two units differ by a power of two, so whoever moves his `lr` by it keeps every bit."""
    now = trained(OPTIMIZERS[name], lr=8e-3, min_lr=0.0)
    before = trained(OPTIMIZERS[name], lr=1e-3, min_lr=0.0, lr_multipliers="paper")
    assert [key for key in now if not torch.equal(now[key], before[key])] == []


PRESETS = {  # by hand: emb, head, qk, ffn, vo, norm, other
    None: (1.25, 1.25, 1, 0.75, 0.5, 0.125, 0.125),
    "adamw_scale": (1.25, 1.25, 1, 0.75, 0.5, 0.125, 0.125),
    "paper": (10, 10, 8, 6, 4, 1, 1),
    "tuned": (1.25, 1.25, 1, 0.75, 0.5, 1, 0.125),
    "uniform": (1, 1, 1, 1, 1, 1, 1),
    "muon": (3, 1, 1, 1, 1, 3, 1),
}
ROLE_OF = ("embedding", "output", "query", "ffn", "value", "norm", "router")


def multipliers(given: object) -> tuple[float, ...]:
    settings = BlockSettings.parse(given)
    return tuple(settings.resolve("x", Role(role), False).update.lr_multiplier for role in ROLE_OF)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_numbers_of_a_preset(preset):
    """By name, as a key, and as what a map of single numbers starts from."""
    assert multipliers(preset) == PRESETS[preset]
    if preset is not None:
        assert multipliers({"preset": preset}) == PRESETS[preset]
        changed = multipliers({"preset": preset, "head": 3, "query": 0.25})
        assert changed == (PRESETS[preset][0], 3, 0.25, *PRESETS[preset][3:])


@pytest.mark.parametrize("unit", ["adamw_scale", "paper"])
def test_measured_multipliers_are_in_the_unit_of_their_preset(unit):
    """Until they are measured all types train at `lr`; the output layer and what fits no type have the preset's."""
    assert multipliers({"preset": unit, "auto": {}}) == (1, PRESETS[unit][1], 1, 1, 1, 1, PRESETS[unit][6])
    if unit == "adamw_scale":
        assert BlockSettings.parse("auto") == BlockSettings.parse({"preset": unit, "auto": {}})


WRONG = {
    "a typing error": ("papr", "did you mean 'paper'"),
    "no preset": ({"preset": "fast"}, "adamw_scale, tuned, paper, uniform, muon, auto"),
    "not a name": ({"preset": 3}, "got 3"),
    "auto as a preset": ({"preset": "auto"}, '{"auto": {}, ...}'),
    "a preset without sharpness": ({"preset": "tuned", "auto": {}}, "adamw_scale, paper"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_presets_are_explained(case):
    """A name that nothing knows must not become the default."""
    given, words = WRONG[case]
    with pytest.raises(ValueError, match="lr_multipliers") as error:
        BlockSettings.parse(given)
    assert words in str(error.value)


def settings(lr_multipliers: object) -> dict[str, object]:
    """What a checkpoint says about an optimizer with these multipliers."""
    model = Layer()
    return settings_of(OPTIMIZERS["BlockwiseAdamW"](tagged(model), lr=1e-3, lr_multipliers=lr_multipliers))


def tagged(model: nn.Module) -> list[nn.Parameter]:
    tag_parameters(model)
    return list(model.parameters())


def test_a_checkpoint_from_before_presets_is_told_apart():
    """Resumed with the same JSON it would train every block at an eighth of its rate, without a word."""
    saved = settings("paper")
    del saved["preset"]
    (line,) = differences(saved, settings(None))
    assert 'was "paper" (emb 10, ' in line and 'is "adamw_scale" (emb 1.25, ' in line
    assert "rate of norms, is the rate of AdamW" in line
    assert 'write "lr_multipliers": "paper", or give lr times 8' in line
    assert differences(saved, settings("paper")) == []
    (back,) = differences(settings(None), settings("paper"))
    assert 'write "lr_multipliers": "adamw_scale", or give lr divided by 8' in back


def test_changed_presets_are_reported_and_the_same_numbers_are_not():
    """What counts is at which rates the run went on."""
    spelt_out = {"emb": 1.25, "head": 1.25, "qk": 1, "ffn": 0.75, "vo": 0.5, "norm": 1, "other": 0.125}
    assert differences(settings("tuned"), settings(spelt_out)) == []
    (line,) = differences(settings("adamw_scale"), settings("tuned"))
    assert 'was "adamw_scale"' in line and "norm 1," in line and "meaning" not in line
    unknown = {**settings("tuned"), "preset": "of a later version"}
    (line,) = differences(unknown, settings("adamw_scale"))
    assert 'was "of a later version"' in line


def test_measurements_move_into_the_unit_of_the_run():
    """Multipliers that a run in the paper's unit had measured would be eight times too large in AdamW's."""
    old = MeasuredMultipliers.of(BlockSettings.parse({"preset": "paper", "auto": {"total_num_steps": 100_000}}))
    old.target, old.measured_at = {"ffn": 6.0, "norm": 1.0}, 2000
    before = old.state()
    del before["norm_multiplier"]  # as an earlier version wrote it
    for state in (old.state(), before):
        new = MeasuredMultipliers.of(BlockSettings.parse({"auto": {"total_num_steps": 100_000}}))
        new.load(state)
        assert new.target == {"ffn": 0.75, "norm": 0.125}
        old.load(new.state())
        assert old.target == {"ffn": 6.0, "norm": 1.0}
