# SPDX-License-Identifier: Apache-2.0
"""One trial of a comparison: the main job in one process on one core, with its result as JSON."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

import pretrain_llama
from benchmarks.compare.peers import register
from benchmarks.compare.trials import Setup, Trial, fingerprint
from benchmarks.provenance import provenance
from ds_blockwise.runs.metrics import read_metric

RESULT = "result.json"
_BEGUN = "digest"  # of what is in the folder, finished or not
VALIDATIONS = 8  # points of a curve


def result_of(trial: Trial, folder: Path, setup: Setup) -> dict[str, Any] | None:
    """What a finished trial left; None if it has not finished, or something that decides its result has changed."""
    path = folder / trial.name / RESULT
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return {**found, "fingerprint": fingerprint(found["digest"])} if found["digest"] == setup.digest(trial) else None


def run_trial(
    trial: Trial, folder: Path, run_file: Path, setup: Setup, overrides: list[str], minutes: float
) -> dict[str, Any] | None:
    """Train in this process, which serves no other trial, and write the result; its output goes to ``log`` beside it.

    A trial that was stopped by the clock goes on from its checkpoint.

    Args:
        trial: What to train.
        folder: Of all trials.
        run_file: Model, data and batch.
        setup: What all trials share.
        overrides: More ``section.key=value`` for the run file.
        minutes: After so many it stops with a checkpoint.

    Returns:
        The result, None if it was stopped; a loss that is no longer finite is one, with ``final_validation_loss`` None.
    """
    place, digest = folder / trial.name, setup.digest(trial)
    folder.mkdir(parents=True, exist_ok=True)
    # A run whose main process was killed leaves this trial going on; the next one waits for it and takes its result.
    lock = os.open(folder / f"{trial.name}.lock", os.O_WRONLY | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)  # until this process ends
    if (found := result_of(trial, folder, setup)) is not None:
        return found
    if not (place / _BEGUN).is_file() or (place / _BEGUN).read_text(encoding="utf-8") != digest:
        shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    (place / _BEGUN).write_text(digest, encoding="utf-8")
    settings = place / "settings.json"
    settings.write_text(json.dumps(setup.settings(trial), indent=2), encoding="utf-8")
    log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    register(setup.settings(trial)["optimizer"]["type"])
    changes = {
        "output": place,
        "cluster.gpus_per_node": 1,
        "training.steps": trial.steps,
        "training.warmup_steps": round(trial.warmup * trial.steps),
        "training.seed": trial.seed,
        "training.validation_interval": max(1, trial.steps // VALIDATIONS),
    }
    options = [f"--set={key}={value}" for key, value in changes.items()]
    options += [f"--set={override}" for override in overrides]
    if minutes < float("inf"):
        options.append(f"--stop-after-minutes={minutes}")
    diverged = None
    try:
        pretrain_llama.main(["--run", str(run_file), "--deepspeed-config", str(settings), "--auto-resume", *options])
    except FloatingPointError as error:
        diverged = str(error)
    seconds = _spent(place)
    result = _result(place / "settings", diverged)
    if result is None:
        return None
    result |= {"cpu_seconds": seconds, "digest": digest, "provenance": provenance()}
    partial = place / f"{RESULT}.partial"
    partial.write_text(json.dumps(result, indent=2), encoding="utf-8")
    partial.replace(place / RESULT)  # a trial that was killed leaves none
    return result_of(trial, folder, setup)


def _spent(place: Path) -> float:
    """CPU seconds of this and earlier processes of a trial; not wall time, because other work may share the machine."""
    path = place / "cpu_seconds"
    before = float(path.read_text(encoding="utf-8")) if path.is_file() else 0.0
    seconds = before + time.process_time()
    path.write_text(str(seconds), encoding="utf-8")
    return seconds


def _result(output: Path, diverged: str | None) -> dict[str, Any] | None:
    if diverged is not None:
        return {"diverged": diverged, "final_validation_loss": None, "curve": []}
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    if not summary["completed"]:
        return None
    points = read_metric(output, "loss/validation")
    kept = (
        "final_validation_loss",
        "parameters",
        "tokens",
        "optimizer_state_bytes_per_parameter",
        "versions",
    )
    return {"diverged": None, "curve": sorted(points.items()), **{key: summary[key] for key in kept}}
