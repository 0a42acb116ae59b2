# SPDX-License-Identifier: Apache-2.0
"""Kills ranks of the main job at random instants, and checks what they leave behind."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ds_blockwise.checkpoint import folder as files
from ds_blockwise.checkpoint.manifest import read_manifest, verify
from tests.helpers.launch.job_server import Job, jobs

ALONE_S = 240.0  # a hang; after a kill the other ranks end by themselves, two seconds later on idle cores
STEPS = 20
TRAINING = "%|"  # the progress bar: process groups, model and data are there
WHEN = ("training", "save")
WHO = ("one", "all")


@dataclass
class Run:
    """One run of the main job, started again after every kill.

    Attributes:
        project: the project.
        name: of its output folder and logs.
        arguments: what every start gets.
        kills: a line for each kill.
        slowest: longest time in seconds that the other ranks needed to end after one.
    """

    project: Path
    name: str
    arguments: tuple[str, ...] = ()
    world_size: int = 2
    json_name: str = "mini"
    kills: list[str] = field(default_factory=list)
    slowest: float = 0.0
    starts: int = 0

    @property
    def checkpoints(self) -> Path:
        return self.project / self.name / self.json_name / "checkpoints"

    @property
    def last(self) -> Path:
        return self.checkpoints / f"step_{STEPS:07d}"

    def start(self, *more: str, prelude: str = "") -> Job:
        self.starts += 1
        output = ("--run", str(self.project / "run.yaml"), "--set", f"output={self.project / self.name}")
        return jobs().start(
            self.project / "logs" / f"{self.name}-{self.starts}",
            *output,
            *("--auto-resume", "--set", f"training.steps={STEPS}", "--set", "training.checkpoint_interval=1"),
            *("--set", "training.validation_interval=100", *self.arguments, *more),
            world_size=self.world_size,
            prelude=prelude,
        )

    def finish(self) -> Path:
        """Run to the end without a break; the last checkpoint."""
        expected = self.expectation()
        job = self.start().succeed()
        expected(job.log(0))
        assert verify(self.last) == []
        return self.last

    def kill_at(self, chance: random.Random) -> bool:
        """Start, kill one rank or all at an instant; False if the run was over before."""
        when, who, late = chance.choice(WHEN), chance.choice(WHO), chance.random()
        expected = self.expectation()
        job = self.start()
        if not self._wait_for(job, lambda: TRAINING in job.log(0)):
            return False
        time.sleep(late * 0.5)
        if when == "save":
            # a save of this model takes about 40 ms
            if not self._wait_for(job, lambda: any(self.checkpoints.glob("*" + files.PARTIAL))):
                return False
            time.sleep(late * 0.05)
        victims = [chance.randrange(self.world_size)] if who == "one" else list(range(self.world_size))
        before = time.monotonic()
        for rank in victims:
            job.kill(rank)
        statuses = job.wait(ALONE_S)
        if not any(statuses):
            return False
        took = time.monotonic() - before
        expected(job.log(0))
        left = [p.name for p in files.partial_folders(self.checkpoints)]
        self.kills.append(f"{self.name}: {when}, rank {victims}, statuses {statuses}, {took:.1f} s, left {left}")
        self.slowest = max(self.slowest, took)
        self.check_folder()
        return True

    def expectation(self) -> Callable[[str], None]:
        """What the next start must say about the folder as it is now."""
        found = files.resolve_tag(self.checkpoints)
        left = files.partial_folders(self.checkpoints)

        def check(log: str) -> None:
            said = re.findall(r"^(?:resuming from .*|starting from the beginning.*)$", log, re.MULTILINE)
            if found is None:
                assert said == [f"starting from the beginning in {self.checkpoints.parent}"], log
            else:
                tag = found.tag.removesuffix(files.REPLACED)
                steps = f"{found.global_steps} of {STEPS} steps"
                assert said == [f"resuming from {self.checkpoints / tag}, {steps}"], log
            for path in left:
                assert f"{path} was removed: a save was stopped" in log, log

        return check

    def check_folder(self) -> None:
        """Whatever was killed: `latest` names a whole checkpoint, and every folder with a proper name is whole."""
        latest = self.checkpoints / files.LATEST
        unfinished = files.partial_folders(self.checkpoints)
        whole = [p for p in self.checkpoints.glob("step_*") if p.is_dir() and p not in unfinished]
        for path in whole:
            assert read_manifest(path) is not None, path
            assert verify(path) == [], path
        if latest.exists():
            assert self.checkpoints / latest.read_text(encoding="utf-8") in whole
        newest = files.newest_complete(self.checkpoints)
        assert (newest is None) == (not whole)

    def _wait_for(self, job: Job, seen: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + 120.0
        while not seen():
            if not job.running():
                assert not any(job.status(rank) for rank in range(self.world_size)), job.tails()
                return False
            assert time.monotonic() < deadline, job.tails()
            time.sleep(0.002)
        return True


def kill_often(runs: Iterator[Run], kills: int, each: int, seed: int) -> list[Run]:
    """Kill `kills` times in all, at most `each` times in a run; then let every run finish."""
    chance = random.Random(seed)
    done: list[Run] = []
    while (left := kills - sum(len(run.kills) for run in done)) > 0:
        run = next(runs)
        done.append(run)
        while len(run.kills) < min(each, left) and run.kill_at(chance):
            pass
        run.finish()
    return done
