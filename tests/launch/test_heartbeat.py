# SPDX-License-Identifier: Apache-2.0
"""A host that falls silent ends the job on the others, with its name; a stopped process stands for a cut line."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="launch/ needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="launch/ needs the extra 'megatron'")

import torch.distributed as dist

from job import heartbeat, rendezvous
from tests.helpers.launch.host_ranks import LIMIT_S, Ranks, start

SILENCE_S = 6.0  # on a busy machine a rank that lives can be late by seconds


def _watched(rank: int, seconds: float) -> None:
    this_rank = rendezvous.RankInfo.from_environment()
    store = rendezvous.connect(this_rank)
    hosts = rendezvous.join(this_rank, store, {}, lambda ranks, facts: [])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=this_rank.world_size)
    with heartbeat.HeartbeatMonitor(this_rank, hosts, store), heartbeat.name_lost_host(hosts):
        print("training", flush=True)
        time.sleep(seconds)
    dist.barrier()
    dist.destroy_process_group()


def _start(folder: Path, seconds_of: dict[int, float], **more: int) -> Ranks:
    ranks = start(
        folder,
        lambda rank: _watched(rank, seconds_of.get(rank, 2 * LIMIT_S)),
        env={"LAUNCH_SILENCE_SECONDS": str(SILENCE_S)},
        **more,
    )
    ranks.wait_for("training")
    return ranks


@pytest.mark.parametrize("gone", [1, 0], ids=["another-host", "the-host-of-rank-0"])
def test_a_silent_host_is_named_and_the_job_ends(tmp_path: Path, gone: int) -> None:
    """Three hosts; the two that are left end by themselves, whoever holds the store."""
    ranks = _start(tmp_path, {}, world_size=3)
    os.kill(ranks.processes[gone].pid or 0, signal.SIGSTOP)
    try:
        left = {rank: process for rank, process in ranks.processes.items() if rank != gone}
        for process in left.values():
            process.join(LIMIT_S)
        for rank, process in left.items():
            text = ranks.logs[rank].read_text(encoding="utf-8")
            assert process.exitcode == heartbeat.LOST, text
            assert (
                f"node{rank + 1}: no sign of life from host node{gone + 1} (rank {gone}) for {SILENCE_S:.0f} s" in text
            )
            assert "--auto-resume" in text
    finally:
        ranks.kill()


def test_the_store_outlives_the_verdict_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that saw the last heartbeat a beat later would find the store gone, and name rank 0's host."""
    monkeypatch.setenv("LAUNCH_SILENCE_SECONDS", "6")
    hosts = [rendezvous.Host(f"node{rank + 1}", (rank,), ()) for rank in range(3)]
    done: list[tuple[str, float]] = []
    monkeypatch.setattr(heartbeat.time, "sleep", lambda seconds: done.append(("sleep", seconds)))
    monkeypatch.setattr(heartbeat.os, "_exit", lambda status: done.append(("exit", status)))
    for rank, expected in ((0, [("sleep", 3.0), ("exit", heartbeat.LOST)]), (2, [("exit", heartbeat.LOST)])):
        info = rendezvous.RankInfo(rank, 3, 0, 1, f"node{rank + 1}")
        heartbeat.HeartbeatMonitor(info, hosts, dist.HashStore())._end([hosts[1]])
        assert done == expected
        done.clear()


def test_without_the_store_only_its_host_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has stopped: the counter of the third host, read a beat earlier, stands still as well."""
    monkeypatch.setenv("LAUNCH_SILENCE_SECONDS", "6")
    hosts = [rendezvous.Host(f"node{rank + 1}", (rank,), ()) for rank in range(3)]
    monitor = heartbeat.HeartbeatMonitor(rendezvous.RankInfo(1, 3, 0, 1, "node2"), hosts, dist.HashStore())
    monitor._reached = 101.0
    monitor._last = {0: ("9", 101.0), 2: ("8", 100.0)}
    assert monitor._lost(106.5) == []
    assert monitor._lost(107.5) == [0]
    monitor._reached = 107.0  # the store answers, and the third host has been silent for 7 s
    monitor._last[0] = ("10", 107.0)
    assert monitor._lost(107.5) == [2]


def test_one_rank_speaks_for_its_host(tmp_path: Path) -> None:
    ranks = _start(tmp_path, {}, world_size=4, per_host=2)
    try:
        os.kill(ranks.processes[3].pid or 0, signal.SIGSTOP)  # its launcher's business
        time.sleep(1.5 * SILENCE_S)
        assert ranks.processes[0].is_alive()
        os.kill(ranks.processes[2].pid or 0, signal.SIGSTOP)
        ranks.processes[0].join(LIMIT_S)
        assert "from host node2 (ranks 2-3)" in ranks.logs[0].read_text(encoding="utf-8")
        assert "no sign of life" not in ranks.logs[1].read_text(encoding="utf-8")
    finally:
        ranks.kill()


def test_a_host_that_has_finished_is_not_missed(tmp_path: Path) -> None:
    """The last validation or plot of one host may take longer than the time that counts as heartbeat."""
    results = _start(tmp_path, {0: 2 * SILENCE_S, 1: 0.1}).wait()
    assert [status for status, _ in results.values()] == [0, 0], results
    for _, text in results.values():
        assert "no sign of life" not in text


def test_a_host_that_failed_is_missed(tmp_path: Path) -> None:
    """An error on one host alone must not leave the others waiting, whatever the backend."""

    def body(rank: int) -> None:
        this_rank = rendezvous.RankInfo.from_environment()
        store = rendezvous.connect(this_rank)
        hosts = rendezvous.join(this_rank, store, {}, lambda ranks, facts: [])
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        with heartbeat.HeartbeatMonitor(this_rank, hosts, store):
            if rank == 1:
                raise RuntimeError("out of memory")
            time.sleep(2 * LIMIT_S)

    results = start(tmp_path, body, env={"LAUNCH_SILENCE_SECONDS": str(SILENCE_S)}).wait()
    assert results[1][0] == 1
    assert results[0][0] == heartbeat.LOST
    assert "from host node2 (rank 1)" in results[0][1]


def test_an_address_in_an_error_gets_its_name() -> None:
    hosts = [rendezvous.Host("node1", (0,), ("10.0.0.1",)), rendezvous.Host("node2", (1, 2), ("10.0.0.2", "fe80::2"))]
    for address in ("10.0.0.2", "fe80::2"):
        cause = RuntimeError(f"[pair.cc:534] Connection closed by peer [{address}]:4242")
        with pytest.raises(RuntimeError, match=r"connection to host node2 \(ranks 1-2\) was lost") as caught:
            with heartbeat.name_lost_host(hosts):
                raise cause
        assert caught.value.__cause__ is cause
    other = RuntimeError("Connection closed by peer [10.0.0.20]:4242")
    with pytest.raises(RuntimeError) as caught, heartbeat.name_lost_host(hosts):
        raise other
    assert caught.value is other
