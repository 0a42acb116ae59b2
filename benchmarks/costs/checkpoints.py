# SPDX-License-Identifier: Apache-2.0
"""How long ``engine.save_checkpoint`` and ``engine.load_checkpoint`` take, beside DeepSpeed's own with its AdamW.

python -m benchmarks.costs.checkpoints          # 75.8M parameters, 1.06 GB in a checkpoint, one process, ZeRO-1, bf16
python -m benchmarks.costs.checkpoints --docs   # also writes the table into docs/benchmarks.md

The engines save and load in turn. When ours return, the files are on the disk; DeepSpeed's are in the page cache then,
so the time until the disk has them is measured as well. Loads read from the page cache. A disk differs more from minute
to minute than programs do. So all is measured a second time in a file system in memory, where a save takes what the
program itself takes.

A virtual machine gives memory that is free for some seconds back to its host, and fetches it page by page when it is
used again: up to two seconds a gigabyte. So the order is drawn anew in each round, that nobody always follows one whose
files were smaller, and as much memory as a save and a load need is used once before each.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.costs.one_process import RULES, matrices, process_group
from benchmarks.provenance import BENCHMARKS_PAGE, PROVENANCE, ROOT, provenance, write_between, write_csv
from ds_blockwise.optimizers.registry import OPTIMIZERS

PEER = "AdamW (DeepSpeed)"
MEASURED = ("save_s", "on_disk_s", "load_s")
MEMORY = Path("/dev/shm")
COLUMNS = (
    "optimizer",
    "file_system",
    "zero_stage",
    "parameters",
    "bytes",
    "threads",
    "rounds",
    *MEASURED,
    *(f"{column}_over_peer" for column in MEASURED),
    *PROVENANCE,
)


def main(arguments: list[str] | None = None) -> None:
    """Measure every optimizer beside DeepSpeed's; print, write."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    with process_group():
        engines = _engines(options)
        rows = [row for folder in options.folder for row in measure(engines, folder, options)]
    write_csv(options.out / "checkpoints.csv", COLUMNS, rows)
    text = markdown(rows)
    print(text)
    if options.docs:
        write_between(BENCHMARKS_PAGE, "checkpoints", text)


def _engines(options: argparse.Namespace) -> dict[str, Any]:
    sections = {PEER: {"type": "AdamW", "params": {"lr": 1e-6, "torch_adam": True}}} | {
        name: {"type": name, "params": {"lr": 1e-6, "rules": RULES}} for name in OPTIMIZERS
    }
    return {name: _engine(section, options) for name, section in sections.items()}


def measure(engines: dict[str, Any], folder: Path, options: argparse.Namespace) -> list[dict[str, str]]:
    """A row for each optimizer, from rounds in which all save and load in turn; the first round warms up."""
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in engines}
    sizes: dict[str, int] = {}
    draw, largest = random.Random(0), 0
    for turn in range(options.rounds + 1):
        for name in draw.sample(list(engines), len(engines)):
            taken, sizes[name] = _save_and_load(engines[name], folder, 2 * largest)
            largest = max(largest, sizes[name])
            if turn:
                times[name].append(taken)
    common = {"file_system": file_system(folder), **provenance()}
    rows = [
        {
            "optimizer": name,
            "zero_stage": "1",
            "parameters": str(sum(p.numel() for p in engine.module.parameters())),
            "bytes": str(sizes[name]),
            "threads": str(options.threads),
            "rounds": str(options.rounds),
            **{column: f"{median:.4g}" for column, median in zip(MEASURED, _medians(times[name]), strict=True)},
            **common,
        }
        for name, engine in engines.items()
    ]
    for row in rows:
        for column in MEASURED:
            row[f"{column}_over_peer"] = f"{float(row[column]) / float(rows[0][column]):.3f}"
    return rows


def file_system(folder: Path) -> str:
    """The kind of file system that a folder lies on, such as ``ext4``; ``tmpfs`` is memory."""
    mounted = {Path(of.mountpoint): of.fstype for of in psutil.disk_partitions(all=True)}
    return next(mounted[at] for at in (folder.resolve(), *folder.resolve().parents) if at in mounted)


def _save_and_load(engine: Any, parent: Path, memory: int) -> tuple[tuple[float, ...], int]:
    folder = tempfile.mkdtemp(dir=parent)
    try:
        os.sync()  # what others left for the disk to do is not ours
        torch.ones(memory, dtype=torch.uint8)
        begin = time.perf_counter()
        engine.save_checkpoint(folder, tag="t")
        saved = time.perf_counter()
        os.sync()
        on_disk = time.perf_counter()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        torch.ones(memory, dtype=torch.uint8)
        return (saved - begin, on_disk - begin, _seconds(lambda: engine.load_checkpoint(folder, tag="t"))), size
    finally:
        shutil.rmtree(folder)


def _seconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _medians(times: list[tuple[float, ...]]) -> list[float]:
    return [statistics.median(column) for column in zip(*times, strict=True)]


def _engine(section: dict[str, Any], options: argparse.Namespace) -> Any:
    """An engine that has made a step, so that there are moments."""
    import deepspeed

    import ds_blockwise  # noqa: F401 - registers the optimizers

    torch.manual_seed(0)
    model = matrices(options.hidden, options.layers)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "optimizer": section,
    }
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    engine.backward(engine(torch.ones(1, options.hidden, dtype=torch.bfloat16)).square().sum())
    engine.step()
    return engine


def markdown(rows: list[dict[str, str]]) -> str:
    """The table of the page, a line for each optimizer."""
    lines = [
        "| file system | optimizer | checkpoint, GB | save, s | until it is on the disk, s | load, s | save / peer's "
        "| on the disk / peer's | load / peer's |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        of = "tmpfs (memory)" if row["file_system"] == "tmpfs" else row["file_system"]
        cells = [of, row["optimizer"], f"{int(row['bytes']) / 1e9:.2f}", *(row[column] for column in MEASURED)]
        cells += [f"{float(row[f'{column}_over_peer']):.2f}" for column in MEASURED]
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]
    lines += [
        "",
        f"Medians of {first['rounds']} rounds in turn by `benchmarks/costs/checkpoints.py`: "
        f"{int(first['parameters']) / 1e6:.1f}M weights in bf16, ZeRO-{first['zero_stage']}, one process, threads: "
        f"{first['threads']}, on {first['cores']} cores ({first['cpu']}), torch {first['torch']}, DeepSpeed "
        f"{first['deepspeed']}, {first['date']}, commit {first['commit']}. The peer is {PEER}.",
    ]
    return "\n".join(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2176)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    usual = [Path(tempfile.gettempdir()), *([MEMORY] if MEMORY.is_dir() else [])]
    where = "where to save; default the system's folder for temporary files, then memory"
    parser.add_argument("--folder", type=Path, nargs="+", default=usual, help=where)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/bench", help="folder of the CSV")
    parser.add_argument("--docs", action="store_true", help="also write the table into docs/benchmarks.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
