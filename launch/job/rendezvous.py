# SPDX-License-Identifier: Apache-2.0
"""How the processes of a job find each other, before torch's process groups and before anything is built.

Each process writes into a store on rank 0 who it is and what it found; rank 0 waits for all of them and answers all.
So a process that does not come up, and whatever differs between hosts, is named on every rank, without a collective
that could hang. Two variables, in seconds: LAUNCH_JOIN_SECONDS (how long to wait for others) and, for `silence.py`,
LAUNCH_SILENCE_SECONDS. LAUNCH_HOSTS ("node1:8,node2:8", from the launchers) names hosts that never came.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch.distributed as dist

JOIN_SECONDS = 300.0
REFUSED = 2  # exit status: the same command would fail again, so launchers do not repeat it
_ANSWER_SECONDS = 30.0  # that rank 0 may need to compare and answer, after all have come
_PORT_SECONDS = 20.0  # that the port of an earlier start may need to become free
_READ_SECONDS = 10.0  # that rank 0 stays after a refusal, so that the others can read it


@dataclass(frozen=True)
class Place:
    """Where this process stands, as its launcher said."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str

    @classmethod
    def of_this_process(cls) -> Place:
        """Read the launcher's variables; without a launcher this is a job of one process."""
        env = os.environ
        if "RANK" not in env:
            env.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        local = int(env["LOCAL_RANK"])
        size = int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", str(local + 1))))
        # Slurm's name of the node: in a container the other one may be the same everywhere
        host = env.get("SLURMD_NODENAME") or socket.gethostname()
        return cls(int(env["RANK"]), int(env["WORLD_SIZE"]), local, size, host)


@dataclass(frozen=True)
class Host:
    """One host of the job: its name, the ranks on it and its addresses."""

    name: str
    ranks: tuple[int, ...]
    addresses: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} ({ranks_text(self.ranks)})"


def ranks_text(ranks: Iterable[int]) -> str:
    """``rank 3`` or ``ranks 0-7, 9``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank {text}" if len(runs) == 1 and runs[0][0] == runs[0][1] else f"ranks {text}"


def seconds(name: str, default: float) -> float:
    """A time limit from the environment.

    Raises:
        ValueError: It is not a positive number.
    """
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1e6:
        raise ValueError(f"{name} = {text!r}: allowed: seconds, more than 0; correct it where the job is started")
    return value


def connect(place: Place) -> dist.Store:
    """The store on rank 0.

    Args:
        place: Where this process stands.

    Raises:
        TimeoutError: Rank 0 was not reached within LAUNCH_JOIN_SECONDS.
        ValueError: Rank 0 cannot have the port, or a time limit is no number.
    """
    limit = seconds("LAUNCH_JOIN_SECONDS", JOIN_SECONDS)
    if dist.is_initialized():  # by the caller, with a store of its own
        return dist.PrefixStore("launch", dist.distributed_c10d._get_default_store())
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store outlives the ranks of an attempt, and torch knows how to keep attempts apart in it
        timeout = datetime.timedelta(seconds=limit)
        store, _, _ = next(iter(dist.rendezvous("env://", place.rank, place.world_size, timeout=timeout)))
        return store
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + (min(limit, _PORT_SECONDS) if place.rank == 0 else limit)
    while True:
        left = max(1.0, deadline - time.monotonic())
        try:
            store = dist.TCPStore(
                address,
                port,
                is_master=place.rank == 0,
                timeout=datetime.timedelta(seconds=left),
                wait_for_workers=False,
            )
            if store.add(f"came/{place.rank}", 1) == 1:
                return store
            cause = "a job that was started earlier still runs there"
        except dist.DistError as error:
            cause = str(error).splitlines()[0]
        if time.monotonic() >= deadline:
            if place.rank == 0:
                raise ValueError(
                    f"MASTER_PORT = {port}: allowed: a port that is free on {place.host}, the host of rank 0; "
                    f"end what uses it or set another ({cause})"
                )
            first = expected_hosts().get(0)
            raise TimeoutError(
                f"rank {place.rank} on {place.host} has not reached rank 0{f' on {first}' if first else ''} at "
                f"{address}:{port} within {limit:.0f} s (LAUNCH_JOIN_SECONDS): {cause}. Either rank 0 has not come up, "
                f"or MASTER_ADDR or a firewall keeps the two hosts apart."
            )
        time.sleep(1.0)


def expected_hosts() -> dict[int, str]:
    """Names of the hosts by rank, as the launcher meant to start them; empty if it did not say."""
    hosts: dict[int, str] = {}
    for item in filter(None, os.environ.get("LAUNCH_HOSTS", "").split(",")):
        name, _, ranks = item.rpartition(":")
        for _ in range(int(ranks)):
            hosts[len(hosts)] = name
    return hosts


def meet(
    place: Place,
    store: dist.Store,
    facts: Mapping[str, Any],
    judge: Callable[[list[Place], list[Mapping[str, Any]]], list[str]],
) -> tuple[Host, ...]:
    """Wait for all processes and compare what they found; all of them must call.

    Args:
        place: Where this process stands.
        store: From `connect`.
        facts: What this process found; anything that JSON holds.
        judge: Called on rank 0 with the places and facts of all ranks; returns what is wrong, a line each.

    Returns:
        The hosts, in the order of their first ranks.

    Raises:
        TimeoutError: Ranks did not come up within LAUNCH_JOIN_SECONDS, or rank 0 was lost.
        ValueError: What `judge` returned, the same on every rank.
    """
    limit = seconds("LAUNCH_JOIN_SECONDS", JOIN_SECONDS)
    mine = {"place": vars(place), "addresses": _addresses(), "facts": facts}
    try:
        store.set(f"facts/{place.rank}", json.dumps(mine))
        if place.rank == 0:
            answer = _answer(place, store, limit, judge)
            store.set("answer", json.dumps(answer))
        else:
            store.wait(["answer"], datetime.timedelta(seconds=limit + _ANSWER_SECONDS))
            answer = json.loads(store.get("answer"))
            store.add("read", 1)
    except dist.DistError as error:
        raise TimeoutError(
            f"rank {place.rank} on {place.host} has lost rank 0 at {os.environ.get('MASTER_ADDR')} before training "
            f"began: {str(error).splitlines()[0]}. See what rank 0 wrote."
        ) from error
    if place.rank == 0 and (answer["missing"] or answer["problems"]):
        deadline = time.monotonic() + _READ_SECONDS
        while store.add("read", 0) < answer["came"] - 1 and time.monotonic() < deadline:
            time.sleep(0.02)
    if answer["missing"]:
        raise TimeoutError(answer["missing"])
    if answer["problems"]:
        lines = answer["problems"]
        count = f"{len(lines)} problem" + ("s" if len(lines) > 1 else "")
        raise ValueError(f"{count} in the configuration:\n- " + "\n- ".join(lines))
    return tuple(Host(name, tuple(ranks), tuple(addresses)) for name, ranks, addresses in answer["hosts"])


def _answer(
    place: Place,
    store: dist.Store,
    limit: float,
    judge: Callable[[list[Place], list[Mapping[str, Any]]], list[str]],
) -> dict[str, Any]:
    deadline = time.monotonic() + limit
    came: dict[int, dict[str, Any]] = {}
    for rank in range(place.world_size):
        try:
            left = max(0.001, deadline - time.monotonic())
            store.wait([f"facts/{rank}"], datetime.timedelta(seconds=left))
        except dist.DistError:
            continue
        came[rank] = json.loads(store.get(f"facts/{rank}"))
    places = [Place(**entry["place"]) for entry in came.values()]
    answer = {"came": len(came), "missing": "", "problems": [], "hosts": _hosts(places, list(came.values()))}
    if len(came) < place.world_size:
        answer["missing"] = _missing(places, place.world_size, limit)
    else:
        answer["problems"] = judge(places, [entry["facts"] for entry in came.values()])
    return answer


def _hosts(places: list[Place], entries: list[dict[str, Any]]) -> list[tuple[str, list[int], list[str]]]:
    hosts: dict[str, tuple[str, list[int], list[str]]] = {}
    for place, entry in zip(places, entries, strict=True):
        hosts.setdefault(place.host, (place.host, [], entry["addresses"]))[1].append(place.rank)
    return list(hosts.values())


def _missing(places: list[Place], world_size: int, limit: float) -> str:
    names = expected_hosts()
    for place in places:  # the neighbours of a rank that came share its host
        first = place.rank - place.local_rank
        names.update(dict.fromkeys(range(first, first + place.local_world_size), place.host))
    absent = sorted(set(range(world_size)) - {place.rank for place in places})
    by_host: dict[str, list[int]] = {}
    for rank in absent:
        by_host.setdefault(names.get(rank, "an unknown host"), []).append(rank)
    came: dict[str, list[int]] = {}
    for place in places:
        came.setdefault(place.host, []).append(place.rank)

    def text(hosts: dict[str, list[int]]) -> str:
        return "; ".join(f"{name} ({ranks_text(ranks)})" for name, ranks in hosts.items())

    return (
        f"{len(absent)} of {world_size} ranks have not come up within {limit:.0f} s (LAUNCH_JOIN_SECONDS): "
        f"{text(by_host)}. These came: {text(came)}. See what the missing ones wrote, and whether their host is up."
    )


def exit_status(main: Callable[[], None]) -> None:
    """Run a program of this folder; a mistake of the user's ends it with the status that launchers do not repeat."""
    try:
        main()
    except ValueError:
        sys.excepthook(*sys.exc_info())  # as if it had not been caught
        sys.exit(REFUSED)


def _addresses() -> list[str]:
    """Addresses of this host by which others may know it."""
    found = (a.address for addresses in psutil.net_if_addrs().values() for a in addresses)
    return sorted({a.partition("%")[0] for a in found if a.count(".") == 3 or ":" in a} - {"127.0.0.1", "::1"})
