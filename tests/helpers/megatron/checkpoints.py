# SPDX-License-Identifier: Apache-2.0
"""Saves a `Run` in Megatron-core's checkpoint formats and loads it again."""

from __future__ import annotations

import multiprocessing
import queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.megatron.stack import Run

RESHARDABLE = ("dp_reshardable", "fully_reshardable")
# the other formats: "torch" (state_dict in a file of each rank), "dp_zero" (Megatron's legacy files)


def allow_dist_checkpoints() -> None:
    """Writers fork processes, which the daemons of a test may not, and keep a manager that would outlive them."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()  # a synchronous save fills and empties it in one process


def save(run: Run, form: str, directory: Path) -> None:
    """Write a model and its optimizer; a collective over all ranks."""
    from megatron.core import dist_checkpointing

    if form in RESHARDABLE:
        dist_checkpointing.save(_sharded(run, form, is_loading=False), str(directory))
        return
    files = directory / f"rank{dist.get_rank()}"
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, files)
    if form == "dp_zero":
        run.optimizer.save_parameter_state(str(directory / "distrib_optim.pt"))
    dist.barrier()


def load(run: Run, form: str, directory: Path) -> None:
    """Read what `save` wrote in the same format; a collective over all ranks."""
    from megatron.core import dist_checkpointing

    if form in RESHARDABLE:
        loaded = dist_checkpointing.load(_sharded(run, form, is_loading=True), str(directory))
    else:
        loaded = torch.load(directory / f"rank{dist.get_rank()}", weights_only=False)
    run.model.load_state_dict(loaded["model"])
    run.optimizer.load_state_dict(loaded["optimizer"])
    if form == "dp_zero":
        run.optimizer.load_parameter_state(str(directory / "distrib_optim.pt"))


def _sharded(run: Run, form: str, *, is_loading: bool) -> dict[str, Any]:
    metadata = {"distrib_optim_sharding_type": form, "chained_optim_avoid_prefix": True}
    model = run.model.sharded_state_dict()
    return {"model": model, "optimizer": run.optimizer.sharded_state_dict(model, is_loading, metadata=metadata)}
