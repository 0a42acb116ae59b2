# SPDX-License-Identifier: Apache-2.0
"""What the tests of telemetry and measured multipliers run on every rank: real engines against the oracle."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers import models
from tests.helpers.deepspeed.compared import assert_same, hyper, to_universal
from tests.helpers.deepspeed.engine_cases import (
    LR,
    Case,
    build,
    config_of,
    hyper_of,
    oracle_of,
)
from tests.helpers.deepspeed.engines import DTYPES, feed_step, masters, open_engine, prepare_deepspeed
from tests.helpers.distributed import RankContext
from tests.helpers.megatron.gpt_shards import LAYERS, SHAPES, cut, cut_all, full_shapes, parallel, small_gpt
from tests.helpers.models import GradientPlan
from tests.helpers.muon_oracle import oracle_for, tolerance_for
from tests.helpers.oracle import assert_same_update, clipped, scheduled_lr
from tests.helpers.tables.oracle_names import megatron_classes
from tests.helpers.telemetry_truth import AutoTruth, assert_reads, truth

SCHEDULE = {"warmup_num_steps": 2, "total_num_steps": 60, "min_lr": 3e-3}
NEW = {"ffn": 2.0, "qk": 0.5, "head": 0.0}
# of 60 steps: the first reading after 2, ten readings, a ramp of 12 steps in ten stages
AUTO = {"auto": {"after": 0.02, "not_before": 1, "exponent": 0.6, "high": 9.0, "ramp": 0.2}, "head": 3.0}
UNIVERSAL = {"checkpoint": {"load_universal": True}}
READING_STEPS, RAMP, AUTO_STEPS = range(2, 12), 12, 28


@dataclass(frozen=True)
class Measured:
    """An engine, and what is measured there.

    Attributes:
        kind: a key of ``CHECKS``.
        case: the engine.
        tp: tensor-parallel ranks; then the model is Megatron-core's.
        saves: steps after which ``resume`` saves.
    """

    kind: str
    case: Case
    tp: int = 1
    saves: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


def run_case(context: RankContext, what: Measured) -> None:
    """Entry of every rank."""
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers

    if what.tp > 1:
        import megatron_patch

        megatron_patch.cpu_shims()
    CHECKS[what.kind](context, what)


class Fed:
    """An engine with fed gradients, and the oracle on unsharded tensors beside it."""

    def __init__(self, run: SimpleNamespace, what: Measured, dp_rank: int, dp_size: int, tp_rank: int) -> None:
        self.run, self.what, self.case = run, what, what.case
        self.dp_rank, self.tp_rank = dp_rank, tp_rank
        self.plan = GradientPlan(dp_size, 1, DTYPES[self.case.dtype])
        self.optimizer = run.engine.basic_optimizer
        self.now = masters(run)
        self.step = 0
        if what.tp > 1:
            self.shapes = full_shapes("gqa")
            start = {n: models.small_weight(n, s) for n, s in self.shapes.items()}
            classes = megatron_classes(layers=LAYERS, **SHAPES["gqa"])
            self.oracle = oracle_for(self.case.optimizer, start, classes, hyper())
        else:
            self.shapes = {n: tuple(p.shape) for n, p in self.now.items()}
            self.oracle = oracle_of(self.case, self.now, hyper_of(self.case, list(self.now)))

    def block_lr(self) -> Callable[[float, float], float] | None:
        if not self.case.scheduler:
            return None
        return scheduled_lr("cosine", self.step, warmup=2, total=60, min_lr=3e-3)

    def take(self) -> dict[str, dict[str, float]]:
        """One step of the engine and of the oracle; their updates must agree. Returns what telemetry must read."""
        extra: dict[str, Any] = {}
        if self.what.tp > 1:
            extra = {"shapes": self.shapes, "cut": partial(cut, rank=self.tp_rank)}
        feed_step(self.run, self.plan, self.step, self.dp_rank, **extra)
        before, self.now, was = self.now, masters(self.run), self.oracle.weights()
        gradients = {n: self.plan.mean(n, s, self.step) for n, s in self.shapes.items()}
        self.raw = gradients
        if self.case.clip:
            gradients = clipped(gradients, self.case.clip)
        rate = self.block_lr()
        self.oracle.step(gradients, rate)
        expected: Any = (was, self.oracle.weights())
        if self.what.tp > 1:
            expected = tuple(cut_all(weights, self.tp_rank) for weights in expected)
        assert_same_update(
            (before, self.now), expected, LR,
            tolerance=tolerance_for(self.case.optimizer), weight_roundings=2, what=f"step {self.step}",
        )  # fmt: skip
        self.step += 1
        return truth(self.oracle, was, gradients, rate)


@contextmanager
def fed(context: RankContext, what: Measured) -> Iterator[Fed]:
    """An open engine of a case."""
    config = config_of(what.case)
    if "csv_monitor" in config:
        config["csv_monitor"] = config["csv_monitor"] | {"output_path": str(context.tmp_path / "csv")}
    if what.tp == 1:
        with open_engine(config, lambda: build(what.case, config)) as run:
            yield Fed(run, what, context.rank, context.world_size, 0)
        return
    from megatron.core import parallel_state

    from megatron_patch import mpu_adapter

    with parallel(what.tp):
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        dp_rank = parallel_state.get_data_parallel_rank()
        with open_engine(config, lambda: small_gpt("gqa", torch.float32, tp_rank), mpu=mpu_adapter()) as run:
            yield Fed(run, what, dp_rank, context.world_size // what.tp, tp_rank)


# ------------------------------------------------------------------------------------------ telemetry


def check_values(context: RankContext, what: Measured) -> None:
    """Readings are those of the unsharded tensors, the same on every rank; norm and factor of clipping; CSV files."""
    with fed(context, what) as run:
        for _ in range(4):
            expected = run.take()
            readings = run.optimizer.telemetry()
            if run.step % 2:
                continue
            assert_reads(readings, expected, run.step, f"step {run.step}")
            everyone: list[Any] = [None] * context.world_size
            dist.all_gather_object(everyone, readings)
            assert all(other == readings for other in everyone), "ranks read different numbers"
            check_clipping(run, readings["ffn"])
        assert {r.step for r in run.optimizer.telemetry().values()} == {4}
        if what.case.config.get("csv_monitor"):
            check_files(context, run)


def check_clipping(run: Fed, reading: Any) -> None:
    wrapped = run.run.engine.optimizer is not run.optimizer
    assert (reading.grad_norm is not None) == wrapped
    if wrapped and run.what.tp == 1:
        norm = float(sum(g.double().square().sum() for g in run.raw.values())) ** 0.5
        assert abs(reading.grad_norm - norm) <= 1e-5 * norm
        factor = min(1.0, run.case.clip / norm) if run.case.clip else 1.0
        assert abs(reading.clip_factor - factor) <= 1e-5
        assert not run.case.clip or factor < 1


def check_files(context: RankContext, run: Fed) -> None:
    context.barrier()
    folder = context.tmp_path / "csv" / "job"
    reading = run.optimizer.telemetry()["qk"]
    for quantity, value in reading.quantities().items():
        with open(folder / f"blockwise_{quantity}_qk.csv", encoding="utf-8") as file:
            rows = list(csv.reader(file))[1:]
        assert [int(step) for step, _ in rows] == [2, 4], quantity
        assert float(rows[-1][1]) == value, quantity
    context.barrier()


def check_alarm(context: RankContext, what: Measured) -> None:
    """Every rank stops, at the same step."""
    from ds_blockwise.measure.readings import TelemetryAlarm

    with fed(context, what) as run:
        stopped = None
        for step in range(6):
            try:
                feed_step(run.run, run.plan, step, run.dp_rank)
            except TelemetryAlarm as alarm:
                stopped = (step, str(alarm))
                break
        everyone: list[Any] = [None] * context.world_size
        dist.all_gather_object(everyone, stopped)
        # warm-up is the JSON schedule's two steps, readings come every second step
        assert stopped is not None
        assert stopped[0] == 3
        assert "block type 'vo'" in stopped[1]
        assert all(other == stopped for other in everyone)


# -------------------------------------------------------------------------------- changed multipliers


def check_changed(context: RankContext, what: Measured) -> None:
    """Multipliers change between steps: the oracle does the same, and no state is lost."""
    with fed(context, what) as run:
        for step in range(6):
            if step in (2, 4):
                # twice: the second time one of them, the others stay
                new = NEW if step == 2 else {"ffn": 7.0}
                run.optimizer.set_lr_multipliers(new)
                run.oracle.lr_multipliers = dict(run.oracle.lr_multipliers) | new
            expected = run.take()
            if run.step % 2 == 0:
                assert_reads(run.optimizer.telemetry(), expected, run.step, f"step {step}")
        assert run.optimizer.lr_multipliers == NEW | {"ffn": 7.0}


# ------------------------------------------------------------------------------- measured multipliers


def check_auto(context: RankContext, what: Measured) -> None:
    """1 until the measurement, then the ramp to what the oracle's second moments say; the same on every rank."""
    with fed(context, what) as run:
        by_hand = AutoTruth(READING_STEPS, RAMP, 0.6, 9.0, {"head": 3.0})
        present = by_hand.after(0, run.oracle)
        seen = []
        for step in range(AUTO_STEPS):
            run.oracle.lr_multipliers = present
            expected = run.take()
            if run.step % 2 == 0:
                assert_reads(run.optimizer.telemetry(), expected, run.step, f"step {step}")
            present = by_hand.after(run.step, run.oracle)
            seen.append(present["qk"])
        target = run.optimizer.meter.auto.target
        assert target.keys() == by_hand.target.keys()
        assert all(abs(target[k] - r) <= 1e-5 * r for k, r in by_hand.target.items()), (target, by_hand.target)
        assert max(target.values()) > 1.5 / 8, "a measurement that leaves everything at the rate of norms shows nothing"
        assert len(set(seen)) == 11, seen
        everyone: list[Any] = [None] * context.world_size
        dist.all_gather_object(everyone, target)
        assert all(other == target for other in everyone), "ranks measured different numbers"


def check_resume(context: RankContext, what: Measured) -> None:
    """Saved before the measurement, in the middle of the ramp and after it: the same bits each time."""
    folder = str(context.tmp_path / f"resume-{what.case.optimizer}-{what.case.stage}")
    config = config_of(what.case)

    def train(run: SimpleNamespace, steps: range) -> None:
        for step in steps:
            feed_step(run, GradientPlan(context.world_size, 1, DTYPES[what.case.dtype]), step, context.rank)
            if step + 1 in what.saves and steps.start == 0:
                run.engine.save_checkpoint(folder, tag=f"step{step + 1}")

    with open_engine(config, lambda: build(what.case, config)) as run:
        train(run, range(AUTO_STEPS))
        wanted = end_of(run)
    for saved in what.saves:
        with open_engine(config, lambda: build(what.case, config)) as run:
            run.engine.load_checkpoint(folder, tag=f"step{saved}")
            assert run.engine.basic_optimizer.meter.steps == saved
            train(run, range(saved, AUTO_STEPS))
            found = end_of(run)
        assert found[1:] == wanted[1:], (saved, found[1:], wanted[1:])
        assert_same(found[0], wanted[0], f"resumed after step {saved}")
    with open_engine(config, lambda: build(what.case, config)) as run:  # weights and moments for another run
        run.engine.load_checkpoint(folder, tag=f"step{what.saves[-1]}", load_lr_scheduler_states=False)
        optimizer = run.engine.basic_optimizer
        assert (optimizer.meter.steps, optimizer.meter.auto.target, optimizer.lr_multipliers) == (0, None, {})
    if what.extra.get("universal"):
        tag = f"step{what.saves[1]}"
        if context.rank == 0:
            to_universal(Path(folder) / tag, Path(folder) / "universal")
        context.barrier()
        with open_engine(config | UNIVERSAL, lambda: build(what.case, config)) as run:
            run.engine.load_checkpoint(folder, tag="universal")
            train(run, range(what.saves[1], AUTO_STEPS))
            found = end_of(run)
        assert found[1:] == wanted[1:]
        assert_same(found[0], wanted[0], "resumed from a universal checkpoint")


def end_of(run: SimpleNamespace) -> tuple[dict[str, Tensor], Any, Any, Any]:
    optimizer = run.engine.basic_optimizer
    return masters(run), optimizer.run_state(), optimizer.lr_multipliers, optimizer.telemetry()


def check_refused(context: RankContext, what: Measured) -> None:
    """An error on every rank before the first step."""
    config = config_of(what.case)
    try:
        with open_engine(config, lambda: build(what.case, config)):
            pass
    except ValueError as error:
        assert what.extra["says"] in str(error), error
    else:
        raise AssertionError("was accepted")


CHECKS = {
    "values": check_values,
    "alarm": check_alarm,
    "changed": check_changed,
    "auto": check_auto,
    "resume": check_resume,
    "refused": check_refused,
}
