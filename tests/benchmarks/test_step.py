# SPDX-License-Identifier: Apache-2.0
"""The benchmark of one step runs, leaves out nobody in silence, refuses another update, and judges by the limits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed", reason="the benchmarks cut shards with the DeepSpeed host: extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="the benchmarks count on Megatron-core's model: extra 'megatron'")
pytest.importorskip("adam_mini", reason="the published Adam-mini is a peer: extra 'dev'")

from benchmarks.provenance import PROVENANCE, read_csv
from benchmarks.step import muon, peers, probe, shapes, small, tables
from benchmarks.step.peers import PEERS, Contender, Missing, build_ours, families, find_contenders
from benchmarks.step.verify import verify
from ds_blockwise import BlockwiseAdamMini, BlockwiseAdamW
from ds_blockwise.blocks.segment_table import build_table
from tests.helpers.benchmark_runs import ALL_COMPILED, COMPILED, run_benchmark

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[dict[str, str]]]:
    """The kernel benchmark at its smallest, once."""
    out = tmp_path_factory.mktemp("bench")
    quickest = ("--sizes", "1M", "--rounds", 3, "--without", *ALL_COMPILED, "[triton]", "--probe", "sweeps")
    text = run_benchmark("step.run", *quickest, "--out", out)
    return out, text, read_csv(out / "kernels_cpu.csv")


def test_muons_step_is_timed_beside_its_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # DeepSpeed's would be compiled for minutes
    run_benchmark("step.muon", "--width", 64, "--layers", 1, "--rounds", 2, "--out", tmp_path)
    rows = read_csv(tmp_path / "muon_step.csv")
    assert tuple(rows[0]) == muon.COLUMNS
    assert {(row["optimizer"], row["matrices"]) for row in rows} == set(muon.CONTENDERS)
    assert all(float(row["median_ms"]) >= float(row["lowest_ms"]) > 0 for row in rows)


def test_small_tensors_are_timed_beside_their_peers(tmp_path: Path) -> None:
    """A peer that is missing would make the other one the faster."""
    text = run_benchmark(
        "step.small", "--cases", small.THOUSAND, "rows of 2", "--rounds", 2, "--without", COMPILED, "--out", tmp_path
    )
    rows = read_csv(tmp_path / "small_tensors.csv")
    assert tuple(rows[0]) == small.COLUMNS
    times = {(row["case"], row["contender"]): float(row["median_ms"] or "nan") for row in rows}
    assert set(times) == {
        (c, n) for c in (small.THOUSAND, "rows of 2") for n in (small.MINI, small.ADAMW, *small.PEERS)
    }
    for row in rows:
        case, name = row["case"], row["contender"]
        assert bool(row["median_ms"]) != bool(row["note"]) and bool(row["note"]) == (name == COMPILED)
        if name in (small.MINI, small.ADAMW):
            for column, other in ((small.OVER_FASTEST, "torch AdamW fused"), (small.OVER_ADAMW, small.ADAMW)):
                assert float(row[column]) == pytest.approx(times[case, name] / times[case, other], rel=2e-3)
    assert f"----  {small.ADAMW}, {small.THOUSAND}, {small.OVER_FASTEST}: not measured" in text
    (mini,) = [row for row in rows if (row["case"], row["contender"]) == ("rows of 2", small.MINI)]
    (check,) = [check for check in small.acceptance(rows) if "rows of 2" in check.what]
    assert (check.value, check.limit) == (float(mini[small.OVER_ADAMW]), 1.5)


def test_kernel_benchmark_leaves_out_nobody_in_silence(quick: tuple[Path, str, list[dict[str, str]]]) -> None:
    """A peer that cannot run here would be forgotten, and the comparison would look complete."""
    out, text, rows = quick
    assert tuple(rows[0]) == tables.COLUMNS
    assert (out / "kernels_cpu.png").stat().st_size > 10_000
    ours = {f"{cls.__name__}[{name}]" for cls in families().values() for name in ("reference", "cpp", "triton")}
    assert len(ours) == 9
    for layout in shapes.LAYOUTS:
        here = {row["contender"]: row for row in rows if row["layout"] == layout}
        assert ours | set(PEERS) <= set(here)
        for name, row in here.items():
            assert bool(row["median_ms"]) != bool(row["note"]), (name, row)
        for name in ("BlockwiseAdamMini[reference]", "BlockwiseLion[cpp]", "torch AdamW fused", "torch AdamW foreach"):
            assert here[name]["median_ms"], here[name]["note"]
    notes = {(row["layout"], row["contender"]): row["note"] for row in rows}
    assert notes["whole", COMPILED] == "not run: left out by --without"
    assert notes["flat", "BlockwiseLion[triton]"] == "not run: left out by --without"
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
        for peer, column in tables.RATIOS.items():
            other = medians.get((row["layout"], peer))
            if row["backend"] and other:
                assert float(row[column]) == pytest.approx(float(row["median_ms"]) / other, rel=2e-3, abs=1e-3)
            else:
                assert row[column] == ""
    bytes_of = {row["contender"]: row["bytes_per_parameter"] for row in timed}
    assert bytes_of["torch AdamW fused"] == bytes_of["BlockwiseAdamW[reference]"] == "28"
    assert bytes_of["adam-mini (published)"] == bytes_of["BlockwiseAdamMini[reference]"] == "20"
    assert bytes_of["BlockwiseLion[cpp]"] == "20"


@pytest.mark.parametrize("size", ["1M", "5M"])
def test_flat_case_begins_and_ends_inside_a_block(size: str) -> None:
    """The flat figures would be of a shard that no cut makes difficult, with one multiplier all over."""
    case = shapes.make_case(size, "flat", CPU)
    assert case.numel == pytest.approx(shapes.SIZES[size].count_parameters(), rel=0.06)
    table = build_table(case.numel, case.placements, shares_second_moment=True)
    slots = {int(slot) for slot in table.dp_slots}
    last = table.runs[-1]
    assert {table.runs[0].block, last.block + last.count - 1} <= slots
    held = torch.zeros(table.num_slots, dtype=torch.float64)
    for run_ in table.runs:
        run_.blocks_of(held).add_(float(run_.repeat * run_.numel))
    for slot in (table.runs[0].block, last.block + last.count - 1):
        assert held[slot] < table.slot_numel[slot], "the block is not cut"
    assert len({run_.update.lr_multiplier for run_ in table.multiplier_runs}) >= 4, "qk, vo, ffn and norm"


def test_whole_case_shares_memory_and_fuses_qkv() -> None:
    """Contenders on copies would need more memory than the machine has, or step other numbers."""
    case = shapes.make_case("1M", "whole", CPU)
    at = case.param.data_ptr()
    for tensors in (case.params, [view for _, view in case.named]):
        assert sum(view.numel() for view in tensors) == case.numel
        assert tensors[0].data_ptr() == at and tensors[0].grad.data_ptr() == case.grad.data_ptr()
    (fused, *_) = [view for view in case.params if "linear_qkv" in view.block_spec.fqn]
    assert {part.update.lr_multiplier for part in fused.block_spec.parts} == {1.0, 0.5}


def test_verification_refuses_another_update() -> None:
    """A fast contender that does something else would win."""

    def wrong(case: shapes.Case, **settings: object) -> torch.optim.Optimizer:
        return torch.optim.AdamW(case.params, **{**settings, "weight_decay": 0.11})

    contender = Contender("wrong", "AdamW", "", "fp32", 28, 8, wrong)
    for layout in shapes.LAYOUTS:
        with pytest.raises(ValueError, match=r"wrong on .* makes another update than its family"):
            verify([contender], [layout], CPU)

    def wrong_mini(case: shapes.Case, **settings: object) -> torch.optim.Optimizer:
        return build_ours(BlockwiseAdamW, case, **settings, backend="reference")

    contender = Contender("mini", "Adam-mini", "reference", "fp32", 20, 4, wrong_mini)
    with pytest.raises(ValueError, match="mini on whole tensors"):
        verify([contender], ["whole"], CPU)


def test_peers_that_cannot_run_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unrelated PyPI project 'apex' would be taken for NVIDIA's."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(peers.Unavailable, match="is not NVIDIA's"):
        peers._apex_fused_adam()
    with pytest.raises(ValueError, match="'no such' is in no contender's name"):
        find_contenders(CPU, ["no such", *ALL_COMPILED])
    contenders, missing = find_contenders(CPU, [*ALL_COMPILED, "bf16"])
    assert not [contender for contender in contenders if contender.momentum == "bf16"]
    reasons = {entry.name: entry.reason for entry in missing}
    assert reasons[COMPILED] == "left out by --without" and reasons["TE FusedAdam"] == "it is not for cpu"


def test_a_case_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would be killed for memory after half an hour."""
    case = shapes.make_case("1M", "whole", CPU)
    contenders, _ = find_contenders(CPU, ALL_COMPILED)
    probe.check_memory(case, contenders)
    monkeypatch.setattr(probe, "free_bytes", lambda device: 1_000_000)
    with pytest.raises(ValueError, match=r"0\.0 GB are free"):
        probe.check_memory(case, contenders)


def test_our_optimizers_are_timed_with_their_default_multipliers() -> None:
    """Multipliers of 1 would be one run for the whole tensor: an easier case than users have."""
    case = shapes.make_case("1M", "whole", CPU)
    optimizer = build_ours(BlockwiseAdamMini, case)
    specs = [optimizer.binding_of(p).table.placements[0].spec for p in case.params]
    spans = {part.update.lr_multiplier for spec in specs for part in spec.parts}
    assert spans == {1.25, 1.0, 0.75, 0.5, 0.125}


# ----------------------------------------------------------------------------------- acceptance


def _rows(seconds: dict[str, float], size: str, layout: str) -> list[dict[str, str]]:
    """Rows of the CSV as if these times had been measured."""
    case = shapes.make_case("1M", layout, CPU)
    case.size = size
    families = {"adam-mini (published)": "Adam-mini", "BlockwiseAdamMini[cpp]": "Adam-mini"}
    contenders = []
    for name in seconds:
        family, backend = families.get(name, "AdamW"), "cpp" if "cpp" in name else ""
        bytes_ = 20 if family == "Adam-mini" else 28
        contenders.append(Contender(name, family, backend, "fp32", bytes_, 8, lambda case: None))
    timings = {name: probe.Timing(1, (time,) * 3) for name, time in seconds.items()}
    probes = {name: probe.Timing(1, (1e-3,)) for name in ("AdamW", "Adam-mini", "copy")}
    common = {
        **dict.fromkeys(PROVENANCE, "x"),
        "device": "cpu",
        "threads": "2",
        "probe": "sweeps",
        "l3_bytes": "1048576",
    }
    rows = tables.timed_rows(case, contenders, timings, probes, common)
    return rows + tables.missing_rows(case, [Missing("apex FusedAdam", "not here")], common)


GOOD = {
    "BlockwiseAdamMini[cpp]": 0.7,
    "BlockwiseAdamW[cpp]": 0.94,
    "DeepSpeedCPUAdam": 1.0,
    "torch AdamW fused": 1.1,
}


@pytest.mark.parametrize(
    ("change", "size", "failed"),
    [
        ({}, "67M", []),
        ({"BlockwiseAdamMini[cpp]": 0.73}, "67M", ["BlockwiseAdamMini[cpp]"]),
        ({"BlockwiseAdamW[cpp]": 0.96}, "67M", ["BlockwiseAdamW[cpp]"]),
        ({"torch AdamW fused": 0.98}, "67M", ["BlockwiseAdamW[cpp]"]),
        ({"BlockwiseAdamMini[cpp]": 0.99, "BlockwiseAdamW[cpp]": 0.99}, "1M", []),
        ({"BlockwiseAdamMini[cpp]": 1.01, "BlockwiseAdamW[cpp]": 0.99}, "5M", ["BlockwiseAdamMini[cpp]"]),
        ({"torch AdamW fused": 0.9}, "200M", ["BlockwiseAdamW[cpp]"]),
    ],
)
def test_acceptance_is_judged_by_the_issues_limits(change: dict[str, float], size: str, failed: list[str]) -> None:
    """A missed target would be printed as a pass; the faster of the two peers decides."""
    checks = tables.acceptance(_rows({**GOOD, **change}, size, "whole"))
    assert len(checks) == 2
    wanted = [f"{name} over the faster peer, {size}, whole tensors" for name in failed]
    assert [check.what for check in checks if not check.passed] == wanted
    assert all(str(check).startswith("PASS" if check.passed else "FAIL") for check in checks)


def test_acceptance_says_what_was_not_measured() -> None:
    """A target whose peer is missing would pass, or vanish."""
    seconds = {name: time for name, time in GOOD.items() if name != COMPILED}
    checks = tables.acceptance(_rows(seconds, "67M", "flat"))
    assert [check.passed for check in checks] == [None, None]
    assert all(str(check).endswith("not measured") for check in checks)
