# SPDX-License-Identifier: Apache-2.0
"""Engines with guarded checkpoints, what they hold, and what they say when something is wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.deepspeed.engine_cases import Case, build, config_of, groups_of
from tests.helpers.deepspeed.engines import feed_step, masters, model_weights, open_engine
from tests.helpers.distributed import RankContext
from tests.helpers.models import GradientPlan


@contextmanager
def engine_of(case: Case | dict[str, Any]) -> Iterator[SimpleNamespace]:
    """An engine whose checkpoints are guarded, of a case or of a plain JSON (then with any optimizer)."""
    from ds_blockwise.hosts.deepspeed.checkpoint.load import guard

    ours = isinstance(case, Case)
    config = config_of(case) if ours else case
    build_case = case if ours else Case(model="nano")
    with open_engine(config, lambda: build(build_case, config), groups=groups_of(build_case)) as run:
        guard(run.engine)
        yield run


def train(run: SimpleNamespace, context: RankContext, *steps: int) -> None:
    for step in steps:
        feed_step(run, GradientPlan(context.world_size, 1, torch.float32), step, context.rank)


def nano(stage: int, optimizer: str = "mini", **changes: Any) -> Case:
    return Case(optimizer, stage, model="nano", decay_multipliers=False, **changes)


def everything(run: SimpleNamespace) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of this rank, as numbers that must not change."""
    found = {f"master {k}": v for k, v in masters(run).items()} | {
        f"model {k}": v for k, v in model_weights(run).items()
    }
    for index, state in enumerate(run.engine.basic_optimizer.state.values()):
        found |= {f"state {index} {k}": torch.as_tensor(v).clone() for k, v in state.items()}
    return found


def raised(call: Callable[[], Any], kind: type[Exception]) -> str:
    """Text of the error that this rank gets; the case's time limit catches a rank that waits."""
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


@contextmanager
def warnings_of(name: str) -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
