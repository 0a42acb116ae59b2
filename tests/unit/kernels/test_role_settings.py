# SPDX-License-Identifier: Apache-2.0
"""Betas per block type, cautious weight decay and moving multipliers in every backend, on flat partitions.

The partitions of all ranks are stepped in this process and put together again. The oracle knows the whole tensors only.
"""

import itertools
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dataclasses import replace

import pytest

from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.segment_table import build_table
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.spec import apply_settings
from ds_blockwise.blocks.structure import HeadGeometry, fused_qkv, whole_tensor
from ds_blockwise.kernels.base import Hyper, Item, ReferenceKernels
from ds_blockwise.kernels.select import kernels_for
from tests.helpers import oracle as independent
from tests.helpers.kernel_cases import CASES, compare, placements_of
from tests.helpers.oracle import Oracle, assert_same_update
from tests.helpers.tables.oracle_names import ROLE, Classified, Span

CPU = torch.device("cpu")
LR, FLOOR = 1e-2, 0.0
SHAPES = {
    "one": (1, 1),
    "emb": (9, 10),
    "qkv": (32, 12),
    "bias": (20,),
    "norm": (33,),
    "ffn": (7, 600),
    "vo": (6, 10),
    "large": (3, 20_003),
}
CLASSES = {
    "one": Classified((Span(0, 1, "ffn", 1),)),
    "emb": Classified((Span(0, 9, "embedding", 1),)),
    "qkv": Classified(
        tuple(
            Span(at + start, at + end, role, size)
            for at in (0, 16)
            for start, end, role, size in ((0, 8, "query", 4), (8, 12, "key", 4), (12, 16, "value", 1))
        )
    ),
    "bias": Classified((Span(0, 20, "ffn", 0),)),
    "norm": Classified((Span(0, 33, "norm", 0),)),
    "ffn": Classified((Span(0, 7, "ffn", 1),)),
    "vo": Classified((Span(0, 6, "attn_out", 1),)),
    "large": Classified((Span(0, 3, "value", ROLE),)),
}
CUTS = (0, 1, 1, 37, 300, 1001, 4096, 25_000)  # one rank holds a single element, another one nothing
SETTINGS = {
    "betas": {"betas_by_type": {"norm": (0.8, 0.99), "ffn": (None, 0.9), "key": (0.5, None), "emb": (0.1, 0.5)}},
    "cautious": {"cautious": True},
    "moving": {"lr_multipliers": {"norm": 1.0, "key": 8.0}, "end_multipliers": {"norm": 0.25, "key": 12.0}},
}
SETTINGS["all"] = {key: value for settings in SETTINGS.values() for key, value in settings.items()}


def specs_of(settings):
    ends = settings.get("end_multipliers", {})
    moving = {key: {"start": start, "end": ends[key]} for key, start in settings.get("lr_multipliers", {}).items()}
    decay = {"vo": 0.0, "norm": 0.5}
    chosen = BlockSettings.parse(moving, decay, {"value": "row"}, betas_by_type=settings.get("betas_by_type"))
    pooled = replace(chosen, granularity={"value": "tensor"})
    roles = {"one": Role.FFN, "emb": Role.EMBEDDING, "bias": Role.FFN, "norm": Role.NORM, "ffn": Role.FFN}
    roles |= {"vo": Role.ATTN_OUT, "large": Role.VALUE}
    structures = {name: whole_tensor(name, SHAPES[name], role, is_bias=name == "bias") for name, role in roles.items()}
    structures["qkv"] = fused_qkv("qkv", SHAPES["qkv"], "grouped", HeadGeometry(4, 2, 4, "test"), is_bias=False, axis=0)
    return [apply_settings(structures[name], pooled if name == "large" else chosen) for name in SHAPES]


def split(flat):
    parts = flat.split([torch.Size(shape).numel() for shape in SHAPES.values()])
    return {name: part.view(shape).clone() for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}


def rank_items(kernels, specs, shared, param, dtype):
    """What each rank steps: a table over its range of the flat tensor, and its copy of the elements."""
    items, bounds = [], [*CUTS, param.numel()]
    for start, end in itertools.pairwise(bounds):
        table = build_table(end - start, placements_of(specs, start, end, bounds[1:-1]), shares_second_moment=shared)
        size = table.num_blocks if shared else table.numel
        state = {
            "step": 0,
            "exp_avg": torch.zeros(end - start, dtype=dtype),
            "exp_avg_sq": torch.zeros(size, dtype=dtype),
        }
        items.append(Item(table, kernels.plan(table, CPU), param[start:end].clone(), state, None))
    return items, bounds


def step_all(kernels, items):
    split_items = [item for item in items if item.table.has_split_blocks]
    if split_items:
        kernels.sum_split_blocks(split_items)
        total = sum(item.sums[item.table.dp_slots] for item in split_items)
        for item in split_items:
            item.sums[item.table.dp_slots] = total
    kernels.step_(items)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["AdamW", "AdamMini"])
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_partitions_are_stepped_as_the_whole_tensors(backend, shared, dtype, name):
    """Each run of elements has its own row of settings: a wrong row, or one for all, shows as a wrong update."""
    settings = SETTINGS[name]
    kernels = kernels_for(backend, CPU)
    generator = torch.Generator().manual_seed(5)
    specs = specs_of(settings)
    numel = sum(s.numel for s in specs)
    param = (torch.randn(numel, generator=generator, dtype=torch.float64) * 0.02).to(dtype)
    items, bounds = rank_items(kernels, specs, shared, param, dtype)
    hyper = independent.Hyper(LR, (0.9, 0.95), 1e-6, 0.1)
    oracle = Oracle(split(param), CLASSES, shared, hyper, weight_decay_multipliers={"vo": 0.0, "norm": 0.5}, **settings)
    for progress in (0.0, 0.3, 1.0):
        grad = torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype)
        cautious = settings.get("cautious", False)
        for item, start, end in zip(items, bounds[:-1], bounds[1:], strict=True):
            item.grad = grad[start:end].clone()
            item.hyper = Hyper(LR, FLOOR, 0.9, 0.95, 1e-6, 0.1, progress, cautious)
        was, before = oracle.weights(), torch.cat([item.param for item in items])
        step_all(kernels, items)
        oracle.progress = progress
        oracle.step(split(grad))
        after = torch.cat([item.param for item in items])
        exact = dtype == torch.float64
        assert_same_update(
            (split(before), split(after)),
            (was, oracle.weights()),
            LR,
            tolerance=1e-11 if exact else 1e-6,
            weight_roundings=0 if exact else 2,
            what=f"progress {progress}",
        )


EVERY_SHAPE = (
    "scalar",
    "odd rows",
    "heads",
    "fused",
    "transposed",
    "bias and norm",
    "flat",
    "row-parallel",
    "dtypes",
)


@pytest.mark.parametrize("shared", [False, True], ids=["AdamW", "AdamMini"])
@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("name", EVERY_SHAPE)
def test_cautious_weight_decay_on_every_shape_and_dtype(backend, name, shared):
    cases = [replace(case, hyper=replace(case.hyper, cautious=True)) for case in CASES[name]()]
    compare(kernels_for(backend, CPU), cases, shared)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_only_elements_that_the_update_moves_away_from_zero_are_spared(backend):
    """arXiv 2510.12402, algorithm 1. An element whose first moment is 0 is decayed, however small others are."""
    spec = apply_settings(whole_tensor("w", (6,), Role.NORM, is_bias=False), BlockSettings.parse("uniform"))
    table = build_table(6, placements_of([spec], 0, 6, ()), shares_second_moment=False)
    kernels = kernels_for(backend, CPU)
    param = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    grad = torch.tensor([1e-30, 0.0, -1e-30, 1e-30, 0.0, -1e-30])  # their products with parameters of 1e-20 vanish
    state = {"step": 0, "exp_avg": torch.zeros(6), "exp_avg_sq": torch.zeros(6)}
    hyper = Hyper(1e-3, 0.0, 0.9, 0.95, 1.0, 100.0, cautious=True)
    kernels.step_([Item(table, kernels.plan(table, CPU), param, state, hyper, grad)])
    decayed = 1 - 1e-3 * 100.0
    torch.testing.assert_close(param, torch.tensor([decayed, decayed, 1.0, -1.0, -decayed, -decayed]))


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_a_step_without_these_settings_is_bitwise_one_with_neutral_ones(backend):
    """Rows that repeat the group's betas, and a change of 0, must give the bits of rows without."""
    kernels = kernels_for(backend, CPU)
    results = []
    for betas in (None, {"ffn": (0.9, 0.95), "norm": (0.9, None)}):
        generator = torch.Generator().manual_seed(1)
        specs = specs_of({} if betas is None else {"betas_by_type": betas})
        param = torch.randn(sum(s.numel for s in specs), generator=generator)
        items, bounds = rank_items(kernels, specs, True, param, torch.float32)
        for _ in range(2):
            grad = torch.randn(param.numel(), generator=generator)
            for item, start, end in zip(items, bounds[:-1], bounds[1:], strict=True):
                item.grad, item.hyper = grad[start:end].clone(), Hyper(LR, FLOOR, 0.9, 0.95, 1e-6, 0.1)
            step_all(kernels, items)
        results.append(torch.cat([item.param for item in items]))
    assert torch.equal(*results)


def test_the_reference_knows_when_all_betas_are_the_groups() -> None:
    specs = specs_of({})
    table = build_table(sum(s.numel for s in specs), placements_of(specs, 0, 10_000, ()), shares_second_moment=True)
    assert len(table.beta_groups) == 1 and table.beta_groups[0].elements == slice(None)
    assert isinstance(kernels_for("reference", CPU), ReferenceKernels)
