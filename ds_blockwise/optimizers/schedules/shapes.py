# SPDX-License-Identifier: Apache-2.0
"""The shapes of schedules as curves: a height between 0 (``min_lr``) and 1 (the peak) for each update after warm-up.

A curve is a stable phase and a decay. The stable phase falls slowly or not at all; the decay takes what is left to 0 at
the end of the run. With x the part of the decay that is done:

| shape | stable phase | decay |
|---|---|---|
| cosine, linear, 1-sqrt, power, exponential | none | from the end of warm-up on |
| wsd | 1 | the last ``decay_num_steps``, in ``decay_shape`` |
| inv-sqrt | sqrt(warm-up / update) | likewise |
| infinite | cosine from 1 to ``constant_factor``, then constant | likewise |
| table | none | the rows of a file |

cosine: ``(1 + cos(pi x)) / 2``. linear: ``1 - x``. 1-sqrt: ``1 - sqrt(x)`` (arXiv 2405.18392). power:
``(1 - x) ** e``. exponential: ``(exp(-e x) - exp(-e)) / (1 - exp(-e))``, which with ``e = ln(constant / minimum)`` is
the annealing of arXiv 2503.02844 and 2403.08763. inv-sqrt: Transformer's (arXiv 1706.03762, section 5.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from ds_blockwise.optimizers.schedules.table import Table, read_table
from ds_blockwise.values import as_count, number, unknown

Decay = Callable[[int, int], float]
"""Height after ``done`` of ``steps`` updates; 1 at 0."""


def _cosine(done: int, steps: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * (done / steps)))


def _linear(done: int, steps: int) -> float:
    return (steps - done) / steps


def _one_minus_sqrt(done: int, steps: int) -> float:
    return 1.0 - math.sqrt(done / steps)


def _power(exponent: float, done: int, steps: int) -> float:
    return float(((steps - done) / steps) ** exponent)


def _exponential(exponent: float, done: int, steps: int) -> float:
    end = math.exp(-exponent)
    return (math.exp(-exponent * done / steps) - end) / (1.0 - end)


_DECAYS: dict[str, Decay] = {"cosine": _cosine, "linear": _linear, "1-sqrt": _one_minus_sqrt}
_WITH_EXPONENT: dict[str, Callable[[float, int, int], float]] = {"power": _power, "exponential": _exponential}
DECAY_SHAPES = (*_DECAYS, *_WITH_EXPONENT)
_OF_DECAY = ("decay_shape", "decay_num_steps", "decay_fraction")
_KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_DECAYS, ()),
    **dict.fromkeys(_WITH_EXPONENT, ("exponent",)),
    "wsd": _OF_DECAY,
    "inv-sqrt": _OF_DECAY,
    "infinite": ("cooldown_num_steps", "cooldown_fraction", "constant_factor", *_OF_DECAY),
    "table": ("table",),
}
SHAPES = tuple(_KEYS)
_DECAY_FRACTION = 5  # one over it: the part of a run that is decay by default


@dataclass(frozen=True)
class Curve:
    """Heights between ``min_lr`` and the peak by update.

    Attributes:
        warmup: updates of warm-up; the curve begins at this update with 1.
        total: the update from which on it is 0.
        decay_steps: updates of the decay, the last ones before ``total``.
        stable: height by update, up to the decay's first.
        decay: what is left of the height at the decay's first update.
    """

    warmup: int
    total: int
    decay_steps: int
    stable: Callable[[int], float]
    decay: Decay

    def height(self, update: int) -> float:
        """The height at an update from ``warmup`` to below ``total``."""
        begin = self.total - self.decay_steps
        if update < begin:
            return self.stable(update)
        return self.stable(begin) * self.decay(update - begin, self.decay_steps)

    def progress(self, update: int) -> float:
        """How much of the decay is done: 0 before it, then up in equal steps to 1 at ``total``."""
        return min(1.0, max(0.0, (update - self.total + self.decay_steps) / self.decay_steps))


def curve_of(shape: object, warmup: int, total: int, settings: Mapping[str, object]) -> Curve:
    """The curve of a shape.

    Args:
        shape: one of `SHAPES`.
        warmup: updates of warm-up.
        total: updates of the run.
        settings: the shape's own keys; those with None count as not given.

    Raises:
        ValueError: an unknown shape, a key that does not belong to it, one that it lacks, phases that do not fit, or
            a table that cannot be read.
        TypeError: a value of another type.
    """
    if shape not in SHAPES:
        if shape is None:
            raise ValueError(f'no shape was given. Write for instance "shape": "cosine". Allowed: {", ".join(SHAPES)}')
        raise ValueError(unknown("shape", shape, SHAPES))
    given = {key: value for key, value in settings.items() if value is not None}
    shape, decay = str(shape), _decay_of(str(shape), given)
    if "decay_shape" not in _KEYS[shape]:
        return Curve(warmup, total, total - warmup, _peak, decay)
    steps = num_steps("decay", total, given.get("decay_num_steps"), given.get("decay_fraction"))
    steps = max(1, total // _DECAY_FRACTION) if steps is None else steps
    phases = {"warmup_num_steps": warmup, "decay_num_steps": steps}
    stable: Callable[[int], float] = _peak
    if shape == "inv-sqrt":
        if warmup == 0:
            raise ValueError(
                'shape "inv-sqrt" needs a warm-up: its rate is the peak times sqrt(warm-up / update). Give '
                "warmup_num_steps or warmup_fraction"
            )
        stable = partial(_inv_sqrt, warmup)
    elif shape == "infinite":
        cooldown = num_steps("cooldown", total, given.get("cooldown_num_steps"), given.get("cooldown_fraction"))
        if cooldown is None:
            raise ValueError(
                'shape "infinite" needs the length of the fall from the peak to the constant rate: write for instance '
                '"cooldown_fraction": 0.3, or cooldown_num_steps'
            )
        phases["cooldown_num_steps"] = cooldown
        constant = number("constant_factor", given.get("constant_factor", 0.5), low=0.0, below=1.0)
        stable = partial(_to_constant, warmup, cooldown, constant)
    if sum(phases.values()) > total:
        listed = " and ".join(f"{key} ({count})" for key, count in phases.items())
        raise ValueError(f"{listed} do not fit into total_num_steps ({total})")
    return Curve(warmup, total, steps, stable, decay)


def num_steps(phase: str, total: int, steps: object, fraction: object, *, low: int = 1) -> int | None:
    """The length of a phase that is given in updates or as a fraction of the run; None if it is not given.

    Args:
        phase: such as ``warmup``: the keys are ``warmup_num_steps`` and ``warmup_fraction``.
        total: updates of the run.
        steps: updates; None for none given.
        fraction: of ``total``, below 1, rounded to updates; None for none given.
        low: the fewest updates that are allowed. A fraction above 0 is one at least.

    Raises:
        ValueError: both are given, or one is outside its range.
        TypeError: the fraction is no number.
    """
    if fraction is None:
        return None if steps is None else as_count(f"{phase}_num_steps", steps, low=low)
    if steps is not None:
        raise ValueError(
            f"{phase}_num_steps ({steps!r}) and {phase}_fraction ({fraction!r}) say the same thing: give one of them"
        )
    share = number(f"{phase}_fraction", fraction, low=0.0, below=1.0)
    if share == 0.0 and low:
        raise ValueError(f"{phase}_fraction must be above 0 and below 1, got {fraction!r}")
    return max(1, round(share * total)) if share else 0


def _decay_of(shape: str, given: Mapping[str, object]) -> Decay:
    """The shape of the decay; refuses keys that do not belong to the shape, and asks for those that it lacks."""
    allowed, key = _KEYS[shape], "shape"
    name: object = shape
    if "decay_shape" in allowed:
        key, name = "decay_shape", given.get("decay_shape", "linear")
        if name not in DECAY_SHAPES:
            raise ValueError(unknown("decay_shape", name, DECAY_SHAPES))
    for own in given:
        if own == "exponent" and name not in _WITH_EXPONENT:
            raise ValueError(f"exponent belongs to {key} {_either(_WITH_EXPONENT)}, not to {name!r}: remove it")
        if own != "exponent" and own not in allowed:
            owners = [shape for shape, keys in _KEYS.items() if own in keys]
            raise ValueError(f"{own} belongs to shape {_either(owners)}, not to {shape!r}: remove it")
    if shape == "table":
        if "table" not in given:
            raise ValueError('shape "table" needs a file: write for instance "table": "schedule.csv"')
        return partial(_from_table, read_table(given["table"]))
    if name not in _WITH_EXPONENT:
        return _DECAYS[str(name)]
    if "exponent" not in given:
        raise ValueError(f'{key} {name!r} needs an exponent: write for instance "exponent": 1.2')
    exponent = number("exponent", given["exponent"], low=0.0)
    if exponent == 0.0:
        raise ValueError(f"exponent must be above 0, got {given['exponent']!r}: the rate would not fall")
    return partial(_WITH_EXPONENT[str(name)], exponent)


def _either(names: Iterable[str]) -> str:
    return " or ".join(map(repr, names))


def _peak(update: int) -> float:
    return 1.0


def _inv_sqrt(warmup: int, update: int) -> float:
    return math.sqrt(warmup / update)


def _to_constant(warmup: int, cooldown: int, constant: float, update: int) -> float:
    done = update - warmup
    return constant + (1.0 - constant) * _cosine(done, cooldown) if done < cooldown else constant


def _from_table(table: Table, done: int, steps: int) -> float:
    return table.at(done / steps)
