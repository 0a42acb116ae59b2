# SPDX-License-Identifier: Apache-2.0
"""The oracle against outside implementations, and the library on whole tensors against all three.

No host is involved: what fails here is the optimizer itself, not a partition.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_blockwise
from ds_blockwise import tag_parameters
from tests.helpers import models
from tests.helpers.deepspeed.engine_cases import MODELS
from tests.helpers.models import GradientPlan
from tests.helpers.optimizers import SHORT_NAMES
from tests.helpers.oracle import Hyper, Oracle, assert_same_update
from tests.helpers.tables.oracle_names import BLOCK_TYPE, MULTIPLIERS, ROLE, Span, regroup

LRS = (0.014, 0.022, 0.018, 0.028)  # must change, or an lr read at construction would pass
PLAN = GradientPlan(1)
OURS = {short: getattr(ds_blockwise, name) for name, short in SHORT_NAMES.items()}
HYPER = {"betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
FAMILIES = pytest.mark.parametrize("family", MODELS)
OPTIMIZERS = pytest.mark.parametrize("kind", OURS)


def _model(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return models.set_small_weights(MODELS[family][0]()).to(dtype)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    return {n: PLAN.mean(n, tuple(p.shape), step) for n, p in model.named_parameters()}


def _oracle(family: str, kind: str, model: nn.Module, **settings: Any) -> Oracle:
    return Oracle(_weights(model), MODELS[family][1], kind == "mini", Hyper(**HYPER), **settings)


def _run(model: nn.Module, optimizer: torch.optim.Optimizer, oracle: Oracle, *, tolerance: float = 1e-6) -> None:
    """Step both on the same gradients and compare every update."""
    for step, lr in enumerate(LRS):
        gradients = _gradients(model, step)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].to(parameter)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("multiplier", 1)
        oracle.hyper.lr = lr
        before, was = _weights(model), oracle.weights()
        optimizer.step()
        oracle.step(gradients)
        after = _weights(model), oracle.weights()
        assert_same_update((before, after[0]), (was, after[1]), lr, tolerance=tolerance, what=f"step {step}")


# ---------------------------------------------------------------- the oracle, against the outside


def _torch_adamw(family: str, model: nn.Module, decay: dict[str, float]) -> torch.optim.AdamW:
    """torch's AdamW the way users do it today: one param group for each block type."""
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        (block_type,) = {BLOCK_TYPE[s.role] for s in MODELS[family][1][name].spans}
        group = groups.setdefault(
            block_type,
            {
                "params": [],
                "multiplier": MULTIPLIERS[block_type],
                "weight_decay": HYPER["weight_decay"] * decay.get(block_type, 1.0),
            },
        )
        group["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), lr=1.0, **HYPER)


def _published_adam_mini(model: nn.Module, head_numel: int, weight_decay: float):
    """The published package; it wants one size for all heads and never decays norms."""
    adam_mini = pytest.importorskip("adam_mini", reason="the published package is an extra: dev")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = adam_mini.Adam_mini(
            model.named_parameters(), lr=1e-3, betas=HYPER["betas"], eps=HYPER["eps"],
            weight_decay=weight_decay, dim=12, n_heads=2, verbose=False,
        )  # fmt: skip
    optimizer.head_numel = head_numel
    return optimizer


UNIT = {key: 1 for key in MULTIPLIERS}
HEAD_NUMEL = {"llama": 6 * 12, "qwen3": 6 * 15}


@pytest.mark.parametrize("decay", [{}, {"norm": 0.0, "emb": 0.5}], ids=["all", "per_type"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_oracle_is_torch_adamw(family: str, decay: dict[str, float]) -> None:
    """The yardstick of every parity test would itself not be AdamW with a lr per block type."""
    model = _model(family, torch.float64)
    oracle = _oracle(family, "adamw", model, weight_decay_multipliers=decay)
    _run(model, _torch_adamw(family, model, decay), oracle, tolerance=1e-12)


@pytest.mark.parametrize("family", HEAD_NUMEL)
def test_oracle_is_published_adam_mini(family: str) -> None:
    """The yardstick would cut heads, rows and vectors otherwise than the published Adam-mini."""
    model = _model(family, torch.float64)
    decay = 0.0 if family == "qwen3" else HYPER["weight_decay"]  # the package never decays biases
    published = _published_adam_mini(model, HEAD_NUMEL[family], decay)
    unit = {"lr_multipliers": UNIT, "weight_decay_multipliers": {"norm": 0.0}}
    oracle = _oracle(family, "mini", model, **unit)
    oracle = replace(oracle, classes=regroup(oracle.classes, "norm", ROLE))
    oracle.hyper.weight_decay = decay
    _run(model, published, oracle, tolerance=1e-12)


def test_oracle_fp32_arithmetic() -> None:
    """fp32 and fp64 oracle would differ by more than rounding: one of them has another formula."""
    model = _model("qwen3")
    exact, rounded = (_oracle("qwen3", "mini", model, arithmetic=d) for d in (torch.float64, torch.float32))
    for step, lr in enumerate(LRS):
        exact.hyper.lr = rounded.hyper.lr = lr
        was = rounded.weights(), exact.weights()
        exact.step(_gradients(model, step))
        rounded.step(_gradients(model, step))
        assert_same_update((was[0], rounded.weights()), (was[1], exact.weights()), lr)


def _shifted(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    """Move the first border between two roles down by one row."""
    if len(spans) < 2:
        return spans
    first, second, *rest = spans
    return (replace(first, end=first.end + 1), replace(second, start=second.start + 1), *rest)


MUTANTS = {
    "beta2": lambda o: replace(o.hyper, betas=(0.9, 0.951)),
    "eps": lambda o: replace(o.hyper, eps=2e-6),
    "weight_decay": lambda o: replace(o.hyper, weight_decay=0.1001),
}


@pytest.mark.parametrize("mutant", [*MUTANTS, "head_size", "border", "role", "whole_norm"])
def test_comparison_notices(mutant: str) -> None:
    """The comparison would be blind to a small error, and every green test with it."""
    model = _model("nano")
    oracle, wrong = _oracle("nano", "mini", model), _oracle("nano", "mini", model)
    if mutant in MUTANTS:
        wrong.hyper = MUTANTS[mutant](wrong)
    elif mutant == "role":
        wrong.lr_multipliers = {"key": 8.0001}
    else:
        classes = {
            "head_size": regroup(wrong.classes, "query", 1),
            "border": {n: replace(c, spans=_shifted(c.spans)) for n, c in wrong.classes.items()},
            "whole_norm": regroup(wrong.classes, "norm", ROLE),
        }[mutant]
        wrong = replace(wrong, classes=classes)
    start = oracle.weights()
    for step in range(2):
        oracle.step(_gradients(model, step))
        wrong.step(_gradients(model, step))
    with pytest.raises(AssertionError, match="off by more than"):
        assert_same_update((start, wrong.weights()), (start, oracle.weights()), LRS[0])


# --------------------------------------------------------------------- the library, whole tensors


def _ours(model: nn.Module, kind: str, **settings: Any) -> torch.optim.Optimizer:
    tag_parameters(model)
    return OURS[kind](model.parameters(), lr=1.0, **{**HYPER, **settings})


SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "decay": {"weight_decay_multipliers": {"norm": 0.0, "qk": 0.5, "value": 2.0}},
    "multipliers": {"lr_multipliers": {"emb": 3, "key": 0.25, "vo": 0, "output": 1.5}},
}


@FAMILIES
@OPTIMIZERS
@pytest.mark.parametrize("settings", SETTINGS)
def test_library_matches_oracle(family: str, kind: str, settings: str) -> None:
    """A plain PyTorch user would get wrong blocks, multipliers or decay from the optimizer."""
    model = _model(family)
    chosen = SETTINGS[settings]
    _run(model, _ours(model, kind, **chosen), _oracle(family, kind, model, **chosen))


@OPTIMIZERS
def test_library_fp64_matches_oracle(kind: str) -> None:
    """A systematic error below 1e-6 would hide in the rounding of every fp32 test."""
    model = _model("qwen3", torch.float64)
    _run(model, _ours(model, kind), _oracle("qwen3", kind, model), tolerance=1e-12)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_library_matches_torch_adamw(family: str) -> None:
    """A user who moves from per-type param groups to one group would not repeat the old run."""
    ours, theirs = _model(family), _model(family)
    optimizer, outside = _ours(ours, "adamw"), _torch_adamw(family, theirs, {})
    for step, lr in enumerate(LRS):
        for model in (ours, theirs):
            for name, parameter in model.named_parameters():
                parameter.grad = PLAN.mean(name, tuple(parameter.shape), step)
        for group in (*optimizer.param_groups, *outside.param_groups):
            group["lr"] = lr * group.get("multiplier", 1)
        was = _weights(ours), _weights(theirs)
        optimizer.step()
        outside.step()
        # One fp32 weight rounds differently from another: two roundings on each of the two sides.
        pairs = (was[0], _weights(ours)), (was[1], _weights(theirs))
        assert_same_update(*pairs, lr, weight_roundings=4, what=f"step {step}")


@pytest.mark.parametrize("family", HEAD_NUMEL)
def test_library_matches_published_adam_mini(family: str) -> None:
    """A user who moves from the published Adam-mini (multipliers 1, its partition) would get another optimizer."""
    ours, theirs = _model(family, torch.float64), _model(family, torch.float64)
    settings = {"lr_multipliers": UNIT, "weight_decay": 0.0, "granularity": "published"}
    optimizer = _ours(ours, "mini", **settings)
    outside = _published_adam_mini(theirs, HEAD_NUMEL[family], 0.0)
    for step, lr in enumerate(LRS):
        for model, stepper in ((ours, optimizer), (theirs, outside)):
            for name, parameter in model.named_parameters():
                parameter.grad = PLAN.mean(name, tuple(parameter.shape), step).double()
            for group in stepper.param_groups:
                group["lr"] = lr
        was = _weights(ours), _weights(theirs)
        optimizer.step()
        outside.step()
        pairs = (was[0], _weights(ours)), (was[1], _weights(theirs))
        assert_same_update(*pairs, lr, tolerance=1e-12, what=f"step {step}")


@OPTIMIZERS
def test_bf16_parameters_round_once(kind: str) -> None:
    """bf16 parameters would be decayed and updated in bf16, losing most small updates."""
    model = _model("qwen3", torch.bfloat16)
    optimizer, oracle = _ours(model, kind), _oracle("qwen3", kind, model)
    for step, lr in enumerate(LRS):
        gradients = {n: g.bfloat16() for n, g in _gradients(model, step).items()}
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        optimizer.param_groups[0]["lr"] = oracle.hyper.lr = lr
        oracle.set_weights(_weights(model))  # both start the step from the same bf16 weights
        optimizer.step()
        oracle.step(gradients)
        for name, exact in oracle.weights().items():
            stored = dict(model.named_parameters())[name].detach()
            # bf16 keeps 8 bits: the nearest one is within 2^-9 of the power of two above |exact|.
            half_ulp = torch.exp2(torch.floor(torch.log2(exact.abs())) - 8)
            error = (stored.double() - exact).abs()
            assert bool((error <= half_ulp + 1e-5 * lr).all()), f"step {step}: {name}"


@OPTIMIZERS
def test_bf16_momentum(kind: str) -> None:
    """momentum_dtype bf16 would round the update too, or not save the memory it promises."""
    model = _model("llama")
    optimizer = _ours(model, kind, momentum_dtype="bf16")
    oracle = _oracle("llama", kind, model, momentum=torch.bfloat16)
    # The stored momentum may fall on the other side of a rounding border: 2^-9 of one update.
    _run(model, optimizer, oracle, tolerance=2.0**-9)
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.bfloat16}
    exact = _model("llama")
    with pytest.raises(AssertionError, match="off by more than"):
        _run(exact, _ours(exact, kind), _oracle("llama", kind, exact, momentum=torch.bfloat16))


@OPTIMIZERS
def test_param_groups(kind: str) -> None:
    """Groups' own lr, betas, eps or weight decay would be ignored or leak into each other."""
    model = _model("nano")
    tag_parameters(model)
    special = [n for n, _ in model.named_parameters() if "ln_" in n or "c_attn" in n]
    named = dict(model.named_parameters())
    other = {"betas": (0.8, 0.9), "eps": 1e-5, "weight_decay": 0.02}
    optimizer = OURS[kind]([p for n, p in named.items() if n not in special], lr=1.0, **HYPER)
    optimizer.add_param_group({"params": [named[n] for n in special], "lr": 1.0, **other})
    oracle = _oracle("nano", kind, model)
    for step, lr in enumerate(LRS):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr, 0.3 * lr
        first, second = Hyper(lr, **HYPER), Hyper(0.3 * lr, **other)
        oracle.hyper = {n: second if n in special else first for n in named}
        for name, parameter in named.items():
            parameter.grad = PLAN.mean(name, tuple(parameter.shape), step)
        was = _weights(model), oracle.weights()
        optimizer.step()
        oracle.step(_gradients(model, step))
        assert_same_update((was[0], _weights(model)), (was[1], oracle.weights()), lr)


@OPTIMIZERS
def test_missing_gradient_leaves_parameter_alone(kind: str) -> None:
    """A layer that is off for one step would be decayed, and its bias correction would drift."""
    model = _model("llama")
    optimizer, oracle = _ours(model, kind), _oracle("llama", kind, model)
    optimizer.param_groups[0]["lr"] = oracle.hyper.lr
    off = "model.layers.1.self_attn.k_proj.weight"
    for step, missing in enumerate((set(), {off}, set())):
        gradients = {n: g for n, g in _gradients(model, step).items() if n not in missing}
        for name, parameter in model.named_parameters():
            parameter.grad = gradients.get(name)
        was = _weights(model), oracle.weights()
        optimizer.step()
        oracle.step(gradients)
        now = _weights(model)
        assert_same_update((was[0], now), (was[1], oracle.weights()), oracle.hyper.lr)
        assert not missing or torch.equal(was[0][off], now[off])


@FAMILIES
@pytest.mark.parametrize(
    ("granularity", "changes"),
    [
        ({"value": "tensor"}, {"value": ROLE}),
        ({"vo": "tensor", "value": "row"}, {"attn_out": ROLE}),
        ({"qk": "row", "key": "element", "emb": "tensor"}, {"query": 1, "key": 0, "embedding": ROLE}),
        ({"ffn": "element", "norm": "row"}, {"ffn": 0, "norm": 0}),
        ("published", {"norm": ROLE}),
        ({"bias": "tensor"}, {"bias": ROLE}),
    ],
    ids=["value_tensor", "role_wins", "attention", "element", "published", "bias_tensor"],
)
def test_granularity(family: str, granularity: dict[str, str] | str, changes: dict[str, int]) -> None:
    """The partition a user chose (one block for V in short runs) would not be the one used."""
    model = _model(family)
    optimizer = _ours(model, "mini", granularity=granularity)
    oracle = _oracle(family, "mini", model)
    classes = oracle.classes
    for role, size in changes.items():
        classes = regroup(classes, role, size)
    _run(model, optimizer, replace(oracle, classes=classes))
