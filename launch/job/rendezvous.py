# SPDX-License-Identifier: Apache-2.0
"""The rendezvous of a job: its processes find each other before torch's process groups are made.

Each process writes its rank, its host and its facts into a store on rank 0. Rank 0 waits for all ranks, compares the
facts and writes the answer, which every rank reads. So a rank that does not come up, or a fact that differs between
hosts, is named on every rank, without a collective that could hang. The store asks nobody for a password: the network
has to be trusted, and what is read from the store is looked at before it is used.

LAUNCH_JOIN_SECONDS limits the wait for other ranks; LAUNCH_HOSTS ("node1:8,node2:8", from the launchers) names the
hosts of ranks that did not come up.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

import psutil
import torch.distributed as dist

Facts = TypeVar("Facts")

JOIN_SECONDS = 300.0
REFUSED = 2  # exit status: the same command would fail again, so launchers do not repeat it
_ANSWER_SECONDS = 30.0  # for rank 0 to compare and answer, after all ranks have come up
_PORT_SECONDS = 20.0  # for the port of an earlier start to become free
_LOOK_SECONDS = 0.1  # between two looks at an entry that something else wrote
_LONGEST_ENTRY = 1 << 24  # bytes
_MOST_RANKS = 1 << 20
_READ_SECONDS = 10.0  # rank 0 stays so long after a refusal, so that the others can read it


@dataclass(frozen=True)
class RankInfo:
    """One process of the job, as its launcher numbered it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str

    @classmethod
    def from_environment(cls) -> RankInfo:
        """This process, from the launcher's variables; without a launcher this is a job of one process."""
        env = os.environ
        if "RANK" not in env:
            env.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        local = int(env["LOCAL_RANK"])
        size = int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", str(local + 1))))
        # Slurm's name of the node: in containers all hosts may have one hostname
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


class _Entry(TypedDict):
    """What each rank writes into the store."""

    rank: dict[str, Any]  # fields of `RankInfo`
    addresses: list[str]
    facts: Any  # the caller's own type


class _Answer(TypedDict):
    """What rank 0 writes into the store for all ranks."""

    came: int
    missing: str
    problems: list[str]
    hosts: list[tuple[str, list[int], list[str]]]  # name, ranks, addresses


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


def connect(this_rank: RankInfo) -> dist.Store:
    """The store on rank 0.

    Args:
        this_rank: This process.

    Raises:
        TimeoutError: Rank 0 was not reached within LAUNCH_JOIN_SECONDS.
        ValueError: The port is in use on the host of rank 0, or a time limit is no number.
    """
    limit = seconds("LAUNCH_JOIN_SECONDS", JOIN_SECONDS)
    if dist.is_initialized():  # the caller made process groups, with a store of its own
        return dist.PrefixStore("launch", dist.distributed_c10d._get_default_store())
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store outlives the ranks of one attempt; torch keeps the attempts apart in it
        timeout = datetime.timedelta(seconds=limit)
        store, _, _ = next(iter(dist.rendezvous("env://", this_rank.rank, this_rank.world_size, timeout=timeout)))
        return store
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + (min(limit, _PORT_SECONDS) if this_rank.rank == 0 else limit)
    while True:
        left = max(1.0, deadline - time.monotonic())
        try:
            store = dist.TCPStore(
                address,
                port,
                is_master=this_rank.rank == 0,
                timeout=datetime.timedelta(seconds=left),
                wait_for_workers=False,
            )
            if store.add(f"came/{this_rank.rank}", 1) == 1:
                return store
            cause = "a job that was started earlier still runs there"
        except dist.DistError as error:
            cause = str(error).splitlines()[0]
        if time.monotonic() >= deadline:
            if this_rank.rank == 0:
                raise ValueError(
                    f"MASTER_PORT = {port}: allowed: a port that is free on {this_rank.host}, the host of rank 0; "
                    f"end the program that uses it, or set another port ({cause})"
                )
            first = expected_hosts().get(0)
            raise TimeoutError(
                f"rank {this_rank.rank} on {this_rank.host} has not reached rank 0{f' on {first}' if first else ''} at "
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


def join(
    this_rank: RankInfo,
    store: dist.Store,
    facts: Facts,
    compare: Callable[[list[RankInfo], list[Facts]], list[str]],
    are_facts: Callable[[object], bool] = lambda facts: True,
) -> tuple[Host, ...]:
    """Wait for all processes and compare their facts; all of them must call.

    Args:
        this_rank: This process.
        store: From `connect`.
        facts: What this process found, as JSON can hold it.
        compare: Called on rank 0 with all ranks and their facts, in the same order; returns what is wrong, a line
            each.
        are_facts: Whether what was read has the form of ``facts``. An entry that another program wrote is passed over.

    Returns:
        The hosts, in the order of their first ranks.

    Raises:
        TimeoutError: Ranks did not come up within LAUNCH_JOIN_SECONDS, or rank 0 was lost.
        ValueError: What `compare` returned, the same on every rank; or the answer is none.
    """
    limit = seconds("LAUNCH_JOIN_SECONDS", JOIN_SECONDS)
    mine = {"rank": vars(this_rank), "addresses": _addresses(), "facts": facts}
    try:
        store.set(f"facts/{this_rank.rank}", json.dumps(mine))
        if this_rank.rank == 0:
            answer = _answer(this_rank, store, limit, compare, are_facts)
            store.set("answer", json.dumps(answer))
        else:
            store.wait(["answer"], datetime.timedelta(seconds=limit + _ANSWER_SECONDS))
            answer = _read_answer(store.get("answer"))
            store.add("read", 1)
    except dist.DistError as error:
        raise TimeoutError(
            f"rank {this_rank.rank} on {this_rank.host} has lost rank 0 at {os.environ.get('MASTER_ADDR')} before "
            f"training began: {str(error).splitlines()[0]}. See what rank 0 wrote."
        ) from error
    if this_rank.rank == 0 and (answer["missing"] or answer["problems"]):
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
    this_rank: RankInfo,
    store: dist.Store,
    limit: float,
    compare: Callable[[list[RankInfo], list[Facts]], list[str]],
    are_facts: Callable[[object], bool],
) -> _Answer:
    deadline = time.monotonic() + limit
    came: dict[int, _Entry] = {}
    strange: list[int] = []
    for rank in range(this_rank.world_size):
        try:
            left = max(0.001, deadline - time.monotonic())
            store.wait([f"facts/{rank}"], datetime.timedelta(seconds=left))
        except dist.DistError:
            continue
        entry = read_entry(store.get(f"facts/{rank}"), rank, are_facts)
        while entry is None and time.monotonic() < deadline:  # the rank itself may still come
            time.sleep(_LOOK_SECONDS)
            entry = read_entry(store.get(f"facts/{rank}"), rank, are_facts)
        if entry is None:
            strange.append(rank)
        else:
            came[rank] = entry
    ranks = [RankInfo(**entry["rank"]) for entry in came.values()]
    complete = len(came) == this_rank.world_size
    return {
        "came": len(came),
        "missing": "" if complete else _missing(ranks, this_rank.world_size, limit, strange),
        "problems": compare(ranks, [entry["facts"] for entry in came.values()]) if complete else [],
        "hosts": _hosts(ranks, list(came.values())),
    }


def read_entry(value: bytes, rank: int, are_facts: Callable[[object], bool]) -> _Entry | None:
    """What a rank wrote into the store; None if no rank of this program can have written it.

    Args:
        value: As read from the store.
        rank: Whose entry it should be.
        are_facts: See `join`.
    """
    entry = _loaded(value)
    if not isinstance(entry, dict) or entry.keys() != _Entry.__annotations__.keys():
        return None
    info, addresses = entry["rank"], entry["addresses"]
    if not isinstance(info, dict) or info.keys() != RankInfo.__annotations__.keys():
        return None
    numbers = [value for key, value in info.items() if key != "host"]
    if not all(type(number) is int and 0 <= number < _MOST_RANKS for number in numbers) or info["rank"] != rank:
        return None
    if not _are_texts([info["host"]]) or not _are_texts(addresses) or not are_facts(entry["facts"]):
        return None
    return {"rank": info, "addresses": addresses, "facts": entry["facts"]}


def _read_answer(value: bytes) -> _Answer:
    answer = _loaded(value)
    if isinstance(answer, dict) and answer.keys() == _Answer.__annotations__.keys():
        hosts = answer["hosts"]
        if (
            _are_texts([answer["missing"]])
            and _are_texts(answer["problems"])
            and isinstance(hosts, list)
            and all(isinstance(host, list) and len(host) == 3 for host in hosts)
            and all(_are_texts([name]) and _are_texts(addresses) for name, _, addresses in hosts)
            and all(isinstance(ranks, list) and all(type(rank) is int for rank in ranks) for _, ranks, _ in hosts)
        ):
            return {
                "came": answer["came"],
                "missing": answer["missing"],
                "problems": answer["problems"],
                "hosts": [(name, ranks, addresses) for name, ranks, addresses in hosts],
            }
    raise ValueError(
        f"what stands at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} is no answer of rank 0: "
        f"something else writes into the store; set another MASTER_PORT, on a network that only this job's hosts can "
        f"reach"
    )


def _loaded(value: bytes) -> object:
    """What JSON in the store says; None if it is none, too long or too deep."""
    try:
        return json.loads(value) if len(value) <= _LONGEST_ENTRY else None
    except (ValueError, RecursionError):
        return None


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(text, str) and _is_whole(text) for text in values)


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _hosts(ranks: list[RankInfo], entries: list[_Entry]) -> list[tuple[str, list[int], list[str]]]:
    hosts: dict[str, tuple[str, list[int], list[str]]] = {}
    for info, entry in zip(ranks, entries, strict=True):
        hosts.setdefault(info.host, (info.host, [], entry["addresses"]))[1].append(info.rank)
    return list(hosts.values())


def _missing(ranks: list[RankInfo], world_size: int, limit: float, strange: list[int]) -> str:
    names = expected_hosts()
    for info in ranks:  # the local ranks beside a rank that came up are on its host
        first = info.rank - info.local_rank
        names.update(dict.fromkeys(range(first, first + info.local_world_size), info.host))
    absent = sorted(set(range(world_size)) - {info.rank for info in ranks})
    by_host: dict[str, list[int]] = {}
    for rank in absent:
        by_host.setdefault(names.get(rank, "an unknown host"), []).append(rank)
    came: dict[str, list[int]] = {}
    for info in ranks:
        came.setdefault(info.host, []).append(info.rank)

    def text(hosts: dict[str, list[int]]) -> str:
        return "; ".join(f"{name} ({ranks_text(ranks)})" for name, ranks in hosts.items())

    stranger = (
        f" Something that is no rank of this job wrote into the store for {ranks_text(strange)}: set another "
        f"MASTER_PORT, on a network that only this job's hosts can reach."
        if strange
        else ""
    )
    return (
        f"{len(absent)} of {world_size} ranks have not come up within {limit:.0f} s (LAUNCH_JOIN_SECONDS): "
        f"{text(by_host)}. These came: {text(came)}. See what the missing ranks wrote, and whether their hosts are up."
        f"{stranger}"
    )


def exit_status(main: Callable[[], None]) -> None:
    """Run a program of this folder; a `ValueError` ends it with the status after which launchers do not restart.

    Ctrl-C where there is nothing to save ends it with a line on the first rank.
    """
    try:
        main()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\ninterrupted", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)  # other threads may wait for ranks that are gone
    except ValueError:
        sys.excepthook(*sys.exc_info())  # prints what an uncaught exception prints
        sys.exit(REFUSED)


def _addresses() -> list[str]:
    """Addresses of this host that an error on another host may name."""
    found = (a.address for addresses in psutil.net_if_addrs().values() for a in addresses)
    return sorted({a.partition("%")[0] for a in found if a.count(".") == 3 or ":" in a} - {"127.0.0.1", "::1"})
