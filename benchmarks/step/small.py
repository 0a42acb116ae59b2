# SPDX-License-Identifier: Apache-2.0
"""Time a step of tensors that are small or have short rows: LoRA, rows of 2 to 64, and thousands of 100 elements.

python -m benchmarks.step.small                                       # all cases, some minutes
python -m benchmarks.step.small --cases "1000 of 100" --rounds 201    # on a busy machine: more rounds

What is timed, and how, is as in `benchmarks.step.run`: one process, in turn, the same memory for all.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

# before torch: every OpenMP library of this process reads it when it is loaded
os.environ.setdefault(
    "OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
)

import torch
from torch import nn

from benchmarks.provenance import BENCHMARKS_PAGE, PROVENANCE, ROOT, provenance, write_between, write_csv
from benchmarks.step.peers import Contender, Missing, find_contenders
from benchmarks.step.probe import Timing, take_turns
from benchmarks.step.shapes import Case
from benchmarks.step.tables import Check, Row
from benchmarks.step.verify import verify
from ds_blockwise import tag_parameters

MINI, ADAMW = "BlockwiseAdamMini[cpp]", "BlockwiseAdamW[cpp]"
PEERS = ("DeepSpeedCPUAdam", "torch AdamW fused")
LEFT_OUT = ["reference", "triton", "bf16", "foreach", "published", "Lion"]
OVER_FASTEST, OVER_ADAMW = "over the faster peer", "over ours of AdamW"
COLUMNS = ("case", "tensors", "parameters", "contender", "threads", "rounds", "steps_per_sample")
COLUMNS += ("median_ms", "p20_ms", "p80_ms", OVER_FASTEST, OVER_ADAMW, "note", *PROVENANCE)
ROUNDS = 61
SHORT_ROWS = (2, 8, 16, 32, 64)
_SHORT_TENSORS, _SHORT_NUMEL = 8, 1 << 17
LORA, THOUSAND, FIVE_THOUSAND = "LoRA", "1000 of 100", "5000 of 100"

CASES: dict[str, list[tuple[int, int]]] = {
    # rank 16 on four square weights of 28 layers
    LORA: [(16, 1280), (1280, 16)] * (4 * 28),
    **{f"rows of {n}": [(_SHORT_NUMEL // n, n)] * _SHORT_TENSORS for n in SHORT_ROWS},
    THOUSAND: [(10, 10)] * 1000,
    FIVE_THOUSAND: [(10, 10)] * 5000,
}
"""The shapes of each case's tensors."""


def make_case(name: str) -> Case:
    """Weights of a feed-forward network, with fixed random gradients."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Module()
    for index, shape in enumerate(CASES[name]):
        param = nn.Parameter(torch.randn(shape, generator=generator).mul_(0.02))
        param.grad = torch.randn(shape, generator=generator).mul_(1e-2)
        model.register_parameter(f"weight_{index}", param)
    tag_parameters(model, rules=[{"match": ".", "role": "ffn"}])
    params = list(model.parameters())
    flat = torch.cat([param.detach().flatten() for param in params])
    return Case(name, "small", None, flat, torch.zeros_like(flat), params, (), [])  # type: ignore[arg-type]


def main(arguments: list[str] | None = None) -> None:
    """Verify, measure, write."""
    options = _options(arguments)
    contenders, missing = find_contenders(torch.device("cpu"), [*LEFT_OUT, *options.without])
    for line in verify(contenders, ["whole"], torch.device("cpu")):
        print(f"verified: {line}", flush=True)
    common = {"threads": str(torch.get_num_threads()), **provenance()}
    rows: list[Row] = []
    results = options.out / "small_tensors.csv"
    for name in options.cases:
        rows += _rows(make_case(name), contenders, missing, options.rounds, common)
        write_csv(results, COLUMNS, rows)  # what is measured is kept, whatever comes next
    print(markdown(rows))
    if options.docs:
        write_between(BENCHMARKS_PAGE, "small-tensors", markdown(rows))
    print(f"written: {results}")
    for check in acceptance(rows):
        print(check)


def _rows(case: Case, contenders: list[Contender], missing: list[Missing], rounds: int, common: Row) -> list[Row]:
    runs = {contender.name: contender.build(case).step for contender in contenders}
    timings = take_turns(runs, rounds, case.param.device)
    facts = {"case": case.size, "tensors": str(len(case.params)), "parameters": str(case.numel), **common}
    absent = [entry for entry in missing if entry.name in (MINI, ADAMW, *PEERS)]
    rows = [{**dict.fromkeys(COLUMNS, ""), **facts, "contender": name, **_times(name, timings)} for name in timings]
    rows += [
        {**dict.fromkeys(COLUMNS, ""), **facts, "contender": entry.name, "note": f"not run: {entry.reason}"}
        for entry in absent
    ]
    return rows


def _times(name: str, timings: dict[str, Timing]) -> Row:
    timing = timings[name]
    found = {
        "rounds": str(len(timing.seconds)),
        "steps_per_sample": str(timing.steps_per_sample),
        "median_ms": f"{timing.median * 1e3:.5g}",
        "p20_ms": f"{timing.quantile(0.2) * 1e3:.5g}",
        "p80_ms": f"{timing.quantile(0.8) * 1e3:.5g}",
    }
    if name not in PEERS:
        found[OVER_FASTEST] = f"{timing.median / min(timings[peer].median for peer in PEERS if peer in timings):.4f}"
        found[OVER_ADAMW] = f"{timing.median / timings[ADAMW].median:.4f}" if ADAMW in timings else ""
    return found


def acceptance(rows: Sequence[Row]) -> Iterator[Check]:
    """What issue 20 asks for, for the cases that the rows have."""
    limits = {LORA: 1.0, THOUSAND: 1.05, FIVE_THOUSAND: 1.05}
    compared = {peer for row in rows if (peer := row["contender"]) in PEERS and row["median_ms"]}
    for row in rows:
        what = f"{row['contender']}, {row['case']}"
        if row["case"] in limits and row["contender"] in (MINI, ADAMW):
            value = float(row[OVER_FASTEST]) if compared == set(PEERS) and row[OVER_FASTEST] else None
            yield Check(f"{what}, {OVER_FASTEST}", value, limits[row["case"]])
        elif row["contender"] == MINI:
            yield Check(f"{what}, {OVER_ADAMW}", float(row[OVER_ADAMW]) if row[OVER_ADAMW] else None, 1.5)


def markdown(rows: Sequence[Row]) -> str:
    """The table of docs/benchmarks.md."""
    names = list(dict.fromkeys(row["contender"] for row in rows if row["median_ms"]))
    cells = {(row["case"], row["contender"]): row for row in rows}
    ours = [name for name in names if name not in PEERS]
    head = [*(f"{name}, ms" for name in names), *(f"{name} {OVER_FASTEST}" for name in ours)]
    lines = [f"| tensors | number | {' | '.join(head)} |", f"|---|---:|{'---:|' * len(head)}"]
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [cells.get((case, name), dict.fromkeys(COLUMNS, "")) for name in names]
        times = [f"{float(row['median_ms']):.3g}" if row["median_ms"] else "-" for row in of_case]
        ratios = [f"{float(row[OVER_FASTEST]):.2f}" if row[OVER_FASTEST] else "-" for row in of_case]
        ratios = [ratio for name, ratio in zip(names, ratios, strict=True) if name in ours]
        number = next(row["tensors"] for row in rows if row["case"] == case)
        lines.append(f"| {case} | {number} | {' | '.join([*times, *ratios])} |")
    first = rows[0]
    lines += [
        "",
        f"Median time of one step of fp32 tensors, in turn. LoRA: {len(CASES[LORA])} tensors of rank 16, "
        f"4,587,520 elements; rows of 2 to 64: 1,048,576 elements. Measured by `benchmarks/step/small.py` on "
        f"{first['cpu']}, {first['cores']} cores, {first['threads']} threads, torch {first['torch']}, DeepSpeed "
        f"{first['deepspeed']}, {first['date']}, commit {first['commit']}.",
    ]
    return "\n".join(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="samples of each contender")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="NAME", help="leave out contenders by a part of a name"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs/bench", help="folder of the CSV")
    parser.add_argument("--docs", action="store_true", help="also write the table into docs/benchmarks.md")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    options.out = options.out.resolve()
    return options


if __name__ == "__main__":
    main()
