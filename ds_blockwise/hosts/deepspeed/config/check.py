# SPDX-License-Identifier: Apache-2.0
"""Everything wrong in a DeepSpeed JSON, before anything is built: misspelt keys, wrong kinds, unknown names.

DeepSpeed's part is asked of the installed DeepSpeed (`models`); without it, the top-level keys are compared with a
record. Optimizer, schedule, batch and clipping, which DeepSpeed takes as they come, are checked here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ds_blockwise.hosts.deepspeed.config.words import AUTO, BATCH_KEYS, SCHEMA_KEY, Mistake, correction, keys_allowed
from ds_blockwise.optimizers.registry import OPTIMIZERS, SCHEDULES
from ds_blockwise.values import is_finite, nearest

# Records of DeepSpeed 0.19; a test compares them with the installed version.
OPTIMIZERS_OF_DEEPSPEED = ("adagrad", "adam", "adamw", "lamb", "lion", "muadam", "muadamw", "muon", "musgd")
SCHEDULES_OF_DEEPSPEED = ("LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR")
TOP_LEVEL_KEYS = (
    "activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type "
    "compile csv_monitor data_efficiency data_parallel_size data_types dataloader_drop_last datastates_ckpt "
    "disable_allgather disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps "
    "gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine log_level "
    "managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler "
    "seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensor_parallel tensorboard timers "
    "torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism "
    "vocabulary_size wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer "
    "zero_force_ds_cpu_optimizer zero_optimization"
).split()
_ADAM_KEYS_OF_DEEPSPEED = ("adam_w_mode", "adamw_mode", "bias_correction", "fp32_optimizer_states", "set_grad_none")
_NUMBERS = ("lr", "eps", "weight_decay")
_PRECISIONS = ("bf16", "fp16", "torch_autocast")
_SECTIONS = ("bf16", "bfloat16", "fp16", "torch_autocast", "zero_optimization")


def json_mistakes(config: Mapping[str, Any], *, may_be_auto: bool = False) -> list[Mistake]:
    """Every mistake in a DeepSpeed JSON; an empty list for one that DeepSpeed and we read as it is meant.

    Args:
        config: the JSON.
        may_be_auto: whether HF Trainer or Accelerate fills in values ``"auto"``.
    """
    config = {key: value for key, value in config.items() if key != SCHEMA_KEY}
    found = [*_clipping(config, may_be_auto), *_batch(config, may_be_auto), *_stage(config), *_precision(config)]
    found += _named(config, "optimizer", ("type", "params", "legacy_fusion"), may_be_auto)
    found += _named(config, "scheduler", ("type", "params"), may_be_auto)
    if is_deepspeed_installed():
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints while it is imported
            from ds_blockwise.hosts.deepspeed.config.models import mistakes
        known = {mistake.key for mistake in found} | ({"(whole)"} if found else set())
        return [*found, *(m for m in mistakes(config, may_be_auto=may_be_auto) if m.key not in known)]
    for key, value in config.items():
        if key not in TOP_LEVEL_KEYS:
            known_keys = keys_allowed("DeepSpeed's keys", TOP_LEVEL_KEYS)
            found.append(Mistake(key, value, known_keys, correction(key, TOP_LEVEL_KEYS)))
        elif key in _SECTIONS and not isinstance(value, Mapping):
            found.append(Mistake(key, value, "an object", "correct it, or remove it"))
    return found


def is_deepspeed_installed() -> bool:
    """Whether the JSON can be checked by DeepSpeed itself."""
    return importlib.util.find_spec("deepspeed") is not None


def clipping_mistake(value: object) -> str | None:
    """What is allowed, where a value is no norm to clip to; None if it is one.

    DeepSpeed compares the value with 0, so that NaN and negative numbers turn clipping off without a word.
    """
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and is_finite(value) and value >= 0
    return None if fits else "a finite number, at least 0 (0: gradients are not clipped; DeepSpeed's default: 1.0)"


def _clipping(config: Mapping[str, Any], may_be_auto: bool) -> Iterator[Mistake]:
    value = config.get("gradient_clipping", 1.0)
    allowed = None if may_be_auto and value == AUTO else clipping_mistake(value)
    if allowed is not None:
        yield Mistake("gradient_clipping", value, allowed, "correct the value")


def _batch(config: Mapping[str, Any], may_be_auto: bool) -> Iterator[Mistake]:
    for key in BATCH_KEYS:
        value = config.get(key, 1)
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not is_count and not (may_be_auto and value == AUTO):
            yield Mistake(key, value, "a whole number, at least 1", "correct the value")


def _stage(config: Mapping[str, Any]) -> Iterator[Mistake]:
    zero = config.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        yield Mistake("zero_optimization.stage", stage, "0, 1, 2 or 3", "correct it")


def _precision(config: Mapping[str, Any]) -> Iterator[Mistake]:
    sections = ((name, config.get(name)) for name in _PRECISIONS)
    on = [name for name, section in sections if isinstance(section, Mapping) and section.get("enabled") is True]
    if len(on) > 1:
        yield Mistake(", ".join(on), "enabled", "one precision at a time", "disable all but one")


def _named(config: Mapping[str, Any], section: str, keys: Sequence[str], may_be_auto: bool) -> Iterator[Mistake]:
    """Mistakes in the section of the optimizer or of the schedule: ``{"type": ..., "params": {...}}``."""
    if section not in config:
        return
    found = config[section]
    if not isinstance(found, Mapping):
        yield Mistake(section, found, 'an object such as {"type": "...", "params": {...}}', "correct it, or remove it")
        return
    for key, value in found.items():
        if key not in keys:
            yield Mistake(f"{section}.{key}", value, keys_allowed("the keys", keys), correction(key, keys))
    name, params = found.get("type"), found.get("params", {})
    known, is_known = _names(section)
    if not isinstance(name, str) or not is_known(name):
        near = nearest(name, known)
        remedy = f"did you mean {near!r}?" if near is not None else "correct the name"
        allowed = f"{', '.join(OPTIMIZERS if section == 'optimizer' else SCHEDULES)}, or one of DeepSpeed's or torch's"
        yield Mistake(f"{section}.type", name, allowed, remedy)
    if not isinstance(params, Mapping):
        yield Mistake(f"{section}.params", params, "an object", "correct it, or remove it")
    elif isinstance(name, str) and is_known(name):
        yield from _params(section, name, params, may_be_auto)


def _names(section: str) -> tuple[list[str], Any]:
    """The names that are near enough to be proposed, and the test of a name."""
    if section == "optimizer":
        torchs = [name for name, cls in vars(torch.optim).items() if _is_class(cls, torch.optim.Optimizer)]
        known = list(dict.fromkeys([*OPTIMIZERS, *torchs]))
        return known, lambda name: name in known or name.lower() in OPTIMIZERS_OF_DEEPSPEED
    schedules = vars(torch.optim.lr_scheduler)
    torchs = [name for name, cls in schedules.items() if _is_class(cls, torch.optim.lr_scheduler.LRScheduler)]
    known = list(dict.fromkeys([*SCHEDULES, *SCHEDULES_OF_DEEPSPEED, *torchs]))
    return known, lambda name: name in known


def _is_class(found: object, base: type) -> bool:
    return isinstance(found, type) and issubclass(found, base)


def _params(section: str, name: str, params: Mapping[str, Any], may_be_auto: bool) -> Iterator[Mistake]:
    """Unknown keys, and numbers that are none. Our own optimizers check the rest themselves."""
    if section == "optimizer" and name in OPTIMIZERS:
        return
    known = _parameters(section, name)
    for key, value in params.items():
        path = f"{section}.params.{key}"
        if may_be_auto and value == AUTO:
            continue
        if known is not None and key not in known:
            yield Mistake(path, value, keys_allowed("the keys", known), correction(key, known))
        elif section == "optimizer" and key in _NUMBERS and not _is_number(value, low=0.0):
            yield Mistake(path, value, "a finite number, at least 0", "correct the value")
        elif section == "optimizer" and key == "betas" and not _are_betas(value):
            yield Mistake(path, value, "two numbers from 0 to below 1", "correct the value")
        elif section == "scheduler" and known is not None and not _is_like(value, known[key]):
            kind = "true or false" if isinstance(known[key], bool) else "a finite number, or a list of them"
            yield Mistake(path, value, kind, "correct the value")


def _parameters(section: str, name: str) -> Mapping[str, object] | None:
    """Arguments of a class with their defaults; None where they are not known here."""
    cls: object = None
    if section == "optimizer":
        adam = name.lower() in ("adam", "adamw")
        cls = torch.optim.AdamW if adam else getattr(torch.optim, name, None)
        more = dict.fromkeys(("torch_adam", *_ADAM_KEYS_OF_DEEPSPEED) if adam else ())
    else:
        cls, more = SCHEDULES.get(name) or getattr(torch.optim.lr_scheduler, name, None), {}
        if cls is None and is_deepspeed_installed():
            with contextlib.redirect_stdout(sys.stderr):
                from ds_blockwise.hosts.deepspeed.config.models import schedule_class
            cls = schedule_class(name)
    if not isinstance(cls, type):
        return None
    given = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in given if p.name not in ("self", "optimizer", "params")} | more


def _is_number(value: object, low: float = -math.inf) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and is_finite(value) and value >= low


def _are_betas(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_number(b, 0.0) and b < 1 for b in value)


def _is_like(value: object, default: object) -> bool:
    """Whether a value is of the kind of a schedule's default; numbers may be lists, one for each param group."""
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, (int, float)):
        return _is_number(value) or (isinstance(value, list) and all(map(_is_number, value)))
    return True
