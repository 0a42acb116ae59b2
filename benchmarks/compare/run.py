# SPDX-License-Identifier: Apache-2.0
"""Train the tiny model with eight optimizers, each with its own learning-rate sweep, and write what came out.

python -m benchmarks.compare.run          # everything: sweeps, seeds, shorter runs, ablations; about 3.5 hours
python -m benchmarks.compare.run --quick  # shorter runs, 3 learning rates, 2 seeds; about 15 minutes

One process on one core (or GPU) per trial. What has finished is never trained again, so a run that was stopped goes
on where it was; `--minutes` stops it by itself, each trial with a checkpoint. `--from-published` also counts what is in
docs/compare: a new seed or ablation costs its own runs only, on any machine.

python -m benchmarks.compare.run --run configs/run/compare_5m.yaml    # a larger model, in bf16; about an hour

python -m benchmarks.compare.run --run configs/run/compare_30m.yaml --steps 4000 --no-ablations \\
    --arms adamw,blockwise_adamw,blockwise_adam_mini --workers 1 --minutes 9    # a GPU, in slices of ten minutes
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.compare import report
from benchmarks.compare.ablations import MINI, OUR_MINI, Ablation, ablations, confirmation
from benchmarks.compare.results import against, best_of, loss_of
from benchmarks.compare.trials import ARMS, BASELINE, FULL, PUBLISHED_PLANS, QUICK, Plan, Setup, Trial
from benchmarks.provenance import ROOT, cores, write_between
from data.token_files import read_metadata
from ds_blockwise.runs.run_file import load_run

RUN_FILE = ROOT / "configs/run/compare.yaml"
_PRELOAD = ["benchmarks.compare.one_trial"]


class Stopped(Exception):
    """The time is up; what has finished is kept."""


class Trials:
    """Trains trials, several at a time, and remembers results.

    Args:
        folder: Of all trials.
        run_file: Model, data and batch.
        workers: Trials at a time.
        deadline: `time.monotonic` after which none begins.
        bf16: As `Plan.bf16`.
        overrides: More ``section.key=value`` for the run file.
        finished: A CSV of the same run file, whose results count as if they had been trained here.
    """

    def __init__(
        self,
        folder: Path,
        run_file: Path,
        workers: int,
        deadline: float,
        *,
        bf16: bool = False,
        overrides: Iterable[str] = (),
        finished: Path | None = None,
    ) -> None:
        self._finished: dict[str, dict[str, Any]] = {}
        if finished is not None:
            self.add_finished(finished)
        self.results: dict[Trial, dict[str, Any]] = {}
        self.compared = False  # all but the ablations has been trained
        self._overrides = list(overrides)
        run, problems = load_run(run_file, overrides=self._overrides)
        problems.raise_if_any()
        assert run is not None
        self.run = run
        metadata = read_metadata(run.data_directory)
        if metadata is None:
            raise SystemExit(
                f"no prepared data in {run.data_directory}: python launch/prepare_data.py --run {run_file}"
            )
        self._folder, self._run_file, self._deadline = folder, run_file, deadline
        self._setup = Setup(run.shape, metadata, bf16)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)  # the packages are imported once
        # the server finds modules by this variable only
        os.environ["PYTHONPATH"] = os.pathsep.join([p for p in sys.path if p])
        self._pool = ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1)
        self._workers = workers

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add_finished(self, path: Path) -> None:
        """Count the results of a CSV of the same run file as if they had been trained here; no file holds none."""
        if path.is_file():
            self._finished |= report.finished_in(path)

    def find(self, trials: Iterable[Trial]) -> list[Trial]:
        """Take over the results of earlier runs.

        Args:
            trials: Whose.

        Returns:
            Those that have none.
        """
        from benchmarks.compare.one_trial import result_of

        missing = []
        for trial in dict.fromkeys(trials):
            found = self.results.get(trial) or result_of(trial, self._folder, self._setup)
            found = found or self._finished.get(self._setup.fingerprint(trial))
            if found is None:
                missing.append(trial)
            else:
                self.results[trial] = found
        return missing

    def train(self, trials: Iterable[Trial], title: str) -> None:
        """Train what has no result yet.

        Args:
            trials: Which.
            title: For the progress bar.

        Raises:
            Stopped: The time is up.
        """
        from benchmarks.compare.one_trial import run_trial

        waiting = self.find(trials)
        running: dict[Future[dict[str, Any]], Trial] = {}
        with tqdm(total=len(waiting), desc=title, unit="run", dynamic_ncols=True) as bar:
            while waiting or running:
                while waiting and len(running) < self._workers and time.monotonic() < self._deadline:
                    trial = waiting.pop(0)
                    minutes = (self._deadline - time.monotonic()) / 60
                    future = self._pool.submit(
                        run_trial, trial, self._folder, self._run_file, self._setup, self._overrides, minutes
                    )
                    running[future] = trial
                if not running:
                    raise Stopped(f"{len(waiting)} runs of '{title}' are left; the same command goes on with them")
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    trial, result = running.pop(future), future.result()
                    if result is None:  # the clock has stopped it
                        waiting.append(trial)
                        continue
                    self.results[trial] = result
                    bar.update()
                    loss = result["final_validation_loss"]
                    bar.write(f"{trial.name}: {'diverged' if loss is None else f'{loss:.4f}'}")


def sweep(trials: Trials, plan: Plan) -> dict[str, float]:
    """Best learning rate of each arm at the first seed.

    Grids grow where an edge is best. Factors of 2 are coarse: an arm whose best lies between two points would look
    worse than one that hits it, so each is then given a rate between its best and the better neighbour.
    """

    def at(arm: str, lr: float) -> Trial:
        return plan.plain(arm, lr, seed=1)

    grids = {arm: list(plan.learning_rates(arm)) for arm in plan.arms}
    trials.train([at(arm, lr) for arm, grid in grids.items() for lr in grid], "learning rates")
    for _ in range(plan.widen):
        for arm, grid in grids.items():
            best = best_of(trials.results, [at(arm, lr) for lr in grid]).lr
            if best == grid[0]:
                grid.insert(0, best / 2)
            elif best == grid[-1]:
                grid.append(best * 2)
        trials.train([at(arm, lr) for arm, grid in grids.items() for lr in grid], "wider grids")
    for _ in range(plan.refine):
        for arm, grid in grids.items():
            grid.append(_between(grid, [loss_of(trials.results, at(arm, lr)) for lr in grid]))
            grid.sort()
        trials.train([at(arm, lr) for arm, grid in grids.items() for lr in grid], "finer grids")
    return {arm: best_of(trials.results, [at(arm, lr) for lr in grid]).lr for arm, grid in grids.items()}


def _between(grid: list[float], losses: list[float]) -> float:
    """The geometric mean of the best rate and its better neighbour, to two digits."""
    best = losses.index(min(losses))
    neighbours = [i for i in (best - 1, best + 1) if 0 <= i < len(grid)]
    better = min(neighbours, key=lambda i: losses[i])
    return float(f"{math.sqrt(grid[best] * grid[better]):.2g}")


def train_all(trials: Trials, plan: Plan) -> None:
    """The whole plan; each part depends on the results of those before.

    Raises:
        Stopped: The time is up.
    """
    best = sweep(trials, plan)
    asked = ablations(best, plan)
    changed = [trial for ablation in asked for trial in ablation.trials(plan)]
    trials.find(changed)
    trials.find(_confirmation(trials, plan, asked))  # they count although the time may be up before
    whole = {arm: [plan.plain(arm, lr, seed) for seed in range(1, plan.seeds + 1)] for arm, lr in best.items()}
    trials.train([trial for seeds in whole.values() for trial in seeds], "seeds")
    differences = {arm: against(trials.results, seeds, whole[BASELINE]) for arm, seeds in whole.items()}
    better = [arm for arm, difference in differences.items() if difference is not None and difference.sign < 0]
    # as many steps of warm-up as the whole runs: with fewer, a run ends above what a longer one has in passing
    shorter = [
        Trial(arm, best[arm], seed, round(share * plan.steps), warmup=plan.warmup / share)
        for share in plan.lengths
        for arm in better
        for seed in range(1, plan.seeds + 1)
    ]
    trials.train(shorter, "shorter runs")
    trials.compared = True
    trials.train(changed, "ablations")
    trials.train(_confirmation(trials, plan, asked), "seeds of what looks good")


def _confirmation(trials: Trials, plan: Plan, asked: list[Ablation]) -> list[Trial]:
    losses = {trial: loss_of(trials.results, trial) for trial in trials.results}
    tried = [ablation for ablation in asked if ablation.trial(plan, 1) in losses]
    return confirmation(plan, tried, losses, (MINI, OUR_MINI))


def _published_plan(run_file: Path, *, quick: bool) -> Plan | None:
    """The plan of a run file whose results stand in the repository; None for any other file."""
    if run_file.resolve().parent != RUN_FILE.parent:
        return None
    if quick:
        return QUICK if run_file.stem == RUN_FILE.stem else None
    return PUBLISHED_PLANS.get(run_file.stem)


def _plan(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Plan:
    plan = QUICK if options.quick else _published_plan(options.run, quick=False) or FULL
    if options.steps:
        plan = replace(plan, steps=options.steps)
    if options.no_ablations:
        plan = replace(plan, ablations=())
    if options.arms:
        arms = tuple(options.arms.split(","))
        unknown = [arm for arm in arms if arm not in ARMS]
        if unknown or BASELINE not in arms:
            parser.error(f"--arms {options.arms}: allowed: {', '.join(ARMS)}, and {BASELINE} must be among them")
        plan = replace(plan, arms=arms)
    return plan


def parser_of(script: str) -> argparse.ArgumentParser:
    """How many runs a script trains at a time and for how long, the same for every comparison.

    Args:
        script: Its docstring.
    """
    parser = argparse.ArgumentParser(description=script.splitlines()[0])
    parser.add_argument("--workers", type=int, default=cores(), help="runs at a time, one core each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    return parser


@dataclass(frozen=True)
class Asked:
    """What a script trains for one question, and where its results stand.

    Attributes:
        name: Of its folder of runs, and of its CSV in docs/compare.
        run_file: Model, data and batch.
        counted: Names of other CSVs of the same run file, whose results count as well.
        bf16: As `Plan.bf16`.
    """

    name: str
    run_file: Path = RUN_FILE
    counted: Sequence[str] = ()
    bf16: bool = False

    @property
    def csv(self) -> Path:
        """What has been trained."""
        return report.DOCS / f"{self.name}.csv"

    @property
    def folder(self) -> Path:
        """Of its runs."""
        return ROOT / "runs" / "compare" / self.name


def answer(
    asked: Asked,
    options: argparse.Namespace,
    train: Callable[[Trials], None],
    tables: Callable[[], Iterable[tuple[Path, str, str]]],
) -> int:
    """Train what is missing, write the CSV, then the tables into their pages.

    Args:
        asked: What, and where it stands.
        options: Those of `parser_of`.
        train: Everything; raises `Stopped` when the time is up.
        tables: Page, mark in it, and what stands there, from the CSV: so that they can be had again digit by digit.

    Returns:
        0; 1 if the time was up before all had been trained.
    """
    os.chdir(ROOT)  # relative paths of run files count from here
    deadline, stopped = time.monotonic() + 60 * options.minutes, None
    with Trials(asked.folder, asked.run_file, options.workers, deadline, bf16=asked.bf16, finished=asked.csv) as trials:
        for name in asked.counted:
            trials.add_finished(report.DOCS / f"{name}.csv")
        try:
            train(trials)
        except Stopped as reason:
            stopped = reason
        report.write_csv(trials.results, asked.csv)
    for page, mark, text in tables():
        print(text)
        write_between(page, mark, text)
    if stopped is not None:
        print(f"not complete: {stopped}")
    return int(stopped is not None)


def main() -> int:
    """Train what the plan asks for and lacks, then report.

    Returns:
        0; 1 if the time was up before the plan was done.
    """
    parser = parser_of(__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter runs, 3 learning rates, 2 seeds, no ablations")
    parser.add_argument("--run", type=Path, default=RUN_FILE, help="run file: model, data, batch")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as in the main job")
    parser.add_argument("--arms", help=f"only these, separated by commas, {BASELINE} among them: {', '.join(ARMS)}")
    parser.add_argument("--steps", type=int, help="of a whole run")
    parser.add_argument("--no-ablations", action="store_true")
    parser.add_argument("--from-published", action="store_true", help="what is in docs/compare counts as finished")
    parser.add_argument("--publish", action="store_true", help="write docs/comparisons.md although runs are missing")
    options = parser.parse_args()
    plan = _plan(options, parser)
    whole = plan == _published_plan(options.run, quick=options.quick) and not options.set
    for option in ("publish", "from-published"):
        if getattr(options, option.replace("-", "_")) and not whole:
            parser.error(f"--{option} is for the plans that docs/comparisons.md shows: no --arms, --steps, --set ...")
    folder = ROOT / "runs" / "compare" / (f"{options.run.stem}_quick" if options.quick else options.run.stem)
    name = "quick" if options.quick else options.run.stem
    # relative paths of run files count from here
    os.chdir(ROOT)
    deadline = time.monotonic() + 60 * options.minutes
    finished = report.DOCS / f"{name}.csv" if options.from_published else None
    if finished is not None and not finished.is_file():
        parser.error(f"--from-published: there is no docs/compare/{finished.name} yet: train everything without it")
    with Trials(
        folder, options.run, options.workers, deadline, bf16=plan.bf16, overrides=options.set, finished=finished
    ) as trials:
        stopped = None
        try:
            train_all(trials, plan)
        except Stopped as reason:
            stopped = reason
        # only a whole comparison changes what stands in the repository, unless somebody asks for it
        published = options.publish or (whole and trials.compared and not options.quick)
        print(report.write(trials.results, name, plan, folder, published=published))
    if stopped is not None:
        print(f"not complete: {stopped}")
    return int(stopped is not None)


if __name__ == "__main__":
    sys.exit(main())
