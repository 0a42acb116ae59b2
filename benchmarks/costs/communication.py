# SPDX-License-Identifier: Apache-2.0
"""What BlockwiseAdamMini sends in one step for LLaMA 2B, counted from the real tables on no more than one machine.

python -m benchmarks.costs.communication     # dp 1 to 1024 x tp 1 to 4 x ZeRO 0, 1/2 and 3; fails if a limit is broken

Model, placements and tables are those of a real run: Megatron-core builds the tensor-parallel rank's model on the meta
device, the DeepSpeed host cuts it, and the optimizer's own reduction is called with a counter in the place of
``all_reduce``. Only the process groups are pretended (torch's ``fake`` backend).
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.provenance import BENCHMARKS_PAGE, ROOT, provenance, write_between, write_csv
from ds_blockwise import tag_parameters
from ds_blockwise.blocks.segment_table import Placement, SegmentTable, build_table, whole_placement
from ds_blockwise.hosts.deepspeed.partitions import offsets_of, zero_3_tensors, zero_window
from ds_blockwise.parallel import reduce
from ds_blockwise.parallel.reduce import ReductionGroups, reduce_block_sums_
from ds_blockwise.runs.model_shape import GPTShape
from megatron_patch import build_gpt, cpu_shims

LLAMA_2B = ROOT / "configs/model/llama_2b.yaml"  # its 20 heads divide by 1, 2 and 4
LIMIT = 1e-3  # of the gradient's bytes
STAGES = ("0", "1/2", "3")
COLUMNS = (
    "model_parameters",
    "zero_stage",
    "dp",
    "tp",
    "ranks_counted",
    "local_parameters",
    "dp_messages",
    "dp_bytes",
    "tp_messages",
    "tp_bytes",
    "fp32_gradient_bytes",
    "share_of_fp32_gradient",
    "share_of_bf16_gradient",
    "date",
    "commit",
)


@dataclass(frozen=True, order=True)
class Traffic:
    """What one rank contributes to the reductions of one step: payload bytes, and collectives, by process group."""

    dp_bytes: int
    dp_messages: int
    tp_bytes: int
    tp_messages: int

    @property
    def bytes(self) -> int:
        """Payload over both groups."""
        return self.dp_bytes + self.tp_bytes


def main(arguments: list[str] | None = None) -> int:
    """Count, write, check.

    Returns:
        Exit status: 1 if a rank sends more than the limit, or more than one message per group.
    """
    options = options_of(__doc__, arguments, dp=[1 << k for k in range(11)], tp=[1, 2, 4])
    shape = GPTShape.load(options.model)
    facts = provenance()
    rows = []
    for tp in options.tp:
        models = {tp_rank: model_of_rank(shape, tp_rank, tp) for tp_rank in sorted({0, tp // 2, tp - 1})}
        for stage in STAGES:
            for dp in options.dp:
                row = _row(shape, models, stage, dp, tp)
                rows.append({**row, "date": facts["date"], "commit": facts["commit"]})
                print(_line(row), flush=True)
    write_csv(options.out / "communication.csv", COLUMNS, rows)
    if options.docs:
        write_between(BENCHMARKS_PAGE, "communication", markdown(rows))
    broken = [row for row in rows if not within_limits(row)]
    for row in broken:
        print(f"FAIL  {_line(row)}; allowed {LIMIT:.1%} and one message per group")
    if not broken:
        worst = max(float(row["share_of_fp32_gradient"]) for row in rows)
        print(f"PASS  at most {worst:.4%} of the fp32 gradient's bytes (limit {LIMIT:.1%}), one message per group")
    return 1 if broken else 0


def within_limits(row: dict[str, str]) -> bool:
    """Whether a row of the CSV keeps the promise: few bytes, one message per process group and step."""
    few = float(row["share_of_fp32_gradient"]) < LIMIT
    return few and int(row["dp_messages"]) <= 1 and int(row["tp_messages"]) <= 1


def _row(shape: GPTShape, models: dict[int, list[nn.Parameter]], stage: str, dp: int, tp: int) -> dict[str, str]:
    counted: dict[tuple[int, int], Traffic] = {}
    for (tp_rank, params), dp_rank in zip(_spread(models), (0, _busiest_rank(models[0], dp), dp - 1), strict=True):
        counted[dp_rank, tp_rank] = count(params, stage, dp_rank, dp, tp)
    worst = max(counted.values(), key=lambda traffic: (traffic.bytes, traffic))
    local = sum(param.numel() for param in models[0])
    values = {
        "model_parameters": shape.count_parameters(),
        "zero_stage": stage,
        "dp": dp,
        "tp": tp,
        "ranks_counted": len(counted),
        "local_parameters": local,
        "dp_messages": worst.dp_messages,
        "dp_bytes": worst.dp_bytes,
        "tp_messages": worst.tp_messages,
        "tp_bytes": worst.tp_bytes,
        "fp32_gradient_bytes": 4 * local,
        "share_of_fp32_gradient": f"{worst.bytes / (4 * local):.3e}",
        "share_of_bf16_gradient": f"{worst.bytes / (2 * local):.3e}",
    }
    return {key: str(value) for key, value in values.items()}


def _spread(models: dict[int, list[nn.Parameter]]) -> list[tuple[int, list[nn.Parameter]]]:
    """First, middle and last tensor-parallel rank, the same one several times if there are fewer."""
    ranks = sorted(models)
    return [(ranks[i], models[ranks[i]]) for i in (0, len(ranks) // 2, -1)]


def _busiest_rank(params: list[nn.Parameter], dp: int) -> int:
    """The data-parallel rank whose window of the flat buffer holds most rows that tensor parallelism splits.

    It sends most under ZeRO 1 and 2; under ZeRO 3 every rank holds the same share of every parameter.
    """
    size = 2 * -(-sum(param.numel() for param in params) // (2 * dp))
    rows = [0.0] * dp
    for param, offset in zip(params, offsets_of(params), strict=True):
        if param.block_shard is None or param.block_shard.dim == param.block_spec.axis:
            continue
        end = offset + param.numel()
        for rank in range(offset // size, -(-end // size)):
            held = min(end, (rank + 1) * size) - max(offset, rank * size)
            rows[rank] += held / param.shape[-1]
    return max(range(dp), key=rows.__getitem__)


# ------------------------------------------------------------------------------------ the model


@contextmanager
def _pretended_ranks(rank: int, world_size: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def model_of_rank(shape: GPTShape, tp_rank: int, tp: int) -> list[nn.Parameter]:
    """Tagged parameters of one tensor-parallel rank, on the meta device."""
    with _pretended_ranks(tp_rank, tp):
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, create_gloo_process_groups=False)
        try:
            cpu_shims()
            with torch.device("meta"):
                model = build_gpt(shape)
            tag_parameters(model)
        finally:
            parallel_state.destroy_model_parallel()
    return list(model.parameters())


# ----------------------------------------------------------------------------------- the count


def count(params: list[nn.Parameter], stage: str, dp_rank: int, dp: int, tp: int) -> Traffic:
    """Reduce the sums of one step and count what leaves the rank.

    Args:
        params: of one tensor-parallel rank, tagged.
        stage: one of `STAGES`.
        dp_rank: place in the data-parallel group.
        dp: its size.
        tp: size of the tensor-parallel group.
    """
    dp_group = "dp" if dp > 1 and stage != "0" else None  # what the host gives to `bind`
    groups = ReductionGroups(dp_group, "tp" if tp > 1 else None)  # type: ignore[arg-type]
    tables = list(_tables(params, stage, dp_rank, dp))
    sums = [torch.zeros(table.num_slots, dtype=torch.float64) for table in tables]
    sent: dict[str, list[int]] = {"dp": [], "tp": []}

    def count_only(vector: torch.Tensor, group: str) -> None:
        sent[group].append(vector.numel() * vector.element_size())

    with mock.patch.object(reduce.dist, "all_reduce", count_only):
        reduce_block_sums_([(s, table, groups) for s, table in zip(sums, tables, strict=True)])
    return Traffic(sum(sent["dp"]), len(sent["dp"]), sum(sent["tp"]), len(sent["tp"]))


def _tables(params: list[nn.Parameter], stage: str, dp_rank: int, dp: int) -> Iterator[SegmentTable]:
    if stage == "0":
        for param in params:
            placement = whole_placement(param.block_spec, param.block_shard)
            yield build_table(param.numel(), [placement], shares_second_moment=True)
        return
    placements, numel = (flat_window if stage == "1/2" else partitions)(params, dp_rank, dp)
    yield build_table(numel, placements, shares_second_moment=True)


def flat_window(params: list[nn.Parameter], dp_rank: int, dp: int) -> tuple[tuple[Placement, ...], int]:
    """ZeRO 1 and 2: one window of the flat buffer, which DeepSpeed pads to a multiple of 2 elements per rank."""
    size = 2 * -(-sum(param.numel() for param in params) // (2 * dp))
    return zero_window(params, offsets_of(params), dp_rank, dp, size), size


def partitions(params: list[nn.Parameter], dp_rank: int, dp: int) -> tuple[tuple[Placement, ...], int]:
    """ZeRO 3: a piece of every parameter, in one sub-group (their number changes neither bytes nor messages)."""
    for param in params:
        param.ds_numel = param.numel()
        param.partition_numel = lambda param=param: -(-param.numel() // dp)
    numel = sum(param.partition_numel() for param in params)
    with _pretended_ranks(dp_rank, dp):
        wrapper = SimpleNamespace(
            fp16_groups=[params],
            fp32_partitioned_groups_flat=[torch.empty(numel, device="meta")],
            dp_process_group=dist.group.WORLD,
        )
        (stepped,) = zero_3_tensors(wrapper)
    return stepped.placements, numel


# ------------------------------------------------------------------------------------- output


def _line(row: dict[str, str]) -> str:
    return (
        f"ZeRO-{row['zero_stage']:<3} dp {row['dp']:>4} tp {row['tp']}: dp {row['dp_messages']} message of "
        f"{int(row['dp_bytes']):>9,} B, tp {row['tp_messages']} of {int(row['tp_bytes']):>9,} B: "
        f"{float(row['share_of_fp32_gradient']):.4%} of the fp32 gradient, "
        f"{float(row['share_of_bf16_gradient']):.4%} of bf16"
    )


def markdown(rows: list[dict[str, str]]) -> str:
    """The table of docs/benchmarks.md: ZeRO stage, tensor-parallel size, the data-parallel size with most to send."""
    lines = [
        "| ZeRO stage | tensor-parallel size | bytes sent per step | % of the fp32 gradient | data-parallel size |",
        "|---|---:|---:|---:|---:|",
    ]
    for stage, tp in itertools.product(STAGES, dict.fromkeys(row["tp"] for row in rows)):
        some = [row for row in rows if (row["zero_stage"], row["tp"]) == (stage, tp)]
        row = max(some, key=lambda row: float(row["share_of_fp32_gradient"]))
        sent = int(row["dp_bytes"]) + int(row["tp_bytes"])
        share = 100 * float(row["share_of_fp32_gradient"])
        lines.append(f"| {stage} | {tp} | {sent:,} | {share:.4f} | {row['dp']} |")
    first = rows[0]
    dps = [int(row["dp"]) for row in rows]
    lines += [
        "",
        f"BlockwiseAdamMini, LLaMA of {int(first['model_parameters']):,} parameters. The table shows the rank that "
        f"sends most. Data-parallel sizes from {min(dps)} to {max(dps)} were counted; the one with the largest share "
        f"is shown. The gradient is that of the rank's own parameters, which data parallelism sends anyway. The share "
        f"of a bf16 gradient is twice as large. A rank sends at most one message per process group and step. "
        f"BlockwiseAdamW sends nothing. Counted by `benchmarks/costs/communication.py`, {first['date']}, commit "
        f"{first['commit']}.",
    ]
    return "\n".join(lines)


def options_of(doc: str, arguments: list[str] | None, *, dp: list[int], tp: list[int]) -> argparse.Namespace:
    """The command line of a count of bytes.

    Args:
        doc: Of the script.
        arguments: Its arguments; None: those of this process.
        dp: Data-parallel sizes to count without ``--dp``.
        tp: Tensor-parallel sizes, likewise.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", type=Path, default=LLAMA_2B, help="a model file such as configs/model/tiny.yaml")
    parser.add_argument("--dp", nargs="+", type=int, default=dp, metavar="N")
    parser.add_argument("--tp", nargs="+", type=int, default=tp, metavar="N")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/bench", help="folder of the CSV")
    parser.add_argument("--docs", action="store_true", help="also write the table into docs/benchmarks.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    deepspeed.utils.logger.setLevel(logging.WARNING)
    sys.exit(main())
