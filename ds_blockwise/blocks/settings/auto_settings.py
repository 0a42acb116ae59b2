# SPDX-License-Identifier: Apache-2.0
"""The settings of measured multipliers: ``"lr_multipliers": "auto"``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from ds_blockwise.blocks.settings.defaults import DEFAULT_EXPONENT, DEFAULT_PRESET, LR_PRESETS, MEASURABLE
from ds_blockwise.values import as_count, as_mapping, as_multiplier, check_keys, if_given

AUTO = "auto"
EARLIEST_MEASUREMENT = 0.02  # share of a run; see `AutoMultipliers.after`
EARLIEST_STEP = 1000  # see `AutoMultipliers.not_before`


@dataclass(frozen=True, slots=True)
class AutoMultipliers:
    """How multipliers are measured: ``"lr_multipliers": "auto"`` or ``{"auto": {...}}``.

    Attributes:
        after: share of the run before the measurement; at least 0.02, because earlier the order of sharpness among
            block types is another one (at step 100 of 50,000 queries and keys are flattest and values sharpest).
        not_before: least number of updates before the measurement, whatever ``after`` says. The order of sharpness
            settles after a number of steps, not after a share of the run (1,000 in arXiv 2502.19002; 300 in our small
            run of AdamW, docs/evidence.md).
        exponent: above 0 and at most 1: ``p`` in ``r = clamp((S_norm / S_type) ** p, 1, high)``. The multiplier is r in
            the unit of ``"paper"``, and r / 8 in that of ``"adamw_scale"``.
        high: largest ``r``.
        ramp: share of the run over which multipliers go from 1 to the measured ones.
        total_num_steps: updates of the whole run; None: taken from the JSON's schedule.
        head: whether the multiplier of an untied output layer is measured too. Off by default: the layer is sharp but
            trains best at the highest rate. With its measured multiplier the loss of a small run was 0.23 nats higher
            (docs/evidence.md).
    """

    after: float = EARLIEST_MEASUREMENT
    exponent: float = DEFAULT_EXPONENT
    high: float = 16.0
    ramp: float = 0.01
    total_num_steps: int | None = None
    not_before: int = EARLIEST_STEP
    head: bool = False


def parse_auto(value: object, preset: str = DEFAULT_PRESET) -> tuple[AutoMultipliers | None, object]:
    """The measurement that ``lr_multipliers`` asks for (None: none), and the fixed multipliers beside it.

    Args:
        value: the setting, without its preset.
        preset: gives the unit, and the multiplier of the output layer.

    Raises:
        ValueError: an unknown key, or a value outside its range.
        TypeError: a value of the wrong type.
    """
    if value == AUTO:
        value = {AUTO: {}}
    if not isinstance(value, Mapping) or AUTO not in value:
        return None, value
    pinned = {key: multiplier for key, multiplier in value.items() if key != AUTO}
    name = f"lr_multipliers[{AUTO!r}]"
    if preset not in MEASURABLE:
        raise ValueError(
            f'lr_multipliers has "{AUTO}" and "preset": {preset!r}. Measured multipliers take the place of a preset '
            f"whose ratios follow from sharpness. Allowed beside it: {', '.join(MEASURABLE)}"
        )
    raw = as_mapping(name, value[AUTO])
    check_keys(name, raw, [f.name for f in fields(AutoMultipliers)])
    after, exponent, high, ramp = (
        as_multiplier(f"{name}[{key!r}]", raw.get(key, getattr(AutoMultipliers(), key)))
        for key in ("after", "exponent", "high", "ramp")
    )
    if not EARLIEST_MEASUREMENT <= after < 1:
        raise ValueError(
            f"{name}['after'] must be >= {EARLIEST_MEASUREMENT} and < 1 (a share of the run), got {after:g}: earlier "
            f"the order of sharpness among block types is another, and multipliers measured then would be wrong for "
            f"the rest of the run."
        )
    if not 0 < exponent <= 1 or high < 1 or ramp >= 1:
        raise ValueError(
            f"{name} needs 0 < exponent <= 1, high >= 1 and ramp < 1 (a share of the run), got exponent={exponent:g}, "
            f"high={high:g}, ramp={ramp:g}"
        )
    total = if_given(as_count, f"{name}['total_num_steps']", raw.get("total_num_steps"))
    not_before = as_count(f"{name}['not_before']", raw.get("not_before", EARLIEST_STEP))
    head = raw.get("head", False)
    if not isinstance(head, bool):
        raise TypeError(f"{name}['head'] must be true (measure the output layer too) or false, got {head!r}")
    if head and "head" in pinned:
        raise ValueError(
            f'lr_multipliers has "head": {pinned["head"]!r} and {name} has "head": true. Give one of them: the '
            f"number, or true to measure it."
        )
    if not head:
        pinned.setdefault("head", LR_PRESETS[preset]["head"])
    return AutoMultipliers(after, exponent, high, ramp, total, not_before, head), pinned
