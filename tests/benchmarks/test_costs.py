# SPDX-License-Identifier: Apache-2.0
"""Bytes sent are what a hand counts, and the overhead and the end-to-end benchmark measure a real run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed", reason="the benchmarks cut shards with the DeepSpeed host: extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="the benchmarks count on Megatron-core's model: extra 'megatron'")

from benchmarks.costs import (
    checkpoints,
    communication,
    communication_overhead,
    end_to_end,
    fused_step,
    muon_traffic,
    safety_checks,
)
from benchmarks.provenance import PROVENANCE, read_csv
from ds_blockwise.kernels.close_look import CloseLook
from ds_blockwise.optimizers.registry import OPTIMIZERS
from tests.helpers.benchmark_runs import run_benchmark

# Odd sizes, so that a half of a parameter often ends inside a block.
ONE_LAYER = {
    "num_layers": 1,
    "hidden_size": 12,
    "ffn_hidden_size": 10,
    "num_heads": 3,
    "num_kv_heads": 1,
    "head_dim": 4,
    "vocab_size": 11,
    "sequence_length": 8,
}
TWO_TENSOR_PARALLEL = {**ONE_LAYER, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 10}


def _count(tmp_path: Path, shape: dict[str, int], dp: int, tp: int) -> dict[str, tuple[int, int, int, int]]:
    """Messages and bytes over data and tensor parallelism, per ZeRO stage."""
    model = tmp_path / "model.yaml"
    model.write_text("".join(f"{key}: {value}\n" for key, value in shape.items()))
    # a model of a thousand parameters cannot keep the limit, which is for large ones
    text = run_benchmark("costs.communication", "--model", model, "--dp", dp, "--tp", tp, "--out", tmp_path, status=1)
    assert "FAIL" in text and "allowed 0.1%" in text
    keys = ("dp_messages", "dp_bytes", "tp_messages", "tp_bytes")
    return {row["zero_stage"]: tuple(int(row[k]) for k in keys) for row in read_csv(tmp_path / "communication.csv")}


def test_communication_of_zero_is_what_a_hand_counts(tmp_path: Path) -> None:
    """The promise of 0.1% would rest on a count that nobody checked."""
    counted = _count(tmp_path, ONE_LAYER, dp=2, tp=1)
    assert counted["0"] == (0, 0, 0, 0)
    # 1044 elements: embedding 11x12, norm 12, proj 12x12 and qkv 20x12 in either order, norm 12, fc1 20x12, fc2 12x10,
    # norm 12, output 11x12. The cut at 522 is 378 behind the first norm: row 19.5 of qkv, or row 11.5 of proj.
    assert counted["1/2"] == (1, 8, 0, 0)
    # Halves of: embedding and output (row 5.5: 1 each), qkv (row 10 of heads 0-4, 4-8, 8-12: 1); proj (row 6), fc1
    # (row 10) and fc2 (row 6) are cut between rows, and norms have one second moment for each element.
    assert counted["3"] == (1, 8 * 3, 0, 0)


def test_communication_of_tensor_parallelism_is_what_a_hand_counts(tmp_path: Path) -> None:
    """Rows of the two row-parallel weights travel, and nothing else: heads and other rows are whole on one rank."""
    counted = _count(tmp_path, TWO_TENSOR_PARALLEL, dp=1, tp=2)
    for stage in communication.STAGES:
        assert counted[stage] == (0, 0, 1, 8 * (12 + 12)), stage


def test_communication_of_two_billion_parameters_keeps_the_limit(tmp_path: Path) -> None:
    """The corners of the promised range; the script itself covers all of it."""
    text = run_benchmark("costs.communication", "--dp", 1, 1024, "--tp", 1, 4, "--out", tmp_path)
    assert "PASS" in text and "FAIL" not in text
    rows = read_csv(tmp_path / "communication.csv")
    assert tuple(rows[0]) == communication.COLUMNS and len(rows) == 3 * 2 * 2
    assert {row["model_parameters"] for row in rows} == {"1935362560"}
    for row in rows:
        assert communication.within_limits(row)
        assert int(row["fp32_gradient_bytes"]) == 4 * int(row["local_parameters"])
        sent = int(row["dp_bytes"]) + int(row["tp_bytes"])
        assert float(row["share_of_fp32_gradient"]) == pytest.approx(sent / int(row["fp32_gradient_bytes"]), rel=1e-3)
        assert (int(row["dp_messages"]) > 0) == (int(row["dp_bytes"]) > 0)


def test_traffic_of_muon_is_what_a_hand_counts(tmp_path: Path) -> None:
    model = tmp_path / "model.yaml"
    model.write_text("".join(f"{key}: {value}\n" for key, value in ONE_LAYER.items()))
    run_benchmark("costs.muon_traffic", "--model", model, "--dp", 2, "--tp", 1, "--out", tmp_path)
    rows = {row["zero_stage"]: row for row in read_csv(tmp_path / "muon_traffic.csv")}
    assert tuple(rows["3"]) == muon_traffic.COLUMNS
    # three heads of q, one of k and of v 4x12, attention's output 12x12, gate and up 10x12, down 12x10
    assert (rows["3"]["matrices"], rows["3"]["matrix_elements"]) == ("9", str(5 * 48 + 144 + 3 * 120))
    assert rows["3"]["predicted_bytes"] == str(4 * 744 // 2)
    # Halves of qkv (row 10), fc1 (row 10), proj and fc2 (row 6): all heads but the third of q lie whole on one rank,
    # gate and up too. Others go to the rank with less to do: proj to rank 0 (72 elements and 6 rows come from rank 1),
    # fc2 to rank 1 (60, 6), the head there too (24, 2). All come back.
    assert rows["3"]["mean_bytes"] == str(4 * 2 * (72 + 6 + 60 + 6 + 24 + 2) // 2)
    # one matrix is cut
    assert rows["1/2"]["buckets"] == "1"


def test_overhead_is_measured_on_real_ranks(tmp_path: Path) -> None:
    """The script that times the reductions would fail where it is needed."""
    run_benchmark("costs.communication_overhead", "--ranks", 2, "--size", "1M", "--rounds", 3, "--out", tmp_path)
    rows = read_csv(tmp_path / "communication_overhead.csv")
    assert tuple(rows[0]) == communication_overhead.COLUMNS
    assert [row["what"] for row in rows] == ["step with reductions", "step without", "all-reduce alone"]
    assert [row["bytes_sent"] for row in rows] == ["8", "0", "8"], "two ranks, one cut, one block"
    assert all(float(row["median_ms"]) > 0 and row["threads_per_rank"] for row in rows)


def test_fused_step_is_timed_beside_the_step_that_it_replaces(tmp_path: Path) -> None:
    """The script would fail on the day when it is needed, or its page would not say of what the figures are."""
    run_benchmark("costs.fused_step", "--hidden", 16, "--layers", 1, "--rounds", 2, "--out", tmp_path)
    rows = read_csv(tmp_path / "fused_step.csv")
    assert tuple(rows[0]) == fused_step.COLUMNS
    kinds = {(row["optimizer"], row["gradients"]) for row in rows}
    assert kinds == {(o, g) for o in ("BlockwiseAdamW", "BlockwiseAdamMini") for g in ("bf16", "fp32")}
    for row in rows:
        assert (row["parameters"], row["rounds"], row["threads"]) == (str(2 * 16 * 64), "2", "1")
        ratio = float(row["fused_ms"]) / float(row["unfused_ms"])
        assert float(row["fused_over_unfused"]) == pytest.approx(ratio, rel=1e-2)
        assert all(row[column] for column in PROVENANCE)
    head, _, *lines = fused_step.markdown(rows).splitlines()
    table, text = lines[: len(rows)], lines[-1]
    assert [line.count("|") for line in table] == [head.count("|")] * len(rows)
    for line, row in zip(table, rows, strict=True):
        for column in ("optimizer", "gradients", "unfused_ms", "fused_ms", "fused_over_unfused"):
            assert f"| {row[column]} |" in line
    for column in ("cpu", "torch", "deepspeed", "date", "commit"):
        assert rows[0][column] in text, column


def test_the_checks_of_a_step_are_all_left_out_and_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference would be of something else than the checks."""
    looks: list[int] = []
    close = CloseLook.still_holds

    def counted(self, tensors, states, grads):
        looks.append(
            len(tensors) + sum("exp_avg" in s for s in states) + sum("exp_avg_sq" in s for s in states) + len(grads)
        )
        return close(self, tensors, states, grads)

    monkeypatch.setattr(CloseLook, "still_holds", counted)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # it would stay for the tests that follow
    options = ("--numel", "2048", "--rounds", "2", "--steps", "1", "--out", str(tmp_path))
    safety_checks.main([*options])
    rows = read_csv(tmp_path / "safety_checks.csv")
    assert tuple(rows[0]) == safety_checks.COLUMNS
    kinds = [(row["optimizer"], row["tensors"]) for row in rows]
    assert kinds == [(name, tensors) for tensors in ("1", "21") for name in safety_checks.MEASURED]
    # parameters with gradients, then states, in every step with checks, and in no other
    seen = [each for row in rows for each in [2, 1 if "Lion" in row["optimizer"] else 2] * (safety_checks.WARM_UP + 2)]
    assert looks[: len(seen) // 2] == seen[: len(seen) // 2] and len(looks) == len(seen)
    assert rows[0]["parameters"] == "2048" and abs(int(rows[-1]["parameters"]) / 1e6 - 1) < 0.01
    for row in rows:
        assert float(row["share"]) == pytest.approx(float(row["checks_us"]) / float(row["step_us"]), abs=1e-3)
    head, _, *lines = safety_checks.markdown(rows).splitlines()
    assert [line.count("|") for line in lines[: len(rows)]] == [head.count("|")] * len(rows)
    assert rows[0]["commit"] in lines[-1]


def test_checkpoints_are_timed_beside_deepspeeds(tmp_path: Path) -> None:
    """The script would fail on the day when it is needed, or leave gigabytes behind."""
    folders = [tmp_path / "work", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    size = ("--hidden", 16, "--layers", 1, "--rounds", 1)
    run_benchmark("costs.checkpoints", *size, "--folder", *folders, "--out", tmp_path)
    rows = read_csv(tmp_path / "checkpoints.csv")
    assert tuple(rows[0]) == checkpoints.COLUMNS
    assert [row["optimizer"] for row in rows] == 2 * [checkpoints.PEER, *OPTIMIZERS]
    assert [list(folder.iterdir()) for folder in folders] == [[], []]
    of_one = len(rows) // 2
    for number, row in enumerate(rows):
        assert int(row["bytes"]) > 14 * int(row["parameters"]) == 14 * 2 * 16 * 64, (
            "weights in bf16 and fp32, two moments"
        )
        for column in checkpoints.MEASURED:
            ratio = float(row[column]) / float(rows[number - number % of_one][column])
            assert float(row[f"{column}_over_peer"]) == pytest.approx(ratio, rel=1e-2)
        assert float(row["on_disk_s"]) >= float(row["save_s"]) > 0 and all(row[column] for column in PROVENANCE)
    head, _, *lines = checkpoints.markdown(rows).splitlines()
    assert [line.count("|") for line in lines[: len(rows)]] == [head.count("|")] * len(rows)


def test_end_to_end_reads_times_and_memory_of_a_real_run(tmp_path: Path) -> None:
    """The wrapper around the main job would time nothing, or something else than a step."""
    arguments = ("--arms", "blockwise_adam_mini", "--rounds", 1, "--steps", 5, "--drop", 1)
    run_benchmark("costs.end_to_end", *arguments, "--work", tmp_path / "work", "--out", tmp_path)
    (row,) = read_csv(tmp_path / "end_to_end.csv")
    assert tuple(row) == end_to_end.COLUMNS
    assert row["timed_steps"] == "4" and row["model_parameters"] == "40904448"
    assert 0 < float(row["optimizer_ms"]) < float(row["step_ms"])
    assert row["step_over_adamw"] == "", "its baseline was not run"
    # 20M parameters of each rank: gradients, master weights and state of 4 bytes, besides the model's 164 MB
    for rank in range(2):
        assert 300 < float(row[f"peak_in_steps_mib_rank{rank}"]) <= float(row[f"peak_mib_rank{rank}"])
    assert 4.0 <= float(row["state_bytes_per_parameter"]) < 4.02
