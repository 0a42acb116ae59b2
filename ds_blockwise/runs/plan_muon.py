# SPDX-License-Identifier: Apache-2.0
"""What BlockwiseMuon's matrices cost a rank in a step: bytes that travel, bytes that are allocated, products.

Means over ranks, from sizes alone; `benchmarks/costs/muon_traffic.py` compares the traffic with real plans.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_blockwise.kernels.newton_schulz import COEFFICIENTS
from ds_blockwise.optimizers.muon.optimizer import BUCKET_BYTES

MUON = "BlockwiseMuon"
_FP32 = 4
_PER_MATRIX = 5  # the matrix and Newton-Schulz on it: its input, two squares, a result


@dataclass(frozen=True)
class MatrixKind:
    """Equal matrices of a model.

    Attributes:
        rows, columns: of the unsharded matrix.
        count: how many there are.
        is_split: whether tensor parallelism splits them.
    """

    rows: int
    columns: int
    count: int
    is_split: bool

    @property
    def numel(self) -> int:
        """Elements of one."""
        return self.rows * self.columns

    @property
    def flops(self) -> int:
        """Of Newton-Schulz on one, as torch multiplies: x x^T, its square, and their sum times x."""
        m, n = sorted((self.rows, self.columns))
        return ITERATIONS * (2 * m * m * n + 2 * m**3 + 2 * m * m * n)


ITERATIONS = len(COEFFICIENTS["quintic"][1])  # all sets have as many


@dataclass(frozen=True)
class MuonCosts:
    """Of one rank in one step.

    Attributes:
        dp_bytes, tp_bytes: sent over data-parallel and tensor-parallel ranks, the mean.
        transient_bytes: allocated beside state and gradients.
        flops: of Newton-Schulz on the rank that has most, about.
        share_of_step: of the FLOPs of the rank's forward and backward passes.
        owners: ranks that have a matrix to multiply.
    """

    dp_bytes: float
    tp_bytes: float
    transient_bytes: int
    flops: float
    share_of_step: float
    owners: int


def muon_costs(
    kinds: Sequence[MatrixKind],
    params: Mapping[str, Any],
    *,
    tp: int,
    dp: int,
    zero_stage: int,
    local_parameters: int,
    step_flops: float,
) -> MuonCosts:
    """Costs of the matrices of a model.

    Args:
        kinds: the matrices of the whole model.
        params: of the optimizer's JSON.
        tp: tensor-parallel size.
        dp: data-parallel size.
        zero_stage: 0 to 3.
        local_parameters: elements of the shards of a tensor-parallel rank.
        step_flops: of a rank's forward and backward passes of a step.
    """
    sharing = dp if zero_stage else 1
    ranks = sharing * tp
    dp_bytes = 2.0 * _FP32 * _away_over_dp(kinds, zero_stage, tp, sharing, local_parameters)
    split = sum(kind.numel * kind.count for kind in kinds if kind.is_split)
    tp_bytes = 2.0 * _FP32 * split / ranks * (tp - 1) / tp
    largest = max((kind.numel for kind in kinds), default=0)
    count, flops = _sums((kind.count, kind.flops) for kind in kinds)
    most = max(flops / ranks, max((kind.flops for kind in kinds), default=0)) if ranks > 1 else float(flops)
    arriving = max(_FP32 * largest, (dp_bytes + tp_bytes) / 2) if dp_bytes or tp_bytes else 0
    bucket = min(arriving, max(int(params.get("bucket_bytes", BUCKET_BYTES)), _FP32 * largest))
    return MuonCosts(
        dp_bytes,
        tp_bytes,
        int(2 * bucket + _PER_MATRIX * _FP32 * largest),
        most,
        most / step_flops,
        min(count, ranks),
    )


def _away_over_dp(kinds: Sequence[MatrixKind], zero_stage: int, tp: int, dp: int, local_parameters: int) -> float:
    """Elements that leave a rank on their way to owners, the mean."""
    if dp == 1:
        return 0.0
    if zero_stage == 3:
        return sum(kind.numel * kind.count for kind in kinds) / tp / dp * (dp - 1) / dp
    window, found = local_parameters / dp, 0.0
    for kind in kinds:
        local = kind.numel / tp if kind.is_split else kind.numel
        held = kind.count if kind.is_split else kind.count / tp  # matrices of a tensor-parallel rank
        # the ends of windows lie anywhere: one of them cuts a matrix with this probability
        found += held * local * min(1.0, local / window)
    return found / dp


def _sums(kinds: Iterable[tuple[int, int]]) -> tuple[int, int]:
    pairs = list(kinds)
    return sum(count for count, _ in pairs), sum(count * value for count, value in pairs)
