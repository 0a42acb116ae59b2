# SPDX-License-Identifier: Apache-2.0
"""What BlockwiseMuon sends in one step for LLaMA 2B, and what its plan costs, from real plans without processes.

python -m benchmarks.costs.muon_traffic      # dp 8 to 1024 x tp 1 and 4 x ZeRO 1/2 and 3

Model, placements and plan are those of a real run, as in `benchmarks.costs.communication`; process groups are
pretended. Beside each count stands what `ds-blockwise plan` says from sizes alone.
"""

from __future__ import annotations

import itertools
import logging
import pickle
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import torch
from torch import nn

from benchmarks.costs.communication import flat_window, model_of_rank, options_of, partitions
from benchmarks.provenance import BENCHMARKS_PAGE, provenance, write_between, write_csv
from ds_blockwise.blocks.segment_table import build_table
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.spec import apply_settings
from ds_blockwise.hosts.deepspeed.partitions import offsets_of
from ds_blockwise.kernels.bindings import Binding
from ds_blockwise.kernels.select import kernels_for
from ds_blockwise.optimizers.muon.buckets import Plan
from ds_blockwise.optimizers.muon.matrices import local_matrix, matrices_of
from ds_blockwise.optimizers.muon.optimizer import BUCKET_BYTES, BlockwiseMuon
from ds_blockwise.optimizers.muon.plan import make_plan
from ds_blockwise.parallel import owners
from ds_blockwise.parallel.reduce import ReductionGroups
from ds_blockwise.runs.model_shape import GPTShape
from ds_blockwise.runs.plan_muon import MatrixKind, muon_costs

STAGES = ("1/2", "3")
RANKS = 16  # evenly spread data-parallel ranks that are counted, of those that own a matrix and of the others
COLUMNS = (
    "model_parameters",
    "zero_stage",
    "dp",
    "tp",
    "matrices",
    "matrix_elements",
    "ranks_counted",
    "buckets",
    "mean_bytes",
    "predicted_bytes",
    "max_bytes",
    "reduce_scatter_bytes",
    "mean_share",
    "two_nths",
    "gathered_bytes",
    "plan_seconds",
    "date",
    "commit",
)


@dataclass(eq=False)
class Pretended:
    """A process group as the rank ``rank`` of it sees it.

    Attributes:
        params: of one tensor-parallel rank; empty for a tensor-parallel group, whose ranks all say the same.
        gathered: bytes that a gather brings to each rank.
    """

    rank: int
    size: int
    stage: str
    params: Sequence[nn.Parameter] = ()
    gathered: int = 0
    said: list[Any] = field(default_factory=list)

    def all_gather_object(self, found: list[Any], value: Any) -> None:
        """What all ranks would have said, from what one says and how the host cuts."""
        self.gathered += self.size * len(pickle.dumps(value))
        if not self.params:
            found[:] = [value] * self.size
            return
        windows, widths = value
        everyone = [_windows(self.params, self.stage, rank, self.size) for rank in range(self.size)]
        pairs = zip(_not_empty(windows), _not_empty(everyone[self.rank]), strict=True)
        assert all(real == pretended for real, pretended in pairs), "the host cuts otherwise"
        found[:] = [(window, widths) for window in everyone]


def _not_empty(windows: Sequence[int]) -> list[tuple[int, int]]:
    return [pair for pair in zip(windows[::2], windows[1::2], strict=True) if pair[0] < pair[1]]


def _windows(params: Sequence[nn.Parameter], stage: str, rank: int, dp: int) -> list[int]:
    """Start and end of what a data-parallel rank holds of each parameter."""
    size, found = 2 * -(-sum(param.numel() for param in params) // (2 * dp)), []
    for param, offset in zip(params, offsets_of(params), strict=True):
        part, before = (-(-param.numel() // dp), 0) if stage == "3" else (size, offset)
        found += [min(max(part * r - before, 0), param.numel()) for r in (rank, rank + 1)]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Count and write."""
    options = options_of(__doc__, arguments, dp=[8, 64, 256, 1024], tp=[1, 4])
    shape = GPTShape.load(options.model)
    facts = provenance()
    settings = BlockSettings.parse(**BlockwiseMuon.block_arguments({}))
    settings = BlockwiseMuon([torch.zeros(1)]).completed(settings)
    rows = []
    for tp in options.tp:
        params = model_of_rank(shape, 0, tp)
        for param in params:
            param.block_spec = apply_settings(param.block_spec.structure, settings)
        for stage, dp in itertools.product(STAGES, options.dp):
            row = _row(shape, params, stage, dp, tp)
            rows.append({**row, "date": facts["date"], "commit": facts["commit"]})
            print(_line(row), flush=True)
    write_csv(options.out / "muon_traffic.csv", COLUMNS, rows)
    if options.docs:
        write_between(BENCHMARKS_PAGE, "muon-traffic", markdown(rows))
    return 0


def _row(shape: GPTShape, params: list[nn.Parameter], stage: str, dp: int, tp: int) -> dict[str, str]:
    began = time.perf_counter()
    first = _plan(params, stage, group := Pretended(0, dp, stage, params), tp)
    seconds = time.perf_counter() - began
    # the ranks that own something send most: they and the others are counted apart
    owning = sorted({owner for bucket in first.buckets if bucket.over_dp for owner in bucket.over_dp.routes.owners})
    strata = [ranks for ranks in (owning, sorted({*range(dp)} - {*owning})) if ranks]
    counts = [
        [_sent(_plan(params, stage, Pretended(rank, dp, stage, params), tp)) for rank in _spread(ranks)]
        for ranks in strata
    ]
    mean = sum(len(ranks) * sum(sent) / len(sent) for ranks, sent in zip(strata, counts, strict=True)) / dp
    matrices = [m for param in params for m in matrices_of(param.block_spec)]
    elements = sum(m.rows * m.columns for m in matrices)
    local = sum(param.numel() for param in params)
    kinds = [_kind(param, m) for param in params for m in matrices_of(param.block_spec)]
    zero = 3 if stage == "3" else 1
    said = muon_costs(kinds, {}, tp=tp, dp=dp, zero_stage=zero, local_parameters=local, step_flops=1.0)
    scatter = 4 * elements / tp * (dp - 1) / dp
    values = {
        "model_parameters": shape.count_parameters(),
        "zero_stage": stage,
        "dp": dp,
        "tp": tp,
        "matrices": len(matrices),
        "matrix_elements": elements,
        "ranks_counted": sum(map(len, counts)),
        "buckets": len(first.buckets),
        "mean_bytes": round(mean),
        "predicted_bytes": round(said.dp_bytes + said.tp_bytes),
        "max_bytes": max(_sent(first), *map(max, counts)),
        "reduce_scatter_bytes": round(scatter),
        "mean_share": f"{mean / scatter:.4f}",
        "two_nths": f"{2 / dp:.4f}",
        "gathered_bytes": group.gathered,
        "plan_seconds": f"{seconds:.2f}",
    }
    return {key: str(value) for key, value in values.items()}


def _spread(ranks: Sequence[int]) -> list[int]:
    """The middles of equal parts of some ranks: the first ones own the largest matrices, and would count too much."""
    wanted = min(RANKS, len(ranks))
    return [ranks[(2 * place + 1) * len(ranks) // (2 * wanted)] for place in range(wanted)]


def _kind(param: nn.Parameter, matrix: Any) -> MatrixKind:
    shard = param.block_shard
    is_split = shard is not None and local_matrix(param.block_spec, shard, matrix).size < matrix.size
    return MatrixKind(matrix.rows, matrix.columns, 1, is_split)


def _plan(params: list[nn.Parameter], stage: str, group: Pretended, tp: int) -> Plan:
    placements, numel = (partitions if stage == "3" else flat_window)(params, group.rank, group.size)
    table = build_table(numel, placements, shares_second_moment=True)
    over_tp = Pretended(0, tp, stage) if tp > 1 else None
    tensor = torch.empty(numel, device="meta")
    kernels = kernels_for("reference", torch.device("cpu"))
    groups = ReductionGroups(group, over_tp)  # type: ignore[arg-type]
    binding = Binding(tensor, table, table, groups, kernels, None)
    with mock.patch.object(owners, "dist", _DIST):
        return make_plan([binding], BUCKET_BYTES)


_DIST = SimpleNamespace(
    get_rank=lambda group: group.rank,
    get_world_size=lambda group: group.size,
    all_gather_object=lambda found, value, group: group.all_gather_object(found, value),
)


def _sent(plan: Plan) -> int:
    trips = [trip for bucket in plan.buckets for trip in (bucket.over_dp, bucket.over_tp) if trip is not None]
    with mock.patch.object(owners, "dist", _DIST):
        return sum(trip.routes.sent_bytes for trip in trips)


def _line(row: dict[str, str]) -> str:
    mean, predicted, most = (int(row[key]) for key in ("mean_bytes", "predicted_bytes", "max_bytes"))
    return (
        f"ZeRO-{row['zero_stage']:<3} dp {row['dp']:>4} tp {row['tp']}: mean {mean:>13,} B (predicted "
        f"{predicted:>13,}), at most {most:>13,} B; {float(row['mean_share']):.2%} of the fp32 reduce-scatter; "
        f"{row['buckets']} buckets; plan {row['plan_seconds']} s, {int(row['gathered_bytes']):,} B gathered"
    )


def markdown(rows: list[dict[str, str]]) -> str:
    """The table of docs/benchmarks.md."""
    lines = [
        "| ZeRO stage | tensor-parallel size | data-parallel size | MB sent, mean | predicted | at most | % of the "
        "gradient's reduce-scatter | 2/N, % | buckets | MB gathered once |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        sent = (int(row[key]) / 1e6 for key in ("mean_bytes", "predicted_bytes", "max_bytes"))
        shares = (100 * float(row[key]) for key in ("mean_share", "two_nths"))
        lines.append(
            f"| {row['zero_stage']} | {row['tp']} | {row['dp']} | {' | '.join(f'{value:,.1f}' for value in sent)} | "
            f"{' | '.join(f'{value:.2f}' for value in shares)} | {row['buckets']} | "
            f"{int(row['gathered_bytes']) / 1e6:.2f} |"
        )
    first = rows[0]
    lines += [
        "",
        f"BlockwiseMuon with default settings, LLaMA of {int(first['model_parameters']):,} parameters, "
        f"{first['matrices']} matrices. Counted on up to {RANKS} evenly spread data-parallel ranks of those that own a "
        f"matrix and of the others, each the first of its tensor-parallel group; predicted: as `ds-blockwise plan` "
        f"does. The reduce-scatter is that of the matrices' fp32 gradients. Plans are made once, at the first step. By "
        f"`benchmarks/costs/muon_traffic.py`, {first['date']}, commit {first['commit']}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    deepspeed.utils.logger.setLevel(logging.WARNING)
    sys.exit(main())
