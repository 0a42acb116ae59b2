# SPDX-License-Identifier: Apache-2.0
"""What of an optimizer's settings changed between a checkpoint and the present run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ds_blockwise.blocks.settings.defaults import ADAMW_RATE, UNITS
from ds_blockwise.checkpoint.record_types import Settings

_BEFORE_PRESETS = "paper"  # of records without the key "preset"


def differences(saved: Settings, own: Settings) -> list[str]:
    """What of ``settings_of`` changed between a checkpoint and the present run, a line each.

    Learning rates are left out (schedules move them), and so is the form of the files.
    """
    lines: list[str] = []
    for key in ("optimizer", "momentum_dtype"):
        lines += _changed(key, saved.get(key), own.get(key))
    cautious = [settings.get("cautious_weight_decay", False) for settings in (saved, own)]
    lines += _changed("cautious_weight_decay", *cautious)
    lines += _changed_multipliers(saved, own)
    by_name: dict[str, tuple[Mapping[str, object], Mapping[str, object]]] = {
        "weight_decay_multipliers": (saved.get("weight_decay_multipliers", {}), own["weight_decay_multipliers"]),
        "betas_by_type": (saved.get("betas_by_type", {}), own.get("betas_by_type", {})),
        "granularity": (saved.get("granularity", {}), own["granularity"]),
    }
    for key, (was, now) in by_name.items():
        lines += _changed_keys(key, was, now)
    if saved.get("optimizer") == own.get("optimizer"):
        lines += [
            line
            for name in sorted({*saved.get("own", {}), *own.get("own", {})})
            for line in _changed(name, saved.get("own", {}).get(name), own.get("own", {}).get(name))
        ]
    lines += _changed("rules", saved.get("rules"), own.get("rules"))
    lines += _changed("transfer", saved.get("transfer"), own.get("transfer"))
    lines += _changed_groups(saved.get("groups", []), own.get("groups", []))
    if not any(line.startswith(("granularity", "rules")) for line in lines) and saved.get("layout") and own["layout"]:
        lines += _changed("layout (roles, heads or shapes)", saved["layout"][:12], own["layout"][:12])
    return lines


def _changed_keys(key: str, was: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    return [line for name in sorted({*was, *now}) for line in _changed(f"{key}.{name}", was.get(name), now.get(name))]


def _changed_multipliers(saved: Settings, own: Settings) -> list[str]:
    """What changed of ``lr_multipliers``: the preset with all its numbers, or single numbers."""
    old, new = saved.get("preset", _BEFORE_PRESETS), own["preset"]
    was, now = saved.get("lr_multipliers", {}), own["lr_multipliers"]
    if old == new or was == now or not was:
        return _changed_keys("lr_multipliers", was, now)
    line = f'lr_multipliers was "{old}" ({_listed(was)}), is "{new}" ({_listed(now)}).'
    if old not in UNITS or UNITS[old] == UNITS[new]:  # a later version may know more presets
        return [line]
    factor = f"lr times {ADAMW_RATE:g}" if old == _BEFORE_PRESETS else f"lr divided by {ADAMW_RATE:g}"
    return [
        f"{line} With them the meaning of lr changed: it was the rate of {UNITS[old]}, is the rate of {UNITS[new]}. To "
        f'train on as before, write "lr_multipliers": "{old}", or give {factor}'
    ]


def _listed(multipliers: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {_shown(value)}" for key, value in multipliers.items())


def _changed_groups(was: Sequence[Mapping[str, object]], now: Sequence[Mapping[str, object]]) -> list[str]:
    if len(was) != len(now):
        return [f"the number of param groups was {len(was)}, is {len(now)}"]
    return [
        line
        for index, (old, new) in enumerate(zip(was, now, strict=True))
        for key in ("betas", "eps", "weight_decay")
        for line in _changed(f"param_groups[{index}].{key}", old.get(key), new.get(key))
    ]


def _changed(name: str, was: object, now: object) -> list[str]:
    return [] if was == now else [f"{name} was {_shown(was)}, is {_shown(now)}"]


def _shown(value: object) -> str:
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
