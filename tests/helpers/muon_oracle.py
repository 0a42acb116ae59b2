# SPDX-License-Identifier: Apache-2.0
"""An independent, slow definition of Blockwise Muon on full tensors, in fp64.

Newton-Schulz is a polynomial of odd powers, so it acts on singular values alone: here it is applied to those of an SVD,
without a matrix product. Which rows are one matrix is cut out by hand-written tables; no line is shared with
``ds_blockwise``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.helpers.oracle import Hyper, LionOracle, Oracle, State
from tests.helpers.tables.oracle_names import Classes

HEADS = ("query", "key", "value")
MATRICES = (*HEADS, "attn_out", "ffn")
MULTIPLIERS = {"emb": 3.0, "head": 1.0, "qk": 1.0, "vo": 1.0, "ffn": 1.0, "norm": 3.0, "other": 1.0}
ONES = dict.fromkeys(("emb", "head", "qk", "vo", "ffn", "norm", "other"), 1.0)
POLYNOMIALS = {
    "quintic": (
        1.0,
        [
            (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
        ],
    ),
    "polar_express": (
        1.01,
        [
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ],
    ),
    "simple": (1.0, [(3.4445, -4.7750, 2.0315)] * 5),
}  # fmt: skip


def polynomial_of(matrix: Tensor, coefficients: str) -> Tensor:
    """Newton-Schulz by singular values, fp64."""
    safety, steps = POLYNOMIALS[coefficients]
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    if not float(values.sum()):
        return torch.zeros_like(matrix, dtype=torch.float64)
    values = values / (values.square().sum().sqrt() * safety)
    for a, b, c in steps:
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


@dataclass
class MuonOracle(Oracle):
    """Blockwise Muon on {name: full tensor}; ``hyper`` holds Adam-mini's part, and lr and weight decay of all.

    Attributes:
        how: Role -> "role", "head", "matrix" or "none"; by default queries, keys and values by heads, the rest by role.
        head_rows: Rows of a head; 0: those of the tables' queries and keys.
        parts: Name of a fused weight -> how many matrices follow each other in its rows.
    """

    how: Mapping[str, str] = field(default_factory=dict)
    head_rows: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)
    momentum_beta: float = 0.95
    nesterov: bool = True
    row_beta: float | None = 0.95
    scale: str = "rms"
    coefficients: str = "quintic"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lr_multipliers = MULTIPLIERS | dict(self.lr_multipliers)
        spans = [span for classified in self.classes.values() for span in classified.spans if span.role in HEADS[:2]]
        self.head_rows = self.head_rows or max((span.size for span in spans), default=0)
        self.rows: dict[tuple[str, int], Tensor] = {}

    def _update(self, name: str, gradient: Tensor, h: Hyper, lr: Tensor, decay: Tensor) -> None:
        found = self.matrices(name)
        if not found:
            super()._update(name, gradient, h, lr, decay)
            return
        p, g, beta = self._p[name], gradient.to(self.arithmetic), self.momentum_beta
        state = self.state.setdefault(name, State(torch.zeros_like(p), torch.zeros_like(p)))
        state.step += 1
        state.m = beta * state.m + (1 - beta) * g
        turned = (1 - beta) * g + beta * state.m if self.nesterov else state.m
        axis = self.classes[name].axis
        outputs, target = turned.transpose(0, axis), torch.zeros_like(p).transpose(0, axis)
        for number, rows in enumerate(found):
            target[rows] = self._direction(name, number, outputs[rows])
        self._p[name] = p - lr * (target.transpose(0, axis) + decay * p)
        if self.momentum is not None:
            state.m = state.m.to(self.momentum).to(self.arithmetic)

    def _direction(self, name: str, number: int, matrix: Tensor) -> Tensor:
        direction = polynomial_of(matrix, self.coefficients)
        if self.row_beta is not None:
            was = self.rows.get((name, number), torch.zeros(len(matrix), dtype=torch.float64))
            seconds = self.row_beta * was + (1 - self.row_beta) * direction.square().mean(1)
            self.rows[name, number] = seconds
            divided = direction / (seconds.sqrt() + 1e-8).unsqueeze(1)
            length = divided.norm()
            direction = divided * direction.norm() / length if float(length) else divided
        rows, columns = matrix.shape
        factor = {
            "rms": 0.2 * max(rows, columns) ** 0.5,
            "keller": max(1.0, rows / columns) ** 0.5,
            "mup": (rows / columns) ** 0.5,
        }[self.scale]
        return factor * direction

    def matrices(self, name: str) -> list[Tensor]:
        """Row numbers of each matrix; none if the parameter is not orthogonalised, as an adapter's factors."""
        classified, shape = self.classes[name], self._p[name].shape
        if len(shape) != 2 or min(shape) == 1 or name.endswith("bias") or "lora_" in name:
            return []
        found: dict[tuple[object, ...], list[int]] = {}
        piece = shape[classified.axis] // self.parts.get(name, 1)
        for span in classified.spans:
            usual = "head" if span.role in HEADS else "role" if span.role in MATRICES else "none"
            how = self.how.get(span.role, usual)
            for row in range(span.start, span.end) if how != "none" else ():
                head = (row - span.start) // self.head_rows if how == "head" and span.role in HEADS else 0
                start = span.start if how == "head" and span.role in HEADS else 0
                key = ("whole",) if how == "matrix" else (span.role, start, head, row // piece)
                found.setdefault(key, []).append(row)
        return [torch.tensor(rows) for rows in found.values()]


_GATE_AND_UP = re.compile(r"linear_fc1\.weight|gate_up_proj")  # of the gated models of the tests


def oracle_for(
    optimizer: str, params: Mapping[str, Tensor], classes: Classes, hyper: Hyper | dict[str, Hyper], **settings: Any
) -> Oracle:
    """The oracle of an optimizer, by its short name."""
    if optimizer == "muon":
        fused = {name: 2 for name in params if _GATE_AND_UP.search(name)}
        return MuonOracle(params, classes, True, hyper, **{"parts": fused, **settings})
    kind = LionOracle if optimizer == "lion" else Oracle
    return kind(params, classes, optimizer == "mini", hyper, **settings)


def tolerance_for(optimizer: str) -> float:
    """Of updates over the rate: Muon's are a chain of matrix products in fp32."""
    return 1e-5 if optimizer == "muon" else 1e-6


def trained_tolerance_for(optimizer: str) -> float:
    """As `tolerance_for`, if gradients are those of a backward pass whose sums run in another order.

    Adam divides by what may be small; Newton-Schulz multiplies small singular values by up to 500.
    """
    return {"lion": 1e-6, "muon": 1e-3}.get(optimizer, 1e-4)
