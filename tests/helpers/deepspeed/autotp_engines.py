# SPDX-License-Identifier: Apache-2.0
"""Engines that AutoTP splits, fed with gradients of the unsharded parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import models
from tests.helpers.deepspeed.autotp_models import MODELS, cut, shapes_of, small
from tests.helpers.deepspeed.compared import case_config
from tests.helpers.deepspeed.engine_cases import betas_of
from tests.helpers.deepspeed.engines import feed_step, masters, open_engine
from tests.helpers.models import Feed, GradientPlan

DECAY_MULTIPLIERS = {"norm": 0.0, "value": 0.5}


@dataclass(frozen=True)
class Case:
    """An HF model on some tensor-parallel ranks; the rest of the world is data-parallel."""

    optimizer: str = "mini"
    stage: int = 1
    dtype: str = "fp32"
    model: str = "qwen3"
    tp: int = 2
    clip: float = 0.0
    steps: int = 3
    config: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)  # of the optimizer
    granularity: dict[str, str] = field(default_factory=dict)
    oracle_multipliers: dict[str, float] = field(default_factory=dict)
    zero_init: bool = False
    backend: str = "cpp"


def config_of(case: Case) -> dict[str, Any]:
    """The DeepSpeed JSON of a case."""
    parallel = {"tensor_parallel": {"autotp_size": case.tp, **MODELS[case.model].tp}} if case.tp > 1 else {}
    params = {
        "weight_decay_multipliers": DECAY_MULTIPLIERS,
        "granularity": case.granularity,
        "backend": case.backend,
        "betas": list(betas_of(case.optimizer)),
        **case.params,
    }
    clip = {"gradient_clipping": case.clip} if case.clip else {}
    return case_config(case, params=params, zero=dict(case.zero), **clip, **parallel)


@contextmanager
def engine_of(context: Any, case: Case, *, feed: bool = True) -> Iterator[SimpleNamespace]:
    """An engine after AutoTP; AutoTP replaces modules, so names and the feed are taken from what it leaves."""
    config = config_of(case)
    shapes = shapes_of(case.model)  # imports the model's file, which zero.Init must not see
    with open_engine(config, lambda: _build(case, config), feed=False) as run:
        run.model = run.engine.module
        run.names = {id(p): name for name, p in run.model.named_parameters()}
        run.feed = Feed(run.model) if feed else None
        run.tp, run.tp_rank, run.dp_rank = case.tp, context.rank % case.tp, context.rank // case.tp
        run.shapes, run.cut_over_all = shapes, case.zero_init
        run.cut = partial(cut, case.model, size=case.tp)
        yield run


def _build(case: Case, config: dict[str, Any]) -> nn.Module:
    if not case.zero_init:
        return small(case.model)
    import deepspeed
    from torch import _dynamo  # noqa: F401 - cannot be imported while zero.Init replaces tensor constructors

    with deepspeed.zero.Init(config_dict_or_path=config):
        model = MODELS[case.model].build()
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(models.small_weight(name, parameter.ds_shape))
    return model


def held(run: SimpleNamespace) -> dict[str, Tensor]:
    """fp32 weights of which this tensor-parallel rank holds anything."""
    return {name: weight for name, weight in masters(run).items() if weight.numel()}


def feed(run: SimpleNamespace, plan: GradientPlan, step: int) -> None:
    """One optimizer step on this rank's part of the planned gradients."""

    def part(name: str, whole: Tensor) -> Tensor:
        return run.cut(name, whole, run.tp_rank, gradient=True)

    feed_step(run, plan, step, run.dp_rank, shapes=run.shapes, cut=part)
