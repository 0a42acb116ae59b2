# SPDX-License-Identifier: Apache-2.0
"""A run of the main job that goes on from its checkpoint ends bit for bit as the one that was not interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed", reason="the main job needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="the main job needs the extra 'megatron'")

from ds_blockwise.checkpoint import folder as files
from tests.helpers.launch.job_server import Job, jobs
from tests.helpers.launch.project import assert_same_checkpoint, prepare_project, write_json

ADAMW = "BlockwiseAdamW"
TENSOR = ("--set", "parallel.tensor=2")
# name -> (what `write_json` gets, more arguments); the quick ones are part of `make test`
QUICK: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "z0-fp32-mini": ({"stage": 0}, ()),
    "z1-bf16-mini-tp2": ({"stage": 1, "dtype": "bf16"}, TENSOR),
    "z2-bf16-mini-offload": ({"stage": 2, "dtype": "bf16", "offload": True}, ()),
    "z3-bf16-mini-compact": ({"stage": 3, "dtype": "bf16", "checkpoint_format": "compact"}, ()),
}
SLOW: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "z0-bf16-adamw": ({"stage": 0, "dtype": "bf16", "optimizer": ADAMW}, ()),
    "z1-fp32-adamw-tp2": ({"stage": 1, "optimizer": ADAMW}, TENSOR),
    "z2-fp32-mini-compact": ({"stage": 2, "checkpoint_format": "compact"}, ()),
    "z3-fp32-mini": ({"stage": 3}, ()),
    "z0-bf16-mini": ({"stage": 0, "dtype": "bf16"}, ()),
    "z0-fp32-mini-tp2": ({"stage": 0}, TENSOR),
    # DeepSpeed's norm would count the first tensor-parallel rank only: clipping is refused there
    "z0-bf16-mini-tp2-compact": (
        {"stage": 0, "dtype": "bf16", "checkpoint_format": "compact", "clipped": False},
        TENSOR,
    ),
    "z1-bf16-mini": ({"stage": 1, "dtype": "bf16"}, ()),
    "z1-fp32-mini-momentum": ({"stage": 1, "momentum_dtype": "bf16"}, ()),
    "z2-bf16-adamw": ({"stage": 2, "dtype": "bf16", "optimizer": ADAMW}, ()),
    "z2-fp32-mini-tp2": ({"stage": 2}, TENSOR),
    "z3-bf16-adamw": ({"stage": 3, "dtype": "bf16", "optimizer": ADAMW}, ()),
    "z3-bf16-mini-offload": ({"stage": 3, "dtype": "bf16", "offload": True}, ()),
    "z2-fp32-adamw-offload": ({"stage": 2, "optimizer": ADAMW, "offload": True}, ()),
}
CASES = QUICK | SLOW


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_project(tmp_path_factory.mktemp("resume"))


def _start(project: Path, log: str, output: Path, *arguments: str) -> Job:
    return jobs().start(
        project / "logs" / log,
        *("--run", str(project / "run.yaml"), "--set", f"output={output}", "--set", "training.checkpoint_interval=3"),
        *arguments,
    )


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_resumed_run_is_bitwise_the_uninterrupted_one(project: Path, name: str) -> None:
    """Weights, moments, schedule, loss curves, random states and data order; the log point lies behind the break."""
    changes, more = CASES[name]
    arguments = ("--deepspeed-config", str(write_json(project, name, **changes)), *more)
    _start(project, f"{name}-whole", project / "whole", *arguments).succeed()
    whole = project / "whole" / name / "checkpoints"
    parts = project / "parts" / name / "checkpoints"
    # what a kill after the third step would have left
    shutil.copytree(whole.parent, parts.parent)
    shutil.rmtree(parts / "step_0000006")
    files.write_latest(parts, "step_0000003")
    log = _start(project, f"{name}-parts", project / "parts", "--resume", *arguments).succeed().log(0)
    assert f"resuming from {parts / 'step_0000003'}, 3 of 6 steps" in log
    assert_same_checkpoint(whole / "step_0000006", parts / "step_0000006")
    # a comparison that could not fail would prove nothing
    with pytest.raises(AssertionError):
        assert_same_checkpoint(whole / "step_0000006", parts / "step_0000003")
