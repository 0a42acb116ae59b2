# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise check RUN``: everything that is wrong with a run, before the first GPU-hour.

Reads the run file with its bases, its model file and its DeepSpeed JSON, and looks for contradictions between them:
batch arithmetic, sizes that do not divide, settings that the optimizers refuse. Builds no model and starts no process.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ds_blockwise.hosts.deepspeed.refusals import facts_of_json, refusals
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.runs.engine_json import compose, optimizer_type, parameter_dtype
from ds_blockwise.runs.reading.engine_file import check_optimizer, clipping_text
from ds_blockwise.runs.reading.problems import Problems
from ds_blockwise.runs.reading.whole_files import JsonObject
from ds_blockwise.runs.run_file import RunConfig, check_run, load_run


def check_run_file(
    file: str | Path, overrides: Sequence[str] = (), deepspeed_file: str | Path | None = None
) -> tuple[RunConfig | None, Problems]:
    """Check a run for the cluster that it names.

    Args:
        file: The run file.
        overrides: ``section.key=value``, applied before anything is checked.
        deepspeed_file: Used instead of the run file's `deepspeed`.

    Returns:
        The run, or None if the files do not describe one, and every problem found.
    """
    run, problems = load_run(file, overrides=overrides, deepspeed_file=deepspeed_file)
    if run is None:
        return None, problems
    check_and_compose(run, run.cluster.processes, problems)
    return run, problems


def check_and_compose(run: RunConfig, processes: int, problems: Problems) -> JsonObject:
    """Check a run for a number of processes.

    Args:
        run: The run, from `load_run`.
        processes: That the launcher starts.
        problems: Every mistake is noted here.

    Returns:
        DeepSpeed's configuration for the run; complete unless a problem was noted.
    """
    if not run.deepspeed and problems:
        return {}  # the JSON could not be read
    check_run(run, processes, problems)
    name = optimizer_type(run.deepspeed)
    if name in OPTIMIZERS:
        for refusal in refusals(facts_of_json(run.deepspeed)):
            problems.refuse(run.deepspeed_file, "optimizer.type", name, refusal)
    known = len(problems.lines)
    config = compose(run, problems)
    if len(problems.lines) == known:
        _check_engine(run, config, problems)
        check_optimizer(run.deepspeed_file, config, problems)
    return config


def describe_run(run: RunConfig) -> list[tuple[str, str]]:
    """What a run is, as names and values for people: sizes, arrangement, batch, length."""
    training, parallel, cluster = run.training, run.parallel, run.cluster
    copies = cluster.processes // (parallel.tensor * parallel.pipeline)
    accumulation = training.global_batch_size // (training.micro_batch_size * copies)
    tokens = training.steps * run.tokens_per_step
    stage = run.deepspeed.get("zero_optimization", {}).get("stage", 0)
    return [
        ("run", f"{run.name} ({run.file})"),
        ("model", f"{run.model_file}, {run.shape.count_parameters():,} parameters"),
        ("engine", f"{run.deepspeed_file}: {run.deepspeed['optimizer']['type']}, ZeRO-{stage}"),
        (
            "processes",
            f"{cluster.processes} = {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu}".rstrip()
            + f" = tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {copies}",
        ),
        (
            "batch",
            f"{training.global_batch_size} sequences of {run.shape.sequence_length} tokens = micro batch "
            f"{training.micro_batch_size} x {copies} x {accumulation} accumulated",
        ),
        ("clipping", clipping_text(run.deepspeed)),
        ("activations", f"checkpointing: {training.activation_checkpointing}"),
        ("length", f"{training.steps:,} steps, {tokens / 1e6:,.1f}M tokens"),
    ]


def _check_engine(run: RunConfig, config: JsonObject, problems: Problems) -> None:
    file = run.deepspeed_file
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage > 1 and run.parallel.pipeline > 1:
        remedy = "lower the stage or set parallel.pipeline to 1"
        problems.add(file, "zero_optimization.stage", stage, "0 or 1 with parallel.pipeline > 1", remedy)
    clip = config.get("gradient_clipping", 1.0)
    if stage == 0 and parameter_dtype(config) != torch.float32 and run.parallel.tensor > 1 and clip:
        allowed = "0 at ZeRO stage 0 in 16 bit with parallel.tensor > 1: DeepSpeed's norm counts the first rank only"
        problems.add(file, "gradient_clipping", clip, allowed, "use ZeRO stage 1")
