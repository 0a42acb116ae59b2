# SPDX-License-Identifier: Apache-2.0
"""Small corpora of every kind of file, with the documents that are in them, for the tests of data preparation."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import signal
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer

from data import pool, token_files
from data.metadata import TOKENIZER, Metadata
from ds_blockwise.runs.run_file import DataConfig

WORDS = [f"{a}{b}{c}" for a in "bdgkmnprst" for b in "aeiou" for c in ("", "n", "r", "ss", "lé")]
VOCABULARY = 320
PART = 3000  # bytes: many parts of little text


def text(seed: int, words: int) -> str:
    draw = random.Random(seed)
    lines = [" ".join(draw.choices(WORDS, k=9)) for _ in range(words // 9 + 1)]
    return "\n".join(lines)


def write_lines(path: Path, texts: list[str], opened: Callable[..., Any] = open) -> list[str]:
    with opened(path, "wb") as file:
        for number, document in enumerate(texts):
            file.write(json.dumps({"id": number, "text": document}, ensure_ascii=number % 2 == 0).encode() + b"\n")
    return texts


def make_corpus(folder: Path, *, parquet: bool = False) -> list[str]:
    """Text, JSON lines plain and packed, with parquet if wanted, and a file that is no text; returns the documents."""
    folder.mkdir()
    found = []
    for number in range(8):
        document = text(number, 20 + 30 * number)
        (folder / f"{number}.txt").write_bytes(document.replace("\n", "\r\n" if number % 2 else "\n").encode())
        found.append(document)
    found += write_lines(folder / "lines.jsonl", [text(100 + n, 9 + n % 40) for n in range(120)])
    found += write_lines(folder / "packed.jsonl.gz", [text(300 + n, 30) for n in range(20)], gzip.open)
    # No text, which shows only in a later part than its first.
    (folder / "picture.txt").write_bytes(b"a header of lines\n" * 400 + b"\xff\xfe\x00\x80" * 2000)
    if parquet:
        import pyarrow

        found += write_parquet(folder / "rows.parquet", [text(500 + n, 25) for n in range(90)])
        with pyarrow.output_stream(folder / "more.jsonl.zst", compression="zstd") as file:
            more = [text(700 + n, 25) for n in range(15)]
            file.write("".join(json.dumps({"text": document}) + "\n" for document in more).encode())
        found += more
    return found


def write_parquet(path: Path, texts: list[str]) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=max(1, len(texts) // 6))
    return texts


def data_config(folder: Path, source: Path | str, **changes: Any) -> DataConfig:
    return dataclasses.replace(
        DataConfig(directory=str(folder), source=(str(source),), validation_fraction=0.2), **changes
    )


def prepare(data: DataConfig, **options: Any) -> Metadata:
    return token_files.prepare(data, VOCABULARY, "run.yaml", **{"part_bytes": PART, **options})


def documents_of(folder: Path, split: str) -> list[str]:
    """The texts in token files, read with Megatron's own class."""
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    dataset = IndexedDataset(str(folder / split))
    return [tokenizer.decode(dataset[i][:-1].tolist(), skip_special_tokens=False) for i in range(len(dataset))]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its name."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def start(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that begins with everything imported, and can be killed."""
    process: BaseProcess = pool.forkserver().Process(target=target, args=arguments)
    process.start()
    return process


def _prepare_alone(ready: Connection, folder: Path, texts: Path) -> None:
    ready.send(None)
    prepare(data_config(folder, texts))


def finished_parts(folder: Path) -> dict[str, int]:
    """Records of finished parts and when they were written."""
    return {p.name: p.stat().st_mtime_ns for p in (folder / "parts").glob("*.json") if len(p.stem) == 24}


def begin(folder: Path, texts: Path) -> BaseProcess:
    """A preparation of its own process that has everything imported and has just begun."""
    ready, send = Pipe(duplex=False)
    process = start(_prepare_alone, send, folder, texts)
    assert ready.poll(120.0)
    return process


def kill_until_done(folder: Path, texts: Path, moment: Callable[[], float]) -> tuple[int, int]:
    """Kill each attempt after its moment until one is through: how many were killed, how many went on with parts."""
    finished: dict[str, int] = {}
    kills = kept = 0
    while True:
        process = begin(folder, texts)
        process.join(moment())
        process.kill()
        process.join()
        kept += bool(finished)
        if process.exitcode == 0:
            return kills, kept
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        if (folder / "metadata.json").is_file():  # killed while it cleaned up
            finished = {}
            continue
        earlier, finished = finished, finished_parts(folder)
        assert earlier.items() <= finished.items(), "a finished part was made again"
