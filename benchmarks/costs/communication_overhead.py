# SPDX-License-Identifier: Apache-2.0
"""What the reductions of split blocks add to a step of BlockwiseAdamMini, measured on local gloo ranks.

python -m benchmarks.costs.communication_overhead     # 2, 3 and 4 ranks, 25M parameters each

Every rank steps the flat shard that it would have under ZeRO-2, in turn with its process group and without, and times
the bare all-reduce of as many bytes. A sample counts as long as its slowest rank takes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from benchmarks.provenance import BENCHMARKS_PAGE, PROVENANCE, ROOT, cores, provenance, write_between, write_csv
from benchmarks.step.peers import HYPER
from benchmarks.step.shapes import SIZES, zero_shard
from ds_blockwise import BlockwiseAdamMini
from ds_blockwise.parallel.reduce import LOCAL, ReductionGroups

WITH, WITHOUT, BARE = "step with reductions", "step without", "all-reduce alone"
COLUMNS = (
    "ranks",
    "parameters_per_rank",
    "what",
    "backend",
    "threads_per_rank",
    "split_blocks",
    "bytes_sent",
    "rounds",
    "median_ms",
    "p20_ms",
    "p80_ms",
    *PROVENANCE,
)
WARM_UP = 3


def main(arguments: list[str] | None = None) -> None:
    """Measure every number of ranks, write."""
    options = _options(arguments)
    common = provenance()
    rows = []
    for ranks in options.ranks:
        rows += [{**row, **common} for row in measure(ranks, options.size, options.rounds)]
        for row in rows[-3:]:
            print(f"{ranks} ranks: {row['what']:<22} {row['median_ms']:>9} ms, {row['bytes_sent']} B", flush=True)
    write_csv(options.out / "communication_overhead.csv", COLUMNS, rows)
    if options.docs:
        write_between(BENCHMARKS_PAGE, "communication-overhead", markdown(rows))


def measure(ranks: int, size: str, rounds: int) -> list[dict[str, str]]:
    """Start the ranks and gather their samples; one row per thing that was timed."""
    threads = max(1, cores() // ranks)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        mp.spawn(_rank_main, (ranks, folder, size, rounds, threads), nprocs=ranks)
        results = [torch.load(Path(folder) / f"result{rank}.pt", weights_only=True) for rank in range(ranks)]
    facts = results[0]
    rows = []
    for what in (WITH, WITHOUT, BARE):
        slowest = sorted(max(times) for times in zip(*(result[what] for result in results), strict=True))
        p20, p80 = (slowest[min(len(slowest) - 1, int(share * len(slowest)))] for share in (0.2, 0.8))
        values = {
            "ranks": ranks,
            "parameters_per_rank": facts["numel"],
            "what": what,
            "backend": facts["backend"],
            "threads_per_rank": threads,
            "split_blocks": facts["split"],
            "bytes_sent": 0 if what == WITHOUT else 8 * facts["split"],
            "rounds": rounds,
            "median_ms": f"{statistics.median(slowest) * 1e3:.5g}",
            "p20_ms": f"{p20 * 1e3:.5g}",
            "p80_ms": f"{p80 * 1e3:.5g}",
        }
        rows.append({key: str(value) for key, value in values.items()})
    return rows


def _rank_main(rank: int, ranks: int, folder: str, size: str, rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    _, placements, numel = zero_shard(SIZES[size], rank, ranks)
    flat = nn.Parameter(torch.randn(numel).mul_(0.02))
    flat.grad = torch.randn(numel).mul_(1e-2)
    steps: dict[str, Callable[[], object]] = {}
    for what, groups in ((WITH, ReductionGroups(dist.group.WORLD)), (WITHOUT, LOCAL)):
        optimizer = BlockwiseAdamMini([flat], **HYPER)
        table = optimizer.bind(flat, placements, groups)
        steps[what] = optimizer.step
    vector = torch.zeros(table.dp_slots.numel(), dtype=torch.float64)
    steps[BARE] = lambda: dist.all_reduce(vector)
    times: dict[str, list[float]] = {what: [] for what in steps}
    for index in range(rounds + WARM_UP):
        for what, step in steps.items() if index % 2 else reversed(steps.items()):
            dist.barrier()
            start = time.perf_counter()
            step()
            if index >= WARM_UP:
                times[what].append(time.perf_counter() - start)
    backend = optimizer.binding_of(flat).kernels.name
    result = {"numel": numel, "split": table.dp_slots.numel(), "backend": backend, **times}
    torch.save(result, f"{folder}/result{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def markdown(rows: list[dict[str, str]]) -> str:
    """The table of docs/benchmarks.md, one line per number of ranks."""
    lines = [
        f"| ranks | {WITH}, ms | {WITHOUT}, ms | added, % | {BARE}, ms | split blocks | bytes sent |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for ranks in dict.fromkeys(row["ranks"] for row in rows):
        found = {row["what"]: row for row in rows if row["ranks"] == ranks}
        added = float(found[WITH]["median_ms"]) / float(found[WITHOUT]["median_ms"]) - 1
        times = [found[what]["median_ms"] for what in (WITH, WITHOUT)]
        cells = [ranks, *times, f"{100 * added:+.1f}", found[BARE]["median_ms"]]
        cells += [found[WITH]["split_blocks"], found[WITH]["bytes_sent"]]
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]
    lines += [
        "",
        f"Median step of BlockwiseAdamMini ({first['backend']} backend) on ZeRO-2 shards of about "
        f"{int(first['parameters_per_rank']) / 1e6:.0f}M parameters a rank, by "
        f"`benchmarks/costs/communication_overhead.py` with gloo on one machine of {first['cores']} "
        f"cores ({first['cpu']}). The ranks share the cores: more than {first['cores']} ranks wait for a core, not for "
        f"the network. torch {first['torch']}, "
        f"{first['date']}, commit {first['commit']}.",
    ]
    return "\n".join(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 3, 4], metavar="N")
    parser.add_argument("--size", choices=SIZES, default="25M", help="parameters of each rank")
    parser.add_argument("--rounds", type=int, default=41, help="samples of each kind")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/bench", help="folder of the CSV")
    parser.add_argument("--docs", action="store_true", help="also write the table into docs/benchmarks.md")
    options = parser.parse_args(arguments)
    if min(options.ranks) < 2:
        parser.error(f"--ranks must be at least 2 each, got {options.ranks}: one rank has nothing to reduce")
    return options


if __name__ == "__main__":
    main()
