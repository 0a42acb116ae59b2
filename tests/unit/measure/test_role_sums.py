# SPDX-License-Identifier: Apache-2.0
"""Sums by role: fused weights are taken apart, and an observer sees every step and can hold it back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ds_blockwise import BlockwiseAdamW, tag_parameters
from ds_blockwise.blocks.roles import Role
from ds_blockwise.kernels.bindings import Binding, Work
from ds_blockwise.measure.role_sums import RoleStatistics, RoleSums, by_block_type
from ds_blockwise.optimizers.registry import OPTIMIZERS
from tests.helpers.models import gpt2_conv1d, llama
from tests.helpers.optimizers import SHORT_NAMES


def _with_gradients(model: nn.Module) -> nn.Module:
    tag_parameters(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def _bound(cls: type, model: nn.Module):
    optimizer = cls(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        optimizer.binding_of(parameter)
    return optimizer


def _gradient(binding: Binding) -> Tensor | None:
    return binding.tensor.grad


def _found(optimizer) -> dict[tuple[str, Role], RoleStatistics]:
    sums = RoleSums(optimizer.bindings())
    merged = sums.merged(squares=sums.squares(_gradient), totals=sums.totals(_gradient))
    return {(one.of.fqn, one.of.role): one for one in merged}


@pytest.mark.parametrize("cls", [OPTIMIZERS[name] for name in SHORT_NAMES])
def test_a_fused_transposed_weight_is_taken_apart(cls):
    model = _with_gradients(gpt2_conv1d())
    found = _found(_bound(cls, model))
    fused = [(name, p) for name, p in model.named_parameters() if name.endswith("c_attn.weight")]
    assert fused
    for name, parameter in fused:
        thirds = parameter.grad.double().chunk(3, dim=1)  # [in, out]; the outputs are queries, keys, values
        for role, expected in zip((Role.QUERY, Role.KEY, Role.VALUE), thirds, strict=True):
            one = found[(name, role)]
            assert one.numel == expected.numel()
            assert one.sums["squares"] == pytest.approx(float(expected.square().sum()), rel=1e-12)
            assert one.sums["totals"] == pytest.approx(float(expected.sum()), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("cls", [OPTIMIZERS[name] for name in SHORT_NAMES])
def test_block_types_add_up_to_the_model(cls):
    model = _with_gradients(llama())
    optimizer = _bound(cls, model)
    types = by_block_type(list(_found(optimizer).values()))
    assert set(types) == {"emb", "head", "qk", "ffn", "vo", "norm"}
    assert sum(one.numel for one in types.values()) == sum(p.numel() for p in model.parameters())
    norms = [p.grad.double().square().sum() for n, p in model.named_parameters() if "norm" in n]
    assert types["norm"].sums["squares"] == pytest.approx(float(sum(norms)), rel=1e-12)


def test_no_values_count_as_zeros():
    model = _with_gradients(llama())
    next(model.parameters()).grad = None
    found = _found(_bound(BlockwiseAdamW, model))
    name = next(name for name, _ in model.named_parameters())
    assert [one.sums["squares"] for (fqn, _), one in found.items() if fqn == name] == [0.0]


class _Watcher:
    def __init__(self, lets: bool) -> None:
        self.lets = lets
        self.calls: list[str] = []

    def before_update(self, work: list[Work]) -> bool:
        self.calls.append("before")
        assert all(w.item.grad is not None for w in work)
        return self.lets

    def after_update(self, work: list[Work]) -> None:
        self.calls.append("after")


@pytest.mark.parametrize("cls", [OPTIMIZERS[name] for name in SHORT_NAMES])
def test_an_observer_can_hold_a_step_back(cls):
    model = _with_gradients(llama())
    optimizer = cls(model.parameters(), lr=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    strict, lenient = _Watcher(False), _Watcher(True)
    optimizer.observe(strict)
    optimizer.observe(lenient)
    optimizer.step()
    assert (strict.calls, lenient.calls, optimizer.step_calls) == (["before"], ["before"], 0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(s["step"] == 0 for s in optimizer.state.values())
    optimizer.unobserve(strict)
    optimizer.step()
    assert (lenient.calls, optimizer.step_calls) == (["before", "before", "after"], 1)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
