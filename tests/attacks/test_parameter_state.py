# SPDX-License-Identifier: Apache-2.0
"""Random keys and values given to the state of single parameters, as a debugging script might."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import nn

from ds_blockwise import tag_parameters
from ds_blockwise.hosts.parameter_states import ParameterStates
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.registry import OPTIMIZERS
from tests.helpers.attacks import Input, attack, number_of_inputs
from tests.helpers.models import NanoGPT

KEYS = ("exp_avg", "exp_avg_sq", "step", None, "momentum", "exp_avg_offload_buffer", "", 3, ("exp_avg",), "EXP_AVG")


def trained(name: str, rng: random.Random) -> tuple[BlockwiseOptimizer, ParameterStates, dict[str, nn.Parameter]]:
    model = NanoGPT()
    tag_parameters(model)
    settings = {"momentum_dtype": rng.choice(["fp32", "bf16"]), "granularity": rng.choice([None, "published"])}
    optimizer = OPTIMIZERS[name](model.parameters(), lr=1e-3, backend="reference", **settings)
    if rng.random() < 0.8:
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
    optimizer.allocate_state() if rng.random() < 0.1 else [optimizer.binding_of(p) for p in model.parameters()]
    params = dict(model.named_parameters())
    return optimizer, ParameterStates(optimizer, {p: p.shape for p in params.values()}), params


def value_for(param: nn.Parameter, rng: random.Random) -> object:
    """Something that a script could pass, most of it wrong."""
    right = torch.rand(param.shape, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
    sizes = [1, max(0, param.numel() - 1), param.numel() + 1, 2 * param.numel()]
    return rng.choice(
        [
            right,
            right.double(),
            right.flatten(),
            right.mT if right.dim() == 2 else right,
            (right > 0.5),
            (100 * right).int(),
            right.bfloat16().requires_grad_(True),
            -right - 1,
            right * float("nan"),
            right.to(torch.complex64),
            right.to_sparse(),
            right.to("meta"),
            torch.zeros(rng.choice(sizes)),
            rng.choice([None, 0.5, "0.5", [1.0], True]),
        ]
    )


def inputs(count: int) -> Iterator[Input]:
    for seed in range(count):
        rng = random.Random(seed)
        if seed % 40 == 0:
            optimizer, states, params = trained(rng.choice(list(OPTIMIZERS)), rng)
        name = rng.choice(list(params))
        key, param, sets = rng.choice(KEYS), params[name], rng.random() < 0.7
        value = value_for(param, rng)
        if sets:
            yield setting(f"seed {seed}: set {key!r} of {name}", optimizer, states, param, key, value)
        else:
            yield Input(
                f"seed {seed}: get {key!r} of {name}",
                lambda states=states, param=param, key=key: states.full(param, key),
                "either" if key in KEYS[:4] else "refuse",
                lambda shown, param=param: None if shown.shape == param.shape else f"shape {tuple(shown.shape)}",
            )


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal, and NaN in the same places: weights and momenta may be set to it."""
    return torch.allclose(one, two, rtol=0, atol=0, equal_nan=True)


def setting(
    label: str, optimizer: BlockwiseOptimizer, states: ParameterStates, param: nn.Parameter, key: object, value: object
) -> Input:
    """What is set must be shown afterwards, and be the only thing that changed."""

    def everything() -> list[torch.Tensor]:
        found = [p.detach().clone() for p in states.parts]
        return found + [v.clone() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]

    def act() -> tuple[torch.Tensor, int]:
        before = everything()
        states.set_full(param, value, key)
        changed = sum(not same(a, b) for a, b in zip(before, everything(), strict=True))
        return states.full(param, key), changed

    def wrong(result: object) -> str | None:
        shown, changed = result
        if changed > 1:
            return f"{changed} tensors changed"
        given = value.detach().to(torch.float64).reshape(shown.shape)
        if key == "exp_avg_sq" and optimizer.shares_second_moment:
            return None if torch.allclose(shown.double().mean(), given.mean(), rtol=1e-4) else "another mean"
        dtype = optimizer.state[param]["exp_avg"].dtype if key == "exp_avg" else shown.dtype
        wanted = given.to(shown.dtype).to(dtype).to(shown.dtype)
        return None if same(shown, wanted) else "another value is shown"

    fits = isinstance(value, torch.Tensor) and value.numel() == param.numel()
    return Input(label, act, "either" if fits and key in ("exp_avg", "exp_avg_sq", None) else "refuse", wrong)


def test_state_of_parameters_is_set_right_or_refused() -> None:
    tally = attack("keys and values for the state of parameters", inputs(number_of_inputs(800)))
    assert tally.accepted > 100 and tally.refused > 100
    tally.keep("parameter_state")
