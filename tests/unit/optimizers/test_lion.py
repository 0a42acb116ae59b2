# SPDX-License-Identifier: Apache-2.0
"""Blockwise Lion on whole tensors: its update, its state, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from ds_blockwise import BlockwiseAdamMini, BlockwiseAdamW, BlockwiseLion, BlockwiseMuon, tag_parameters
from ds_blockwise.kernels.bindings import Work
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from tests.helpers.deepspeed.engine_cases import MODELS
from tests.helpers.oracle import BY_ROLE, Hyper, LionOracle, assert_same_update, told

LR, DECAY, BETAS = 2e-2, 0.1, (0.9, 0.99)
MULTIPLIERS = {"emb": 3.0, "qk": 2.0, "key": 5.0, "ffn": 0.5, "vo": 0.25, "norm": 1.0}


def made(kind: str = "nano", **settings: object) -> tuple[nn.Module, BlockwiseLion]:
    torch.manual_seed(0)
    model = MODELS[kind][0]()
    tag_parameters(model)
    return model, BlockwiseLion(model.parameters(), lr=LR, weight_decay=DECAY, **settings)  # type: ignore[arg-type]


def feed(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("settings", [{}, BY_ROLE], ids=["plain", "by_role"])
@pytest.mark.parametrize("backend", ["cpp", "triton", "reference"])
@pytest.mark.parametrize("kind", ["nano", "qwen3", "gpt2"])
def test_its_update_is_lions_with_the_multipliers_of_block_types(
    kind: str, backend: str, settings: dict[str, object]
) -> None:
    given = {"lr_multipliers": MULTIPLIERS, "weight_decay_multipliers": {"norm": 0.0, "key": 0.5}}
    model, optimizer = made(kind, backend=backend, **given, **settings)
    params = dict(model.named_parameters())
    oracle = LionOracle(
        params,
        MODELS[kind][1],
        False,
        Hyper(LR, BETAS, 0.0, DECAY),
        weight_decay_multipliers=given["weight_decay_multipliers"],
        **told({**given, **settings}),
    )
    for step in range(4):
        before, was = oracle.weights(), {name: param.detach().clone() for name, param in params.items()}
        oracle.step(feed(model, step))
        optimizer.step()
        assert_same_update((was, params), (before, oracle.weights()), LR, weight_roundings=3, what=f"step {step}")
        oracle.set_weights(params)
    counts = 8 * len(params) if backend == "triton" else 0  # of steps, on the device
    assert optimizer.state_bytes() == 4 * sum(param.numel() for param in params.values()) + counts
    assert {optimizer.backend_of(param) for param in params.values()} == {backend}


def test_weights_in_16_bit_are_rounded_once_and_momentum_is_kept_in_fp32() -> None:
    (model, optimizer), (twin, other) = made(), made()
    model.bfloat16()
    with torch.no_grad():
        for param, whole in zip(model.parameters(), twin.parameters(), strict=True):
            whole.copy_(param)
    copies = {param: torch.empty_like(param, dtype=torch.float16) for param in twin.parameters()}
    for param, rounded in copies.items():
        other.write_copy(param, rounded)
    feed(model, 0)
    for param, whole in zip(model.parameters(), twin.parameters(), strict=True):
        assert param.grad is not None
        whole.grad = param.grad.float()
    optimizer.step()
    other.step()
    for param, whole in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(param, whole.bfloat16())
        assert torch.equal(copies[whole], whole.half())
        assert torch.equal(optimizer.state[param]["exp_avg"], other.state[whole]["exp_avg"])


def test_it_goes_on_bit_for_bit_and_takes_the_momentum_of_others() -> None:
    model, optimizer = made()
    feed(model, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    twin, other = made()
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(saved)
    for each, stepped in ((model, optimizer), (twin, other)):
        feed(each, 1)
        stepped.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    adam = BlockwiseAdamW(model.parameters(), lr=LR)
    feed(model, 2)
    adam.step()
    optimizer.load_state_dict(adam.state_dict())
    for param in model.parameters():
        assert torch.equal(optimizer.state[param]["exp_avg"], adam.state[param]["exp_avg"])
        assert "exp_avg_sq" not in optimizer.state[param]
    for cls in (BlockwiseAdamW, BlockwiseAdamMini):
        with pytest.raises(ValueError, match="written by BlockwiseLion, which keeps no second moment"):
            cls(model.parameters(), lr=LR).load_state_dict(saved)


@pytest.mark.parametrize(
    ("backend", "device", "found"),
    [("auto", "cpu", "cpp"), ("triton", "cpu", "triton"), ("reference", "meta", "reference")],
)
def test_it_is_stepped_by_what_was_asked_for(backend: str, device: str, found: str) -> None:
    _, optimizer = made(backend=backend)
    assert optimizer.kernels_on(torch.device(device)).name == found
    assert optimizer.kernels_on(torch.device(device)) is made(backend=backend)[1].kernels_on(torch.device(device))


def test_the_kernel_keeps_updates_that_somebody_reads() -> None:
    found = []
    for backend in ("reference", "cpp"):
        model, optimizer = made(backend=backend)
        optimizer.observe(Reader(found))
        for step in range(2):
            feed(model, step)
            optimizer.step()
    half = len(found) // 2
    assert half == 2 * len(list(model.parameters()))
    for wanted, kept in zip(found[:half], found[half:], strict=True):
        assert torch.equal(wanted, kept) and bool((kept.abs() == 1).all())


class Reader:
    """Looks at every update, as telemetry does at some."""

    def __init__(self, found: list[torch.Tensor]) -> None:
        self.found = found

    def before_update(self, work: Sequence[Work]) -> bool:
        for w in work:
            w.item.keeps_update = True
        return True

    def after_update(self, work: Sequence[Work]) -> None:
        self.found += [w.item.update for w in work if w.item.update is not None]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_multipliers": {"auto": {"total_num_steps": 10**6}}}, r'BlockwiseLion does not support "lr_multipliers"'),
        ({"granularity": {"qk": "haed"}}, "haed"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**settings)  # type: ignore[arg-type]


def test_betas_of_a_block_type_are_those_of_a_run_with_them() -> None:
    """A fused weight holds queries, keys and values: its parts then have momenta of their own."""
    runs = [made(), made(betas=(0.5, 0.7)), made(betas_by_type={"qk": [0.5, 0.7]})]
    for step in range(3):
        for model, optimizer in runs:
            feed(model, step)
            optimizer.step()
    plain, other, mixed = (dict(model.named_parameters()) for model, _ in runs)
    for name, found in mixed.items():
        wanted = plain[name].detach().clone()
        if name.endswith("c_attn.weight"):
            queries_and_keys = 2 * len(wanted) // 3
            wanted[:queries_and_keys] = other[name][:queries_and_keys].detach()
            assert not torch.equal(wanted, plain[name])
        if not name.endswith("c_attn.bias"):
            assert torch.equal(found, wanted), name


@pytest.mark.parametrize("cls", [BlockwiseLion, BlockwiseMuon])
def test_cautious_weight_decay_leaves_out_what_the_update_moves_away_from_zero(cls: type[BlockwiseOptimizer]) -> None:
    torch.manual_seed(0)
    model = MODELS["nano"][0]()
    tag_parameters(model)
    start = copy.deepcopy(model.state_dict())
    results = []
    for decay in (0.0, DECAY):
        model.load_state_dict(start)
        settings = {"weight_decay": decay, "cautious_weight_decay": True, "lr_multipliers": "uniform"}
        optimizer = cls(model.parameters(), lr=LR, **settings)  # type: ignore[arg-type]
        feed(model, 5)  # 0 gives the weights
        optimizer.step()
        results.append({name: param.detach().clone() for name, param in model.named_parameters()})
    for name, without in results[0].items():
        before = start[name]
        grows = (before - without) * before < 0
        wanted = without - torch.where(grows, 0.0, LR * DECAY * before)
        assert 0 < int(grows.sum()) < grows.numel() or "ln_" in name or "bias" in name
        torch.testing.assert_close(results[1][name], wanted, rtol=1e-5, atol=1e-6)
