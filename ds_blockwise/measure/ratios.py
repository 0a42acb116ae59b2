# SPDX-License-Identifier: Apache-2.0
"""Learning-rate multipliers from measured sharpness: flatter blocks can take longer steps.

r(type) = clamp((S(norm) / S(type)) ** p, low, high), so that norms, the sharpest, stay at the base learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ds_blockwise.blocks.settings.defaults import DEFAULT_EXPONENT
from ds_blockwise.values import is_finite


def multipliers_from_sharpness(
    sharpness: Mapping[str, float], *, exponent: float, low: float = 1.0, high: float = 16.0
) -> dict[str, float]:
    """Learning-rate multipliers by block type.

    Args:
        sharpness: average sharpness by block type; ``norm`` must be among them, being the reference.
        exponent: of the ratios, above 0 and at most 1; see `DEFAULT_EXPONENT`.
        low: the smallest multiplier.
        high: the largest multiplier.

    Returns:
        A multiplier for each of the block types given, ``norm`` included.

    Raises:
        ValueError: there is no norm, a sharpness is not a positive finite number, or the limits make no sense.
    """
    if "norm" not in sharpness:
        raise ValueError(
            f"no sharpness of 'norm', the reference of all ratios; measured: {', '.join(sharpness) or 'nothing'}. "
            f"A model without trained norms needs multipliers given by hand."
        )
    for block_type, value in sharpness.items():
        if not (is_finite(value) and value > 0.0):
            raise ValueError(
                f"the sharpness of {block_type!r} is {value}; ratios need a positive finite number. Its gradient was "
                f"zero or overflowed, or the estimator was 'hutchinson', whose traces can be negative: measure again, "
                f"or leave the type out and give its multiplier by hand."
            )
    if not 0.0 < exponent <= 1.0:
        raise ValueError(f"exponent = {exponent}: allowed: above 0, at most 1; {DEFAULT_EXPONENT} fits the paper's")
    if not 0.0 < low <= high < math.inf:
        raise ValueError(f"low = {low}, high = {high}: allowed: 0 < low <= high, both finite")
    norm = sharpness["norm"]
    return {block_type: min(max((norm / value) ** exponent, low), high) for block_type, value in sharpness.items()}
