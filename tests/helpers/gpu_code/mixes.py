# SPDX-License-Identifier: Apache-2.0
"""The tensors of real models as a step sees them: their tables are real, their memory is never touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.segment_table import Placement, build_table, whole_placement
from ds_blockwise.blocks.settings.update_settings import UpdateSettings
from ds_blockwise.blocks.spec import BlockSpec, apply_settings
from ds_blockwise.blocks.structure import HeadGeometry, fused_qkv
from ds_blockwise.kernels.base import Item, Kernels
from ds_blockwise.kernels.triton.plan import make_plan
from tests.helpers.kernel_cases import BF16, BLOCK_SETTINGS, F32, HYPER, SCALE, placements_of, spec

#: names of the tensors of an item, in the order in which `item` takes their distances from an aligned address
TENSORS = ("param", "grad", "exp_avg", "exp_avg_sq", "param_copy")


def llama(hidden: int = 2560, ffn: int = 10240, heads: int = 20, layers: int = 16) -> list[BlockSpec]:
    """Separate Q, K, V, gate and up, as Hugging Face has them; by default configs/model/llama_2b.yaml."""
    return [
        spec((50304, hidden), Role.EMBEDDING),
        *_layer(hidden, heads, [spec((ffn, hidden), Role.FFN)] * 2 + [spec((hidden, ffn), Role.FFN)]) * layers,
        spec((hidden,), Role.NORM),
        spec((50304, hidden), Role.OUTPUT),
    ]


def _layer(hidden: int, heads: int, ffn: list[BlockSpec]) -> list[BlockSpec]:
    attention = [spec((hidden, hidden), role, num_heads=heads) for role in (Role.QUERY, Role.KEY)]
    attention += [spec((hidden, hidden), role) for role in (Role.VALUE, Role.ATTN_OUT)]
    return [*attention, *ffn, *[spec((hidden,), Role.NORM)] * 2]


def gpt2_medium() -> list[BlockSpec]:
    """Hugging Face's GPT-2: transposed weights (Conv1D), Q, K and V in one, biases; configs/model/gpt2_medium.yaml."""
    hidden, heads = 1024, HeadGeometry(16, 16, 64, "gpt2_medium.yaml")
    layer = [
        apply_settings(
            fused_qkv("c_attn", shape, "concat", heads, is_bias=len(shape) == 1, axis=len(shape) - 1), BLOCK_SETTINGS
        )
        for shape in ((hidden, 3 * hidden), (3 * hidden,))
    ]
    for fan_in, fan_out, role in (
        (hidden, hidden, Role.ATTN_OUT),
        (hidden, 4 * hidden, Role.FFN),
        (4 * hidden, hidden, Role.FFN),
    ):
        layer += [spec((fan_in, fan_out), role, axis=1), spec((fan_out,), role, is_bias=True)]
    layer += [spec((hidden,), Role.NORM), spec((hidden,), Role.NORM, is_bias=True)] * 2
    return [spec((50304, hidden), Role.EMBEDDING), spec((1024, hidden), Role.EMBEDDING), *layer * 24]


def moe() -> list[BlockSpec]:
    """A layer of eight experts, Mixtral's shapes: rows of 4096 and of 14336, a router."""
    hidden, ffn = 4096, 14336
    expert = [spec((ffn, hidden), Role.FFN)] * 2 + [spec((hidden, ffn), Role.FFN)]
    return _layer(hidden, 32, [spec((8, hidden), Role.ROUTER), *expert * 8])


def lora() -> list[BlockSpec]:
    """Adapters of rank 16 on every matrix of a layer of 4096."""
    hidden, ffn, rank = 4096, 11008, 16
    shapes = [(hidden, hidden)] * 4 + [(ffn, hidden)] * 2 + [(hidden, ffn)]
    pairs = [[spec((rank, fan_in), Role.FFN), spec((fan_out, rank), Role.FFN)] for fan_out, fan_in in shapes]
    return [one for pair in pairs for one in pair]


def whole(specs: Sequence[BlockSpec], *, shared: bool, **memory: object) -> list[Item]:
    """A tensor for each parameter."""
    return [item(s.numel, (whole_placement(s, None),), shared=shared, **memory) for s in specs]


def shard(specs: Sequence[BlockSpec], *, shared: bool, ranks: int = 8, **memory: object) -> list[Item]:
    """The flat partition of the second of several ZeRO ranks: it begins and ends inside a block."""
    size = -(-sum(s.numel for s in specs) // ranks)
    placements = placements_of(specs, size, 2 * size, [rank * size for rank in range(1, ranks)])
    return [item(size, placements, shared=shared, **memory)]


def item(
    numel: int,
    placements: tuple[Placement, ...],
    *,
    shared: bool,
    grad: torch.dtype = F32,
    copy: torch.dtype | None = None,
    exp_avg: torch.dtype = F32,
    off: Sequence[int] = (0, 0, 0, 0, 0),
    cautious: bool = False,
    grad_scale: float | None = None,
    lion: bool = False,
) -> Item:
    """A tensor in fp32 with this content.

    Args:
        numel: its elements.
        placements: what lies in it.
        shared: whether blocks share second moments.
        grad: dtype of the gradient.
        copy: dtype of the 16-bit copy.
        exp_avg: dtype of the first moment.
        off: elements between an aligned address and each of `TENSORS`.
        cautious: whether weight decay is.
        grad_scale: what gradients are multiplied by where they are read.
        lion: whether there is no second moment.
    """
    table = build_table(numel, placements, shares_second_moment=shared)
    sizes = (numel, numel, numel, table.num_blocks if shared else numel, numel)
    dtypes = (F32, grad, exp_avg, F32, copy)
    memory = [None if d is None else _untouched(d, n, at) for d, n, at in zip(dtypes, sizes, off, strict=True)]
    param, gradient, first, second, copied = memory
    state = {"step": torch.zeros((), dtype=torch.int64), "exp_avg": first}
    if not lion:
        state["exp_avg_sq"] = second
    hyper = replace(HYPER, cautious=cautious)
    return Item(table, make_plan(table), param, state, hyper, gradient, None, copied, grad_scale=grad_scale)


def _untouched(dtype: torch.dtype, numel: int, at: int) -> torch.Tensor:
    return torch.zeros(at + 1, dtype=dtype)[at:].expand(numel)


FUSED: dict[str, Any] = {"grad": BF16, "copy": BF16, "grad_scale": SCALE}  # as a host hands it over that casts nothing

MIXES: dict[str, Callable[[], list[Item]]] = {
    "LLaMA 2B": lambda: whole(llama(), shared=True),
    "LLaMA 2B, bf16": lambda: whole(llama(), shared=True, grad=BF16, exp_avg=BF16, copy=BF16),
    "LLaMA 2B, cautious": lambda: whole(llama(layers=1), shared=True, cautious=True),
    "LLaMA 2B, ZeRO shard": lambda: shard(llama(), shared=True),
    "LLaMA 2B, ZeRO shard, AdamW": lambda: shard(llama(), shared=False),
    "LLaMA 2B, ZeRO shard, AdamW, gradient at 8 bytes": lambda: shard(llama(), shared=False, off=(0, 2, 0, 0, 0)),
    "LLaMA 2B, ZeRO shard, AdamW, gradient at 4 bytes": lambda: shard(llama(), shared=False, off=(0, 1, 0, 0, 0)),
    "LLaMA 2B, cut at an odd place": lambda: shard(llama(), shared=True, ranks=7),
    "LLaMA 2B, cut at an odd place, bf16": lambda: shard(
        llama(), shared=True, ranks=7, grad=BF16, exp_avg=BF16, copy=BF16
    ),
    "LLaMA 2B, ZeRO shard, fused step, bf16": lambda: shard(llama(), shared=True, **FUSED),
    "LLaMA 2B, cut at an odd place, fused step, bf16": lambda: shard(llama(), shared=True, ranks=7, **FUSED),
    "LLaMA 2B, cut at an odd place, fused step of AdamW, bf16": lambda: shard(llama(), shared=False, ranks=7, **FUSED),
    "GPT-2 medium, ZeRO shard, fused step, bf16": lambda: shard(gpt2_medium(), shared=True, **FUSED),
    "LLaMA 2B, cut at an odd place, cautious AdamW": lambda: shard(llama(), shared=False, ranks=7, cautious=True),
    "LLaMA 2B, ZeRO shard, Lion": lambda: shard(llama(), shared=False, lion=True),
    "LLaMA 2B, cut at an odd place, Lion, bf16": lambda: shard(
        llama(), shared=False, ranks=7, lion=True, grad=BF16, exp_avg=BF16, copy=BF16
    ),
    "LLaMA 2B, cut at an odd place, cautious Lion": lambda: shard(
        llama(), shared=False, ranks=7, lion=True, cautious=True
    ),
    "GPT-2 medium": lambda: whole(gpt2_medium(), shared=True),
    "GPT-2 medium, ZeRO shard": lambda: shard(gpt2_medium(), shared=True),
    "GPT-2 medium, cut at an odd place": lambda: shard(gpt2_medium(), shared=True, ranks=7),
    "GPT-2 medium, AdamW": lambda: whole(gpt2_medium(), shared=False),
    "GPT-2 medium, Lion": lambda: whole(gpt2_medium(), shared=False, lion=True),
    "MoE": lambda: whole(moe(), shared=True),
    "LoRA": lambda: whole(lora(), shared=True),
    "LoRA, cut at an odd place": lambda: shard(lora(), shared=True, ranks=7),
}


def part(
    height: int,
    width: int,
    stride: int,
    *,
    param: torch.dtype = F32,
    narrow: torch.dtype = F32,
    copy: torch.dtype | None = None,
    off: int = 0,
    cautious: bool = False,
) -> Callable[[Kernels], None]:
    """A matrix of Muon's, or a part of one: its momentum moved, its weights changed.

    Args:
        height: rows.
        width: elements of each.
        stride: distance of rows in the stepped tensor.
        param: dtype of the parameter.
        narrow: dtype of gradient and momentum.
        copy: dtype of the 16-bit copy.
        off: elements between an aligned address and the stepped tensors.
        cautious: whether weight decay is.
    """

    def rows(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(off + height * stride, dtype=dtype).as_strided((height, width), (stride, 1), off)

    def work(kernels: Kernels) -> None:
        ahead, update = torch.empty(height, width), UpdateSettings(1.0)
        kernels.momentum_part_(rows(narrow), rows(narrow), ahead, momentum=0.95, nesterov=True)
        copied = None if copy is None else rows(copy)
        kernels.step_part_(rows(param), ahead, copied, update, replace(HYPER, cautious=cautious))

    return work


PARTS: dict[str, Callable[[Kernels], None]] = {
    "Muon, a whole weight": part(2560, 2560, 2560),
    "Muon, a whole weight, bf16": part(2560, 2560, 2560, narrow=BF16, copy=BF16),
    "Muon, a whole weight in bf16": part(2560, 2560, 2560, param=BF16, narrow=BF16),
    "Muon, a whole weight, cautious": part(2560, 2560, 2560, cautious=True),
    "Muon, a head of a transposed weight": part(1024, 64, 3072),
    "Muon, a role of a transposed weight": part(1024, 1024, 3072),
    "Muon, cut at an odd place": part(2560, 2560, 2560, off=1),
    "Muon, narrow columns at an odd place": part(1024, 24, 73, off=1),
}
