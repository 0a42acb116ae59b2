# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C while training: the first SIGINT asks for a checkpoint, the second ends the process at once.

A thread acts on the signals: Python's own handlers wait for the main thread, which may be in a collective for minutes.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time

INTERRUPTED = 128 + signal.SIGINT  # exit status, as a shell reports it
_TERMINATED = 128 + signal.SIGTERM
_SAME_S = 1.0  # the terminal's Ctrl-C and the same one, passed on by a launcher
_ORDER_S = 0.5  # two signals that wait together may be noted by two threads, in either order


class Interrupt:
    """Notes that a stop was asked for, while in its context; enter it in the main thread.

    SIGTERM ends the process, as it would without this, but not beside a SIGINT: a launcher that gets the same Ctrl-C
    sends it to its ranks, and waits for them (DeepSpeed's: 30 s).

    Args:
        notice: written to stderr at the first SIGINT; empty on all ranks but one.

    Attributes:
        asked: whether the first SIGINT has come.
    """

    def __init__(self, notice: str = "") -> None:
        self.asked = False
        self._notice = notice

    def __enter__(self) -> Interrupt:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _watch(self) -> None:
        first = 0.0
        while arrived := os.read(self._read, 1):
            if arrived[0] == signal.SIGTERM and not self.asked:
                follows = select.select([self._read], [], [], _ORDER_S)[0] and os.read(self._read, 1)
                if follows != bytes([signal.SIGINT]):
                    os._exit(_TERMINATED)
                arrived = follows
            if arrived[0] == signal.SIGINT and not self.asked:
                self.asked = True
                first = time.monotonic()
                if self._notice:
                    print(f"\n{self._notice}", file=sys.stderr, flush=True)
            elif arrived[0] == signal.SIGINT and time.monotonic() - first > _SAME_S:
                os._exit(INTERRUPTED)
