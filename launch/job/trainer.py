# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, validation, curves, checkpoints, resume."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import deepspeed
import torch
from tqdm import tqdm

from ds_blockwise.hosts.deepspeed.checkpoint.load import load_checkpoint, load_rank_state, save_checkpoint
from ds_blockwise.measure.readings import Readings
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.runs.run_file import RunConfig
from job.batches import BatchLoader, MicroBatch
from job.interrupt import Interrupt
from job.process_groups import Processes, random_states, restore_random_states
from job.run_folder import checkpoints_of, folder_and_tag, remove_old
from job.sharpness import SharpnessCurve


@dataclass
class TrainerState:
    """Steps, curves and times of a run; saved with every checkpoint.

    Attributes:
        step: Optimizer steps done.
        train_curve: (step, loss in nats per token averaged over the steps since the last point).
        validation_curve: (step, loss in nats per token).
        telemetry: (step, block type -> quantity -> value), if the JSON asks for telemetry.
        train_seconds: Time spent in optimizer steps.
        wall_seconds: Time since the start, validation and checkpoints included.
    """

    step: int = 0
    train_curve: list[tuple[int, float]] = field(default_factory=list)
    validation_curve: list[tuple[int, float]] = field(default_factory=list)
    telemetry: list[tuple[int, dict[str, dict[str, float]]]] = field(default_factory=list)
    train_seconds: float = 0.0
    wall_seconds: float = 0.0


class Trainer:
    """Drives one DeepSpeed engine through one run.

    Args:
        engine: What `deepspeed.initialize` returned.
        run: The run.
        batches: Its data.
        processes: This process's ranks, and its data-parallel group.
        started: `time.perf_counter()` at the start of the program.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        run: RunConfig,
        batches: BatchLoader,
        processes: Processes,
        *,
        started: float,
    ) -> None:
        self.state = TrainerState()
        self._engine = engine
        self._run = run
        self._batches = batches
        self._processes = processes
        self._started = self._program_started = started
        self._sharpness = SharpnessCurve(engine, run, batches, processes)
        self._loss_sum = torch.zeros((), device=processes.device)
        self._loss_count = torch.zeros((), device=processes.device)
        optimizer = engine.basic_optimizer
        if isinstance(optimizer, BlockwiseOptimizer) and optimizer.has_telemetry:
            optimizer.on_telemetry(self._note)

    def train(self, stop_at: int | None = None, stop_after: float | None = None) -> bool:
        """Train to the last step, or until told to stop, and write a checkpoint there.

        Args:
            stop_at: Step after which to stop.
            stop_after: Minutes since the start of the program after which to stop, at the next point of the curve.

        Returns:
            False if Ctrl-C on any rank stopped it before the last step.

        Raises:
            FloatingPointError: The loss is no longer finite (on every rank at the same step).
        """
        training, state = self._run.training, self.state
        last = min(training.steps, stop_at or training.steps)
        interrupted = False
        saved = state.step
        with self._interrupt() as interrupt, self._progress_bar() as bar:
            if not state.validation_curve:
                self._validate()
            while state.step < last:
                begin = time.perf_counter()
                self._one_step()
                state.step += 1
                if state.step % training.log_interval == 0 or state.step == training.steps:
                    self._log(bar)
                state.train_seconds += time.perf_counter() - begin
                bar.update()
                final = state.step == training.steps
                if final or state.step % training.validation_interval == 0:
                    self._validate()
                if self._sharpness.due(state.step):
                    self._sharpness.measure(state.step)
                interval = training.checkpoint_interval
                if interval and state.step % interval == 0:
                    self.save()
                    saved = state.step
                if stop_after is not None and state.step % training.log_interval == 0:
                    # clocks differ: a rank that stopped alone would leave the others waiting
                    if self._processes.any(time.perf_counter() - self._program_started > 60 * stop_after):
                        break
                if interrupted := self._processes.any(interrupt.asked):
                    break
            if saved != state.step:
                self.save()
        return not interrupted or state.step == training.steps

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on.

        Raises:
            CheckpointError: A rank could not write its files; the earlier checkpoints are untouched.
        """
        self._count_wall_time()
        state = {
            "progress": dataclasses.asdict(self.state),
            # of all ranks together, for a run that goes on with another number of them
            "loss_since_last_point": self._processes.sums(self._loss_sum, self._loss_count),
        }
        mine = {"random": random_states(), "loss_since_last_point": (float(self._loss_sum), float(self._loss_count))}
        folder = checkpoints_of(self._run)
        save_checkpoint(self._engine, folder, f"step_{self.state.step:07d}", client_state=state, rank_state=mine)
        if self._processes.rank == 0:
            remove_old(folder, self._run.training.keep_checkpoints)

    def resume(self) -> None:
        """Load the newest checkpoint; training goes on with the step after it.

        Raises:
            CheckpointError: Files of it are damaged (all are named).
        """
        path, state = load_checkpoint(self._engine, checkpoints_of(self._run))
        assert path is not None  # the caller has found one
        assert state is not None
        self.state = TrainerState(**state["progress"])
        mine = load_rank_state(path)
        if mine is None:  # saved with another number of ranks, then converted
            total, count = (value / self._processes.dp_size for value in state["loss_since_last_point"])
        else:
            total, count = mine["loss_since_last_point"]
            restore_random_states(mine["random"])
        self._loss_sum.fill_(total)
        self._loss_count.fill_(count)
        self._sharpness.resume(self.state.step)
        self._started = time.perf_counter() - self.state.wall_seconds

    def start_from(self, source: Path) -> None:
        """Take weights and optimizer state from another run's checkpoint; steps and schedule begin at 0.

        Args:
            source: A folder of checkpoints, or one of them.

        Raises:
            CheckpointError: There is no checkpoint, or files of it are damaged (all are named).
            ValueError: It does not fit the model, or was saved by another number of ranks and not converted.
        """
        folder, tag = folder_and_tag(source)
        load_checkpoint(self._engine, folder, tag, load_lr_scheduler_states=False)
        for counter in ("global_steps", "global_samples", "skipped_steps"):
            setattr(self._engine, counter, 0)

    def _one_step(self) -> None:
        for batch in self._batches.micro_batches(self.state.step):
            loss = self._forward(batch).mean()
            self._engine.backward(loss)
            self._engine.step()
            self._loss_sum += loss.detach()
            self._loss_count += 1

    def _note(self, readings: Readings) -> None:
        values: dict[str, dict[str, float]] = {kind: reading.quantities() for kind, reading in readings.items()}
        self.state.telemetry.append((self.state.step + 1, values))

    def _forward(self, batch: MicroBatch) -> torch.Tensor:
        """Loss of each token, [sequences, sequence length]."""
        losses: torch.Tensor = self._engine(batch.tokens, batch.position_ids, None, labels=batch.labels)
        return losses

    def _log(self, bar: tqdm[NoReturn]) -> None:
        loss = self._processes.mean(self._loss_sum, self._loss_count)
        self._loss_sum.zero_()
        self._loss_count.zero_()
        step = self.state.step
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss is {loss} at step {step}: lower optimizer.params.lr in "
                f"{self._run.deepspeed_file} (a blockwise optimizer multiplies it)"
            )
        self.state.train_curve.append((step, loss))
        rate = self.tokens_per_second()
        learning_rate = self._engine.get_lr()[0]
        self._engine.monitor.write_events(
            [
                ("loss/train", loss, step),
                ("lr/base", learning_rate, step),
                ("throughput/tokens_per_second", rate, step),
            ]
        )
        bar.set_postfix(loss=f"{loss:.3f}", lr=f"{learning_rate:.1e}", refresh=False)

    def _validate(self) -> None:
        total = torch.zeros((), dtype=torch.float64, device=self._processes.device)
        count = torch.zeros_like(total)
        self._engine.eval()
        with torch.no_grad():
            for batch in self._batches.validation():
                losses = self._forward(batch)
                total += losses.double().sum()
                count += losses.numel()
        self._engine.train()
        loss = self._processes.mean(total, count)
        step = self.state.step
        self.state.validation_curve.append((step, loss))
        self._engine.monitor.write_events([("loss/validation", loss, step)])
        if self._processes.rank == 0:
            tqdm.write(f"step {step:6d}  validation loss {loss:.4f}")

    def tokens_per_second(self) -> float:
        """Training tokens per second of training time, all ranks together."""
        tokens = self.state.step * self._run.tokens_per_step
        return tokens / self.state.train_seconds if self.state.train_seconds else 0.0

    def finish(self) -> TrainerState:
        """The state with its final times; draws the figures of the sharpness, if it was measured."""
        self._sharpness.finish()
        self._count_wall_time()
        return self.state

    def _interrupt(self) -> Interrupt:
        notice = "Ctrl-C: saving a checkpoint after this step; once more ends at once, without one"
        return Interrupt(notice if self._processes.rank == 0 else "")

    def _count_wall_time(self) -> None:
        self.state.wall_seconds = time.perf_counter() - self._started

    @contextmanager
    def _progress_bar(self) -> Iterator[tqdm[NoReturn]]:
        with tqdm(
            total=self._run.training.steps,
            initial=self.state.step,
            desc=self._run.name,
            unit="step",
            disable=self._processes.rank != 0,
            dynamic_ncols=True,
            # In a log file each refresh is a new line.
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
        ) as bar:
            yield bar
