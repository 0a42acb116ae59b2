# SPDX-License-Identifier: Apache-2.0
"""What the installed DeepSpeed reads in a JSON, found by asking DeepSpeed itself.

DeepSpeed ignores a key that it does not know, but for sections that are pydantic models. `known_keys` hands its own
configuration class a mapping that notes what is asked of it; `mistakes` gives each section to its model.
"""

from __future__ import annotations

import copy
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.inference.config import WeightQuantConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DeepSpeedConfig, HybridEngineConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, ValidationError

from ds_blockwise.hosts.deepspeed.config.words import (
    AUTO,
    BATCH_KEYS,
    SCHEMA_KEY,
    Mistake,
    correction,
    keys_allowed,
    word_for,
)
from ds_blockwise.hosts.deepspeed.engine import VERIFY
from ds_blockwise.values import is_finite

MODELS: Mapping[str, type[BaseModel]] = {
    "bf16": DeepSpeedBF16Config,
    "bfloat16": DeepSpeedBF16Config,
    "comet": CometConfig,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
    "csv_monitor": CSVConfig,
    "fp16": DeepSpeedFP16Config,
    "hybrid_engine": HybridEngineConfig,
    "tensor_parallel": TPTrainingConfig,
    "tensorboard": TensorBoardConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
    "wandb": WandbConfig,
    "weight_quantization": WeightQuantConfig,
    "zero_optimization": DeepSpeedZeroConfig,
}
# Sections that DeepSpeed reads by hand, key by key, without a look at the others.
_BY_HAND = (
    "activation_checkpointing",
    "aio",
    "autotuning",
    "checkpoint",
    "data_types",
    "flops_profiler",
    "optimizer",
    "scheduler",
    "timers",
    "torch_autocast",
)
_ANY_BATCH = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}  # with any number of ranks
_CHECKED_BEFORE = ("optimizer", "scheduler")
# Read elsewhere than by `DeepSpeedConfig`.
_ELSEWHERE = ("data_parallel_size", "sequence_parallel_size")
# Kinds of values for which DeepSpeed has no default.
_KINDS: Mapping[str, type] = {
    "activation_checkpointing.number_checkpoints": int,
    "data_parallel_size": int,
    "flops_profiler.output_file": str,
    "log_level": str,
    "optimizer.legacy_fusion": bool,
    "sequence_parallel_size": int,
    "steps_per_print": int,
    "vocabulary_size": int,
}
_DTYPES = ("data_types.grad_accum_dtype", "data_types.param_dtype", "data_types.buffer_dtype", "torch_autocast.dtype")
_REMOVED: Mapping[str, str] = getattr(deepspeed_config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {})
_REMOVED_OF_ZERO: Mapping[str, str] = getattr(deepspeed_config, "_REMOVED_ZERO_CONFIG_KEYS", {})


class _Asked(dict[str, Any]):
    """A section that notes the keys that are asked of it, with their defaults."""

    def __init__(self, section: str, values: Mapping[str, Any], found: dict[str, dict[str, object]]) -> None:
        super().__init__(values)
        self.section = section
        self.found = found

    def _note(self, key: object, default: object = None) -> None:
        keys = self.found.setdefault(self.section, {})
        if keys.get(str(key)) is None:
            keys[str(key)] = default

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key, default)
        if key not in self.keys_given() and isinstance(default, dict) and not default and self.section:
            return _Asked(f"{self.section}.{key}", {}, self.found)
        return super().get(key, default)

    def keys_given(self) -> list[str]:
        return list(super().keys())

    def __contains__(self, key: object) -> bool:
        self._note(key)
        return super().__contains__(key)

    def keys(self) -> Any:  # what DeepSpeed looks a key up in
        return self

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)


@functools.cache
def known_keys() -> Mapping[str, Mapping[str, object]]:
    """By section (``""``: the top), each key that DeepSpeed reads there by hand, with its default, None if unknown."""
    found: dict[str, dict[str, object]] = {}
    sections = {name: _Asked(name, {}, found) for name in _BY_HAND}
    built = DeepSpeedConfig(_Asked("", {**_ANY_BATCH, **sections}, found))
    found["pipeline"] = dict.fromkeys(built.pipeline)
    for section in _CHECKED_BEFORE:
        found[section]["params"] = None
    found["checkpoint"] |= {"trust": False, "verify": VERIFY[0]}  # our own: `engine.trusts`, `engine.verifies`
    top = {key: default for key, default in found[""].items() if key not in _REMOVED}
    return {**found, "": {**top, **dict.fromkeys(_ELSEWHERE)}}


def schedule_class(name: str) -> object:
    """DeepSpeed's schedule of a name."""
    return getattr(lr_schedules, name)


def mistakes(config: Mapping[str, Any], *, may_be_auto: bool = False) -> list[Mistake]:
    """Everything that DeepSpeed would ignore, read otherwise or refuse.

    Args:
        config: a JSON of which the optimizer, the schedule and the batch were checked already.
        may_be_auto: whether HF Trainer fills in values ``"auto"``.
    """
    found = [*_by_hand("", config, may_be_auto), *_in_models(config, may_be_auto)]
    if found:
        return found
    # DeepSpeed writes defaults into sections
    whole = copy.deepcopy({key: value for key, value in config.items() if key not in BATCH_KEYS})
    try:
        DeepSpeedConfig({**whole, **_ANY_BATCH})
    except Exception as error:  # DeepSpeed refuses with any type: of its own, AssertionError, TypeError, ...
        reason = f"what DeepSpeed takes ({type(error).__name__}: {str(error).strip()})"
        return [Mistake("(whole)", "...", reason, "correct it")]
    return []


def _by_hand(section: str, values: Mapping[str, Any], may_be_auto: bool) -> Iterator[Mistake]:
    known = known_keys()[section]
    for key, value in values.items():
        path = f"{section}.{key}" if section else key
        if path in MODELS or path in BATCH_KEYS:
            continue
        if not section and key in _REMOVED:
            yield Mistake(path, value, f"nothing: {_REMOVED[key]}", "remove it")
        elif key not in known:
            yield Mistake(path, value, keys_allowed("DeepSpeed's keys", known), correction(key, known))
        elif path in known_keys():
            if path in _CHECKED_BEFORE:
                continue
            if isinstance(value, Mapping):
                yield from _by_hand(path, value, may_be_auto)
            else:
                yield Mistake(path, value, "an object", "correct it, or remove it")
        elif not (may_be_auto and value == AUTO) and (allowed := _unlike(path, value, known[key])) is not None:
            yield Mistake(path, value, allowed, "correct the value")


def unread(config: Mapping[str, Any], section: str = "") -> Iterator[Mistake]:
    """Keys that DeepSpeed never asks for, in the sections that are no models; the models refuse them."""
    known = known_keys()[section]
    for key, value in config.items():
        path = f"{section}.{key}" if section else key
        if key not in known and path not in MODELS and path != SCHEMA_KEY:
            yield Mistake(path, value, keys_allowed("DeepSpeed's keys", known), correction(key, known))
        elif path in known_keys() and isinstance(value, Mapping):
            yield from unread(value, path)


def _unlike(path: str, value: object, default: object) -> str | None:
    """What is allowed, where a value is not of the kind of the default; None if it is."""
    if path in _DTYPES and value is not None:
        return None if value in _dtype_names() else f"one of {', '.join(_dtype_names())}"
    if path == "checkpoint.verify":
        return None if value in VERIFY else f"one of {', '.join(VERIFY)}"
    kind = _KINDS.get(path, type(default))
    if value is None and default is None:
        return None
    if kind not in (bool, int, float, str) or (kind is str and isinstance(value, list)):
        return None  # DeepSpeed looks itself
    return None if _fits(value, kind) else word_for(kind)


def _dtype_names() -> list[str]:
    return [name for kind in deepspeed_config.DtypeEnum for name in kind._all_values if isinstance(name, str)]


def _fits(value: object, kind: object) -> bool:
    """Whether a value is what JSON has for a type; DeepSpeed's models take text for numbers and 1 for true."""
    if kind is bool:
        return isinstance(value, bool)
    if isinstance(kind, type) and issubclass(kind, int):
        return not isinstance(value, bool) and (
            isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        )
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and is_finite(value)
    return isinstance(value, str) if kind is str else True


def _in_models(config: Mapping[str, Any], may_be_auto: bool) -> Iterator[Mistake]:
    for path, model in MODELS.items():
        parent, _, key = path.rpartition(".")
        holder = config.get(parent, {}) if parent else config
        if isinstance(holder, Mapping) and key in holder:
            value = holder[key]
            if isinstance(value, Mapping):
                yield from _in_model(path, model, value, may_be_auto)
            else:
                yield Mistake(path, value, "an object", "correct it, or remove it")


def _in_model(path: str, model: type[BaseModel], values: Mapping[str, Any], may_be_auto: bool) -> Iterator[Mistake]:
    told = {}
    for mistake in _loose(path, model, values, may_be_auto):
        told[mistake.key] = mistake
    try:
        model(**values)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            at = ".".join([path, *map(str, found["loc"])])
            if at not in told:
                told[at] = Mistake(
                    at, found["input"], found["msg"].removeprefix("Input should be "), "correct the value"
                )
    except (TypeError, ValueError, AssertionError) as error:  # contradictions inside of a section
        if not told:
            told[path] = Mistake(path, dict(values), f"what DeepSpeed takes ({error})", "correct it")
    yield from told.values()


def _loose(path: str, model: type[BaseModel], values: Mapping[str, Any], may_be_auto: bool) -> Iterator[Mistake]:
    """Unknown keys, and values that pydantic would make into the right type."""
    fields = {name: field for key, field in model.model_fields.items() for name in (key, field.alias) if name}
    for key, value in values.items():
        at = f"{path}.{key}"
        if key not in fields:
            removed = _REMOVED_OF_ZERO.get(key) if path == "zero_optimization" else None
            allowed = keys_allowed("the keys", fields) if removed is None else f"nothing: {removed}"
            yield Mistake(at, value, allowed, correction(key, fields) if removed is None else "remove it")
        elif not (may_be_auto and value == AUTO):
            yield from _loose_value(at, fields[key].annotation, value, may_be_auto)


def _loose_value(at: str, annotation: Any, value: object, may_be_auto: bool) -> Iterator[Mistake]:
    kinds = [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = list(typing.get_args(annotation))
        if value is None and type(None) in kinds:
            return
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if isinstance(value, Mapping):
                yield from _loose(at, kind, value, may_be_auto)
            else:
                yield Mistake(at, value, "an object", "correct it, or remove it")
            return
    kinds = [kind for kind in kinds if kind is not type(None)]
    if kinds and not any(_fits(value, kind) for kind in kinds):
        yield Mistake(at, value, " or ".join(map(word_for, kinds)), "correct the value")
    elif isinstance(value, bool) and not any(kind in (bool, object, Any) for kind in kinds):
        yield Mistake(at, value, "no truth value", "correct the value")
