# SPDX-License-Identifier: Apache-2.0
"""Values that no sound run has: NaN, infinities, second moments below zero."""

from __future__ import annotations

import torch

SECOND_MOMENT = "exp_avg_sq"


def bad_values(kind: str, tensor: torch.Tensor) -> str | None:
    """What is wrong with the values of a tensor, in words that follow its name; None if nothing is.

    Args:
        kind: what it is: ``weights``, ``exp_avg``, ``exp_avg_sq``, ``frozen`` or ``buffers``. A buffer may hold
            infinities (masks do).
        tensor: its values, in any shape and dtype; what is not floating-point has no bad ones.
    """
    if not tensor.is_floating_point():
        return None
    if tensor.element_size() == 1:
        tensor = tensor.float()  # torch compares no 8-bit floats
    found = {"NaN": torch.isnan(tensor)}
    if kind != "buffers":
        found["infinity"] = torch.isinf(tensor)
    if kind == SECOND_MOMENT:
        found["values below zero"] = tensor < 0
    counted = {what: int(where.sum()) for what, where in found.items()}
    listed = [f"{what} in {count}" for what, count in counted.items() if count]
    return f"holds {' and '.join(listed)} of {tensor.numel()} elements" if listed else None
