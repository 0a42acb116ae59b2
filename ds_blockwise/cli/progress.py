# SPDX-License-Identifier: Apache-2.0
"""Lines on stderr while a command makes one wait: what is awaited, for how long, and how far it is."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

_ON_TERMINAL_S = (2.0, 10.0)  # until the first line, and between lines
_IN_LOG_S = (60.0, 60.0)
Item = TypeVar("Item")


class Progress:
    """What `waiting` reports.

    Attributes:
        what: is awaited.
        done: how far it is; empty if that is not known.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.done = ""

    def each(self, items: Sequence[Item]) -> Iterator[Item]:
        """The items, counted as they are taken."""
        for index, item in enumerate(items):
            self.done = f", {index} of {len(items)}"
            yield item


@contextmanager
def waiting(what: str, *, quiet: bool = False) -> Iterator[Progress]:
    """Report on stderr while the block runs, from a thread: nothing if it is over soon.

    Args:
        what: is awaited, such as ``converting checkpoints/step_100``.
        quiet: report nothing.
    """
    progress = Progress(what)
    if quiet:
        yield progress
        return
    over = threading.Event()
    thread = threading.Thread(target=_report, args=(progress, over), daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        over.set()
        thread.join()


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add ``--quiet``, for commands that may take long."""
    parser.add_argument("--quiet", action="store_true", help="do not report on stderr while it takes long")


def _report(progress: Progress, over: threading.Event) -> None:
    started = time.monotonic()
    first, between = _ON_TERMINAL_S if sys.stderr.isatty() else _IN_LOG_S
    wait = first
    while not over.wait(wait):
        seconds = time.monotonic() - started
        print(f"{progress.what}: {seconds:.0f} s{progress.done} ...", file=sys.stderr, flush=True)
        wait = between
