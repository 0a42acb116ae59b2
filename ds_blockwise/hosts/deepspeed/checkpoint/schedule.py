# SPDX-License-Identifier: Apache-2.0
"""Brings an engine's schedule to the position of a checkpoint, or back if another part of the load is refused.

DeepSpeed loads the schedule after the weights, and fails there on a checkpoint without one. Here it comes first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from ds_blockwise.hosts.deepspeed.engine import Engine, Schedule
from ds_blockwise.kernels.param_groups import SCHEDULED
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.schedules.schedule import BlockwiseLR
from ds_blockwise.parallel.agree import first_error, is_first_rank

logger = logging.getLogger(__name__)

_FRESH = "load_lr_scheduler_states=False begins the schedule anew"
Undo = Callable[[], None]


def load_schedule(engine: Engine, saved: Mapping[str, object] | None, updates: int) -> Undo:
    """Load the schedule of an engine that has one; a collective over all ranks.

    Args:
        engine: the engine; its schedule may be ours, DeepSpeed's, or any of torch's.
        saved: the saved schedule's state; None if that run had none. Then a schedule that counts updates begins after
            those of the saved run, as if it had been there from the start.
        updates: made by the saved run.

    Returns:
        What brings the schedule and the learning rates back.

    Raises:
        ValueError: on every rank, with nothing changed: the state is of another kind of schedule.
    """
    schedule = engine.lr_scheduler
    if schedule is None:
        return lambda: None
    groups = _groups_of(engine)
    # not load_state_dict, with which ours may begin to warm up anew
    before, rates = dict(vars(schedule)), [_rates(group) for group in groups]

    def undo() -> None:
        vars(schedule).clear()
        vars(schedule).update(before)
        for group, rate in zip(groups, rates, strict=True):
            group.update(rate)

    message = first_error(_load(schedule, saved, updates, groups))
    if message is not None:
        undo()
        raise ValueError(message)
    return undo


def _load(schedule: Schedule, saved: object, updates: int, groups: Sequence[MutableMapping[str, Any]]) -> str | None:
    """What speaks against it; None once the schedule is there."""
    name = type(schedule).__name__
    if saved is None:
        if not _counts_updates(schedule):
            return (
                f"the checkpoint has no schedule, but this engine has {name}, whose position cannot be computed from "
                f"the number of updates. {_FRESH}. Nothing was loaded."
            )
        saved = {"last_batch_iteration": updates - 1}
        if is_first_rank():
            logger.warning(
                "the checkpoint has no schedule: %s begins after its %d updates, as if it had been there from the "
                "start (%s)",
                name,
                updates,
                _FRESH,
            )
    try:
        if not isinstance(saved, Mapping):
            raise ValueError(f"it is a {type(saved).__name__}")
        schedule.load_state_dict(saved)
        if not all(math.isfinite(group["lr"]) for group in groups):
            raise ValueError("it leads to a learning rate that is not finite")
    except Exception as error:  # a schedule of another class raises whatever it likes
        return (
            f"{name} cannot take in the saved schedule's state ({type(error).__name__}: {error}). Use the schedule "
            f"that it was trained with; {_FRESH}. Nothing was loaded."
        )
    return None


def _counts_updates(schedule: Schedule) -> bool:
    """Whether a schedule's position is the number of updates alone: ours, and DeepSpeed's."""
    return isinstance(schedule, BlockwiseLR) or set(schedule.state_dict()) == {"last_batch_iteration"}


def set_rates(engine: Engine) -> None:
    """Give the param groups the rates of a schedule of DeepSpeed that only counts; ours have set them already.

    Needed where the checkpoint had no schedule, so that no rate of it was saved.
    """
    schedule = engine.lr_scheduler
    rates = getattr(schedule, "get_lr", None)
    if schedule is not None and not isinstance(schedule, BlockwiseLR) and _counts_updates(schedule) and rates:
        for group, rate in zip(_groups_of(engine), rates(), strict=True):
            group["lr"] = rate


def _groups_of(engine: Engine) -> Sequence[MutableMapping[str, Any]]:
    found: Sequence[MutableMapping[str, Any]] = getattr(engine.basic_optimizer, "param_groups", [])
    return found


def _rates(group: Mapping[str, object]) -> dict[str, object]:
    return {key: group[key] for key in SCHEDULED if key in group}


def restore_groups(
    optimizer: BlockwiseOptimizer,
    scheduler: Schedule | None,
    own: Sequence[Mapping[str, object]],
    saved: Sequence[Mapping[str, object]],
) -> None:
    """Undo what a load did to the groups; only the learning rate follows the loaded schedule.

    Args:
        optimizer: loaded.
        scheduler: the schedule, loaded too; None if there is none or it was not loaded.
        own: settings of the groups before.
        saved: settings of the groups when the checkpoint was saved, empty if unknown.
    """
    for index, (group, settings) in enumerate(zip(optimizer.param_groups, own, strict=True)):
        lr = group["lr"]
        for key in set(group) - set(settings) - {"params"}:
            del group[key]
        group.update(settings)
        if scheduler is not None and not isinstance(scheduler, BlockwiseLR):
            group["lr"] = saved[index]["lr"] if index < len(saved) else lr
    if isinstance(scheduler, BlockwiseLR):
        scheduler.load_state_dict(scheduler.state_dict())  # sets the rate of its update in the restored groups
