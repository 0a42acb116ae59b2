# SPDX-License-Identifier: Apache-2.0
"""Which runs of a folder are planned, and for which numbers of nodes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ds_blockwise.runs.plan_files import choose_run, plan_over_nodes, read_runs
from ds_blockwise.runs.plan_memory import RankCounts
from ds_blockwise.runs.run_file import RunConfig
from tests.helpers import ROOT

FOLDER = ROOT / "configs" / "run" / "llama_2b"


def count(run: RunConfig) -> RankCounts:
    return RankCounts(run.shape.count_parameters() // run.parallel.tensor, 1)


def test_runs_of_a_folder_are_ordered_by_nodes() -> None:
    runs = read_runs(FOLDER, [], None)
    assert [run.cluster.nodes for run in runs] == [1, 2, 4, 8, 16, 32, 64]
    assert len({run.name for run in runs}) == 1  # a variant lies in the same folder
    found = [choose_run(runs, nodes).cluster.nodes for nodes in (None, 1, 6, 8, 100)]
    assert found == [64, 1, 4, 8, 64]
    assert choose_run(runs[3:], 2).cluster.nodes == 8


def test_a_folder_is_planned_file_by_file_and_a_file_for_powers_of_two() -> None:
    runs = read_runs(FOLDER, [], None)
    plans = plan_over_nodes(runs, runs[0], count, 8, "h100-80g")
    expected = [(run.cluster.nodes, run.parallel.tensor) for run in runs]
    assert [(plan.nodes, plan.tp) for plan in plans] == expected
    assert all(plan.dp * plan.tp == 8 * plan.nodes for plan in plans)
    alone = read_runs(FOLDER / "nodes_4.yaml", ["training.global_batch_size=96", "training.micro_batch_size=1"], None)
    plans = plan_over_nodes(alone, alone[0], count, 8, "h100-80g")
    assert [plan.nodes for plan in plans] == [1, 2, 4]  # 96 sequences cannot be shared by 64 ranks


def test_problems_of_a_run_are_raised(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run file"):
        read_runs(tmp_path, [], None)
    shutil.copy(FOLDER / "nodes_1.yaml", tmp_path / "a.yaml")
    with pytest.raises(ValueError, match=r"problem.* in the configuration:"):
        read_runs(tmp_path, [], None)
