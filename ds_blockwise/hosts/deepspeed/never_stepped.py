# SPDX-License-Identifier: Apache-2.0
"""Engines that are never stepped: reference and reward models that share the JSON of the model that is trained.

Two kinds. A frozen model has nothing to train, which is known at once. A model in evaluation mode may be trained after
all; if that is impossible, it is refused when training begins. Checked with DeepSpeed 0.19.8.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from ds_blockwise.hosts.deepspeed.checkpoint.load import guard, load_checkpoint
from ds_blockwise.hosts.deepspeed.checks import refuse_empty_in_forward
from ds_blockwise.hosts.deepspeed.engine import Engine, FrozenEngineOptimizer, Loaded, set_optimizers, whole_numel
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.parallel.agree import gather, is_first_rank

logger = logging.getLogger(__name__)


def trains_nothing(engine: Engine) -> bool:
    """Collective over all ranks: whether no parameter of the model is trained, on any rank."""
    return not any(gather(any(p.requires_grad and whole_numel(p) for p in engine.module.parameters())))


def configure_frozen(
    engine: Engine, client_optimizer: BlockwiseOptimizer | None, model_parameters: Iterable[object] | None
) -> None:
    """Configure an engine with ZeRO that trains nothing; DeepSpeed's own way fails in its empty flat buffers.

    ZeRO-3 cuts and gathers the weights as for an engine without an optimizer. Below it nothing is left of ZeRO.

    Args:
        engine: a ``DeepSpeedEngine`` in ``_configure_optimizer``.
        client_optimizer: one of ours; None if the JSON names it.
        model_parameters: what it is built of then.
    """
    optimizer = client_optimizer or engine._configure_basic_optimizer(model_parameters)
    if engine.zero_optimization_partition_weights():
        wrapper: FrozenEngineOptimizer = engine._configure_zero_optimizer(None)
        # where schedules and ``get_lr`` look for them
        wrapper.optimizer, wrapper.param_groups = optimizer, optimizer.param_groups
        set_optimizers(engine, optimizer, wrapper)
    else:
        set_optimizers(engine, optimizer, optimizer)
    refuse_empty_in_forward(engine)
    _refuse(
        engine,
        optimizer,
        f"every parameter of this engine's model was frozen when deepspeed.initialize built it, so "
        f"{type(optimizer).__name__} has nothing to step and no state. To train it, unfreeze parameters before "
        f"deepspeed.initialize and build a new engine; to save its weights use engine.save_16bit_model, or the "
        f"model's own method.",
    )


def refuse_when_trained(engine: Engine, optimizer: BlockwiseOptimizer, reason: str) -> None:
    """Refuse an engine in evaluation mode: by its first backward, step or checkpoint, on every rank.

    Args:
        engine: a ``DeepSpeedEngine``.
        optimizer: its basic optimizer.
        reason: what is wrong, the same on every rank.
    """
    if is_first_rank():
        logger.warning(
            "%s cannot train this engine's model. It is in evaluation mode and may never be trained, so this is an "
            "error only if it is:\n%s",
            type(optimizer).__name__,
            reason,
        )
    _refuse(engine, optimizer, reason)


def _refuse(engine: Engine, optimizer: BlockwiseOptimizer, reason: str) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise ValueError(reason)

    guard(engine)
    optimizer.refuse_to_step(reason)  # also where neither is called: a pipeline
    for name in ("backward", "step", "save_checkpoint"):
        setattr(engine, name, refuse)
    engine.load_checkpoint = functools.partial(_load_weights, engine, reason)


def _load_weights(
    engine: Engine,
    reason: str,
    load_dir: str | Path,
    tag: str | None = None,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: object = None,
) -> Loaded:
    """`load_checkpoint` of an engine that has no optimizer state."""
    if load_optimizer_states and not load_module_only:
        raise ValueError(f"{reason}\nNo optimizer state can be loaded. The weights alone load: load_module_only=True.")
    return load_checkpoint(
        engine,
        load_dir,
        tag,
        load_module_strict,
        load_optimizer_states,
        load_lr_scheduler_states,
        load_module_only,
        custom_load_fn,
    )
