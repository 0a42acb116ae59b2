# SPDX-License-Identifier: Apache-2.0
"""The JSON Schemas in `configs/schema`, for editors: from constructors, dataclasses and their docstrings.

A schema says which keys there are and what kind of value each takes. What only several keys together tell (a fused
weight's ``layout`` goes with its role) is left to ``ds-blockwise check``: a schema never refuses what the code takes.
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal

import torch
from pydantic import TypeAdapter

from ds_blockwise.blocks.roles import BLOCK_TYPES, NORM_PLACES, QKV_LAYOUTS, STORAGES
from ds_blockwise.blocks.settings.auto_settings import AUTO, AutoMultipliers
from ds_blockwise.blocks.settings.block_settings import _SETTING_KEYS, PRESET
from ds_blockwise.blocks.settings.defaults import (
    GRANULARITIES,
    LR_PRESETS,
    NOT_ORTHOGONALIZED,
    ORTHOGONALIZE,
    PUBLISHED,
)
from ds_blockwise.blocks.settings.rules import _OPTIONAL, _RULE_KEYS, ROLE_NAMES, Rule
from ds_blockwise.blocks.settings.transfer import Transfer
from ds_blockwise.blocks.settings.update_settings import MovingMultiplier
from ds_blockwise.hosts.deepspeed.config.check import OPTIMIZERS_OF_DEEPSPEED, TOP_LEVEL_KEYS
from ds_blockwise.hosts.deepspeed.config.words import SCHEMA_KEY
from ds_blockwise.measure.readings import TelemetrySettings
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.registry import OPTIMIZERS, SCHEDULES
from ds_blockwise.optimizers.schedules.schedule import BlockwiseLR
from ds_blockwise.optimizers.schedules.shapes import DECAY_SHAPES, SHAPES
from ds_blockwise.optimizers.settings import _ADAMW_KEYS, BACKENDS, OPTIMIZER_KEYS
from ds_blockwise.runs.model_shape import GPTShape
from ds_blockwise.runs.run_file import RunFile
from ds_blockwise.runs.strict_files import StrictSection
from tests.helpers import ROOT
from tests.helpers.pages.run_file import CHOICES as RUN_CHOICES
from tests.helpers.pages.text import described

FOLDER = ROOT / "configs" / "schema"
Schema = dict[str, Any]
_DRAFT = "http://json-schema.org/draft-07/schema#"  # the newest that every editor reads
# what Hugging Face Trainer and Accelerate fill in
_FILLED_IN = ("lr", "betas", "eps", "weight_decay", "warmup_num_steps", "total_num_steps")
_NUMBER: Schema = {"type": "number", "minimum": 0}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_BETA: Schema = {"type": "number", "minimum": 0, "exclusiveMaximum": 1}
_TEXT: Schema = {"type": "string"}
_SIMPLE: dict[Any, Schema] = {int: _COUNT, float: _NUMBER, bool: {"type": "boolean"}, str: _TEXT}


def any_of(*choices: Schema) -> Schema:
    return {"anyOf": list(choices)}


def one_value_of(values: Iterable[object]) -> Schema:
    return {"enum": list(values)}


def section(properties: Mapping[str, Schema], required: Iterable[str] = ()) -> Schema:
    """An object with these keys and no others."""
    needed = {"required": list(required)} if required else {}
    return {"type": "object", "properties": dict(properties), **needed, "additionalProperties": False}


def map_of(value: Schema, *more: str, **own: Schema) -> Schema:
    """A map from block types, roles and more keys of that kind, and keys with values of their own."""
    names = one_value_of((*_SETTING_KEYS, *more, *own))
    return {"type": "object", "properties": own, "propertyNames": names, "additionalProperties": value}


def pair(value: Schema) -> Schema:
    return {"type": "array", "items": value, "minItems": 2, "maxItems": 2}


def of_dataclass(cls: type, own: Mapping[str, Schema] | None = None) -> Schema:
    """The keys of a settings class, described by its docstring; ``own`` says what its annotations do not."""
    hints, meanings = typing.get_type_hints(cls), described(cls, "Attributes")
    keys = {}
    for field in fields(cls):
        value = (own or {}).get(field.name) or of_annotation(hints[field.name])
        keys[field.name] = {**value, "description": meanings[field.name]} if field.name in meanings else value
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    return section(keys, missing)


def of_annotation(kind: Any) -> Schema:
    """The values of a type.

    Raises:
        TypeError: the type says too little, such as ``object``.
    """
    if kind in _SIMPLE:
        return _SIMPLE[kind]
    if kind is type(None):
        return {"type": "null"}
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return one_value_of(inside)
    if origin in (typing.Union, types.UnionType):
        return any_of(*map(of_annotation, inside))
    if origin is tuple and len(inside) == 2:
        return pair(of_annotation(inside[0]))
    if is_dataclass(kind):
        return of_dataclass(typing.cast(type, kind))
    raise TypeError(f"{kind} says too little: write its schema")


_MULTIPLIER = any_of(_NUMBER, of_dataclass(MovingMultiplier))
_BETAS = pair(any_of(_BETA, {"type": "null"}))
_ROLES = one_value_of((*ROLE_NAMES, *NORM_PLACES))
_BAND = pair(_NUMBER)
_ORTHOGONALIZE = one_value_of((*ORTHOGONALIZE, NOT_ORTHOGONALIZED))


def rule() -> Schema:
    """One entry of ``rules``."""
    own: dict[str, Schema] = {
        "match": {"type": "string", "minLength": 1, "format": "regex"},
        "role": one_value_of((*ROLE_NAMES, *NORM_PLACES, "qkv", None)),
        "qkv_layout": one_value_of((*QKV_LAYOUTS, None)),
        "lr_multiplier": any_of(_MULTIPLIER, {"type": "null"}),
        "betas": any_of(_BETAS, {"type": "null"}),
        "granularity": one_value_of((*GRANULARITIES, None)),
        "storage": one_value_of((*STORAGES, None)),
        "orthogonalize": one_value_of((*_ORTHOGONALIZE["enum"], None)),
    }
    whole = of_dataclass(Rule, own)
    keys = {"layout" if key == "qkv_layout" else key: value for key, value in whole["properties"].items()}
    return section({key: keys[key] for key in (*_RULE_KEYS, _OPTIONAL)}, ("match",))


def lr_multipliers(cls: type[BlockwiseOptimizer]) -> Schema:
    """A preset's name, or numbers by block type or role."""
    measured = of_dataclass(AutoMultipliers, {"total_num_steps": any_of(_COUNT, {"type": "null"})})
    names = [*LR_PRESETS, *([AUTO] if cls.can_be_measured else [])]
    own = {PRESET: one_value_of(LR_PRESETS)}
    if cls.can_be_measured:
        own[AUTO] = any_of(section(measured["properties"]), {"type": "null"})
    return any_of(one_value_of(names), map_of(_MULTIPLIER, **own))


# What constructors take as ``object``.
_STRUCTURED: dict[str, Callable[[type[BlockwiseOptimizer]], Schema]] = {
    "lr_multipliers": lr_multipliers,
    "weight_decay_multipliers": lambda cls: map_of(_NUMBER),
    "granularity": lambda cls: any_of(one_value_of([PUBLISHED]), map_of(one_value_of(GRANULARITIES), "bias")),
    "rules": lambda cls: {"type": "array", "items": rule()},
    "transfer": lambda cls: of_dataclass(Transfer),
    "betas_by_type": lambda cls: map_of(_BETAS),
    "telemetry": lambda cls: of_dataclass(
        TelemetrySettings,
        {"band": any_of(_BAND, section(dict.fromkeys(BLOCK_TYPES, _BAND)), {"type": "null"})},
    ),
    "orthogonalize": lambda cls: map_of(_ORTHOGONALIZE),
}
_CHOICES: dict[str, Iterable[object]] = {
    "backend": BACKENDS,
    "fused_step": (False, True),
    "shape": SHAPES,
    "decay_shape": DECAY_SHAPES,
}


def takes(cls: type[BlockwiseOptimizer], **params: object) -> bool:
    """Whether an optimizer's constructor takes these params."""
    try:
        cls([torch.zeros(1)], **params)  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return False
    return True


def optimizer_params(cls: type[BlockwiseOptimizer], shared: Schema) -> Schema:
    """The ``"params"`` of an optimizer; what several optimizers have alike goes into ``shared``."""
    signature, meanings = inspect.signature(cls).parameters, described(cls, "Args")
    hints = typing.get_type_hints(cls.__init__)
    keys: dict[str, Schema] = {}
    for key in (*OPTIMIZER_KEYS, *cls.own_settings):
        if key == "transfer" and not takes(cls, transfer={"base_width": 1}):
            continue
        if key in _STRUCTURED:
            own = _STRUCTURED[key](cls)
            name = key if shared.setdefault(key, own) == own else f"{key}_of_{cls.__name__}"
            shared[name] = own
            value = any_of({"$ref": f"#/definitions/{name}"}, {"type": "null"})
        elif key == "betas":
            value = pair(_BETA)
        else:
            chosen = [choice for choice in _CHOICES.get(key, ()) if takes(cls, **{key: choice})]
            value = one_value_of(chosen) if chosen else dict(of_annotation(hints[key]))
            if value.get("type") in ("number", "integer"):
                value |= {} if takes(cls, **{key: 0}) else {"minimum": 1}
                value |= {} if takes(cls, **{key: 1}) else {"exclusiveMaximum": 1}
        keys[key] = _finished(key, value, signature[key].default, meanings[key])
    accepted = {key: one_value_of(values) for key, values in _ADAMW_KEYS.items()}
    return section(keys | accepted)


def schedule_params(cls: type[BlockwiseLR]) -> Schema:
    """The ``"params"`` of a schedule. None is required: the main job and Trainer fill in the lengths."""
    meanings = {**described(BlockwiseLR, "Args"), **described(cls, "Args")}
    hints, keys = typing.get_type_hints(cls.__init__), {}
    for key, parameter in inspect.signature(cls).parameters.items():
        if key in ("optimizer", "last_batch_iteration"):  # DeepSpeed gives these
            continue
        value = any_of(one_value_of(_CHOICES[key]), {"type": "null"}) if key in _CHOICES else of_annotation(hints[key])
        default = None if parameter.default is parameter.empty else parameter.default
        keys[key] = _finished(key, value, default, meanings[key])
    return section(keys)


def _finished(key: str, value: Schema, default: object, meaning: str) -> Schema:
    value = any_of(value, one_value_of([AUTO])) if key in _FILLED_IN else value
    shown = {} if default is None else {"default": list(default) if isinstance(default, tuple) else default}
    return {**value, **shown, "description": meaning}


def named(classes: Mapping[str, Schema], other: Iterable[str], *more: str) -> Schema:
    """A section ``{"type": ..., "params": ...}``: the params of our types are known, those of others are theirs."""
    cases = [
        {
            "if": {"required": ["type"], "properties": {"type": {"const": name}}},
            "then": {"properties": {"params": params}},
        }
        for name, params in classes.items()
    ]
    # names in lower case are DeepSpeed's, in any case; others are torch's
    kind = any_of(one_value_of([*classes, *other]), {"type": "string", "not": {"pattern": "^Blockwise"}})
    keys = {"type": kind, "params": {"type": "object"}, **{key: {} for key in more}}
    return {**section(keys, ("type",)), "allOf": cases}


def deepspeed() -> Schema:
    """A DeepSpeed JSON: our two sections in full, DeepSpeed's keys by name."""
    keys: dict[str, Schema] = {SCHEMA_KEY: _TEXT, **{key: {} for key in TOP_LEVEL_KEYS}}
    shared: Schema = {}
    optimizers = {name: optimizer_params(cls, shared) for name, cls in OPTIMIZERS.items()}
    keys["optimizer"] = named(optimizers, OPTIMIZERS_OF_DEEPSPEED, "legacy_fusion")
    keys["scheduler"] = named({name: schedule_params(cls) for name, cls in SCHEDULES.items()}, ())
    return _titled(
        "DeepSpeed JSON with the optimizers and schedules of ds_blockwise", {**section(keys), "definitions": shared}
    )


def run_file() -> Schema:
    """A run file; nothing is required, because a base may have it."""
    whole = _of_sections(RunFile)
    whole["properties"] = {
        "base": {**_TEXT, "description": "Another run file, whose entries hold where this one states nothing."}
    } | whole["properties"]
    return _titled("Run file of launch/pretrain_llama.py", _without_required(whole))


def model_file() -> Schema:
    """A model file."""
    return _titled("Model file of launch/pretrain_llama.py", _of_sections(GPTShape))


def _of_sections(cls: type[StrictSection]) -> Schema:
    schema = TypeAdapter(cls).json_schema()
    for name, part in {cls.__name__: schema, **schema.get("$defs", {})}.items():
        owner = cls if name == cls.__name__ else _section_of(cls, name)
        meanings = described(owner, "Attributes")
        for key, value in part["properties"].items():
            value.pop("title", None)
            if value.get("type") == "array":  # one text may stand without a list
                least = {"minItems": value["minLength"]} if "minLength" in value else {}  # pydantic's word is of texts
                value = any_of({"type": "string"}, {"type": "array", "items": value["items"], **least})
            elif key in RUN_CHOICES:
                value = one_value_of(
                    dict.fromkeys(("", *RUN_CHOICES[key]) if value.get("default") == "" else RUN_CHOICES[key])
                )
            part["properties"][key] = {**value, "description": meanings[key]}
        part.pop("title", None)
        part.pop("description", None)
    return schema


def _section_of(cls: type, name: str) -> type:
    return next(hint for hint in typing.get_type_hints(cls).values() if getattr(hint, "__name__", "") == name)


def _without_required(schema: Schema) -> Schema:
    for part in (schema, *schema.get("$defs", {}).values()):
        part.pop("required", None)
    return schema


def _titled(title: str, schema: Schema) -> Schema:
    return {"$schema": _DRAFT, "title": title, **schema}


def text_of(schema: Callable[[], Schema]) -> Callable[[], str]:
    """The file of a schema."""
    return lambda: json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


SCHEMAS = {"deepspeed": deepspeed, "run": run_file, "model": model_file}
