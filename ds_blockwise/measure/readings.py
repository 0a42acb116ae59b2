# SPDX-License-Identifier: Apache-2.0
"""What telemetry reports per block type, its settings, and the alarm on update ratios.

This file knows neither tensors nor ranks. It gets sums over the whole model, which are the same on every rank, so every
rank decides the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

from ds_blockwise.blocks.roles import BLOCK_TYPES, BlockType
from ds_blockwise.parallel.agree import is_first_rank
from ds_blockwise.values import as_count, check_keys, number, suggest, unknown

logger = logging.getLogger(__name__)

OnAlarm = Literal["log", "stop"]
_ON_ALARM: tuple[OnAlarm, ...] = ("log", "stop")
Band = tuple[float, float]


class TelemetryAlarm(FloatingPointError):
    """A block type's update ratio left its band, and the settings say to stop. Raised on every rank at one step."""


@dataclass(frozen=True, slots=True)
class TypeTelemetry:
    """One block type at one step. All sums run over the whole, unsharded model; RMS is the root of the mean square.

    Attributes:
        block_type: ``emb head qk ffn vo norm other``.
        step: updates made since the start of the run, this one included.
        lr: effective learning rate: the block's own, with the schedule's floor (`kernels.update.block_lr`).
        lr_multiplier: the factor on the base learning rate in this step.
        update_ratio: ``update_rms / param_rms``.
        update_rms: RMS of what the step subtracted: learning rate included, weight decay and rounding to the
            parameter's dtype not. Of Adam ``lr * m_hat / (sqrt(v_hat) + eps)``, of Lion ``lr * sign(c)``, of Muon's
            matrices ``lr`` times the scaled, orthogonal P.
        param_rms: RMS of the parameters after the step (of the fp32 masters, where there are such).
        grad_rms: RMS of the gradients as the optimizer got them, that is after clipping.
        second_moment: mean of ``v_hat``, the bias-corrected ``exp_avg_sq``. For Adam-mini each block's value is the
            block's mean squared gradient, so this is the type's. None for Lion and Muon: they keep none, or of updates.
        momentum_rms: RMS of ``m_hat``, the bias-corrected ``exp_avg``; of Lion, and of Muon's matrices, of ``exp_avg``
            itself, which they do not correct.
        grad_norm: norm of all gradients before clipping, where the host knows it, else None.
        clip_factor: what clipping multiplied the gradients with, ``min(1, gradient_clipping / grad_norm)``; else None.

    Where several roles of a type, or several param groups, have different rates, ``lr`` and ``lr_multiplier`` are means
    over elements. Parameters without a gradient in the step count with zero update and zero gradient.
    """

    block_type: BlockType
    step: int
    lr: float
    lr_multiplier: float
    update_ratio: float
    update_rms: float
    param_rms: float
    grad_rms: float
    second_moment: float | None
    momentum_rms: float
    grad_norm: float | None = None
    clip_factor: float | None = None

    def quantities(self) -> dict[str, float]:
        """The numbers by name, without those that are not known."""
        skipped = ("block_type", "step")
        return {name: value for name, value in asdict(self).items() if name not in skipped and value is not None}


Readings = Mapping[BlockType, TypeTelemetry]


@dataclass(frozen=True, slots=True)
class TelemetrySettings:
    """The setting ``telemetry``.

    Attributes:
        interval: steps between readings.
        band: per block type the lowest and highest update ratio that is no alarm.
        on_alarm: ``"log"``, or ``"stop"`` to raise `TelemetryAlarm` on every rank.
        warmup_num_steps: updates at the start without alarms; None: those of the JSON's schedule, else 0.
    """

    interval: int = 100
    band: Mapping[str, Band] = field(default_factory=dict)
    on_alarm: OnAlarm = "log"
    warmup_num_steps: int | None = None

    @classmethod
    def parse(cls, value: object) -> TelemetrySettings | None:
        """Check the raw setting: None (off) or a mapping with any of the attributes' names.

        Raises:
            TypeError: a value of the wrong type.
            ValueError: an unknown key, or a value outside its range.
        """
        if value is None:
            return None
        known = [f.name for f in fields(cls)]
        if not isinstance(value, Mapping):
            raise TypeError(f'telemetry must be a mapping such as {{"interval": 100}}, or left out; got {value!r}')
        check_keys("telemetry", value, known)
        on_alarm = value.get("on_alarm", "log")
        if on_alarm not in _ON_ALARM:
            raise ValueError(
                f"telemetry.on_alarm must be one of {', '.join(_ON_ALARM)}, got {on_alarm!r}"
                f"{suggest(on_alarm, _ON_ALARM)}"
            )
        warmup = value.get("warmup_num_steps")
        return cls(
            as_count("telemetry.interval", value.get("interval", 100)),
            _bands(value.get("band")),
            on_alarm,
            None if warmup is None else as_count("telemetry.warmup_num_steps", warmup, low=0),
        )


def _bands(value: object) -> dict[str, Band]:
    if value is None:
        return {}
    if isinstance(value, Mapping):
        for key in value:
            if key not in BLOCK_TYPES:
                raise ValueError(f"telemetry.band has an {unknown('block type', key, BLOCK_TYPES)}")
        return {key: _band(f"telemetry.band[{key!r}]", pair) for key, pair in value.items()}
    return dict.fromkeys(BLOCK_TYPES, _band("telemetry.band", value))


def _band(name: str, value: object) -> Band:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"{name} must be [low, high] (or a mapping from block types to such pairs), got {value!r}")
    low, high = (number(f"{name}[{i}]", v, low=0.0) for i, v in enumerate(value))
    if low >= high:
        raise ValueError(f"{name} must be [low, high] with low < high, got [{low:g}, {high:g}]")
    return low, high


def type_telemetry(
    block_type: BlockType, step: int, sums: Mapping[str, float], grad_norm: float | None, clip: float
) -> TypeTelemetry:
    """A reading from sums over the elements of a block type.

    Args:
        block_type: which.
        step: see `TypeTelemetry`.
        sums: ``numel``, ``lr`` and ``lr_multiplier`` (a rate per element), ``second_moment`` (values; may be missing),
            and squares of ``update param grad momentum``.
        grad_norm: of all gradients before clipping; None if unknown.
        clip: the norm that gradients are clipped to; 0: they are not.
    """
    numel = sums["numel"]
    update, param = math.sqrt(sums["update"] / numel), math.sqrt(sums["param"] / numel)
    ratio = update / param if param else math.inf if update else 0.0
    factor = None if grad_norm is None else min(1.0, clip / grad_norm) if clip and grad_norm else 1.0
    return TypeTelemetry(
        block_type=block_type,
        step=step,
        lr=sums["lr"] / numel,
        lr_multiplier=sums["lr_multiplier"] / numel,
        update_ratio=ratio,
        update_rms=update,
        param_rms=param,
        grad_rms=math.sqrt(sums["grad"] / numel),
        second_moment=sums["second_moment"] / numel if "second_moment" in sums else None,
        momentum_rms=math.sqrt(sums["momentum"] / numel),
        grad_norm=grad_norm,
        clip_factor=factor,
    )


class Alarm:
    """Watches update ratios: one message per block type and episode; the other side of the band is a new one.

    Args:
        settings: bands, and what to do.
    """

    def __init__(self, settings: TelemetrySettings) -> None:
        self._settings = settings
        self._outside: dict[str, bool] = {}  # whether below

    def look(self, readings: Readings) -> None:
        """Log what left its band, on the first rank, or raise on all.

        Raises:
            TelemetryAlarm: a ratio left its band and ``on_alarm`` is ``"stop"``.
        """
        messages = []
        for kind, reading in readings.items():
            band = self._settings.band.get(kind)
            if band is None or reading.step <= (self._settings.warmup_num_steps or 0):
                continue
            below, inside = reading.update_ratio < band[0], band[0] <= reading.update_ratio <= band[1]
            if inside:
                self._outside.pop(kind, None)
            elif self._outside.get(kind) is not below:  # NaN is outside, and above
                self._outside[kind] = below
                messages.append(_message(reading, band))
        if messages and is_first_rank():
            for message in messages:
                logger.warning("%s", message)
        if messages and self._settings.on_alarm == "stop":
            raise TelemetryAlarm("\n".join(messages))


def _message(reading: TypeTelemetry, band: Band) -> str:
    kind, ratio = reading.block_type, reading.update_ratio
    low = ratio < band[0]
    advice = (
        f"Updates are too small to matter: raise lr or lr_multipliers[{kind!r}], look whether gradients reach these "
        f"weights (grad_rms {reading.grad_rms:.3g}), or lower the band for the end of the schedule."
        if low
        else f"Training is near divergence there: lower lr or lr_multipliers[{kind!r}], or lengthen the warm-up. If "
        f"the loss has risen already, go back to the last checkpoint."
    )
    return (
        f"telemetry: update ratio of block type {kind!r} is {ratio:.3g} at step {reading.step}, "
        f"{'below' if low else 'above'} its band [{band[0]:g}, {band[1]:g}] (effective lr {reading.lr:.3g}). {advice}"
    )
