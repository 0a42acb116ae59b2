# SPDX-License-Identifier: Apache-2.0
"""The schedule that a run's gradient norms ask for (Defazio et al., arXiv 2310.07831, algorithms 1 and 2).

With ``G_t`` the smoothed gradient norm at reading t = 1 ... T:

    w_t = G_t ** -2 (L2 norms)  or  1 / G_t (L1 norms, for methods like Adam that normalise each coordinate)
    eta_t = w_t * (w_{t+1} + ... + w_T),        divided by the largest eta

Constant norms give the linear decay to 0. Large norms at the start give a warm-up, falling ones at the end a steeper
decay. Smoothing is a running median as in the authors' code: its width is the odd number next to ``tau * T``; beyond
the last reading the sequence is mirrored (the last reading is not repeated), before the first one it stands still.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import Literal

from ds_blockwise.optimizers.schedules.table import Table
from ds_blockwise.values import number

Norm = Literal["l2", "l1"]
NORMS: tuple[Norm, ...] = ("l2", "l1")
_FEWEST = 10
"""Readings below which a curve is no use."""


def refine(norms: Mapping[int, float], *, norm: Norm = "l2", tau: float = 0.1) -> Table:
    """The refined schedule of a run.

    Args:
        norms: gradient norms of the whole model by update. Where not every update was read, each reading stands for
            the updates since the one before it.
        norm: what they are.
        tau: width of the running median as a fraction of the readings; 0: no smoothing.

    Returns:
        The first reading is at fraction 0, the last one, where the factor is 0, at fraction 1.

    Raises:
        ValueError: fewer than 10 readings, one that is not above 0 and finite, or ``tau`` outside [0, 1).
    """
    number("tau", tau, low=0.0, below=1.0)
    steps = sorted(norms)
    if len(steps) < _FEWEST:
        raise ValueError(f"too few gradient norms to refine a schedule: {len(steps)}, at least {_FEWEST} are needed")
    for step in steps:
        if not (math.isfinite(norms[step]) and norms[step] > 0.0):
            raise ValueError(f"the gradient norm at update {step} is {norms[step]}: it must be finite and above 0")
    smooth = running_median([norms[step] for step in steps], tau)
    # relative to one of them: the square of a tiny norm has no finite inverse
    scale = max(smooth)
    weights = [(scale / value) ** (2 if norm == "l2" else 1) for value in smooth]
    rates = [0.0] * len(steps)
    left = 0.0
    for t in reversed(range(len(steps) - 1)):
        left += weights[t + 1] * (steps[t + 1] - steps[t])
        rates[t] = weights[t] * left
    highest = max(rates)
    length = steps[-1] - steps[0]
    return Table(tuple((step - steps[0]) / length for step in steps), tuple(rate / highest for rate in rates))


def running_median(values: Sequence[float], tau: float) -> list[float]:
    """The median of each value's neighbourhood, see the head of this file.

    Args:
        values: to smooth.
        tau: width of the neighbourhood as a fraction of the number of values.
    """
    count = len(values)
    half = int(tau * count) // 2
    padded = [*[values[0]] * half, *values, *(values[count - 2 - i] for i in range(half))]
    window = sorted(padded[: 2 * half])
    smooth = []
    for i in range(count):
        insort(window, padded[i + 2 * half])
        smooth.append(window[half])
        del window[bisect_left(window, padded[i])]
    return smooth
