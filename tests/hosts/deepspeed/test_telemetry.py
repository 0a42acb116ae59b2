# SPDX-License-Identifier: Apache-2.0
"""Telemetry, changed and measured multipliers on real DeepSpeed engines: ZeRO 0 to 3, tensor parallelism, resume."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from typing import Any

import pytest

from tests.helpers.deepspeed.engine_cases import Case
from tests.helpers.deepspeed.telemetry_engines import AUTO, SCHEDULE, Measured, run_case
from tests.helpers.distributed import Outcome, passes
from tests.helpers.suites import Suite

_MISSING = find_spec("deepspeed") is None or find_spec("megatron") is None
pytestmark = pytest.mark.skipif(_MISSING, reason="needs deepspeed and megatron")

OWN = {"scheduler": "BlockwiseCosineLR", "scheduler_params": SCHEDULE}
PLAIN = {"model": "llama", "decay_multipliers": False}


def _case(optimizer: str, stage: int, params: dict[str, Any], **fields: Any) -> Case:
    return Case(optimizer, stage, params=params, **fields)


def _cases() -> Iterator[tuple[str, tuple[int, Measured]]]:
    telemetry = {"telemetry": {"interval": 2}}
    for stage, optimizer in product((0, 1, 2, 3), ("mini", "adamw")):
        name = f"{optimizer}-z{stage}"
        # small enough that every step is clipped
        zero = {"sub_group_size": 300} if stage == 3 else {}
        case = _case(optimizer, stage, telemetry, clip=0.01, zero=zero, **OWN)
        yield f"values-{name}", (2, Measured("values", case))
        changed = _case(optimizer, stage, telemetry, zero=zero)
        yield f"changed-{name}", (2, Measured("changed", changed))
        auto = _case(optimizer, stage, {"lr_multipliers": AUTO, **telemetry}, **PLAIN, **OWN)
        yield f"auto-{name}", (2, Measured("auto", auto))
    for kind, optimizer in product(("values", "changed", "auto"), ("mini", "adamw")):
        params = telemetry | ({"lr_multipliers": AUTO} if kind == "auto" else {})
        case = _case(optimizer, 1, params, decay_multipliers=False, **OWN)
        yield f"{kind}-{optimizer}-tp2", (2, Measured(kind, case, tp=2))
    for optimizer, stage in (("mini", 1), ("adamw", 3), ("mini", 3)):  # some of three ranks hold nothing of a norm
        case = _case(optimizer, stage, telemetry, model="slim", **OWN)
        yield f"values-{optimizer}-z{stage}-slim-dp3", (3, Measured("values", case))
    for optimizer, stage in (("muon", 2), ("muon", 3), ("lion", 3)):
        zero = {"sub_group_size": 300} if stage == 3 else {}
        yield (
            f"values-{optimizer}-z{stage}",
            (2, Measured("values", _case(optimizer, stage, telemetry, zero=zero, **OWN))),
        )
    case = _case("muon", 1, telemetry, decay_multipliers=False, **OWN)
    yield "values-muon-tp2", (2, Measured("values", case, tp=2))
    csv = {"csv_monitor": {"enabled": True, "job_name": "job"}}
    yield "values-csv", (2, Measured("values", _case("mini", 2, telemetry, config=csv)))
    stop = {"telemetry": {"interval": 2, "band": {"vo": [0.0, 1e-6]}, "on_alarm": "stop"}}
    for stage in (0, 2, 3):
        yield f"alarm-z{stage}", (2, Measured("alarm", _case("mini", stage, stop, **OWN)))
    for optimizer, stage, dtype in (("mini", 0, "bf16"), ("mini", 2, "fp32"), ("adamw", 3, "bf16")):
        params = {"lr_multipliers": AUTO, "telemetry": {"interval": 4}}
        case = _case(optimizer, stage, params, dtype=dtype, **PLAIN, **OWN)
        universal = {"universal": stage == 2}
        yield f"resume-{optimizer}-z{stage}", (2, Measured("resume", case, saves=(6, 16, 24), extra=universal))
    no_total = _case("mini", 2, {"lr_multipliers": "auto"}, **PLAIN)
    yield "refused-no_total", (2, Measured("refused", no_total, extra={"says": '"total_num_steps": N'}))
    short = _case("mini", 2, {"lr_multipliers": {"auto": {"total_num_steps": 8, "not_before": 1}}}, **PLAIN)
    yield "refused-short", (2, Measured("refused", short, extra={"says": "until step 10, but the run has 8 steps"}))


SUITE = Suite(run_case, dict(_cases()))
outcome = SUITE.outcome()


@SUITE.cases("values")
def test_readings_are_those_of_the_whole_model(outcome: Outcome, name: str) -> None:
    """A piece counted twice, a padding, or a part of a step (DeepSpeed steps group by group) would go unnoticed."""
    passes(outcome, name)


@SUITE.cases("alarm")
def test_every_rank_stops_at_the_same_step(outcome: Outcome, name: str) -> None:
    """A rank that goes on alone would wait for the others for ever."""
    passes(outcome, name)


@SUITE.cases("changed")
def test_multipliers_change_between_steps(outcome: Outcome, name: str) -> None:
    """Old tables in a kernel's plan, or moments lost with them, would train on without a sign."""
    passes(outcome, name)


@SUITE.cases("auto")
def test_measured_multipliers(outcome: Outcome, name: str) -> None:
    """Each step is that of the oracle with multipliers computed by hand from the oracle's own second moments."""
    passes(outcome, name)


@SUITE.cases("resume")
def test_resume_is_bitwise(outcome: Outcome, name: str) -> None:
    """A ramp that starts anew, or a second measurement, would make it another run."""
    passes(outcome, name)


@SUITE.cases("refused")
def test_refused_before_the_first_step(outcome: Outcome, name: str) -> None:
    """After two percent of a long run it would be late to hear of it."""
    passes(outcome, name)
