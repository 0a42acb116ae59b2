# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed's state API shows and sets on every rank of a real engine, against the oracle on whole tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers import models
from tests.helpers.deepspeed.compared import set_lr
from tests.helpers.deepspeed.engines import masters
from tests.helpers.models import GradientPlan
from tests.helpers.oracle import Oracle, State, Weights, assert_same_update

MOMENTS = ("exp_avg", "exp_avg_sq")
STEPS = 2


@dataclass
class Engine:
    """An engine and how it is fed.

    Attributes:
        run: the engine.
        oracle: on whole tensors, at the engine's start.
        plan: of the gradients.
        shapes: of whole parameters by name.
        feed: takes the optimizer step of a number.
        local: this tensor-parallel rank's part of a whole tensor, by name.
        read: the fp32 weights of this tensor-parallel rank.
    """

    run: SimpleNamespace
    oracle: Oracle
    plan: GradientPlan
    shapes: dict[str, tuple[int, ...]]
    feed: Callable[[int], object]
    local: Callable[[str, Tensor], Tensor] = lambda name, whole: whole
    read: Callable[[SimpleNamespace], dict[str, Tensor]] = masters

    def trained(self) -> dict[str, nn.Parameter]:
        return {self.run.names[id(p)]: p for p in self.run.model.parameters() if p.requires_grad}

    def step(self, number: int) -> None:
        lr = set_lr(self.run, number)
        hyper = self.oracle.hyper
        own = hyper if isinstance(hyper, dict) else {"": hyper}
        for settings in own.values():
            settings.lr = lr
        self.feed(number)
        self.oracle.step({n: self.plan.mean(n, self.shapes[n], number) for n in self.trained()})

    def tolerance(self) -> float:
        return 1e-6 if self.oracle.momentum is None else 2.0**-8


def check_all(engine: Engine) -> None:
    """Nothing before the first step, then values, then values that were set, and a step with these."""
    from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

    for param in engine.trained().values():
        for key in (*MOMENTS, "step"):
            with pytest.raises(ValueError, match=r"no optimizer state of parameter '.*' yet"):
                safe_get_full_optimizer_state(param, key)
    param = next(iter(engine.trained().values()))
    with pytest.raises(ValueError, match="no optimizer state"):
        safe_set_full_optimizer_state(param, torch.zeros(_shape(param)), "exp_avg_sq")
    for number in range(STEPS):
        engine.step(number)
    check_shown(engine)
    check_frozen(engine)
    check_refusals(engine)
    check_set(engine)


def check_shown(engine: Engine) -> None:
    """Every rank sees the oracle's moments, in the shape of the parameter, and the fp32 weight."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    weights = engine.read(engine.run)
    for name, param in engine.trained().items():
        state = engine.oracle.state[name]
        wanted = {"exp_avg": state.m, "exp_avg_sq": state.v, "step": torch.full_like(state.m, state.step)}
        for key, whole in wanted.items():
            _compare(engine, name, key, safe_get_full_optimizer_state(param, key), whole)
        if name in weights:
            assert torch.equal(safe_get_full_fp32_param(param), weights[name]), name
        if hasattr(param, "ds_id"):
            check_local(name, param)


def check_local(name: str, param: nn.Parameter) -> None:
    """ZeRO-3's piece of a parameter is its part of the whole, and zeros where it is padded."""
    from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

    for key in (*MOMENTS, "step"):
        whole = safe_get_full_optimizer_state(param, key).flatten()
        piece = safe_get_local_optimizer_state(param, key)
        assert torch.equal(piece, _piece(param, whole)), f"{key} of {name}"


def check_frozen(engine: Engine) -> None:
    """As DeepSpeed: nothing is kept of a frozen parameter, and nothing is set."""
    from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

    for param in engine.run.model.parameters():
        if not param.requires_grad:
            assert safe_get_full_optimizer_state(param, "exp_avg_sq") is None
            safe_set_full_optimizer_state(param, torch.ones(_shape(param)), "exp_avg_sq")


def check_refusals(engine: Engine) -> None:
    """What cannot be shown or set is refused on all ranks, and changes nothing."""
    from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_fp32_param, safe_set_full_optimizer_state

    param = max(engine.trained().values(), key=lambda p: _numel(p))
    fits, short = torch.ones(_shape(param)), torch.ones(_numel(param) - 1)
    with pytest.raises(ValueError, match=r"keeps 'step', 'exp_avg', 'exp_avg_sq' of a parameter, but no 'momentum'"):
        safe_get_full_optimizer_state(param, "momentum")
    with pytest.raises(ValueError, match="but no 'momentum'"):
        safe_set_full_optimizer_state(param, fits, "momentum")
    with pytest.raises(ValueError, match="cannot be set for one"):
        safe_set_full_optimizer_state(param, fits, "step")
    for key in MOMENTS:
        with pytest.raises(ValueError, match=rf"{key} of parameter .* must be set to a tensor of {_numel(param)} ele"):
            safe_set_full_optimizer_state(param, short, key)
    with pytest.raises(ValueError, match="weight of parameter"):
        safe_set_full_fp32_param(param, short)
    if engine.oracle.mini:
        check_refused_by_one(engine, param, fits, short)
    check_shown(engine)


def check_refused_by_one(engine: Engine, param: nn.Parameter, fits: Tensor, short: Tensor) -> None:
    """A value that fits on rank 0 only is refused on the ranks that share the parameter."""
    from deepspeed.utils import safe_set_full_optimizer_state

    binding = next(iter(engine.run.engine.basic_optimizer.bindings()))
    if binding.groups.dp_group is None and binding.groups.tp_group is None:
        return
    message = "was not set: another rank" if dist.get_rank() == 0 else "must be set to a tensor of"
    with pytest.raises(ValueError, match=message):
        safe_set_full_optimizer_state(param, fits if dist.get_rank() == 0 else short, "exp_avg_sq")


def check_set(engine: Engine) -> None:
    """Set values are shown, second moments as means over their blocks, and the next step goes on from them."""
    from deepspeed.utils import (
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    weights, moments = {}, {}
    for index, (name, param) in enumerate(engine.trained().items()):
        new = {key: _new(name, key, engine.shapes[name]) for key in (*MOMENTS, "weight")}
        given = {key: engine.local(name, value) for key, value in new.items()}
        if hasattr(param, "ds_id") and index % 2:
            safe_set_local_fp32_param(param, _piece(param, given["weight"].flatten()))
            for key in MOMENTS:
                safe_set_local_optimizer_state(param, _piece(param, given[key].flatten()), key)
        else:
            safe_set_full_fp32_param(param, given["weight"])
            for key in MOMENTS:
                safe_set_full_optimizer_state(param, given[key], key)
        weights[name] = new["weight"]
        moments[name] = State(new["exp_avg"], new["exp_avg_sq"], STEPS)
    engine.oracle.set_weights(weights)
    engine.oracle.take_over(moments)
    check_shown(engine)
    before, was = engine.read(engine.run), engine.oracle.weights()
    engine.step(STEPS)
    after, now = engine.read(engine.run), engine.oracle.weights()
    assert_same_update(
        (before, after), (_held(engine, was), _held(engine, now)), set_lr(engine.run, STEPS),
        tolerance=engine.tolerance(), weight_roundings=2, what="the step after setting",
    )  # fmt: skip
    for name, param in engine.trained().items():
        shown = safe_get_full_optimizer_state(param, "exp_avg_sq")
        _compare(engine, name, "exp_avg_sq", shown, engine.oracle.state[name].v)


def check_gradients(engine: Engine, number: int) -> None:
    """Between backward and step: gradients are shown, set and updated, also where ZeRO-3 pads a parameter's pieces."""
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad, safe_update_full_grad_vectorized

    run, rank = engine.run, dist.get_rank()
    run.feed.gradients = {n: engine.plan.share(n, engine.shapes[n], number, rank) for n in engine.trained()}
    run.engine.backward(run.engine())
    for name, param in engine.trained().items():
        wanted = engine.plan.mean(name, engine.shapes[name], number)
        assert torch.equal(safe_get_full_grad(param).float(), wanted.to(safe_get_full_grad(param).dtype).float()), name
        safe_set_full_grad(param, 2 * wanted)
        assert torch.equal(safe_get_full_grad(param).float(), 2 * wanted), name
    safe_update_full_grad_vectorized(list(engine.trained().values()), lambda gradient, _: gradient / 4)
    for name, param in engine.trained().items():
        wanted = engine.plan.mean(name, engine.shapes[name], number)
        assert torch.equal(safe_get_full_grad(param).float(), wanted / 2), name
    run.engine.step()


def _compare(engine: Engine, name: str, key: str, shown: Tensor, whole: Tensor) -> None:
    wanted = engine.local(name, whole)
    assert shown.shape == wanted.shape and shown.dtype == torch.float32, (name, key, shown.shape, shown.dtype)
    error = (shown.double() - wanted).abs().max() if wanted.numel() else torch.zeros(())
    largest = whole.abs().max()
    limit = engine.tolerance() if key == "exp_avg" else 1e-6
    assert error <= limit * largest, f"{key} of {name}: off by {error:.1e} of {largest:.1e}"


def _held(engine: Engine, whole: Weights) -> dict[str, Tensor]:
    parts = {name: engine.local(name, weight) for name, weight in whole.items()}
    return {name: part for name, part in parts.items() if part.numel()}


def _new(name: str, key: str, shape: tuple[int, ...]) -> Tensor:
    value = models.small_weight(f"{key} of {name}", shape)
    # as large as the moments of the planned gradients, and a second moment above zero
    return value if key == "weight" else value.abs() + 1e-3 if key == "exp_avg_sq" else value.bfloat16().float()


def _piece(param: nn.Parameter, whole: Tensor) -> Tensor:
    numel, rank = param.partition_numel(), dist.get_rank(param.ds_process_group)  # type: ignore[attr-defined]
    padded = nn.functional.pad(whole, (0, numel * dist.get_world_size(param.ds_process_group) - whole.numel()))  # type: ignore[attr-defined]
    return padded[rank * numel : (rank + 1) * numel]


def _shape(param: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(param, "ds_shape", param.shape))


def _numel(param: nn.Parameter) -> int:
    return int(getattr(param, "ds_numel", param.numel()))
