# SPDX-License-Identifier: Apache-2.0
"""Which files a corpus holds, and which documents are kept for validation."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="the token files need the extra 'megatron'")
pytest.importorskip("tokenizers", reason="the token files need the extra 'launch'")

from data import corpus
from ds_blockwise.runs.reading.problems import Problems


def test_folder_search_and_names(tmp_path: Path) -> None:
    for name in ("a.json.gz", "b.jsonl.zst", "c.parquet", "d.txt", "e.json", "f.png", "c4.00000-of-1.json.gz"):
        (tmp_path / name).write_bytes(b"")
    found = corpus.find_corpus((str(tmp_path),), "text", "run.yaml", Problems()).files
    assert [Path(name).name for name, _ in found] == [
        "a.json.gz",
        "b.jsonl.zst",
        "c.parquet",
        "c4.00000-of-1.json.gz",
        "d.txt",
    ]


def test_share_of_validation_is_the_fraction() -> None:
    for fraction in (0.01, 0.3):
        count = sum(corpus.is_validation(f"document {n}", fraction) for n in range(20_000))
        deviation = (20_000 * fraction * (1 - fraction)) ** 0.5
        assert abs(count - 20_000 * fraction) < 4 * deviation
