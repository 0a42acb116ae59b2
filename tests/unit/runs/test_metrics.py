# SPDX-License-Identifier: Apache-2.0
"""`metrics.csv`: one file for all curves of a run, through resumes and kills, and the files of earlier versions."""

from __future__ import annotations

from pathlib import Path

from ds_blockwise.runs.metrics import METRICS_CSV, MetricsFile, read_metric


def test_rows_in_the_order_of_the_run(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / METRICS_CSV)
    file.write_events([("loss/validation", 2.5, 0), ("lr/base", 1e-4, 0)])
    file.write_events([("Train/Samples/lr", 1e-4, 32)])  # DeepSpeed's own, by samples
    file.write_events([("loss/validation", 0.1 + 0.2, 10)])
    text = (tmp_path / METRICS_CSV).read_text(encoding="utf-8")
    assert text.splitlines() == [
        "step,metric,value",
        "0,loss/validation,2.5",
        "0,lr/base,0.0001",
        "10,loss/validation,0.30000000000000004",
    ]
    assert read_metric(tmp_path, "loss/validation") == {0: 2.5, 10: 0.1 + 0.2}
    assert read_metric(tmp_path, "loss/train") == {}


def test_a_resumed_run_drops_what_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / METRICS_CSV
    file = MetricsFile(path)
    file.write_events([("a", 1.0, 5), ("a", 2.0, 10), ("a", 3.0, 15)])
    with path.open("a", encoding="utf-8") as cut:
        cut.write("16,a,3.")  # a kill while it was written
    MetricsFile(path, step=10).write_events([("a", 4.0, 15)])
    assert read_metric(tmp_path, "a") == {5: 1.0, 10: 2.0, 15: 4.0}
    assert len(path.read_text(encoding="utf-8").splitlines()) == 4
    MetricsFile(path)  # a new run
    assert read_metric(tmp_path, "a") == {}


def test_runs_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """A file for each metric; the header came again at each start, and steps after a kill came twice."""
    (tmp_path / "csv").mkdir()
    text = "step,validation\n0,9.0\n5,8.0\n10,7.5\nstep,validation\n10,7.0\n"
    (tmp_path / "csv" / "loss_validation.csv").write_text(text, encoding="utf-8")
    assert read_metric(tmp_path, "loss/validation") == {0: 9.0, 5: 8.0, 10: 7.0}
    # resumed by this version
    MetricsFile(tmp_path / METRICS_CSV, step=10).write_events([("loss/validation", 6.0, 15)])
    assert read_metric(tmp_path, "loss/validation") == {0: 9.0, 5: 8.0, 10: 7.0, 15: 6.0}
