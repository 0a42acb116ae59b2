# SPDX-License-Identifier: Apache-2.0
"""The planner's arithmetic, checked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ds_blockwise.runs.check import check_run_file
from ds_blockwise.runs.model_shape import GPTShape
from ds_blockwise.runs.plan import GPUS, computed_again, flops_per_token, make_plan, traffic
from ds_blockwise.runs.plan_memory import Arrangement, RankCounts, memory_of
from ds_blockwise.runs.plan_muon import MatrixKind, muon_costs
from tests.helpers import ROOT

FOLDER = ROOT / "configs" / "run" / "llama_2b"


def test_flops_by_hand() -> None:
    """6 per multiplying parameter and 12 L h s; an untied embedding multiplies nothing."""
    shape = GPTShape.load(ROOT / "configs" / "model" / "llama_2b.yaml")
    multiplying = 1_935_362_560 - 50_304 * 2560
    attention = 12 * 16 * 2560 * shape.sequence_length
    assert flops_per_token(shape) == 6 * multiplying + attention
    assert computed_again(shape, "none") == 0
    assert computed_again(shape, "selective") == attention / 3
    assert computed_again(shape, "full") == pytest.approx(flops_per_token(shape) / 3)


def test_traffic_by_hand() -> None:
    """A ring sends (N-1)/N of the weights' bytes for a reduction and again for a gathering."""
    held, shape = RankCounts(1000, 10), GPTShape(3, 64, 160, 4, 2, 16, 512, 32)
    weights = 1000 * 2
    for stage, times in ((0, 2), (1, 2), (2, 4 + 1), (3, 4 + 8)):
        data, tensor = traffic(shape, held, Arrangement(dp=8, zero_stage=stage), 2, 4)
        assert data == pytest.approx(weights * 7 / 8 * times)
        assert tensor == 0
    _, tensor = traffic(shape, held, Arrangement(tp=2, dp=4, zero_stage=1), 2, 4)
    assert tensor == 4 * 3 * 4 * (2 * 32 * 64 * 2) * 2 * 1 / 2


def test_a_larger_micro_batch_is_found_only_if_it_fits() -> None:
    """The largest micro batch divides a rank's share, and the next one would not fit."""
    run, _ = check_run_file(FOLDER / "nodes_1.yaml")
    assert run is not None
    held = RankCounts(1_935_362_560, 636_288)
    plan = make_plan(run, held, 1, 8, "h100-80g")
    usable = 0.92 * GPUS["h100-80g"].memory
    arrangement = Arrangement(dp=8, zero_stage=1, bucket_elements=100_000_000)
    sizes = {
        m: memory_of(run.shape, held, arrangement, "BlockwiseAdamMini", m, "selective").on_gpu
        for m in (1, 2, 4, 8, 16, 32, 64)
    }
    assert plan.largest_micro_batch == max(m for m, size in sizes.items() if size <= usable)
    small = make_plan(run, held, 1, 8, "a100-40g")
    assert small.largest_micro_batch < plan.largest_micro_batch


@pytest.mark.parametrize(("name", "bytes_"), [("BlockwiseAdamW", 28), ("BlockwiseAdamMini", 20), ("BlockwiseLion", 20)])
def test_an_update_takes_what_its_kernel_moves(name: str, bytes_: int) -> None:
    """Parameter and moments are read and written, the gradient is read; fp32."""
    run, _ = check_run_file(FOLDER / "nodes_1.yaml")
    assert run is not None
    deepspeed = {**run.deepspeed, "optimizer": {**run.deepspeed["optimizer"], "type": name}}
    plan = make_plan(replace(run, deepspeed=deepspeed), RankCounts(1_935_362_560, 636_288), 1, 8, "h100-80g")
    own = bytes_ * 1_935_362_560 / 8
    assert plan.optimizer_seconds[name] == pytest.approx(own / (0.8 * GPUS["h100-80g"].bandwidth))


def test_muons_matrices_by_hand() -> None:
    """Newton-Schulz of m x n, m the smaller: five times 2mmn for x x^T, 2mmm for its square, 2mmn for their product."""
    wide, split = MatrixKind(10, 40, 6, False), MatrixKind(40, 20, 2, True)
    flops = 5 * 6 * (4 * 100 * 40 + 2 * 1000) + 5 * 2 * (4 * 400 * 40 + 2 * 8000)
    given = {"local_parameters": 4000, "step_flops": 1e9}
    here = muon_costs([wide, split], {}, tp=1, dp=1, zero_stage=0, **given)
    assert (here.dp_bytes, here.tp_bytes, here.flops) == (0, 0, flops)
    assert here.transient_bytes == 5 * 4 * 800 and here.share_of_step == flops / 1e9
    # ZeRO 3: 4000 elements, an eighth of them here, of which 7/8 leave, there and back, as fp32
    three = muon_costs([wide, split], {}, tp=1, dp=8, zero_stage=3, **given)
    assert three.dp_bytes == 2 * 4 * 4000 / 8 * 7 / 8 and three.tp_bytes == 0 and three.owners == 8
    assert three.flops == max(flops / 8, split.flops) == split.flops, "nobody does less than one matrix"
    of_two = muon_costs([wide, split], {}, tp=1, dp=2, zero_stage=3, **given)
    assert of_two.flops == flops / 2
    # a bucket holds what arrives of all, or what is set, but at least the largest matrix
    assert of_two.transient_bytes == 5 * 4 * 800 + 2 * 4 * 4000 / 2 / 2
    small = muon_costs([wide, split], {"bucket_bytes": 100}, tp=1, dp=2, zero_stage=3, **given)
    assert small.transient_bytes == 5 * 4 * 800 + 2 * 3200
    # ZeRO 1: a window of 500 elements cuts one of 400 with probability 4/5, one of 800 always
    one = muon_costs([wide, split], {}, tp=1, dp=8, zero_stage=1, **given)
    assert one.dp_bytes == pytest.approx(2 * 4 * (6 * 400 * 0.8 + 2 * 800) / 8)
    # two tensor-parallel ranks: half of each split matrix leaves
    two = muon_costs([wide, split], {}, tp=2, dp=8, zero_stage=3, **given)
    assert two.tp_bytes == 2 * 4 * 2 * 800 / 16 / 2 and two.dp_bytes == three.dp_bytes / 2
    assert two.owners == 8
