# SPDX-License-Identifier: Apache-2.0
"""Muon's mathematics on one matrix: Newton-Schulz, the second moment of its rows, its scale.

Newton-Schulz for momentum: Jordan et al., "Muon", 2024 (kellerjordan.github.io/posts/muon). Second moment per row with
the norm kept: NorMuon, arXiv 2510.05491. Scale of RMS 0.2: arXiv 2502.16982, section 2.2.
One matrix at a time: the bits of a batched product depend on how many matrices are in the batch and on the place among
them (seen with MKL, in fp32 and fp64), and what lies on one rank depends on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Coefficients = tuple[tuple[float, float, float], ...]
"""``(a, b, c)`` of each iteration ``x -> a x + b x^3 + c x^5`` on the singular values."""

COEFFICIENTS: dict[str, tuple[float, Coefficients]] = {
    "quintic": (
        1.0,
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
    ),
    "polar_express": (
        1.01,
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
    ),
    "simple": (1.0, ((3.4445, -4.7750, 2.0315),) * 5),
}
"""By name: what the Frobenius norm is multiplied by before the first iteration, and the iterations.

``quintic``: Megatron-core's default and Dion's; singular values from 0.01 on end between 0.98 and 1.03. ``simple``:
``torch.optim.Muon``'s and DeepSpeed's; 0.68 to 1.13. ``polar_express``: arXiv 2505.16932 with a safety factor, five
iterations; 0.86 to 1.14 from 0.001 on.
"""

SCALES: dict[str, Callable[[int, int], float]] = {
    "rms": lambda outputs, inputs: 0.2 * math.sqrt(max(outputs, inputs)),
    "keller": lambda outputs, inputs: math.sqrt(max(1.0, outputs / inputs)),
    "mup": lambda outputs, inputs: math.sqrt(outputs / inputs),
}
"""By name: the factor on an orthogonalised matrix of ``outputs`` rows and ``inputs`` columns.

``rms`` gives every element a root mean square of 0.2, that of AdamW's update, so that AdamW's learning rate keeps its
meaning. ``keller``: the original's. ``mup``: learning rates that transfer over widths.
"""


NEWTON_SCHULZ_DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
"""By name: what matrices are rounded to before the first iteration and after each product; None: not at all."""


def newton_schulz(matrix: torch.Tensor, coefficients: str, dtype: str = "fp32") -> torch.Tensor:
    """The nearest matrix with orthonormal rows or columns, about: all singular values become about 1.

    Args:
        matrix: 2-D, fp32 or fp64.
        coefficients: key of `COEFFICIENTS`.
        dtype: key of `NEWTON_SCHULZ_DTYPES`. In bf16 singular values end within 0.05 (``quintic``), 0.15 (``simple``)
            or 0.3 (``polar_express``) of where fp32 brings them.

    Returns:
        Of the same shape and dtype; zeros for zeros. It does not depend on the size of ``matrix``, only on its
        direction.
    """
    safety, steps = COEFFICIENTS[coefficients]
    wide = matrix.mT if matrix.size(0) > matrix.size(1) else matrix
    norm = torch.linalg.vector_norm(wide, dtype=torch.float64) * safety
    x = torch.empty_like(wide, dtype=NEWTON_SCHULZ_DTYPES[dtype])
    torch.div(wide, torch.where(norm > 0, norm, 1.0).to(wide.dtype), out=x)
    for a, b, c in steps:
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.to(matrix.dtype)
    return x.mT if wide is not matrix else x


def normalized_rows(
    update: torch.Tensor, second_moment: torch.Tensor, *, beta2: float, eps: float, row_dim: int
) -> torch.Tensor:
    """Divide each row by the root of its second moment, then give the matrix back the norm that it had.

    ``v = beta2 v + (1 - beta2) mean of the row's squares``; with ``d = o / (sqrt(v) + eps)``: ``p = d ||o|| / ||d||``.
    Keeping the norm makes a correction of ``v`` for its start at zero unnecessary.

    Args:
        update: the orthogonalised matrix.
        second_moment: one value per row, like ``update`` in dtype; changed in place.
        beta2: its decay rate.
        eps: added to its root.
        row_dim: the dimension that counts rows (a transposed weight is stored with rows along dimension 1).
    """
    second_moment.lerp_(update.square().mean(1 - row_dim), 1 - beta2)
    divided = update / (second_moment.sqrt() + eps).unsqueeze(1 - row_dim)
    was, now = (torch.linalg.vector_norm(m, dtype=torch.float64) for m in (update, divided))
    return divided.mul_((was / torch.where(now > 0, now, 1.0)).to(update.dtype))
