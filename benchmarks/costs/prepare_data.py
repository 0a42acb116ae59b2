# SPDX-License-Identifier: Apache-2.0
"""How fast text becomes tokens: text, JSON lines and parquet, with one and with two processes.

python -m benchmarks.costs.prepare_data --docs      # writes docs/data/throughput.csv and the table in docs/data.md

The text is the standard library of Python, several times over with other words in it, and the tokenizer is one of
50304 tokens that was trained on it. Each worker uses one core. The start of the command is not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import quiet  # noqa: F401
from benchmarks.provenance import PROVENANCE, ROOT, provenance, write_between, write_csv
from data.corpus import Corpus, find_corpus
from data.token_files import prepare
from ds_blockwise.runs.reading.problems import Problems
from ds_blockwise.runs.run_file import DataConfig

MB = 10**6
PART_BYTES = 8 << 20  # enough parts of little text to keep two workers busy
KINDS = ("text", "jsonl", "parquet")
COLUMNS = (
    "kind",
    "workers",
    "rounds",
    "text_mb",
    "tokens",
    "seconds",
    "mb_per_s",
    "tokens_per_s",
    "gb_per_hour",
    "gb_per_core_hour",
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
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
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
    for kind in options.kinds:
        _write(kind, work, round(options.megabytes * MB))
    data = DataConfig(str(work / "tokenizer"))
    prepare(data, options.vocab_size, "benchmark")
    data = dataclasses.replace(data, directory=str(work / "data"), tokenizer=data.directory)
    for workers in options.workers:  # the first worker waits for its packages to be imported
        prepare(data, options.vocab_size, "benchmark", force=True, workers=workers, part_bytes=MB)
    facts = {**provenance(), "tokenizers": importlib.metadata.version("tokenizers")}
    facts["pyarrow"] = importlib.metadata.version("pyarrow") if "parquet" in options.kinds else "none"
    taken: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for _ in range(options.rounds):
        for kind in options.kinds:
            for workers in options.workers:
                load = os.getloadavg()[0]
                wall, cpu = time.perf_counter(), time.process_time()
                source = dataclasses.replace(data, source=(str(work / kind),))
                metadata = prepare(
                    source, options.vocab_size, "benchmark", force=True, workers=workers, part_bytes=PART_BYTES
                )
                run = (time.perf_counter() - wall, time.process_time() - cpu, load)
                print(f"{kind}, {workers} workers: {run[0]:.1f} s, load before {load:.1f}", flush=True)
                taken.setdefault((kind, workers), []).append(run)
    tokens = sum(split["tokens"] for split in metadata["splits"].values())
    rows = []
    for (kind, workers), runs in taken.items():
        seconds, cpu = (statistics.median(run[i] for run in runs) for i in (0, 1))
        size = options.megabytes
        rows.append(
            {
                **facts,
                "kind": kind,
                "workers": str(workers),
                "rounds": str(len(runs)),
                "text_mb": f"{size:g}",
                "tokens": str(tokens),
                "seconds": f"{seconds:.2f}",
                "mb_per_s": f"{size / seconds:.2f}",
                "tokens_per_s": f"{tokens / seconds:.0f}",
                "gb_per_hour": f"{size / 1000 / seconds * 3600:.1f}",
                # The processor time of workers is not known to who started them.
                "gb_per_core_hour": f"{size / 1000 / cpu * 3600:.1f}" if workers == 1 else "",
                "load_before": f"{max(run[2] for run in runs):.1f}",
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


def markdown(rows: list[dict[str, str]]) -> str:
    """The table of docs/data.md."""
    lines = [
        "| source | workers | MB/s of text | tokens/s | GB/hour | GB in an hour of processor time |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = (row["kind"], row["workers"], row["mb_per_s"], f"{int(row['tokens_per_s']):,}", row["gb_per_hour"])
        lines.append(f"| {' | '.join(cells)} | {row['gb_per_core_hour'] or '-'} |")
    first = rows[0]
    loads = sorted(float(row["load_before"]) for row in rows)
    lines += [
        "",
        f"Median of {first['rounds']} rounds of `benchmarks/costs/prepare_data.py` on {first['cpu']}, "
        f"{first['cores']} cores, each worker on one of them: {first['text_mb']} MB of Python's own library, a "
        f"byte-level BPE tokenizer trained on it, joining and checking included, the start of the command not. The "
        f"machine's load before the runs was {loads[0]} to {loads[-1]}; where it is above 1, others worked on it at "
        f"the same time, and only the last column holds for a free one. tokenizers {first['tokenizers']}, pyarrow "
        f"{first['pyarrow']}, Python {first['python']}, {first['date']}, commit {first['commit']}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
