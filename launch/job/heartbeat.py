# SPDX-License-Identifier: Apache-2.0
"""Ends a job whose hosts have lost each other, and says which one is gone.

A host whose processes are killed closes its connections: gloo then fails at once, naming an address. A host that is cut
off closes nothing: NCCL and gloo wait for minutes, and name nobody. So the first rank of each host counts up in the
store on rank 0 and looks at the others' counts; one that stands still for LAUNCH_SILENCE_SECONDS is lost.
"""

from __future__ import annotations

import datetime
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from job.rendezvous import Host, Place, seconds

SILENCE_SECONDS = 60.0
LOST = 75  # exit status: worth another try
_BEATS = 6  # in the time that counts as silence
_OVER = "over"  # a host that has finished is silent with good reason


@contextmanager
def naming_hosts(hosts: Sequence[Host]) -> Iterator[None]:
    """Give an error of a connection the name of the host behind the address in it.

    Args:
        hosts: Of the job.

    Raises:
        RuntimeError: The error that names an address of another host, with the host's name.
    """
    try:
        yield
    except RuntimeError as error:
        for address in re.findall(r"\[([0-9a-fA-F.:]+)\]:\d+", str(error)):
            for host in hosts:
                if address in host.addresses and len(hosts) > 1:
                    raise RuntimeError(
                        f"the connection to host {host} was lost: its processes have ended or its network has. See "
                        f"what they wrote; the job can go on from its last complete checkpoint (--auto-resume)"
                    ) from error
        raise


class Watch:
    """Watches the other hosts while in its context; all processes must enter it together.

    Args:
        place: Where this process stands.
        hosts: Of the job.
        store: Where they met.

    Raises:
        ValueError: LAUNCH_SILENCE_SECONDS is no time.
    """

    def __init__(self, place: Place, hosts: Sequence[Host], store: dist.Store) -> None:
        self._limit = seconds("LAUNCH_SILENCE_SECONDS", SILENCE_SECONDS)
        self._hosts = list(hosts)
        self._mine = next((i for i, host in enumerate(hosts) if host.ranks[0] == place.rank), None)
        # One host needs no watch: its launcher sees its processes. One rank speaks for its host.
        self._active = len(hosts) > 1 and self._mine is not None
        self._store = store
        self._stopped = threading.Event()
        self._failed = False
        self._threads: list[threading.Thread] = []
        # what was last read of each host, and when it last changed
        self._last: dict[int, tuple[str, float]] = {}
        self._reached = 0.0  # when the store last answered

    def __enter__(self) -> None:
        if self._active:
            # a connection of its own: the main thread's may be waiting for something
            self._store = self._store.clone()
            self._store.set_timeout(datetime.timedelta(seconds=self._limit))
            self._store.set(self._key(self._mine), "0")
        if len(self._hosts) > 1:
            dist.barrier()  # every host counts from here on
        if self._active:
            self._reached = time.monotonic()
            self._last = {i: ("", self._reached) for i in range(len(self._hosts)) if i != self._mine}
            for target in (self._beat, self._look):
                thread = threading.Thread(target=target, daemon=True)
                thread.start()
                self._threads.append(thread)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._failed = kind is not None
        self._stopped.set()
        for thread in self._threads:
            thread.join(self._limit / _BEATS)

    def _beat(self) -> None:
        count = 0
        others = list(self._last)
        while True:
            ending = self._stopped.is_set()
            if ending and self._failed:
                return  # the others shall notice
            count += 1
            try:
                self._store.set(self._key(self._mine), _OVER if ending else str(count))
                for other, value in zip(others, self._store.multi_get([self._key(i) for i in others]), strict=True):
                    text = value.decode()
                    if text != self._last[other][0] or text == _OVER:
                        self._last[other] = (text, time.monotonic())
                self._reached = time.monotonic()
            except dist.DistError:
                pass  # rank 0 is not to be reached, or has ended; _look gives it time to come to this by itself
            if ending:
                return
            self._stopped.wait(self._limit / _BEATS)

    def _look(self) -> None:
        while not self._stopped.wait(self._limit / _BEATS):
            now = time.monotonic()
            lost = [i for i, (_, when) in self._last.items() if now - when > self._limit]
            if now - self._reached > self._limit and self._mine != 0:
                lost = [0]  # without the store nothing is known of the others
            if lost:
                self._end([self._hosts[i] for i in lost])

    def _end(self, lost: list[Host]) -> None:
        mine = self._hosts[self._mine or 0]
        names = " and ".join(f"host {host}" for host in lost)
        print(
            f"\n{mine.name}: no sign of life from {names} for {self._limit:.0f} s (LAUNCH_SILENCE_SECONDS): ending the "
            f"job here. See whether it is up and reachable; the job can go on from its last complete checkpoint "
            f"(--auto-resume).",
            file=sys.stderr,
            flush=True,
        )
        # The main thread is in a collective that would not return for minutes, so it cannot be asked to end.
        os._exit(LOST)

    def _key(self, host: int | None) -> str:
        return f"beat/{host}"
