# SPDX-License-Identifier: Apache-2.0
"""A base learning rate in the wrong unit is said once, in the first updates; right ones and fresh zeros are not."""

import logging
import re

import pytest
import torch
from torch import nn

from ds_blockwise import BlockwiseAdamMini, BlockwiseAdamW, tag_parameters
from ds_blockwise.measure.first_steps import LOOKED_AT

BOTH = pytest.mark.parametrize("cls", [BlockwiseAdamW, BlockwiseAdamMini])
ADAMW_LR = 2e-3


class Model(nn.Module):
    """A matrix of each block type that is looked at, and a norm that starts at zero."""

    def __init__(self, std: float = 0.02, zero_head: bool = True) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(16, 8)
        self.self_attn = nn.Module()
        self.self_attn.num_heads = 2
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.self_attn.add_module(name, nn.Linear(8, 8, bias=False))
        self.mlp = nn.Module()
        self.mlp.up_proj = nn.Linear(8, 32, bias=True)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 16, bias=False)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std, generator=generator)
        for parameter in (
            *self.norm.parameters(),
            self.mlp.up_proj.bias,
            *([self.lm_head.weight] if zero_head else []),
        ):
            nn.init.zeros_(parameter)


def run(cls, steps, caplog, *, model=None, whole=None, **settings):
    """Updates with injected gradients; the lines that were said, and `whole` after each update."""
    caplog.clear()
    caplog.set_level(logging.WARNING, "ds_blockwise.measure.first_steps")
    model = Model() if model is None else model
    tag_parameters(model)
    optimizer = cls(model.parameters(), **{"lr": ADAMW_LR, "weight_decay": 0.0, "backend": "reference", **settings})
    gradients = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=gradients)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        if whole is not None:
            whole.append((before, {name: p.detach().clone() for name, p in model.named_parameters()}))
    return [record.getMessage() for record in caplog.records if record.name.endswith("first_steps")]


@BOTH
def test_adamw_s_rate_in_the_unit_of_the_norms_is_said_once(cls, caplog):
    """The likely cause and both ways out; the ratio is that of the whole weights."""
    whole = []
    (line,) = run(cls, 64, caplog, whole=whole, lr_multipliers="paper")
    update, kind, ratio = re.match(
        r"update (\d+) changed the weights of block type '(\w+)' by ([\d.]+) of", line
    ).groups()
    assert int(update) == min(LOOKED_AT)
    names = {"emb": ["embed_tokens"], "qk": ["q_proj", "k_proj"], "vo": ["v_proj", "o_proj"], "ffn": ["up_proj"]}
    before, after = whole[int(update) - 1]
    by_hand = {}
    for one, parts in names.items():
        mine = [name for name in before if any(part in name for part in parts)]
        moved = sum((after[name] - before[name]).square().sum().item() for name in mine)
        by_hand[one] = (moved / sum(before[name].square().sum().item() for name in mine)) ** 0.5
    assert kind == max(by_hand, key=by_hand.get) and float(ratio) == pytest.approx(by_hand[kind], rel=0.05)
    assert "give an eighth of AdamW's best rate" in line and 'leave "paper" out' in line


@BOTH
def test_a_rate_that_is_right_says_nothing(cls, caplog):
    """Not for the default unit, not for an eighth in the other one, and not for what starts at zero."""
    assert run(cls, 64, caplog) == []
    assert run(cls, 64, caplog, lr=ADAMW_LR / 8, lr_multipliers="paper") == []


def test_without_the_preset_the_rate_itself_is_the_cause(caplog):
    """Nobody is told to remove a preset that is not there."""
    (line,) = run(BlockwiseAdamW, 64, caplog, lr=8 * ADAMW_LR)
    assert "lower lr, or lengthen the warm-up" in line and "paper" not in line


def test_what_is_loaded_later_is_looked_at_no_more(caplog):
    """Past the warm-up nothing is compared: a run costs nothing for the rest of its life."""
    model = Model()
    assert run(BlockwiseAdamW, max(LOOKED_AT) + 1, caplog, model=model, lr=1e-6) == []
    tag_parameters(model)
    optimizer = BlockwiseAdamW(model.parameters(), lr=1.0)
    observer = optimizer._observers[-1]
    observer._is_done = True
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert observer._before == [] and observer._turns == {}
