# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, count right, judge right, and the README's tables are their CSVs."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT

pytest.importorskip("deepspeed", reason="the benchmarks cut shards with the DeepSpeed host: extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="the benchmarks count on Megatron-core's model: extra 'megatron'")
pytest.importorskip("adam_mini", reason="the published Adam-mini is a peer: extra 'dev'")

from benchmarks.costs import communication, communication_overhead, end_to_end
from benchmarks.provenance import PROVENANCE, between, read_csv, write_between
from benchmarks.step import peers as bench_peers
from benchmarks.step import shapes as bench_shapes
from benchmarks.step import tables as bench_tables
from benchmarks.step import verify as bench_verify
from benchmarks.step.peers import PEERS, Contender, Missing, build_ours, find_contenders
from benchmarks.step.probe import Timing, check_memory
from ds_blockwise import BlockwiseAdamMini, BlockwiseAdamW
from ds_blockwise.blocks.segment_table import build_table

BENCHMARKS = ROOT / "benchmarks"
CPU = torch.device("cpu")
COMPILED = "DeepSpeedCPUAdam"  # by DeepSpeed, for minutes; the figures have it, the tests do without


def run(script: str, *arguments: object, status: int = 0) -> str:
    """Run a benchmark as a user does; compiled kernels of DeepSpeed are never needed."""
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == status, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


# --------------------------------------------------------------------------------------- kernels


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[dict[str, str]]]:
    """The kernel benchmark at its smallest, once."""
    out = tmp_path_factory.mktemp("bench")
    quickest = ("--sizes", "1M", "--rounds", 3, "--without", COMPILED, "--probe", "sweeps")
    text = run("bench_kernels.py", *quickest, "--out", out)
    return out, text, read_csv(out / "kernels_cpu.csv")


def test_kernel_benchmark_leaves_out_nobody_in_silence(quick: tuple[Path, str, list[dict[str, str]]]) -> None:
    """A peer that cannot run here would be forgotten, and the comparison would look complete."""
    out, text, rows = quick
    assert tuple(rows[0]) == bench_tables.COLUMNS
    assert (out / "kernels_cpu.png").stat().st_size > 10_000
    ours = {
        f"{cls}[{name}]" for cls in ("BlockwiseAdamW", "BlockwiseAdamMini") for name in ("reference", "cpp", "triton")
    }
    for layout in bench_shapes.LAYOUTS:
        here = {row["contender"]: row for row in rows if row["layout"] == layout}
        assert ours | set(PEERS) <= set(here)
        for name, row in here.items():
            assert bool(row["median_ms"]) != bool(row["note"]), (name, row)
        for name in ("BlockwiseAdamMini[reference]", "torch AdamW fused", "torch AdamW foreach"):
            assert here[name]["median_ms"], here[name]["note"]
    notes = {(row["layout"], row["contender"]): row["note"] for row in rows}
    assert notes["whole", COMPILED] == "not run: left out by --without"
    assert "whole two-dimensional weights" in notes["flat", "adam-mini (published)"]
    assert "apex" in text and "verified: BlockwiseAdamMini[reference], flat" in text


def test_kernel_figures_follow_from_the_medians(quick: tuple[Path, str, list[dict[str, str]]]) -> None:
    """A ratio or a bandwidth that does not belong to the times beside it would be published."""
    _, _, rows = quick
    timed = [row for row in rows if row["median_ms"]]
    medians = {(row["layout"], row["contender"]): float(row["median_ms"]) for row in timed}
    for row in timed:
        median, numel = float(row["median_ms"]) / 1e3, int(row["parameters"])
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert int(row["bytes_moved"]) == numel * int(row["bytes_per_parameter"])
        assert float(row["gb_per_s"]) == pytest.approx(int(row["bytes_moved"]) / median / 1e9, rel=1e-3)
        assert float(row["ns_per_parameter"]) == pytest.approx(median * 1e9 / numel, rel=1e-3)
        share = float(row["gb_per_s"]) / float(row["probe_gb_per_s"])
        assert float(row["share_of_probe"]) == pytest.approx(share, rel=2e-3, abs=2e-3)
        for column in (*PROVENANCE, "threads", "working_set_bytes", "copy_gb_per_s"):
            assert row[column], column
        for peer, column in bench_tables.RATIOS.items():
            other = medians.get((row["layout"], peer))
            if row["backend"] and other:
                assert float(row[column]) == pytest.approx(float(row["median_ms"]) / other, rel=2e-3, abs=1e-3)
            else:
                assert row[column] == ""
    bytes_of = {row["contender"]: row["bytes_per_parameter"] for row in timed}
    assert bytes_of["torch AdamW fused"] == bytes_of["BlockwiseAdamW[reference]"] == "28"
    assert bytes_of["adam-mini (published)"] == bytes_of["BlockwiseAdamMini[reference]"] == "20"


@pytest.mark.parametrize("size", ["1M", "5M"])
def test_flat_case_begins_and_ends_inside_a_block(size: str) -> None:
    """The flat figures would be of a shard that no cut makes difficult, with one multiplier all over."""
    case = bench_shapes.make_case(size, "flat", CPU)
    assert case.numel == pytest.approx(bench_shapes.SIZES[size].count_parameters(), rel=0.06)
    table = build_table(case.numel, case.placements, shares_second_moment=True)
    slots = {int(slot) for slot in table.dp_slots}
    last = table.runs[-1]
    assert {table.runs[0].block, last.block + last.count - 1} <= slots
    held = torch.zeros(table.num_slots, dtype=torch.float64)
    for run_ in table.runs:
        run_.blocks_of(held).add_(float(run_.repeat * run_.numel))
    for slot in (table.runs[0].block, last.block + last.count - 1):
        assert held[slot] < table.slot_numel[slot], "the block is not cut"
    assert len({run_.lr_multiplier for run_ in table.multiplier_runs}) >= 4, "qk, vo, ffn and norm"


def test_whole_case_shares_memory_and_fuses_qkv() -> None:
    """Contenders on copies would need more memory than the machine has, or step other numbers."""
    case = bench_shapes.make_case("1M", "whole", CPU)
    at = case.param.data_ptr()
    for tensors in (case.params, [view for _, view in case.named]):
        assert sum(view.numel() for view in tensors) == case.numel
        assert tensors[0].data_ptr() == at and tensors[0].grad.data_ptr() == case.grad.data_ptr()
    (fused, *_) = [view for view in case.params if "linear_qkv" in view.block_spec.fqn]
    assert {part.lr_multiplier for part in fused.block_spec.parts} == {8.0, 4.0}


def test_verification_refuses_another_update() -> None:
    """A fast contender that does something else would win."""

    def wrong(case: bench_shapes.Case, **settings: object) -> torch.optim.Optimizer:
        return torch.optim.AdamW(case.params, **{**settings, "weight_decay": 0.11})

    contender = Contender("wrong", "AdamW", "", "fp32", 28, 8, wrong)
    for layout in bench_shapes.LAYOUTS:
        with pytest.raises(ValueError, match=r"wrong on .* makes another update than its family"):
            bench_verify.verify([contender], [layout], CPU)

    def wrong_mini(case: bench_shapes.Case, **settings: object) -> torch.optim.Optimizer:
        return build_ours(BlockwiseAdamW, case, **settings, backend="reference")

    contender = Contender("mini", "Adam-mini", "reference", "fp32", 20, 4, wrong_mini)
    with pytest.raises(ValueError, match="mini on whole tensors"):
        bench_verify.verify([contender], ["whole"], CPU)


def test_peers_that_cannot_run_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unrelated PyPI project 'apex' would be taken for NVIDIA's."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(bench_peers.Unavailable, match="is not NVIDIA's"):
        bench_peers._apex_fused_adam()
    with pytest.raises(ValueError, match="'no such' is in no contender's name"):
        find_contenders(CPU, ["no such", COMPILED])
    contenders, missing = find_contenders(CPU, [COMPILED, "bf16"])
    assert not [contender for contender in contenders if contender.momentum == "bf16"]
    reasons = {entry.name: entry.reason for entry in missing}
    assert reasons[COMPILED] == "left out by --without" and reasons["TE FusedAdam"] == "it is not for cpu"


def test_a_case_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would be killed for memory after half an hour."""
    case = bench_shapes.make_case("1M", "whole", CPU)
    contenders, _ = find_contenders(CPU, [COMPILED])
    check_memory(case, contenders)
    monkeypatch.setattr("bench_probe.free_bytes", lambda device: 1_000_000)
    with pytest.raises(ValueError, match=r"0\.0 GB are free"):
        check_memory(case, contenders)


# ----------------------------------------------------------------------------------- acceptance


def _rows(seconds: dict[str, float], size: str, layout: str) -> list[dict[str, str]]:
    """Rows of the CSV as if these times had been measured."""
    case = bench_shapes.make_case("1M", layout, CPU)
    case.size = size
    families = {"adam-mini (published)": "Adam-mini", "BlockwiseAdamMini[cpp]": "Adam-mini"}
    contenders = []
    for name in seconds:
        family, backend = families.get(name, "AdamW"), "cpp" if "cpp" in name else ""
        bytes_ = 20 if family == "Adam-mini" else 28
        contenders.append(Contender(name, family, backend, "fp32", bytes_, 8, lambda case: None))
    timings = {name: Timing(1, (time,) * 3) for name, time in seconds.items()}
    probes = {name: Timing(1, (1e-3,)) for name in ("AdamW", "Adam-mini", "copy")}
    common = {
        **dict.fromkeys(PROVENANCE, "x"),
        "device": "cpu",
        "threads": "2",
        "probe": "sweeps",
        "l3_bytes": "1048576",
    }
    rows = bench_tables.timed_rows(case, contenders, timings, probes, common)
    return rows + bench_tables.missing_rows(case, [Missing("apex FusedAdam", "not here")], common)


GOOD = {
    "BlockwiseAdamMini[cpp]": 0.7,
    "BlockwiseAdamW[cpp]": 1.0,
    "DeepSpeedCPUAdam": 1.0,
    "adam-mini (published)": 10.0,
}


@pytest.mark.parametrize(
    ("change", "size", "failed"),
    [
        ({}, "67M", []),
        ({"BlockwiseAdamMini[cpp]": 0.76}, "67M", ["BlockwiseAdamMini[cpp] over DeepSpeedCPUAdam"]),
        ({"adam-mini (published)": 7.7}, "67M", ["BlockwiseAdamMini[cpp] over adam-mini (published)"]),
        ({"BlockwiseAdamW[cpp]": 1.03}, "67M", ["BlockwiseAdamW[cpp] over DeepSpeedCPUAdam"]),
        ({"BlockwiseAdamMini[cpp]": 0.86, "BlockwiseAdamW[cpp]": 1.17}, "5M", []),
        ({"BlockwiseAdamW[cpp]": 1.18}, "5M", ["BlockwiseAdamW[cpp] over DeepSpeedCPUAdam"]),
    ],
)
def test_acceptance_is_judged_by_the_issues_limits(change: dict[str, float], size: str, failed: list[str]) -> None:
    """A missed target would be printed as a pass."""
    checks = bench_tables.acceptance(_rows({**GOOD, **change}, size, "whole"))
    assert len(checks) == 3
    assert [check.what for check in checks if not check.passed] == [f"{name}, {size}, whole tensors" for name in failed]
    assert all(str(check).startswith("PASS" if check.passed else "FAIL") for check in checks)


def test_acceptance_says_what_was_not_measured() -> None:
    """A target whose peer is missing would pass, or vanish."""
    seconds = {name: time for name, time in GOOD.items() if name != COMPILED}
    checks = bench_tables.acceptance(_rows(seconds, "67M", "flat"))
    assert [check.passed for check in checks] == [None, None]
    assert all(str(check).endswith("not measured") for check in checks)


# --------------------------------------------------------------------------------- communication

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
    text = run("communication.py", "--model", model, "--dp", dp, "--tp", tp, "--out", tmp_path, status=1)
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
    text = run("communication.py", "--dp", 1, 1024, "--tp", 1, 8, "--out", tmp_path)
    assert "PASS" in text and "FAIL" not in text
    rows = read_csv(tmp_path / "communication.csv")
    assert tuple(rows[0]) == communication.COLUMNS and len(rows) == 3 * 2 * 2
    assert {row["model_parameters"] for row in rows} == {"2067130880"}
    for row in rows:
        assert communication.within_limits(row)
        assert int(row["fp32_gradient_bytes"]) == 4 * int(row["local_parameters"])
        sent = int(row["dp_bytes"]) + int(row["tp_bytes"])
        assert float(row["share_of_fp32_gradient"]) == pytest.approx(sent / int(row["fp32_gradient_bytes"]), rel=1e-3)
        assert (int(row["dp_messages"]) > 0) == (int(row["dp_bytes"]) > 0)


def test_overhead_is_measured_on_real_ranks(tmp_path: Path) -> None:
    """The script that times the reductions would fail where it is needed."""
    run("communication_overhead.py", "--ranks", 2, "--size", "1M", "--rounds", 3, "--out", tmp_path)
    rows = read_csv(tmp_path / "communication_overhead.csv")
    assert tuple(rows[0]) == communication_overhead.COLUMNS
    assert [row["what"] for row in rows] == ["step with reductions", "step without", "all-reduce alone"]
    assert [row["bytes_sent"] for row in rows] == ["8", "0", "8"], "two ranks, one cut, one block"
    assert all(float(row["median_ms"]) > 0 and row["threads_per_rank"] for row in rows)


# ------------------------------------------------------------------------------------ end to end


def test_end_to_end_reads_times_and_memory_of_a_real_run(tmp_path: Path) -> None:
    """The wrapper around the main job would time nothing, or something else than a step."""
    arguments = ("--arms", "blockwise_adam_mini", "--rounds", 1, "--steps", 5, "--drop", 1)
    run("end_to_end.py", *arguments, "--work", tmp_path / "work", "--out", tmp_path)
    (row,) = read_csv(tmp_path / "end_to_end.csv")
    assert tuple(row) == end_to_end.COLUMNS
    assert row["timed_steps"] == "4" and row["model_parameters"] == "40904448"
    assert 0 < float(row["optimizer_ms"]) < float(row["step_ms"])
    assert row["step_over_adamw"] == "", "its baseline was not run"
    # 20M parameters of each rank: gradients, master weights and state of 4 bytes, besides the model's 164 MB
    for rank in range(2):
        assert 300 < float(row[f"peak_in_steps_mib_rank{rank}"]) <= float(row[f"peak_mib_rank{rank}"])
    assert 4.0 <= float(row["state_bytes_per_parameter"]) < 4.02


# ------------------------------------------------------------------------------------------ README

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def _kernels(rows: list[dict[str, str]]) -> str:
    return bench_tables.markdown(rows, f"docs/bench/kernels_{rows[0]['device']}.png")


TABLES = {
    "bench": ("kernels_cpu.csv", _kernels),
    "communication": ("communication.csv", communication.markdown),
    "communication-overhead": ("communication_overhead.csv", communication_overhead.markdown),
    "end-to-end": ("end_to_end.csv", end_to_end.markdown),
}


@pytest.mark.parametrize("section", TABLES)
def test_readme_shows_what_was_measured(section: str) -> None:
    """A figure in the README that no file holds, or one that is older than its file."""
    name, markdown = TABLES[section]
    assert between(TEXT, section) == markdown(read_csv(ROOT / "docs/bench" / name))


def test_readme_shows_gpu_figures_if_there_are_any() -> None:
    """A table of a GPU that nobody measured, or figures that nobody sees."""
    results = ROOT / "docs/bench/kernels_cuda.csv"
    if results.is_file():
        assert between(TEXT, "bench-gpu") == _kernels(read_csv(results))
    else:
        assert "<!-- bench-gpu:begin -->" not in TEXT


def test_committed_figures_are_of_everything_that_was_promised() -> None:
    """A table of fewer sizes, layouts or arms than issue 3 asks for."""
    rows = read_csv(ROOT / "docs/bench/kernels_cpu.csv")
    measured = {(row["size"], row["layout"]) for row in rows if row["contender"] == COMPILED and row["median_ms"]}
    assert measured == {(s, layout) for s in ("1M", "5M", "25M", "67M", "200M") for layout in bench_shapes.LAYOUTS}
    counted = {(r["zero_stage"], r["dp"], r["tp"]) for r in read_csv(ROOT / "docs/bench/communication.csv")}
    assert len(counted) == 3 * 11 * 4
    assert all(communication.within_limits(row) for row in read_csv(ROOT / "docs/bench/communication.csv"))
    assert {row["arm"] for row in read_csv(ROOT / "docs/bench/end_to_end.csv")} == set(end_to_end.ARMS)
    with open(ROOT / "docs/bench/end_to_end.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    again = [dict(row) for row in rows]
    end_to_end.compare(again)
    assert again == rows, "the ratios are not those of the times"


def test_writing_between_markers_keeps_the_rest(tmp_path: Path) -> None:
    """A script would eat the README, or write nowhere and say nothing."""
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- x:begin -->\nold\n<!-- x:end -->\nafter\n")
    write_between(path, "x", r"new \1 line")
    assert path.read_text() == "before\n<!-- x:begin -->\nnew \\1 line\n<!-- x:end -->\nafter\n"
    with pytest.raises(ValueError, match="has no lines <!-- y:begin -->"):
        write_between(path, "y", "text")


def test_our_optimizers_are_timed_with_their_default_multipliers() -> None:
    """Multipliers of 1 would be one run for the whole tensor: an easier case than users have."""
    case = bench_shapes.make_case("1M", "whole", CPU)
    optimizer = build_ours(BlockwiseAdamMini, case)
    spans = {part.lr_multiplier for p in case.params for part in optimizer.binding_of(p).table.placements[0].spec.parts}
    assert spans == {10.0, 8.0, 6.0, 4.0, 1.0}
