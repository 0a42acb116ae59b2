# SPDX-License-Identifier: Apache-2.0
"""Several processes tokenize the parts, with a line of progress."""

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
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from data.documents import Span
from data.parts import PartSettings, write_part

if TYPE_CHECKING:  # not a class that can be indexed at run time
    from multiprocessing.sharedctypes import SynchronizedArray

    SharedCounts = SynchronizedArray[int]

logger = logging.getLogger(__name__)

_ON_TERMINAL_S, _IN_LOG_S = 2.0, 30.0
_shared: SharedCounts | None = None  # in a worker: documents, bytes of text and tokens of all workers


class Counts(Protocol):
    """Documents, bytes of text and tokens so far."""

    def __getitem__(self, index: int, /) -> int: ...

    def __setitem__(self, index: int, value: int, /) -> None: ...


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def write_parts(settings: PartSettings, parts: Sequence[tuple[tuple[Span, ...], str]], workers: int) -> None:
    """Make every part; the result does not depend on the number of workers.

    Args:
        settings: What all parts share.
        parts: Parts with their keys.
        workers: Processes; with 1 the work is done in this process.

    Raises:
        ValueError: See `documents.documents`. Finished parts stay, and are not made again.
        RuntimeError: A worker was killed.
    """
    workers = min(workers, len(parts))
    total = sum(span.bytes for part, _ in parts for span in part)
    if workers <= 1:
        progress = ProgressLine([0, 0, 0], total)
        for part, key in parts:
            write_part(settings, part, key, progress.count)
            progress.finish(part)
        progress.close()
        return
    context = forkserver()
    counters = context.Array("q", 3)
    progress = ProgressLine(counters.get_obj(), total)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(counters,))
    try:
        _wait({pool.submit(_work, settings, part, key): part for part, key in parts}, progress)
    except BaseException as error:  # also Ctrl-C: no worker goes on with its part; raised again
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise RuntimeError(
                "a worker was killed, perhaps because memory ran out; finished parts are kept: start the same command "
                f"again, with fewer than --workers {workers} if it happens again"
            ) from error
        raise
    pool.shutdown()
    progress.close()


def _wait(futures: dict[Future[None], tuple[Span, ...]], progress: ProgressLine) -> None:
    left = set(futures)
    while left:
        done, left = wait(left, timeout=progress.interval, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
            progress.finish(futures[future])
        progress.show()


def forkserver() -> ForkServerContext:
    """A context whose processes are forked from one server, so that the packages are imported once."""
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


def _begin(counters: SharedCounts) -> None:
    """Each worker uses one core, ignores Ctrl-C, and ends when the parent has ended."""
    global _shared
    _shared = counters
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(settings: PartSettings, part: tuple[Span, ...], key: str) -> None:
    write_part(settings, part, key, _count)


def _count(documents: int, text_bytes: int, tokens: int) -> None:
    assert _shared is not None  # `_begin` came first
    with _shared.get_lock():
        _add(_shared, documents, text_bytes, tokens)


def _add(counts: Counts, *more: int) -> None:
    for index, number in enumerate(more):
        counts[index] += number


class ProgressLine:
    """A line that says how much is done: every 2 s on a terminal, every 30 s in a log.

    Args:
        counts: Documents, bytes of text and tokens so far; other processes may add to them.
        total: Bytes on disk of all parts.
    """

    def __init__(self, counts: Counts, total: int) -> None:
        self._counts = counts
        self._total = total
        self._finished = 0
        self._terminal = sys.stdout.isatty()
        self._started = self._shown = time.monotonic()
        self.interval = _ON_TERMINAL_S if self._terminal else _IN_LOG_S

    def count(self, documents: int, text_bytes: int, tokens: int) -> None:
        """Add what was done in this process."""
        _add(self._counts, documents, text_bytes, tokens)
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
        """Documents, rates and the time left at ``now``, in seconds of `time.monotonic`."""
        seconds = max(now - self._started, 1e-9)
        documents, text, tokens = (self._counts[index] for index in range(3))
        done = f"{documents:,} documents, {text / seconds / 1e6:.2f} MB/s, {tokens / seconds:,.0f} tokens/s"
        if not self._finished:  # nothing to tell the rest of the time from, as with a single part
            return done
        left = int(seconds * (self._total - self._finished) / self._finished)
        return (
            f"{done}, {self._finished / self._total:.0%} of the parts' bytes finished, "
            f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        )

    def close(self) -> None:
        """End the line on a terminal."""
        if self._terminal and self._shown != self._started:
            print(flush=True)
