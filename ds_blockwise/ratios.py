# SPDX-License-Identifier: Apache-2.0
"""Learning-rate multipliers from measured sharpness: the sharper a block type next to norms, the smaller its own."""

from __future__ import annotations

import math
from collections.abc import Mapping

REFERENCE = "norm"  # the sharpest type in the paper, whose learning rate is the base one


def multipliers_from_sharpness(
    sharpness: Mapping[str, float], *, exponent: float, low: float = 1.0, high: float = 16.0
) -> dict[str, float]:
    """``r = clamp((S_norm / S_type) ** exponent, low, high)`` for every block type.

    Only ratios count, so sharpness may be known up to a common factor. The published 10/8/6/4 are the paper's own
    sharpness ratios to a power of 0.64 to 0.80.

    Args:
        sharpness: by block type, ``norm`` among them: trace of its Hessian block over its number of parameters.
        exponent: > 0.
        low: smallest multiplier.
        high: largest multiplier.

    Returns:
        A multiplier for every type given, in their order.

    Raises:
        ValueError: no norms, a sharpness that is not positive and finite, or a setting outside its range.
    """
    if not (math.isfinite(exponent) and exponent > 0 and 0 < low <= high):
        raise ValueError(f"exponent must be > 0 and 0 < low <= high, got exponent={exponent}, low={low}, high={high}")
    if REFERENCE not in sharpness:
        raise ValueError(
            f"multipliers are relative to the sharpness of {REFERENCE!r}, and there is none: got "
            f"{', '.join(sharpness) or 'nothing'}. Give fixed multipliers instead."
        )
    for block_type, value in sharpness.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"the sharpness of {block_type!r} must be positive and finite, got {value}: no gradient reached it, or "
                f"training has diverged. Leave the type out and give it a fixed multiplier."
            )
    reference = sharpness[REFERENCE]
    return {kind: min(high, max(low, (reference / value) ** exponent)) for kind, value in sharpness.items()}
