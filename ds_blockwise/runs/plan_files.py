# SPDX-License-Identifier: Apache-2.0
"""The run files that ``ds-blockwise plan`` is given, and a plan of them for each number of nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ds_blockwise.runs.check import check_run_file
from ds_blockwise.runs.plan import Plan, make_plan
from ds_blockwise.runs.plan_memory import RankCounts
from ds_blockwise.runs.run_file import RunConfig


def read_runs(path: Path, overrides: Sequence[str], deepspeed_file: Path | None) -> list[RunConfig]:
    """The run of a file, or the runs of a folder, ordered by their number of nodes.

    Of a folder with runs of several names, only those of the run with the fewest nodes: variants lie beside it.

    Raises:
        ValueError: no run file, or every problem of the first one that has any.
    """
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no run file (*.yaml)")
    runs = []
    for file in files:
        run, problems = check_run_file(file, overrides, deepspeed_file)
        problems.raise_if_any()
        assert run is not None
        runs.append(run)
    first = min(runs, key=lambda run: (run.cluster.nodes, len(run.name))).name
    return sorted((run for run in runs if run.name == first), key=lambda run: run.cluster.nodes)


def choose_run(runs: Sequence[RunConfig], nodes: int | None) -> RunConfig:
    """The run of the most nodes; given a number of them, the largest run that has no more, or else the smallest."""
    if nodes is None:
        return runs[-1]
    fitting = [run for run in runs if run.cluster.nodes <= nodes]
    return fitting[-1] if fitting else runs[0]


def plan_over_nodes(
    runs: Sequence[RunConfig],
    chosen: RunConfig,
    count: Callable[[RunConfig], RankCounts],
    gpus_per_node: int,
    gpu: str,
) -> list[Plan]:
    """A plan for each of several runs; of a single one for the powers of two that can share its batch.

    Args:
        runs: see `read_runs`.
        chosen: see `choose_run`.
        count: tells what a tensor-parallel rank of a run holds.
        gpus_per_node: GPUs of each node.
        gpu: see `make_plan`.
    """
    if len(runs) > 1:
        return [make_plan(run, count(run), run.cluster.nodes, gpus_per_node, gpu) for run in runs]
    ranks = {nodes: nodes * gpus_per_node // chosen.parallel.tensor for nodes in (2**k for k in range(7))}
    batch = chosen.training.global_batch_size
    possible = [nodes for nodes, dp in ranks.items() if dp and batch % dp == 0] or [chosen.cluster.nodes]
    return [make_plan(chosen, count(chosen), nodes, gpus_per_node, gpu) for nodes in possible]
