# SPDX-License-Identifier: Apache-2.0
"""How fast text becomes tokens: text, JSON lines and parquet, with one and with two processes.

python benchmarks/bench_prepare_data.py --docs      # writes docs/data/throughput.csv and the table in docs/data.md

The text is the standard library of Python, several times over with other words in it, and the tokenizer is one of
50304 tokens that was trained on it. Each process uses one core. Start-up of the command is part of the seconds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from bench_machine import PROVENANCE, ROOT, provenance, write_between, write_csv

sys.path.insert(0, str(ROOT / "launch"))

import quiet  # noqa: F401
from corpus import Corpus, find_corpus
from token_files import read_metadata

from ds_blockwise.config_files import Problems

MB = 10**6
KINDS = ("text", "jsonl", "parquet")
COLUMNS = (
    "kind",
    "workers",
    "rounds",
    "text_mb",
    "tokens",
    "seconds",
    "start_up_seconds",
    "mb_per_s",
    "tokens_per_s",
    "gb_per_hour",
    "peak_mib",
    "load_before",
    "tokenizers",
    "pyarrow",
    *PROVENANCE,
)


def main(arguments: list[str] | None = None) -> None:
    """Write the text in every kind, prepare each with every number of workers, in turn; write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=64.0, help="of text in each kind of file")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=50304)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "data")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/data.md, too")
    options = parser.parse_args(arguments)
    work = Path(tempfile.mkdtemp(prefix="prepare_data_"))
    try:
        rows = _measure(options, work)
    finally:
        shutil.rmtree(work)
    write_csv(options.out / "throughput.csv", COLUMNS, rows)
    print(markdown(rows))
    if options.docs:
        write_between(ROOT / "docs" / "data.md", "throughput", markdown(rows))


def _measure(options: argparse.Namespace, work: Path) -> list[dict[str, str]]:
    model = yaml.safe_load((ROOT / "configs/model/tiny.yaml").read_text(encoding="utf-8"))
    model.pop("num_parameters", None)
    (work / "model.yaml").write_text(yaml.safe_dump({**model, "vocab_size": options.vocab_size}), encoding="utf-8")
    run = yaml.safe_load((ROOT / "configs/run/tiny.yaml").read_text(encoding="utf-8"))
    run |= {"model": "model.yaml", "deepspeed": str(ROOT / "configs/deepspeed/adamw.json")}
    (work / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    for kind in options.kinds:
        _write(kind, work, round(options.megabytes * MB))
    _prepare(work, "tokenizer", "--source", "stdlib", "--workers", "1")
    given = ("--tokenizer", str(work / "tokenizer"))
    (work / "few.jsonl").write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(99)))
    few = ("--source", str(work / "few.jsonl"), "--part-megabytes", "0.001", *given)
    start_up = {n: _prepare(work, f"few{n}", *few, "--workers", str(n))[0] for n in options.workers}
    facts = {**provenance(), "tokenizers": importlib.metadata.version("tokenizers")}
    facts["pyarrow"] = importlib.metadata.version("pyarrow") if "parquet" in options.kinds else "none"
    taken: dict[tuple[str, int], list[tuple[float, float]]] = {}
    loads: dict[tuple[str, int], float] = {}
    for _ in range(options.rounds):
        for kind in options.kinds:
            for workers in options.workers:
                source = ("--source", str(work / kind), "--workers", str(workers), "--part-megabytes", "8")
                loads[kind, workers] = max(loads.get((kind, workers), 0.0), os.getloadavg()[0])
                taken.setdefault((kind, workers), []).append(_prepare(work, "data", *source, *given))
    rows = []
    for (kind, workers), runs in taken.items():
        metadata = read_metadata(work / "data")
        assert metadata is not None
        seconds = statistics.median(run[0] for run in runs)
        size, working = options.megabytes, seconds - start_up[workers]
        tokens = sum(split["tokens"] for split in metadata["splits"].values())
        rows.append(
            {
                **facts,
                "kind": kind,
                "workers": str(workers),
                "rounds": str(len(runs)),
                "text_mb": f"{size:g}",
                "tokens": str(tokens),
                "seconds": f"{seconds:.2f}",
                "start_up_seconds": f"{start_up[workers]:.2f}",
                "mb_per_s": f"{size / working:.2f}",
                "tokens_per_s": f"{tokens / working:.0f}",
                "gb_per_hour": f"{size / 1000 / working * 3600:.1f}",
                # Several workers are no children of the command; their peaks are not known.
                "peak_mib": f"{max(run[1] for run in runs):.0f}" if workers == 1 else "",
                "load_before": f"{loads[kind, workers]:.1f}",
            }
        )
    return rows


def _texts(size: int) -> Iterator[str]:
    """Files of the standard library, again and again, each time with another word in each line."""
    files = find_corpus(("stdlib",), "text", "stdlib", Problems()).files
    written = number = 0
    while True:
        for text in Corpus(files, "text"):
            changed = text.replace("self", f"self{number}") if number else text
            written += len(changed.encode())
            if written > size:
                return
            yield changed
        number += 1


def _write(kind: str, work: Path, size: int) -> None:
    folder = work / kind
    folder.mkdir()
    if kind == "text":
        for number, text in enumerate(_texts(size)):
            (folder / f"{number:06d}.txt").write_text(text, encoding="utf-8")
    elif kind == "jsonl":
        with (folder / "a.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in _texts(size))
    else:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"text": list(_texts(size))})
        pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=200)


def _prepare(work: Path, directory: str, *options: str) -> tuple[float, float]:
    """Run the command; its seconds and its peak memory in MiB."""
    shutil.rmtree(work / "data", ignore_errors=True)
    script = [sys.executable, str(ROOT / "launch" / "prepare_data.py"), "--run", str(work / "run.yaml")]
    command = [*script, "--directory", str(work / directory), *options]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    with (work / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError((work / "log").read_text(encoding="utf-8")[-3000:])
    return time.perf_counter() - started, used.ru_maxrss / 1024


def markdown(rows: list[dict[str, str]]) -> str:
    """The table of docs/data.md."""
    lines = [
        "| source | workers | MB/s of text | tokens/s | GB/hour | peak memory, MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        rate, tokens, hour = float(row["mb_per_s"]), int(row["tokens_per_s"]), float(row["gb_per_hour"])
        lines.append(
            f"| {row['kind']} | {row['workers']} | {rate:.2f} | {tokens:,} | {hour:.1f} | {row['peak_mib'] or '-'} |"
        )
    first = rows[0]
    loads = sorted(float(row["load_before"]) for row in rows)
    lines += [
        "",
        f"Median of {first['rounds']} rounds of `benchmarks/bench_prepare_data.py` on {first['cpu']}, "
        f"{first['cores']} cores, each process on one of them: {first['text_mb']} MB of Python's own library, a "
        f"byte-level BPE tokenizer trained on it, without the start-up of the command "
        f"({first['start_up_seconds']} s with one worker). The machine's load before the rounds was {loads[0]} to "
        f"{loads[-1]}; above 1 it was shared, and a free machine is faster. tokenizers {first['tokenizers']}, "
        f"pyarrow {first['pyarrow']}, Python {first['python']}, {first['date']}, commit {first['commit']}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
