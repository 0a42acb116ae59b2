# SPDX-License-Identifier: Apache-2.0
"""Which elements of which parameters DeepSpeed's wrappers step, on lists like theirs and every element numbered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from ds_blockwise import tag_parameters
from ds_blockwise.blocks.segment_table import Placement
from ds_blockwise.hosts.stepped_tensors import Stepped, window

pytest.importorskip("deepspeed", reason="needs deepspeed")

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ds_blockwise.hosts.deepspeed.partitions import stepped_tensors, zero_window
from ds_blockwise.hosts.deepspeed.releases import offsets_of

SHAPES = {"first": (5, 2), "second": (7,), "third": (2, 2), "last": (1,)}  # 22 elements
PADDING = -1.0


def numbered(shapes: dict[str, tuple[int, ...]]) -> list[nn.Parameter]:
    """Tagged parameters whose elements have the numbers of their places in all of them together."""
    model, at = nn.ParameterDict(), 0
    for name, shape in shapes.items():
        values = torch.arange(at, at + torch.Size(shape).numel(), dtype=torch.float32)
        model[name] = nn.Parameter(values.reshape(shape))
        at += values.numel()
    tag_parameters(model, rules=[{"match": ".", "role": "other"}])
    return list(model.parameters())


def flat_of(params: Sequence[nn.Parameter], size: int) -> torch.Tensor:
    flat = torch.cat([param.detach().reshape(-1) for param in params])
    return torch.cat([flat, torch.full((size - flat.numel(),), PADDING)])


@contextmanager
def rank_of(rank: int, world_size: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def stepped_by(kind: type, lists: dict[str, Any], rank: int = 0, world_size: int = 1) -> list[Stepped]:
    """What a rank steps with a wrapper that has these lists."""
    wrapper = kind.__new__(kind)
    vars(wrapper).update(lists)
    engine = SimpleNamespace(optimizer=wrapper, basic_optimizer=SimpleNamespace(param_groups=[]))
    with rank_of(rank, world_size):
        return list(stepped_tensors(engine, engine.basic_optimizer))


def assert_placed(tensor: torch.Tensor, placements: Sequence[Placement], params: Sequence[nn.Parameter]) -> None:
    """Each placement points at its parameter's own numbers, and together they hold every number in the tensor once."""
    by_name = {param.block_spec.fqn: param.detach().reshape(-1) for param in params}
    assert [p.spec.fqn for p in placements] == list(by_name)
    held = []
    for p in placements:
        found = tensor[p.flat_start : p.flat_start + p.numel]
        assert torch.equal(found, by_name[p.spec.fqn][p.param_start : p.param_start + p.numel])
        held += found.tolist()
    assert held == [number for number in tensor.tolist() if number != PADDING]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 12, 30])
def test_windows_of_a_flat_buffer(world_size: int) -> None:
    """Every element is stepped by one rank, and each rank knows where the others' parts of a parameter begin."""
    params = numbered(SHAPES)
    size = 2 * -(-22 // (2 * world_size))
    flat = flat_of(params, size * world_size)
    owner = {number: index // size for index, number in enumerate(flat.tolist())}
    for rank in range(world_size):
        placements = zero_window(params, offsets_of(params), rank, world_size, size)
        assert_placed(flat[rank * size : (rank + 1) * size], placements, params)
        for param, placement in zip(params, placements, strict=True):
            numbers = param.detach().reshape(-1).tolist()
            changes = [i for i in range(1, len(numbers)) if owner[numbers[i]] != owner[numbers[i - 1]]]
            assert list(placement.cuts) == changes


def test_a_window_in_the_padding_holds_nothing() -> None:
    """More ranks than elements: the range is empty, but a window of the next parameter must not be taken for it."""
    start, stop, cuts = window(offset=3, numel=4, rank=5, world_size=6, size=2)
    assert start >= stop
    assert cuts == (1, 3)


@pytest.mark.parametrize("rank", [0, 1])
def test_zero_1_and_2_in_the_order_of_the_flat_buffer(rank: int) -> None:
    """With round_robin_gradients DeepSpeed's other list, in the user's order, names the wrong parameters."""
    users = numbered(SHAPES)
    params = [users[i] for i in (2, 0, 3, 1)]
    flat = flat_of(params, 24)
    for param, offset in zip(params, offsets_of(params), strict=True):
        param.data = flat[offset : offset + param.numel()].view(param.shape)
    lists = {
        "bit16_groups": [users],
        "round_robin_bit16_groups": [params],
        "round_robin_bit16_offsets": [offsets_of(params)],
        "bit16_groups_flat": [flat],
        "single_partition_of_fp32_groups": [flat[12 * rank : 12 * (rank + 1)]],
        "partition_size": [12],
        "real_dp_process_group": [None],
    }
    (stepped,) = stepped_by(DeepSpeedZeroOptimizer, lists, rank, 2)
    assert stepped.tensor is lists["single_partition_of_fp32_groups"][0]
    assert_placed(stepped.tensor, stepped.placements, params)
    del lists["round_robin_bit16_offsets"]  # older versions
    (older,) = stepped_by(DeepSpeedZeroOptimizer, lists, rank, 2)
    assert older.placements == stepped.placements


def test_zero_1_and_2_that_lie_elsewhere_are_refused() -> None:
    """The buffer itself tells where parameters are; lists of another version would step them into each other."""
    params = numbered(SHAPES)
    flat = flat_of(params, 22)
    for param, offset in zip(params, offsets_of(params), strict=True):
        param.data = flat[offset : offset + param.numel()].view(param.shape)
    lists = {
        "round_robin_bit16_groups": [params],
        "round_robin_bit16_offsets": [[0, 12, 19, 23]],
        "bit16_groups_flat": [flat],
        "single_partition_of_fp32_groups": [flat],
        "partition_size": [22],
        "real_dp_process_group": [None],
    }
    with pytest.raises(ValueError, match="'second' at offset 10 of its flat buffer, not at 12"):
        stepped_by(DeepSpeedZeroOptimizer, lists)


@pytest.mark.parametrize("rank", range(3))
def test_bf16_optimizer(rank: int) -> None:
    """Padding lies at the end of the group alone."""
    params = numbered(SHAPES)
    part = flat_of(params, 24)[8 * rank : 8 * (rank + 1)]
    lists = {"bf16_groups": [params], "fp32_groups_flat_partition": [part], "real_dp_process_group": [None]}
    (stepped,) = stepped_by(BF16_Optimizer, lists, rank, 3)
    assert_placed(part, stepped.placements, params)


def pieces(params: Sequence[nn.Parameter], rank: int, world_size: int) -> tuple[list[Any], torch.Tensor]:
    """Parameters as zero.Init leaves them, and one rank's piece of each, one after the other."""
    partitioned, held = [], []
    for param in params:
        numel = -(-param.numel() // world_size)
        held.append(flat_of([param], numel * world_size)[rank * numel : (rank + 1) * numel])
        facts = {"ds_numel": param.numel(), "partition_numel": lambda numel=numel: numel}
        partitioned.append(SimpleNamespace(**facts, block_spec=param.block_spec, block_shard=None))
    return partitioned, torch.cat(held)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 3), (1, 3), (2, 3), (8, 12), (11, 12)])
def test_zero_3_in_sub_groups(rank: int, world_size: int) -> None:
    """A piece of every parameter, padded by itself; ranks beyond a small parameter hold nothing of it."""
    params = numbered(SHAPES)
    groups = [params[:1], params[1:]]
    made = [pieces(group, rank, world_size) for group in groups]
    lists = {
        "fp16_groups": [partitioned for partitioned, _ in made],
        "fp32_partitioned_groups_flat": [flat for _, flat in made],
        "dp_process_group": None,
    }
    stepped = stepped_by(DeepSpeedZeroOptimizer_Stage3, lists, rank, world_size)
    for item, group in zip(stepped, groups, strict=True):
        assert_placed(item.tensor, item.placements, group)
        for placement, param in zip(item.placements, group, strict=True):
            piece = -(-param.numel() // world_size)
            assert list(placement.cuts) == list(range(piece, param.numel(), piece))


def test_zero_3_that_is_stored_in_another_way_is_refused() -> None:
    """Swapped out to NVMe the tensor is empty: nothing in it could be stepped."""
    partitioned, flat = pieces(numbered(SHAPES), 0, 2)
    lists = {"fp16_groups": [partitioned], "fp32_partitioned_groups_flat": [flat[:0]], "dp_process_group": None}
    with pytest.raises(ValueError, match="has 0 elements but its parameters' partitions 12"):
        stepped_by(DeepSpeedZeroOptimizer_Stage3, lists, 0, 2)
    partitioned[0].ds_process_group = "another group"
    with pytest.raises(ValueError, match="mixes parameters of 2 process groups"):
        stepped_by(DeepSpeedZeroOptimizer_Stage3, lists, 0, 2)


def test_whole_parameters() -> None:
    """Without ZeRO each parameter, or its fp32 copy, is stepped by itself."""
    params = numbered(SHAPES)
    masters = [param.detach().clone() for param in params]
    lists = {"fp16_groups": [params[:3], params[3:]], "fp32_groups": [masters[:3], masters[3:]]}
    stepped = stepped_by(FP16_UnfusedOptimizer, lists)
    assert [item.tensor.data_ptr() for item in stepped] == [master.data_ptr() for master in masters]
    basic = SimpleNamespace(param_groups=[{"params": params[:1]}, {"params": params[1:]}])
    alone = list(stepped_tensors(SimpleNamespace(optimizer=basic, basic_optimizer=basic), basic))
    assert [item.tensor for item in alone] == params
    for item, param in zip([*stepped, *alone], [*params, *params], strict=True):
        assert_placed(item.tensor.detach().reshape(-1), item.placements, [param])
        assert item.dp_group is None


def test_a_wrapper_of_a_later_version_is_refused() -> None:
    """Guessing what lies in its tensors would train something else."""
    with pytest.raises(ValueError, match="wraps the optimizer in SimpleNamespace, which ds_blockwise does not know"):
        stepped_by(SimpleNamespace, {})
