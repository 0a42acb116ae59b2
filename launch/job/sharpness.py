# SPDX-License-Identifier: Apache-2.0
"""The sharpness of a run's model: measured on the same validation batches each time, kept in the run's folder."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import deepspeed
import torch

from ds_blockwise.hosts.deepspeed.sharpness import check_engine, probe_engine
from ds_blockwise.measure.predictions import megatron_gpt
from ds_blockwise.measure.sharpness_plot import draw
from ds_blockwise.measure.sharpness_report import SharpnessReport, read_csv, write_csv
from ds_blockwise.parallel.agree import raise_together
from ds_blockwise.runs.run_file import RunConfig
from job.batches import BatchLoader
from job.process_groups import Processes
from job.run_folder import SHARPNESS_CSV


def measure(
    engine: deepspeed.DeepSpeedEngine,
    run: RunConfig,
    batches: BatchLoader,
    step: int,
    *,
    estimator: str = "gauss_newton",
    count: int | None = None,
    draws: int = 1,
) -> SharpnessReport:
    """Measure on the first validation batches; all processes must call it.

    Args:
        engine: Between two steps.
        run: For the number of batches.
        batches: Of the run.
        step: Optimizer steps done; every step draws labels of its own.
        estimator: See `ds_blockwise.measure.sharpness`.
        count: Batches, if not the run's.
        draws: Labels drawn for each batch.

    Raises:
        FloatingPointError: No gradient was finite.
    """
    wanted = run.training.sharpness_batches if count is None else count
    chosen = _fields(batches, wanted)
    return probe_engine(engine, chosen, megatron_gpt, estimator=estimator, draws=draws, seed=step, step=step)


def _fields(batches: BatchLoader, count: int) -> Iterator[dict[str, torch.Tensor]]:
    for batch in itertools.islice(batches.validation(), count):
        yield {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}


class SharpnessCurve:
    """The measurements of one run, in its folder and on its monitors.

    Args:
        engine: What `deepspeed.initialize` returned.
        run: The run.
        batches: Its data.
        processes: This process's ranks, and its data-parallel group.

    Raises:
        ValueError: Such an engine cannot be measured.
    """

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, run: RunConfig, batches: BatchLoader, processes: Processes
    ) -> None:
        self._engine = engine
        self._run = run
        self._batches = batches
        self._rank = processes.rank
        self._reports: list[SharpnessReport] = []
        self._csv = run.output / SHARPNESS_CSV
        if run.training.sharpness_interval:
            check_engine(engine, "gauss_newton")

    def due(self, step: int) -> bool:
        """Whether the run file wants a measurement after this step."""
        interval = self._run.training.sharpness_interval
        return bool(interval) and (step % interval == 0 or step == self._run.training.steps)

    def resume(self, step: int) -> None:
        """Resume from a checkpoint: drop the measurements after it, because their steps are done again."""
        failure: Exception | None = None
        if self._rank == 0 and self._csv.is_file():
            try:
                self._reports = [r for r in read_csv(self._csv) if r.step is not None and r.step <= step]
            except (ValueError, OSError) as error:  # raised on all ranks below
                failure = error
        raise_together(failure)

    def measure(self, step: int) -> None:
        """Measure and write; all processes must call it. A model without finite gradients is reported, not measured."""
        try:
            report = measure(self._engine, self._run, self._batches, step)
        except FloatingPointError as error:  # on every rank alike; training itself decides whether to go on
            if self._rank == 0:
                print(f"step {step:6d}  {error}", flush=True)
            return
        events = [(f"sharpness/{name}", value, step) for name, value in report.by_type().items()]
        self._engine.monitor.write_events(events)
        if self._rank == 0:
            self._reports.append(report)
            write_csv(self._reports, self._csv)

    def finish(self) -> None:
        """Draw both figures, if there is anything to draw."""
        if self._rank == 0 and self._reports:
            draw(self._reports, self._reports[-1], self._run.name, self._run.output)
