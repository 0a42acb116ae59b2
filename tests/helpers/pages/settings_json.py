# SPDX-License-Identifier: Apache-2.0
"""`docs/reference/settings_json.md`: the params of optimizers and schedules, from their constructors and docstrings."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields

from ds_blockwise.blocks.roles import (
    BLOCK_TYPE_OF,
    BLOCK_TYPES,
    NORM_PLACE_MEANING,
    NORM_PLACES,
    QKV_LAYOUT_MEANING,
    ROLE_MEANING,
    STORAGE_MEANING,
    Role,
)
from ds_blockwise.blocks.settings.auto_settings import AutoMultipliers
from ds_blockwise.blocks.settings.defaults import DEFAULT_GRANULARITY, LR_PRESETS, PUBLISHED_GRANULARITY, UNITS
from ds_blockwise.blocks.settings.rules import Rule
from ds_blockwise.blocks.settings.transfer import Transfer
from ds_blockwise.measure.readings import TelemetrySettings
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.registry import OPTIMIZERS, SCHEDULES
from ds_blockwise.optimizers.schedules.schedule import BlockwiseLR
from ds_blockwise.optimizers.settings import _ADAMW_KEYS, OPTIMIZER_KEYS
from tests.helpers.pages.text import described, sentence, table

_INTRODUCTION = """\
# Settings in the JSON

Written by `make docs` from the constructors and their docstrings; a test compares them.

When to set which key, and why: [Settings](../settings.md). The keys are those of `"params"` in DeepSpeed's
`"optimizer"` and `"scheduler"`, and the arguments of the classes in Python. An unknown key is an error that names the
nearest known one.

```json
{
  "optimizer": {
    "type": "BlockwiseAdamMini",
    "params": {"lr": 4e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "weight_decay_multipliers": {"norm": 0.0}}
  },
  "scheduler": {
    "type": "BlockwiseCosineLR",
    "params": {"warmup_num_steps": 1000, "total_num_steps": 50000, "min_lr": 5e-5}
  }
}
```

Keys of maps are block types or roles; where both are given, the role wins.
"""
_RULES = """\
## `rules`

A list of objects. Each names parameters by `match` and sets at least one of the other keys for them. A rule that
matches nothing and two rules that match one parameter are errors.

```json
"rules": [
  {"match": "adapter\\\\..*weight", "role": "ffn"},
  {"match": "attn\\\\.c_attn", "role": "qkv", "layout": "concat", "num_heads": 12, "num_kv_heads": 12}
]
```
"""
_JSON_NAMES = {"qkv_layout": "layout"}
_SCHEDULES = """\
## Schedules

All warm up linearly from 0 and decay every block to one absolute `min_lr`. `BlockwiseLR` has every shape; the other
names are one shape each. Which one to take: [schedules](../schedules.md). With `launch/pretrain_llama.py` leave out
`warmup_num_steps` and `total_num_steps`: they come from the run file.
"""


def page() -> str:
    """The page's text."""
    lines = [_INTRODUCTION]
    for name, cls in OPTIMIZERS.items():
        lines += [f"## {name}", "", *table(("key", "default", "meaning"), _optimizer_rows(cls))]
    accepted = (f"`{key}`: {' or '.join(f'`{json.dumps(v)}`' for v in values)}" for key, values in _ADAMW_KEYS.items())
    lines += [f"So that an AdamW JSON needs a new `type` only, these are accepted too: {'; '.join(accepted)}.", ""]
    lines += ["## Block types and roles", "", *table(("role", "block type", "what it is"), _roles())]
    lines += ["### Presets of `lr_multipliers`", "", 'The default is `"adamw_scale"`.', ""]
    lines += table(("preset", "`lr` is the rate of", *(f"`{kind}`" for kind in BLOCK_TYPES)), _presets())
    lines += ["### Granularity by default", "", "The elements that share one second moment in BlockwiseAdamMini.", ""]
    lines += table(("role", "default", '`"published"`'), _granularities())
    lines += [_RULES, *table(("key", "meaning"), _rule_rows())]
    lines += ["### `layout`", "", *table(("value", "order of rows"), _choices(QKV_LAYOUT_MEANING))]
    lines += ["### `storage`", "", *table(("value", "shape"), _choices(STORAGE_MEANING))]
    lines += ["## `lr_multipliers`: `auto`", "", *_text_of(AutoMultipliers)]
    lines += [
        "## `transfer`",
        "",
        "The exponents, and what was measured: [The width rule](../rates.md#the-width-rule).",
        "",
    ]
    lines += _text_of(Transfer)
    lines += ["## `telemetry`", "", "What is measured: [Telemetry](../telemetry.md).", "", *_text_of(TelemetrySettings)]
    lines.append(_SCHEDULES)
    for name, schedule in SCHEDULES.items():
        lines += [f"### {name}", "", *table(("key", "default", "meaning"), _schedule_rows(schedule))]
    return "\n".join(lines).rstrip() + "\n"


def _optimizer_rows(cls: type[BlockwiseOptimizer]) -> Iterator[tuple[str, str, str]]:
    signature, meanings = inspect.signature(cls).parameters, described(cls, "Args")
    for key in (*OPTIMIZER_KEYS, *cls.own_settings):
        yield f"`{key}`", _default(signature[key].default), sentence(_linked(meanings[key]))


def _schedule_rows(cls: type[BlockwiseLR]) -> Iterator[tuple[str, str, str]]:
    meanings = described(BlockwiseLR, "Args")
    own = described(cls, "Args")
    for key, parameter in inspect.signature(cls).parameters.items():
        if key not in ("optimizer", "last_batch_iteration"):  # DeepSpeed gives these
            meaning = meanings.get(key) or own[key]
            default = "required" if parameter.default is parameter.empty else _default(parameter.default)
            yield f"`{key}`", default, sentence(meaning)


def _roles() -> Iterator[tuple[str, str, str]]:
    for role in Role:
        yield f"`{role.value}`", f"`{BLOCK_TYPE_OF[role]}`", sentence(ROLE_MEANING[role])
        if role is Role.NORM:
            yield from ((f"`{place}`", "`norm`", sentence(NORM_PLACE_MEANING[place])) for place in NORM_PLACES)


def _presets() -> Iterator[tuple[str, ...]]:
    for name, multipliers in LR_PRESETS.items():
        yield f'`"{name}"`', UNITS[name], *(f"{multipliers[kind]:g}" for kind in BLOCK_TYPES)


def _granularities() -> Iterator[tuple[str, str, str]]:
    for role in Role:
        yield f"`{role.value}`", f"`{DEFAULT_GRANULARITY[role]}`", f"`{PUBLISHED_GRANULARITY[role]}`"


def _rule_rows() -> Iterator[tuple[str, str]]:
    meanings = {_JSON_NAMES.get(key, key): text for key, text in described(Rule, "Attributes").items()}
    meanings["match"] = meanings["match"].partition(". The other attributes")[0]
    meanings["role"] = 'A role, for the whole parameter; `"qkv"` for a fused weight, with `layout` and the head counts.'
    meanings["layout"] = "Order of the rows in a fused weight; see below."
    for field in fields(Rule):
        if field.name == "norm_place":
            continue  # said by the role
        key = _JSON_NAMES.get(field.name, field.name)
        yield f"`{key}`", sentence(meanings[key])


def _choices(meanings: dict[str, str]) -> Iterator[tuple[str, str]]:
    for choice, meaning in meanings.items():
        yield f"`{choice}`", sentence(meaning)


def _text_of(cls: type) -> list[str]:
    meanings = described(cls, "Attributes")
    rows = ((f"`{f.name}`", _default_of(f), sentence(meanings[f.name])) for f in fields(cls))
    return table(("key", "default", "meaning"), rows)


def _default_of(field: Field[object]) -> str:
    if field.default_factory is not MISSING:
        return _default(field.default_factory())
    return "required" if field.default is MISSING else _default(field.default)


def _default(value: object) -> str:
    return "" if value is None or value == {} else f"`{json.dumps(value)}`"


def _linked(text: str) -> str:
    """References to classes of the code become links to this page's sections."""
    text = re.sub(r"`[\w.]+\.AutoMultipliers`", "[`auto`](#lr_multipliers-auto)", text)
    text = re.sub(r"`[\w.]+\.Transfer`", "[`transfer`](#transfer)", text)
    return re.sub(r"`[\w.]+\.TelemetrySettings`", "[`telemetry`](#telemetry)", text)
