# SPDX-License-Identifier: Apache-2.0
"""One trial of `compare_optimizers.py`: the main job in one process on one core, with its result as JSON."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launch"))
os.environ["OMP_NUM_THREADS"] = "1"

import pretrain_llama
import torch
from bench_machine import provenance
from compare_peers import register
from compare_trials import Trial, digest_of

RESULT = "result.json"
VALIDATIONS = 8  # points of a curve


def result_of(trial: Trial, folder: Path, vocab_size: int, data: dict[str, Any]) -> dict[str, Any] | None:
    """What a finished trial left; None if it has not finished, or something that decides its result has changed."""
    path = folder / trial.name / RESULT
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if found["digest"] == digest_of(trial, vocab_size, data) else None


def run_trial(
    trial: Trial, folder: Path, run_file: Path, vocab_size: int, data: dict[str, Any], overrides: list[str]
) -> dict[str, Any]:
    """Train in this process, which serves no other trial, and write the result; its output goes to ``log`` beside it.

    Args:
        trial: What to train.
        folder: Of all trials.
        run_file: Model, data and batch.
        vocab_size: Of the model.
        data: `metadata.json` of the prepared text.
        overrides: More ``section.key=value`` for the run file.

    Returns:
        The result; a loss that is no longer finite is one, with ``final_validation_loss`` None.
    """
    place = folder / trial.name
    place.mkdir(parents=True, exist_ok=True)
    (place / RESULT).unlink(missing_ok=True)
    settings = place / "settings.json"
    settings.write_text(json.dumps(trial.settings(vocab_size), indent=2), encoding="utf-8")
    log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    register(trial.settings(vocab_size)["optimizer"]["type"])
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
    diverged = None
    before = time.process_time()
    try:
        pretrain_llama.main(["--run", str(run_file), "--deepspeed-config", str(settings), "--overwrite", *options])
    except FloatingPointError as error:
        diverged = str(error)
    result = _result(place / "settings", diverged)
    # not wall time: other work may share the machine
    result["cpu_seconds"] = time.process_time() - before
    result |= {"digest": digest_of(trial, vocab_size, data), "provenance": provenance()}
    partial = place / f"{RESULT}.partial"
    partial.write_text(json.dumps(result, indent=2), encoding="utf-8")
    partial.replace(place / RESULT)  # a trial that was killed leaves none
    return result


def _result(output: Path, diverged: str | None) -> dict[str, Any]:
    if diverged is not None:
        return {"diverged": diverged, "final_validation_loss": None, "curve": []}
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    with open(output / "csv" / "loss_validation.csv", newline="", encoding="utf-8") as file:
        curve = [(int(step), float(loss)) for step, loss in list(csv.reader(file))[1:]]
    kept = (
        "final_validation_loss",
        "parameters",
        "tokens",
        "optimizer_state_bytes_per_parameter",
        "versions",
    )
    return {"diverged": None, "curve": curve, **{key: summary[key] for key in kept}}
