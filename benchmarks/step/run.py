# SPDX-License-Identifier: Apache-2.0
"""Time one step of our optimizers and of their peers, in one process and in turn; write a CSV and a figure.

python -m benchmarks.step.run                            # 1M to 200M parameters on the CPU
python -m benchmarks.step.run --device cuda              # 1M to 1B parameters on a GPU
python -m benchmarks.step.run --sizes 1M --rounds 3 --without DeepSpeedCPU --probe sweeps --out /tmp/b

DeepSpeed compiles its optimizer at first use, which takes a minute or two. Do not interrupt that: it would leave a lock
that later starts wait for.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# before torch: every OpenMP library of this process reads it when it is loaded
os.environ.setdefault(
    "OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
)

import torch

from benchmarks.provenance import BENCHMARKS_PAGE, ROOT, provenance, read_csv, write_between, write_csv
from benchmarks.step.peers import Contender, Missing, find_contenders
from benchmarks.step.plots import plot
from benchmarks.step.probe import PROBES, measure
from benchmarks.step.shapes import LAYOUTS, SIZES, make_case
from benchmarks.step.tables import COLUMNS, Row, acceptance, limits, markdown, missing_rows, timed_rows
from benchmarks.step.verify import verify

ELSEWHERE = ROOT / "docs/bench/kernels_cpu_amd.csv"  # of `--out` on another machine
SECTION = {"cpu": "bench", "cuda": "bench-gpu"}
ROUNDS = {"1M": 61, "5M": 61, "25M": 41, "67M": 41, "200M": 21, "1B": 21}


def main(arguments: list[str] | None = None) -> None:
    """Verify, measure, write."""
    options = _options(arguments)
    device = torch.device(options.device)
    contenders, missing = find_contenders(device, options.without)
    for entry in missing:
        print(f"not run: {entry.name}: {entry.reason}", flush=True)
    for line in verify(contenders, options.layouts, device):
        print(f"verified: {line}", flush=True)
    common = {"device": device.type, "probe": options.probe, "threads": str(torch.get_num_threads()), **provenance()}
    rows: list[Row] = []
    results = options.out / f"kernels_{device.type}.csv"
    figure = results.with_suffix(".png")
    for size in options.sizes:
        for layout in options.layouts:
            rows += _run_case(size, layout, device, contenders, missing, options.rounds or ROUNDS[size], common)
            write_csv(results, COLUMNS, rows)  # what is measured is kept, whatever comes next
    plot(rows, figure)
    if options.docs:
        table = markdown(rows, os.path.relpath(figure, BENCHMARKS_PAGE.parent))
        write_between(BENCHMARKS_PAGE, SECTION[device.type], table)
        if device.type == "cpu":
            write_between(BENCHMARKS_PAGE, "bench-limits", limits([rows, read_csv(ELSEWHERE)]))
    print(f"written: {results} and {figure}")
    checks = acceptance(rows)
    for check in checks:
        print(check)
    if not checks:
        print("no acceptance limit is for these sizes")


def _run_case(
    size: str,
    layout: str,
    device: torch.device,
    contenders: list[Contender],
    missing: list[Missing],
    rounds: int,
    common: Row,
) -> list[Row]:
    case = make_case(size, layout, device)
    timings, probes, cannot = measure(case, contenders, rounds, common["probe"])
    rows = timed_rows(case, contenders, timings, probes, common)
    print(f"{size}, {layout}: {case.numel:,} parameters in {len(case.params)} tensors, {rounds} rounds", flush=True)
    for row in rows:
        print(
            f"  {row['contender']:<40} {float(row['median_ms']):10.3f} ms  ({row['p20_ms']} to {row['p80_ms']})  "
            f"{row['gb_per_s']:>6} GB/s  {float(row['share_of_probe']):6.1%} of the probe",
            flush=True,
        )
    return rows + missing_rows(case, [*missing, *cannot], common)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: all, 1B only on a GPU")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, help="samples of each contender; default: 21 to 61 by size")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="NAME", help="leave out contenders whose name has this in it"
    )
    parser.add_argument(
        "--probe",
        choices=PROBES,
        default=PROBES[0],
        help="bandwidth probe: one loop made by torch.compile (needs its compiler), or sweeps of plain operations",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs/bench", help="folder of CSV and figure")
    parser.add_argument("--docs", action="store_true", help="also write the table into docs/benchmarks.md")
    options = parser.parse_args(arguments)
    if options.sizes is None:
        options.sizes = [size for size in SIZES if size != "1B" or options.device == "cuda"]
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device and torch for CUDA; this torch sees none")
    options.out = options.out.resolve()
    return options


if __name__ == "__main__":
    main()
