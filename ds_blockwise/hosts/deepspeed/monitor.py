# SPDX-License-Identifier: Apache-2.0
"""Telemetry under DeepSpeed: what the engine knows of a run, and its monitor (TensorBoard, CSV, W&B).

Reads attributes of the engine and its optimizer wrapper; imports nothing of DeepSpeed. Checked with DeepSpeed 0.19.8.
"""

from __future__ import annotations

import functools
import math

from ds_blockwise.hosts.deepspeed.engine import Engine, EventWriter
from ds_blockwise.measure.readings import Readings
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.registry import SCHEDULES
from ds_blockwise.optimizers.schedules.schedule import warmup_of
from ds_blockwise.parallel.agree import is_first_rank
from ds_blockwise.values import as_count

PREFIX = "blockwise"


def connect(engine: Engine, optimizer: BlockwiseOptimizer) -> None:
    """Tell an optimizer how long its run is and where the gradient norm stands, and send its readings to the monitor.

    Args:
        engine: a ``DeepSpeedEngine``.
        optimizer: its basic optimizer, with every tensor bound.

    Raises:
        ValueError: multipliers are to be measured and neither the settings nor the schedule say how long the run is,
            or it is too short.
    """
    meter = optimizer.meter
    if meter is None:
        return
    meter.host(
        total_num_steps=_of_schedule(engine, "total_num_steps"),
        warmup_num_steps=_warmup(engine),
        norm_source=functools.partial(_norm, engine),
    )
    if meter.settings is not None:
        optimizer.on_telemetry(functools.partial(_write, engine))


def add_monitor(engine: Engine, monitor: EventWriter) -> None:
    """Send everything that goes to an engine's monitor to one of the caller's, too.

    Args:
        engine: a ``DeepSpeedEngine`` whose JSON has no ``csv_monitor``, whose place the caller's takes.
        monitor: called on the first rank.
    """
    engine.monitor.csv_monitor = monitor
    engine.monitor.enabled = True


def _of_schedule(engine: Engine, key: str) -> int | None:
    """A number of steps from the JSON's schedule, or from a schedule object given to ``deepspeed.initialize``."""
    params = engine.scheduler_params() or {}
    value = params.get(key, getattr(engine.client_lr_scheduler, key, None))
    return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _warmup(engine: Engine) -> int | None:
    params = engine.scheduler_params() or {}
    total, fraction = params.get("total_num_steps"), params.get("warmup_fraction")
    if engine.scheduler_name() in SCHEDULES and fraction is not None and total is not None:
        return warmup_of(as_count("total_num_steps", total), params.get("warmup_num_steps", 0), fraction)
    return _of_schedule(engine, "warmup_num_steps")


def _norm(engine: Engine) -> tuple[float | None, float]:
    # The engine's own copy is still the last step's. Without a wrapper (fp32, no ZeRO) DeepSpeed forgets the norm.
    value = getattr(engine.optimizer, "_global_grad_norm", None)
    norm = None if value is None else float(value)
    known = norm is not None and math.isfinite(norm)
    return norm if known else None, float(engine.gradient_clipping())


def _write(engine: Engine, readings: Readings) -> None:
    if not is_first_rank() or not engine.monitor.enabled:
        return
    step = int(engine.global_steps) + 1  # counted when the step has returned
    engine.monitor.write_events(
        [
            (f"{PREFIX}/{quantity}/{kind}", value, step)
            for kind, reading in readings.items()
            for quantity, value in reading.quantities().items()
        ]
    )
