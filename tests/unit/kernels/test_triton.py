# SPDX-License-Identifier: Apache-2.0
"""What is particular to the Triton backend: launches, uploads, host time, counts on the device, compiled code."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import inspect
import weakref
from dataclasses import replace

import pytest

from tests.helpers.counting import count_calls
from tests.helpers.kernel_cases import CASES, HYPER, LR, clone, compare, flat, item_of, spec, step, whole

triton_kernels = pytest.importorskip("ds_blockwise.kernels.triton.backend", reason="Triton is not installed")

from ds_blockwise.blocks.roles import Role  # noqa: E402
from ds_blockwise.blocks.segment_table import Placement, build_table  # noqa: E402
from ds_blockwise.kernels.triton import batch as triton_batch  # noqa: E402
from ds_blockwise.kernels.triton.batch import join_jobs  # noqa: E402
from ds_blockwise.kernels.triton.plan import make_plan  # noqa: E402
from ds_blockwise.kernels.triton.tables import (  # noqa: E402
    Address,
    Finish,
    Job,
    Multiplier,
    Scalar,
    Setting,
)

CPU = torch.device("cpu")
INTERPRETED = triton_kernels.unavailable(CPU) is None
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off (TRITON_INTERPRET=1)")


@pytest.fixture
def kernels():
    return triton_kernels.TritonKernels()


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched; nothing runs."""
    names = []
    monkeypatch.setattr(
        triton_kernels, "_launch", lambda kernel, programs, *a, **m: names.append(kernel.__name__) if programs else None
    )
    return names


def batches_of(kernels):
    return [batch for found in kernels.batches._of_plan.values() for batch in found.values()]


def items_of(cases, kernels, shared):
    return [clone(item_of(case, i, shared)[0], kernels) for i, case in enumerate(cases)]


def layer(dim=64):
    heads = {"num_heads": 4}
    roles = [(Role.QUERY, heads), (Role.KEY, heads), (Role.VALUE, {}), (Role.ATTN_OUT, {}), (Role.FFN, {})]
    return [whole(spec((dim, dim), role, **settings)) for role, settings in roles] + [whole(spec((dim,), Role.NORM))]


@pytest.mark.parametrize(("shared", "updates"), [(False, 1), (True, 3)])
def test_a_launch_for_each_form_whatever_the_number_of_tensors(kernels, launches, shared, updates):
    """AdamW: elements. Adam-mini: rows of 64, heads of 1024 elements, the norm's elements."""
    for count in (1, 5):
        launches.clear()
        kernels.step_(items_of(layer() * count, kernels, shared))
        assert launches == ["prepare_kernel", *["update_kernel"] * updates]


def test_large_and_split_blocks_add_two_launches(kernels, launches):
    kernels.step_(items_of(CASES["several pieces"](), kernels, True))
    assert launches == ["prepare_kernel", "sum_kernel", "finish_kernel", "update_kernel"]
    launches.clear()
    split = items_of([flat([spec((6, 50), Role.FFN)], 25, 260)], kernels, True)
    kernels.sum_split_blocks(split)
    kernels.step_(split)
    updates = ["update_kernel"] * 2  # whole rows, and the two that are split
    assert launches == ["sum_kernel", "finish_kernel", "prepare_kernel", "finish_kernel", *updates]


@pytest.mark.parametrize("shared", [False, True])
def test_nothing_is_sent_when_nothing_changed(kernels, launches, shared):
    items = items_of(layer(), kernels, shared)
    for _ in range(3):
        kernels.step_(items)
    (batch,) = batches_of(kernels)
    assert batch.uploads == 1
    items[0].hyper = replace(HYPER, lr=2 * LR)
    kernels.step_(items)
    assert batch.uploads == 2
    items[0].grad = items[0].grad.clone()
    kernels.step_(items)
    assert batch.uploads == 3


def test_a_learning_rate_on_the_device_is_read_there(kernels):
    rate = torch.tensor(LR, dtype=torch.float64)
    case = whole(spec((3, 9), Role.FFN))
    by_tensor, by_number = (items_of([case], kernels, True)[0] for _ in range(2))
    by_tensor.hyper = replace(HYPER, lr=rate)
    for lr in (LR, LR / 3):
        rate.fill_(lr)
        by_number.hyper = replace(HYPER, lr=lr)
        kernels.step_([by_tensor])
        kernels.step_([by_number])
        assert torch.equal(by_tensor.param, by_number.param)
    assert [batch.uploads for batch in kernels.batches._of_plan[by_tensor.plan].values()] == [1]


def test_a_learning_rate_of_another_dtype_is_refused(kernels):
    (item,) = items_of([whole(spec((3, 9), Role.FFN))], kernels, True)
    item.hyper = replace(HYPER, lr=torch.tensor(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"torch\.int64.*float32"):
        kernels.step_([item])


def test_the_step_is_counted_on_the_device_and_a_loaded_count_is_taken_over(kernels):
    (item,) = items_of([whole(spec((3, 9), Role.FFN))], kernels, True)
    for loaded in (0, 41, torch.tensor(6.0)):
        item.state["step"] = loaded
        kernels.step_([item])
        counted = item.state["step"]
        assert counted.dtype == torch.int64 and counted.numel() == 1 and int(counted) == int(loaded) + 1
        address = counted.data_ptr()
        kernels.step_([item])
        assert item.state["step"].data_ptr() == address and int(item.state["step"]) == int(loaded) + 2


def test_autograd_notices_the_change(kernels):
    (item,) = items_of([whole(spec((3, 9), Role.FFN))], kernels, True)
    before = item.param._version
    kernels.step_([item])
    assert item.param._version > before


def test_graphs_and_steps_outside_them_do_not_read_each_others_addresses(kernels, launches, monkeypatch):
    """Both use one table on the device: a replay must not step with an eager step's addresses, nor the reverse."""
    items = items_of(layer(), kernels, True)
    kernels.step_(items)
    (batch,) = batches_of(kernels)
    captured = batch.addresses.clone()
    capturing = [True]
    monkeypatch.setattr(triton_batch, "_capturing", lambda device: capturing[0])
    kernels.step_(items)
    assert batch.uploads == 2, "a capture records an upload of its own"
    kernels.step_(items)
    assert batch.uploads == 3, "of the same buffer where nothing moved"
    ((sent, _),) = batch._captured
    items[0].grad = items[0].grad.clone()
    with pytest.raises(RuntimeError, match="Run one step outside of "):
        kernels.step_(items)
    capturing[0] = False
    kernels.step_(items)
    assert not torch.equal(batch.addresses, captured)
    assert torch.equal(sent[: len(captured)], captured), "what replays send must stay as it was"
    before = batch.uploads
    kernels.step_(items)
    assert batch.uploads == before + 1, "a replay may have been in between"
    read_by_graph = weakref.ref(batch)
    del batch, items
    assert read_by_graph() is not None, "a graph still reads it"


@pytest.fixture
def built(monkeypatch):
    """Weak references to the batches built so far."""
    found = []

    class Counted(triton_batch.Batch):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            found.append(weakref.ref(self))

    monkeypatch.setattr(triton_batch, "Batch", Counted)
    return found


def test_groups_stepped_in_turn_are_built_once_and_go_with_their_tensors(kernels, launches, built):
    """ZeRO-3 steps its sub-groups one after the other, and a layer-wise host its layers: any number of them."""
    cut = flat([spec((6, 50), Role.FFN)], 25, 260)
    groups = [items_of([cut, *layer(8)[:2]], kernels, True) for _ in range(40)]

    def step_all():
        for items in groups:
            kernels.sum_split_blocks(items[:1])
            kernels.step_(items)

    step_all()
    assert len(built) == 80, "one for the sums and one for the update of each group"
    step_all()
    step_all()
    assert len(built) == 80
    groups[0][1] = items_of(layer(8)[:1], kernels, True)[0]  # bound anew: under other multipliers, say
    step_all()
    assert len(built) == 81
    groups.clear()
    assert not [batch for batch in built if batch() is not None], "batches outlive their tensors"


def test_calls_with_other_tensors_every_time_do_not_pile_up(kernels, launches, built):
    """Experts without tokens have no gradient: a step may leave any of them out."""
    items = items_of(layer(8) * 6, kernels, True)
    for left_out in range(1, len(items)):
        kernels.step_([item for index, item in enumerate(items) if index != left_out])
    assert len(built) == len(items) - 1 > kernels.batches.PER_PLAN
    assert len(batches_of(kernels)) == kernels.batches.PER_PLAN


def test_a_step_makes_few_python_calls_per_tensor(kernels, launches):
    """220 tensors are a LLaMA of 2B, and a GPU would wait for Python. About 15 calls a tensor were counted."""
    items = items_of([whole(spec((4, 8), Role.FFN)) for _ in range(220)], kernels, True)
    kernels.step_(items)
    assert count_calls(lambda: kernels.step_(items)) < 30 * len(items)
    one = items[:1]
    kernels.step_(one)
    assert count_calls(lambda: kernels.step_(one)) < 100


def test_tables_of_two_billion_parameters_are_built_by_a_loop_over_runs():
    """32 layers of 2304 x 2304 and 2304 x 6144, 32000 tokens: 2.2e9 elements as one flat tensor."""
    dim, ffn, specs = 2304, 6144, [spec((32000, 2304), Role.EMBEDDING)]
    for _ in range(32):
        specs += [spec((dim, dim), role, num_heads=18) for role in (Role.QUERY, Role.KEY)]
        specs += [spec((dim, dim), role) for role in (Role.VALUE, Role.ATTN_OUT)]
        specs += [spec((ffn, dim), Role.FFN), spec((ffn, dim), Role.FFN), spec((dim, ffn), Role.FFN)]
        specs += [spec((dim,), Role.NORM)] * 2
    at, placements = 0, []
    for s in specs:
        placements.append(Placement(s, None, at, 0, s.numel))
        at += s.numel
    table = build_table(at, placements, shares_second_moment=True)
    made = []

    def build():
        plan = make_plan(table)
        made.append(join_jobs([plan.jobs], [plan.tiles], [len(plan.rows)], None, CPU))

    calls = count_calls(build)
    tiles = sum(program.tiles.numel() for program in made[0])
    assert 2e9 < at and table.num_blocks > 500_000 and 300_000 < tiles < 1_000_000
    assert calls < 200 * len(table.runs) < 0.2 * table.num_blocks


@pytest.mark.parametrize("table", [Job, Address, Setting, Multiplier, Scalar, Finish])
def test_columns_are_numbered_from_zero(table):
    """Records are written column by column; a gap or a double number would shift what kernels read."""
    assert [column.value for column in table] == list(range(len(table)))


@pytest.mark.parametrize("name", ["prepare_kernel", "sum_kernel", "finish_kernel", "update_kernel"])
def test_cached_kernels_of_other_tables_are_not_taken(name):
    """Triton's cache on disk outlives an update of this package, and its key lacks the constants before Triton 3.6."""
    assert "VERSION" in inspect.signature(getattr(triton_kernels, name).fn).parameters


def test_both_alignments_are_stepped_in_one_call(kernels):
    compare(kernels, [*CASES["odd rows"]()[:3], *CASES["storage offsets"]()[:2]], True)


def test_a_step_of_split_blocks_takes_the_completed_sums(kernels):
    case = flat([spec((6, 50), Role.FFN)], 25, 260)
    mine, peers = item_of(case, 0, True)
    item = clone(mine, kernels)
    step(kernels, [item], [peers])
    first, numel = item.table.dp_slots[0], item.table.slot_numel
    expected = 0.95 * mine.state["exp_avg_sq"][first] + 0.05 * item.sums[first] / numel[first]
    torch.testing.assert_close(item.state["exp_avg_sq"][first].double(), expected.double(), rtol=1e-6, atol=0)
