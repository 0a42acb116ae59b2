# SPDX-License-Identifier: Apache-2.0
"""Another optimizer is one class: what second moment it keeps, what ranks exchange, and its update.

The class here is sign momentum without a second moment. It gets block types, groups, state dicts and copies from
`BlockwiseOptimizer`, and none of them asks which optimizer it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from ds_blockwise import BlockwiseAdamMini, BlockwiseAdamW, tag_parameters
from ds_blockwise.kernels.base import Item, Kernels
from ds_blockwise.kernels.update import block_lr
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from tests.helpers.models import NanoGPT

LR, DECAY, BETA1 = 1e-2, 0.1, 0.9
MULTIPLIERS = {"emb": 3.0, "qk": 2.0, "ffn": 0.5, "vo": 0.25, "norm": 1.0}


class SignMomentum(BlockwiseOptimizer):
    """``m = beta1 * m + (1 - beta1) * g``, then a step of the block's learning rate in the direction of m's signs."""

    second_moment = "none"

    def update_(self, kernels: Kernels, items: Sequence[Item]) -> None:
        for item in items:
            assert item.grad is not None
            item.state["step"] += 1
            exp_avg = item.state["exp_avg"].view(-1).lerp_(item.grad.view(-1), 1 - item.hyper.beta1)
            param = item.param.detach().view(-1)
            for run in item.table.multiplier_runs:
                lr = block_lr(run.update.lr_multiplier, lr=float(item.hyper.lr), lr_floor=item.hyper.lr_floor)
                decay = item.hyper.weight_decay * run.update.weight_decay_multiplier
                run.of(param).mul_(1 - lr * decay).sub_(lr * run.of(exp_avg).sign())


def made() -> tuple[nn.Module, SignMomentum]:
    torch.manual_seed(0)
    model = NanoGPT()
    tag_parameters(model)
    groups = [{"params": list(model.parameters()), "weight_decay": DECAY}]
    return model, SignMomentum(groups, lr=LR, betas=(BETA1, 0.95), lr_multipliers=MULTIPLIERS, backend="reference")


def feed(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


def test_its_updates_are_its_own_with_the_multipliers_of_block_types() -> None:
    model, optimizer = made()
    params = dict(model.named_parameters())
    expected = {name: param.detach().double().clone() for name, param in params.items()}
    momentum = {name: torch.zeros_like(value) for name, value in expected.items()}
    rates = {name: _rates(name, param) for name, param in params.items()}
    for step in range(4):
        before = {name: value.clone() for name, value in expected.items()}
        was = {name: param.detach().clone() for name, param in params.items()}
        feed(model, step)
        optimizer.step()
        for name, param in params.items():
            assert param.grad is not None
            momentum[name] = BETA1 * momentum[name] + (1 - BETA1) * param.grad.double()
            expected[name] *= 1 - LR * rates[name] * DECAY
            expected[name] -= LR * rates[name] * momentum[name].sign()
            update, right = (param.detach() - was[name]) / LR, (expected[name] - before[name]) / LR
            # weights up to 4 in fp32, rounded twice (1 ULP: 4.8e-7), over a rate of 0.01
            torch.testing.assert_close(update.double(), right, rtol=0, atol=1e-4, msg=lambda t, n=name: f"{n}: {t}")
            expected[name] = param.detach().double()


def _rates(name: str, param: torch.Tensor) -> torch.Tensor:
    """Multipliers element by element, from the names of nanoGPT; its attention weight is queries, keys, values."""
    rates = torch.ones(param.shape, dtype=torch.float64)
    if name.endswith(("wte.weight", "wpe.weight", "lm_head.weight")):
        return rates * MULTIPLIERS["emb"]
    if "ln_" in name:
        return rates * MULTIPLIERS["norm"]
    if "attn.c_attn" in name:
        third = param.shape[0] // 3
        rates[: 2 * third] = MULTIPLIERS["qk"]
        rates[2 * third :] = MULTIPLIERS["vo"]
        return rates
    return rates * MULTIPLIERS["vo" if "attn.c_proj" in name else "ffn"]


@pytest.mark.parametrize("how", ["state dict", "copy"])
def test_it_goes_on_bit_for_bit(how: str) -> None:
    model, optimizer = made()
    for step in range(2):
        feed(model, step)
        optimizer.step()
    if how == "copy":
        other_model, other = copy.deepcopy((model, optimizer))
        tag_parameters(other_model)  # torch does not copy the attributes of parameters
    else:
        other_model, other = made()
        other_model.load_state_dict(model.state_dict())
        saved = copy.deepcopy(optimizer.state_dict())
        assert {key for state in saved["state"].values() for key in state} == {"step", "exp_avg"}
        other.load_state_dict(saved)
    for step in range(2, 4):
        for run_model, run in ((model, optimizer), (other_model, other)):
            feed(run_model, step)
            run.step()
    for one, two in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_it_takes_the_first_moment_of_others_and_they_refuse_its_state() -> None:
    model, optimizer = made()
    feed(model, 0)
    optimizer.step()
    for cls in (BlockwiseAdamW, BlockwiseAdamMini):
        other = cls(model.parameters(), lr=LR)
        with pytest.raises(ValueError, match="no second moment"):
            other.load_state_dict(optimizer.state_dict())
        feed(model, 1)
        other.step()
        optimizer.load_state_dict(other.state_dict())
        first = next(model.parameters())
        assert torch.equal(optimizer.state[first]["exp_avg"], other.state[first]["exp_avg"])
        assert "exp_avg_sq" not in optimizer.state[first]
