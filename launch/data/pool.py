# SPDX-License-Identifier: Apache-2.0
"""Work on many parts in several processes, with a line of progress."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

from data.documents import Span
from data.parts import Job, write_part

logger = logging.getLogger(__name__)

_ON_TERMINAL_S, _IN_LOG_S = 2.0, 30.0
_counters: Any = None  # in a worker: shared with whoever started it


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def write_parts(job: Job, parts: Sequence[tuple[tuple[Span, ...], str]], workers: int) -> None:
    """Make every part; the result does not depend on the number of workers.

    Args:
        job: What all parts share.
        parts: Parts with their keys.
        workers: Processes; one works in this process.

    Raises:
        ValueError: See `data_readers.documents`. Finished parts stay, and are not made again.
        RuntimeError: A worker was killed.
    """
    workers = min(workers, len(parts))
    total = sum(span.bytes for part, _ in parts for span in part)
    if workers <= 1:
        progress = Progress([0, 0, 0], total)
        for part, key in parts:
            write_part(job, part, key, progress.count)
            progress.finish(part)
        progress.close()
        return
    context = forkserver()
    counters = context.Array("q", 3)
    progress = Progress(counters.get_obj(), total)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(counters,))
    try:
        _wait({pool.submit(_work, job, part, key): part for part, key in parts}, progress)
    except BaseException as error:  # also Ctrl-C: nobody goes on with a part that may take hours; raised again
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise RuntimeError(
                "a worker was killed, perhaps for want of memory; finished parts are kept: start again, "
                f"with fewer than --workers {workers} if it happens again"
            ) from error
        raise
    pool.shutdown()
    progress.close()


def _wait(futures: dict[Future[None], tuple[Span, ...]], progress: Progress) -> None:
    left = set(futures)
    while left:
        done, left = wait(left, timeout=progress.interval, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
            progress.finish(futures[future])
        progress.show()


def forkserver() -> Any:
    """A context whose processes are forked from one that has imported the packages: once, not in each of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["job.quiet", "data.pool"])
    before = os.environ.get("PYTHONPATH")
    here = str(Path(__file__).resolve().parents[1])
    # The server finds modules by this variable only; workers by the path of their parent.
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *([before] if before else []), *filter(None, sys.path)])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def _begin(counters: Any) -> None:
    """Of every worker: one core each, silent on Ctrl-C, and gone when the parent is gone."""
    global _counters
    _counters = counters
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(job: Job, part: tuple[Span, ...], key: str) -> None:
    write_part(job, part, key, _count)


def _count(documents: int, text_bytes: int, tokens: int) -> None:
    with _counters.get_lock():
        for place, more in enumerate((documents, text_bytes, tokens)):
            _counters[place] += more


class Progress:
    """A line on how far the work is, now and then: more often on a terminal than in a log.

    Args:
        counts: Documents, bytes of text and tokens so far; other processes may count them up.
        total: Bytes on disk of all parts.
    """

    def __init__(self, counts: Any, total: int) -> None:
        self._counts = counts
        self._total = total
        self._finished = 0
        self._terminal = sys.stdout.isatty()
        self._started = self._shown = time.monotonic()
        self.interval = _ON_TERMINAL_S if self._terminal else _IN_LOG_S

    def count(self, documents: int, text_bytes: int, tokens: int) -> None:
        """Add what was done in this process."""
        for place, more in enumerate((documents, text_bytes, tokens)):
            self._counts[place] += more
        self.show()

    def finish(self, part: tuple[Span, ...]) -> None:
        """Note a finished part."""
        self._finished += sum(span.bytes for span in part)

    def show(self) -> None:
        """Print the line if it is time."""
        now = time.monotonic()
        if now - self._shown < self.interval:
            return
        self._shown = now
        if self._terminal:
            print(f"\r{self.line(now)}\033[K", end="", flush=True)
        else:
            logger.info("%s", self.line(now))

    def line(self, now: float) -> str:
        """Documents, rates and the time left at ``now``, in the clock's seconds."""
        seconds = max(now - self._started, 1e-9)
        documents, text, tokens = self._counts[:3]
        left = "-"
        if self._finished:
            whole = int(seconds * (self._total - self._finished) / self._finished)
            left = f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
        return (
            f"{documents:,} documents, {text / seconds / 1e6:.2f} MB/s, {tokens / seconds:,.0f} tokens/s, "
            f"{self._finished / max(self._total, 1):.0%} of the parts' bytes finished, {left} left"
        )

    def close(self) -> None:
        """End the line on a terminal."""
        if self._terminal and self._shown != self._started:
            print(flush=True)
