# SPDX-License-Identifier: Apache-2.0
"""Processes that tokenize parts: a killed worker is reported, the line of progress is rare and right."""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="the token files need the extra 'megatron'")
pytest.importorskip("tokenizers", reason="the token files need the extra 'launch'")

from data import pool
from data.documents import Span
from tests.helpers.launch.data_corpus import data_config, make_corpus, prepare


def test_killed_worker_is_reported(tmp_path: Path) -> None:
    """The system kills for want of memory; waiting for such a worker would never end."""
    make_corpus(tmp_path / "texts")
    before = set(multiprocessing.active_children())

    def kill_one() -> None:
        while not (children := set(multiprocessing.active_children()) - before):
            time.sleep(0.001)
        children.pop().kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(RuntimeError, match=r"a worker was killed, .* finished parts are kept"):
        prepare(data_config(tmp_path / "data", tmp_path / "texts"), workers=2)
    killer.join()


def test_progress_is_rare_in_a_log_and_counts_right(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock = [100.0]
    monkeypatch.setattr(pool.time, "monotonic", lambda: clock[0])
    progress = pool.ProgressLine([0, 0, 0], 400)
    span = Span("a", Path("a"), "text", 0, 100, 100, 100, 0)
    for _ in range(29):
        clock[0] += 1.0
        progress.count(2, 1_000_000, 50)
    assert caplog.messages == []
    assert progress.line(clock[0]).endswith(" tokens/s")  # of the only part nobody knows how much is left
    progress.finish((span,))
    clock[0] += 1.0
    progress.count(2, 1_000_000, 50)
    (line,) = caplog.messages
    assert line.startswith("60 documents, 1.00 MB/s, 50 tokens/s, 25% ")
    assert line.endswith("0:01:30 left")
    clock[0] += 20.0
    progress.show()
    assert len(caplog.messages) == 1
