# SPDX-License-Identifier: Apache-2.0
"""Ranks that do not come up are named on all others; an old start and a new one do not mix."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="launch/ needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="launch/ needs the extra 'megatron'")

from job import rendezvous
from tests.helpers.launch.host_ranks import LIMIT_S, free_port, start


def _join(rank: int) -> None:
    """Come up, say who came, and keep the store on rank 0 until all have read the answer."""
    this_rank = rendezvous.RankInfo.from_environment()
    store = rendezvous.connect(this_rank)
    hosts = rendezvous.join(this_rank, store, {"rank": rank}, _differences)
    print("joined: " + ", ".join(map(str, hosts)), flush=True)
    store.add("done", 1)
    while rank == 0 and store.add("done", 0) < this_rank.world_size:
        time.sleep(0.02)


def _join_together(rank: int) -> None:
    """As `_join`, but begin when all that come are there: on a busy machine one may start long after another."""
    meeting = Path(os.environ["MEETING"])
    (meeting / f"{rank}.came").touch()
    while len(list(meeting.glob("*.came"))) < int(os.environ["COMING"]):
        time.sleep(0.02)
    _join(rank)


def _differences(ranks: list[rendezvous.RankInfo], facts: list[dict[str, int]]) -> list[str]:
    """Each rank's facts stand beside it."""
    return [f"{info} gave {fact}" for info, fact in zip(ranks, facts, strict=True) if info.rank != fact["rank"]]


def test_all_ranks_learn_all_hosts(tmp_path: Path) -> None:
    results = start(tmp_path, _join, world_size=4, per_host=2).wait()
    for status, text in results.values():
        assert status == 0, text
        assert "joined: node1 (ranks 0-1), node2 (ranks 2-3)" in text


def test_ranks_are_written_as_ranges() -> None:
    assert rendezvous.ranks_text([3]) == "rank 3"
    assert rendezvous.ranks_text([9, 0, 1, 2]) == "ranks 0-2, 9"


@pytest.mark.parametrize("told", [True, False], ids=["hosts-told", "hosts-unknown"])
def test_a_rank_that_does_not_come_up_is_named_with_its_host(tmp_path: Path, told: bool) -> None:
    """Ranks 1 and 3 to 5 stay away: 1 has a neighbour, node3 was never seen."""
    env = {"LAUNCH_JOIN_SECONDS": "15", "MEETING": str(tmp_path), "COMING": "2"}
    env |= {"LAUNCH_HOSTS": "node1:2,node2:2,node3:2"} if told else {}
    results = start(tmp_path, _join_together, world_size=6, per_host=2, absent=(1, 3, 4, 5), env=env).wait()
    third = "node3 (ranks 4-5)" if told else "an unknown host (ranks 4-5)"
    for status, text in results.values():
        assert status == 1  # not REFUSED: the launchers try again
        assert "TimeoutError: 4 of 6 ranks have not come up within 15 s (LAUNCH_JOIN_SECONDS): " in text
        assert f"node1 (rank 1); node2 (rank 3); {third}. " in text
        assert "These came: node1 (rank 0); node2 (rank 2)" in text


def test_a_missing_rank_0_is_named_with_its_host(tmp_path: Path) -> None:
    env = {"LAUNCH_JOIN_SECONDS": "2", "LAUNCH_HOSTS": "node1:1,node2:1"}
    results = start(tmp_path, _join, absent=(0,), env=env).wait()
    status, text = results[1]
    assert status == 1
    assert "TimeoutError: rank 1 on node2 has not reached rank 0 on node1 at 127.0.0.1:" in text
    assert "within 2 s (LAUNCH_JOIN_SECONDS)" in text


def test_a_new_start_does_not_meet_the_ranks_of_an_old_one(tmp_path: Path) -> None:
    """Host 2 was started again while rank 0 of the first start was still there: it waits for the next one."""

    def first_start(rank: int) -> None:
        store = rendezvous.connect(rendezvous.RankInfo.from_environment())
        store.add("came/1", 1)  # rank 1 came as well, and has ended
        print("is there", flush=True)
        time.sleep(LIMIT_S)

    env = {"MASTER_PORT": str(free_port())}
    folders = [tmp_path / name for name in ("old", "second", "first")]
    for folder in folders:
        folder.mkdir()
    old = start(folders[0], first_start, absent=(1,), env=env)
    old.wait_for("is there")
    second = start(folders[1], _join, absent=(0,), env=env)
    time.sleep(1.5)
    assert second.processes[1].is_alive(), second.wait()
    old.kill()
    first = start(folders[2], _join, absent=(1,), env=env)
    assert first.wait()[0][0] == 0
    assert second.wait()[1][0] == 0


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    def impatient(rank: int) -> None:
        rendezvous._PORT_SECONDS = 1.0
        _join(rank)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        results = start(tmp_path, impatient, world_size=1, env={"MASTER_PORT": port}).wait()
    status, text = results[0]
    assert status == rendezvous.REFUSED
    assert f"MASTER_PORT = {port}: allowed: a port that is free on node1" in text


def test_a_time_limit_that_is_no_number_is_named(tmp_path: Path) -> None:
    results = start(tmp_path, _join, world_size=1, env={"LAUNCH_JOIN_SECONDS": "soon"}).wait()
    assert results[0][0] == rendezvous.REFUSED
    assert "LAUNCH_JOIN_SECONDS = 'soon': allowed: seconds, more than 0" in results[0][1]
