# SPDX-License-Identifier: Apache-2.0
"""The dict that `deepspeed.initialize` gets: the JSON, plus what follows from the run file."""

from __future__ import annotations

import copy

import torch

from ds_blockwise.blocks.settings.auto_settings import AUTO
from ds_blockwise.hosts.deepspeed.config.check import json_mistakes
from ds_blockwise.optimizers.registry import SCHEDULES
from ds_blockwise.runs.reading.problems import Problems
from ds_blockwise.runs.reading.whole_files import JsonObject
from ds_blockwise.runs.run_file import RunConfig

# Keys that the launcher writes; in the JSON they would be a second place for the same number.
_FROM_RUN_FILE = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "steps_per_print": "training.log_interval",
}
_MONITORS = ("csv_monitor", "tensorboard")
_MONITOR_KEYS = ("output_path", "job_name")
# What each schedule calls the number of warm-up steps and of all steps.
_WARMUP, _TOTAL = "warmup_num_steps", "total_num_steps"
_WARMUP_FRACTION = "warmup_fraction"  # which schedules of ours take in its place
_SCHEDULE_KEYS = {
    **dict.fromkeys(SCHEDULES, (_WARMUP, _TOTAL)),
    "WarmupCosineLR": (_WARMUP, _TOTAL),
    "WarmupDecayLR": (_WARMUP, _TOTAL),
    "WarmupLR": (_WARMUP,),
}


def compose(run: RunConfig, problems: Problems) -> JsonObject:
    """DeepSpeed's configuration for this run.

    Args:
        run: The run, with the JSON as it stands in its file.
        problems: Notes each key of the JSON that belongs into the run file, everything that `json_mistakes` finds
            in the others, and a missing optimizer.

    Returns:
        A new dict; complete unless a problem was noted.
    """
    file = run.deepspeed_file
    config = copy.deepcopy(run.deepspeed)
    for key in [key for key in _FROM_RUN_FILE if key in config]:
        remedy = f"remove it here and set {_FROM_RUN_FILE[key]} in {run.file}"
        problems.add(file, key, config.pop(key), "nothing, the launcher writes it", remedy)
    mistakes = json_mistakes(config)
    for mistake in mistakes:
        problems.add(file, *mistake)
    for broken in {mistake.key.partition(".")[0] for mistake in mistakes}:
        config.pop(broken, None)  # what follows takes sections as they should be
    training = run.training
    config["train_batch_size"] = training.global_batch_size
    config["train_micro_batch_size_per_gpu"] = training.micro_batch_size
    config["steps_per_print"] = training.steps + 1  # the progress bar says it already
    if "optimizer" in config or "optimizer" not in run.deepspeed:
        _check_optimizer(run, config, problems)
    _fill_auto_multipliers(run, config, problems)
    _fill_schedule(run, config, problems)
    for monitor in _MONITORS:
        section = config.get(monitor)
        if not isinstance(section, dict):
            continue
        for key in _MONITOR_KEYS:
            if key in section:
                remedy = f"remove it here and set output in {run.file}"
                allowed = "nothing, the launcher writes it"
                problems.add(file, f"{monitor}.{key}", section[key], allowed, remedy)
        section["output_path"] = str(run.output)
        section["job_name"] = monitor
    config.pop("csv_monitor", None)  # the main job's own monitor has one file: RunConfig.wants_metrics_csv
    return config


def optimizer_type(config: JsonObject) -> str:
    """Name of the optimizer that the JSON chooses; empty if it chooses none."""
    section = config.get("optimizer")
    name = section.get("type") if isinstance(section, dict) else None
    return name if isinstance(name, str) else ""


def parameter_dtype(config: JsonObject) -> torch.dtype:
    """Type of the model's weights under this configuration."""
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        section = config.get(key)
        if isinstance(section, dict) and section.get("enabled"):
            return dtype
    return torch.float32


def zero_stage(config: JsonObject) -> int:
    """ZeRO stage of this configuration; DeepSpeed's default is 0."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _check_optimizer(run: RunConfig, config: JsonObject, problems: Problems) -> None:
    section = config.get("optimizer")
    if section is None:
        allowed = 'an object such as {"type": "BlockwiseAdamMini", "params": {"lr": 5e-4}}'
        problems.add(run.deepspeed_file, "optimizer", section, allowed, "add it")
    if zero_stage(config) == 3 and run.parallel.tensor > 1:
        allowed = "0, 1 or 2 with parallel.tensor > 1"
        remedy = "lower the stage or set parallel.tensor to 1"
        problems.add(run.deepspeed_file, "zero_optimization.stage", 3, allowed, remedy)


def _fill_auto_multipliers(run: RunConfig, config: JsonObject, problems: Problems) -> None:
    """Say how long the run is to an optimizer that measures its multipliers, whatever the schedule."""
    section = config.get("optimizer")
    params = section.get("params") if isinstance(section, dict) else None
    multipliers = params.get("lr_multipliers") if isinstance(params, dict) else None
    if multipliers == AUTO:
        multipliers = {AUTO: {}}
    if not isinstance(params, dict) or not isinstance(multipliers, dict) or not isinstance(multipliers.get(AUTO), dict):
        return
    if _TOTAL in multipliers[AUTO]:
        problems.add(
            run.deepspeed_file,
            f"optimizer.params.lr_multipliers.{AUTO}.{_TOTAL}",
            multipliers[AUTO][_TOTAL],
            "nothing, the launcher writes it",
            f"remove it here and set training.steps in {run.file}",
        )
    params["lr_multipliers"] = {**multipliers, AUTO: {**multipliers[AUTO], _TOTAL: run.training.steps}}


def _fill_schedule(run: RunConfig, config: JsonObject, problems: Problems) -> None:
    section = config.get("scheduler")
    if section is None:
        return
    params = section.setdefault("params", {})
    values = {_WARMUP: run.training.warmup_steps, _TOTAL: run.training.steps}
    sources = {_WARMUP: "training.warmup_steps", _TOTAL: "training.steps"}
    written = _SCHEDULE_KEYS.get(section["type"], ())
    for key in (*written, _WARMUP_FRACTION):
        if key in params:
            source = sources[_WARMUP if key == _WARMUP_FRACTION else key]
            remedy = f"remove it here and set {source} in {run.file}"
            allowed = "nothing, the launcher writes it"
            problems.add(run.deepspeed_file, f"scheduler.params.{key}", params.pop(key), allowed, remedy)
    params.update((key, values[key]) for key in written)
