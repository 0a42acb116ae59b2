# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise check FILE.json``: everything that is wrong in a DeepSpeed JSON that belongs to no run file.

Scripts of one's own, HF Trainer, Accelerate and tools around them have nothing but the JSON. What they fill in for
``"auto"`` is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ds_blockwise.hosts.deepspeed.config.check import json_mistakes
from ds_blockwise.hosts.deepspeed.config.words import AUTO, Mistake
from ds_blockwise.hosts.deepspeed.refusals import EngineFacts, facts_of_json, refusals
from ds_blockwise.optimizers.registry import OPTIMIZERS, SCHEDULES
from ds_blockwise.optimizers.settings import check_progress
from ds_blockwise.runs.reading.problems import Problems
from ds_blockwise.runs.reading.whole_files import JsonObject, read_json

_FILLED_IN = {
    "optimizer": ("lr", "betas", "eps", "weight_decay"),
    "scheduler": ("warmup_num_steps", "total_num_steps"),
}
"""What HF Trainer and Accelerate know, of what our classes take."""

_ANY_LENGTH = {"warmup_num_steps": 1, "total_num_steps": 2}


def check_engine_file(file: str | Path) -> tuple[JsonObject, Problems]:
    """Check a DeepSpeed JSON; ``"auto"`` may stand where HF Trainer and Accelerate fill it in.

    Args:
        file: The JSON.

    Returns:
        What is in it, and every problem found.
    """
    problems = Problems()
    config = read_json(Path(file), problems)
    if problems:
        return config, problems
    for mistake in (*json_mistakes(config, may_be_auto=True), *_auto_of_ours(config)):
        problems.add(file, *mistake)
    facts = facts_of_json(config)
    if facts.optimizer in OPTIMIZERS:
        for refusal in refusals(facts):
            problems.refuse(file, "optimizer.type", facts.optimizer, refusal)
    if not problems:
        check_optimizer(file, _without_auto(config), problems, may_have_schedule="scheduler" not in config)
    return config, problems


def check_optimizer(
    file: str | Path, config: JsonObject, problems: Problems, *, may_have_schedule: bool = False
) -> None:
    """The optimizer's and the schedule's own checks, on one weight.

    Args:
        file: The JSON, for messages.
        config: What is in it, without a mistake that `json_mistakes` finds, and without ``"auto"`` for others to fill
            in.
        problems: Every mistake is noted here.
        may_have_schedule: Whether a script may bring a schedule that the JSON does not name.
    """
    section = config.get("optimizer", {})
    cls = OPTIMIZERS.get(section.get("type"))
    if cls is None:
        return  # AdamW and others are DeepSpeed's business
    try:
        optimizer = cls([torch.nn.Parameter(torch.zeros(1))], **section.get("params", {}))
    except (ValueError, TypeError) as error:
        problems.refuse(file, "optimizer.params", section.get("params"), str(error))
        return
    schedule = config.get("scheduler")
    if schedule is not None and schedule["type"] in SCHEDULES:
        params = schedule.get("params", {})
        try:
            SCHEDULES[schedule["type"]](optimizer, **params)
        except (ValueError, TypeError) as error:
            problems.refuse(file, "scheduler.params", params, str(error))
            return
    if optimizer.block_settings.moves and not may_have_schedule:
        try:
            check_progress(optimizer.param_groups, section["type"])
        except ValueError as error:
            problems.refuse(file, "optimizer.params", section.get("params"), str(error))


def describe_engine_file(config: JsonObject) -> list[tuple[str, str]]:
    """What a sound DeepSpeed JSON says, as names and values for people."""
    facts = facts_of_json(config)
    described = [
        ("optimizer", _optimizer(config, facts)),
        ("engine", f"ZeRO-{facts.zero_stage}{_offload(facts)}, {facts.precision}"),
        ("clipping", clipping_text(config)),
    ]
    if left := [key for key in _auto_keys(config) if not _is_ours(key)]:
        described.append(("filled in", f"by HF Trainer or Accelerate, and not checked here: {', '.join(left)}"))
    return described


def clipping_text(config: JsonObject) -> str:
    """The norm to which a JSON has gradients clipped, in words."""
    norm = config.get("gradient_clipping")
    if norm is None:
        return "to a gradient norm of 1.0, DeepSpeed's default; set gradient_clipping in the JSON to change it"
    if norm == AUTO:
        return "as filled in"
    return f"to a gradient norm of {norm}" if norm else "none"


def _optimizer(config: JsonObject, facts: EngineFacts) -> str:
    if "optimizer" not in config:
        return "none here: the script must give one"
    return facts.optimizer if facts.optimizer in OPTIMIZERS else f"{facts.optimizer}, which is not one of ours"


def _offload(facts: EngineFacts) -> str:
    return "" if facts.offload_device is None else f", optimizer offloaded to {facts.offload_device}"


def _without_auto(config: JsonObject) -> JsonObject:
    """The JSON as it may look once ``"auto"`` was filled in."""
    filled = dict(config)
    for section, names in _FILLED_IN.items():
        found = config.get(section)
        if found is None:
            continue
        params = found.get("params", {})
        left = {name: value for name, value in params.items() if name not in names or value != AUTO}
        lengths = {name: value for name, value in _ANY_LENGTH.items() if section == "scheduler" and name in params}
        filled[section] = {**found, "params": {**lengths, **left}}
    return filled


def _auto_of_ours(config: JsonObject) -> Iterator[Mistake]:
    """Values ``"auto"`` of our own settings in a JSON that others fill in: Accelerate stops at them."""
    keys = list(_auto_keys(config))
    if all(map(_is_ours, keys)):
        return
    for key in filter(_is_ours, keys):
        remedy = 'write {"auto": {}}' if key.endswith(".lr_multipliers") else "leave it out"
        yield Mistake(key, AUTO, 'no "auto" of ours beside those that HF Trainer or Accelerate fills in', remedy)


def _auto_keys(values: Mapping[str, object], section: str = "") -> Iterator[str]:
    """Dotted names of what is ``"auto"``."""
    for key, value in values.items():
        path = f"{section}.{key}" if section else key
        if isinstance(value, Mapping):
            yield from _auto_keys(value, path)
        elif value == AUTO:
            yield path


def _is_ours(path: str) -> bool:
    """Whether ``"auto"`` is a value of one of our settings there."""
    section, _, name = path.partition(".params.")
    return bool(name) and name not in _FILLED_IN.get(section, ())
