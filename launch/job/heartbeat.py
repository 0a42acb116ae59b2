# SPDX-License-Identifier: Apache-2.0
"""Heartbeats between hosts: end a job that has lost a host, and name the host.

A host whose processes are killed closes its connections: gloo then fails at once, with an address. A host whose network
is cut closes nothing: NCCL and gloo wait for minutes, and name no host. So the first rank of each host increments a
counter in the store on rank 0 and reads the other hosts' counters. A host whose counter has not changed for
LAUNCH_SILENCE_SECONDS is lost.
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

from job.rendezvous import Host, RankInfo, seconds

SILENCE_SECONDS = 60.0
LOST = 75  # exit status: the launchers restart the job
_BEATS = 6  # heartbeats in LAUNCH_SILENCE_SECONDS
_FINISHED = "finished"  # counter of a host that needs no more heartbeats


@contextmanager
def name_lost_host(hosts: Sequence[Host]) -> Iterator[None]:
    """Turn an error of a connection, which holds an address, into one that names the host with that address.

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
                        f"the connection to host {host} was lost: its processes have ended, or its network is down. "
                        f"See what they wrote; the job can go on from its last complete checkpoint (--auto-resume)"
                    ) from error
        raise


class HeartbeatMonitor:
    """Sends heartbeats and checks those of the other hosts while in its context; all processes must enter it.

    Args:
        this_rank: This process.
        hosts: Of the job.
        store: From `rendezvous.connect`.

    Raises:
        ValueError: LAUNCH_SILENCE_SECONDS is not a positive number.
    """

    def __init__(self, this_rank: RankInfo, hosts: Sequence[Host], store: dist.Store) -> None:
        self._limit = seconds("LAUNCH_SILENCE_SECONDS", SILENCE_SECONDS)
        self._hosts = list(hosts)
        self._mine = next((i for i, host in enumerate(hosts) if host.ranks[0] == this_rank.rank), None)
        # One host needs no heartbeat: its launcher sees its processes. Its first rank sends a host's heartbeats.
        self._active = len(hosts) > 1 and self._mine is not None
        self._store = store
        self._stopped = threading.Event()
        self._failed = False
        self._threads: list[threading.Thread] = []
        # the last counter of each host, and when it changed
        self._last: dict[int, tuple[str, float]] = {}
        self._reached = 0.0  # when the store last answered

    def __enter__(self) -> None:
        if self._active:
            # its own connection: the main thread may be waiting on the other one
            self._store = self._store.clone()
            self._store.set_timeout(datetime.timedelta(seconds=self._limit))
            self._store.set(self._key(self._mine), "0")
        if len(self._hosts) > 1:
            dist.barrier()  # every host sends heartbeats from here on
        if self._active:
            self._reached = time.monotonic()
            self._last = {i: ("", self._reached) for i in range(len(self._hosts)) if i != self._mine}
            for target in (self._send_heartbeats, self._check_hosts):
                thread = threading.Thread(target=target, daemon=True)
                thread.start()
                self._threads.append(thread)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._failed = kind is not None
        self._stopped.set()
        for thread in self._threads:
            thread.join(self._limit / _BEATS)

    def _send_heartbeats(self) -> None:
        count = 0
        others = list(self._last)
        while True:
            ending = self._stopped.is_set()
            if ending and self._failed:
                return  # the other hosts then see no heartbeat, and end
            count += 1
            try:
                self._store.set(self._key(self._mine), _FINISHED if ending else str(count))
                for other, value in zip(others, self._store.multi_get([self._key(i) for i in others]), strict=True):
                    text = value.decode(errors="replace")  # whatever a stranger wrote
                    if text != self._last[other][0] or text == _FINISHED:
                        self._last[other] = (text, time.monotonic())
                self._reached = time.monotonic()
            except dist.DistError:
                pass  # rank 0 can't be reached or has ended: _check_hosts ends the job after the time limit
            if ending:
                return
            self._stopped.wait(self._limit / _BEATS)

    def _check_hosts(self) -> None:
        while not self._stopped.wait(self._limit / _BEATS):
            if lost := self._lost(time.monotonic()):
                self._end([self._hosts[i] for i in lost])

    def _lost(self, now: float) -> list[int]:
        if now - self._reached > self._limit and self._mine != 0:
            return [0]  # the store is on rank 0, so the other hosts' counters can't be read
        # until the last answer only: without the store every counter stands still, whoever is lost
        return [i for i, (_, when) in self._last.items() if self._reached - when > self._limit]

    def _end(self, lost: list[Host]) -> None:
        mine = self._hosts[self._mine or 0]
        names = " and ".join(f"host {host}" for host in lost)
        print(
            f"\n{mine.name}: no sign of life from {names} for {self._limit:.0f} s (LAUNCH_SILENCE_SECONDS): ending the "
            f"job here. Check that it is up and reachable; the job can go on from its last complete checkpoint "
            f"(--auto-resume).",
            file=sys.stderr,
            flush=True,
        )
        if self._mine == 0:
            # The store ends with this process, and the others would name this host. They may have seen the last
            # heartbeat one beat later, and look once a beat.
            time.sleep(3 * self._limit / _BEATS)
        # The main thread may be in a collective that returns only after minutes.
        os._exit(LOST)

    def _key(self, host: int | None) -> str:
        return f"beat/{host}"
