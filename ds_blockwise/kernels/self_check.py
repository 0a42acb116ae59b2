# SPDX-License-Identifier: Apache-2.0
"""Does a backend work on this machine? A small model is stepped beside the reference before anybody's weights are.

Kernels that are compiled on the spot depend on drivers, compilers and chips that no test of ours has seen.
"""

from __future__ import annotations

import torch

from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.segment_table import Placement, SegmentTable, build_table
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.spec import apply_settings
from ds_blockwise.blocks.structure import RoleSpan, TensorStructure
from ds_blockwise.kernels.base import Hyper, Item, Kernels, ReferenceKernels, StepState

_LR = 1e-3
_HYPER = Hyper(_LR, 0.0, 0.9, 0.95, 1e-8, 0.1)
_STRUCTURES = (
    TensorStructure("query", (64, 50), 0, (RoleSpan(0, 64, Role.QUERY, 16),), False),
    TensorStructure("up", (40, 300), 0, (RoleSpan(0, 40, Role.FFN),), False),
    TensorStructure("bias", (40,), 0, (RoleSpan(0, 40, Role.FFN),), True),
    TensorStructure("norm", (300,), 0, (RoleSpan(0, 300, Role.NORM),), False),
    TensorStructure("transposed", (30, 45), 1, (RoleSpan(0, 45, Role.VALUE),), False),
)
_SKIPPED = 7  # the flat tensor begins inside a block and at an odd address


def disagreement(kernels: Kernels, device: torch.device) -> str | None:
    """Step a small flat partition twice with a backend and with the reference, for both optimizers.

    Args:
        kernels: the backend.
        device: where the tensors lie.

    Returns:
        What differs, in a sentence; None if the updates agree to 1e-5.
    """
    for shared in (False, True):
        table = _table(shared)
        ours, reference = (_stepped(k, table, device) for k in (kernels, ReferenceKernels()))
        for name, a, b in zip(("parameters", "exp_avg", "exp_avg_sq"), ours, reference, strict=True):
            scale = 10 * _LR if name == "parameters" else 1.0
            error = float((a - b).abs().div(scale).max())
            if not error <= 1e-5:
                form = "Adam-mini" if shared else "AdamW"
                return f"the {kernels.name} kernels differ from the reference by {error:.1e} in {name} of {form}"
    return None


def _table(shared: bool) -> SegmentTable:
    settings = BlockSettings.parse(None, None, None, None)
    placements: list[Placement] = []
    at = 0
    for structure in _STRUCTURES:
        spec = apply_settings(structure, settings)
        skipped = 0 if placements else _SKIPPED
        placements.append(Placement(spec, None, at, skipped, spec.numel - skipped))
        at += spec.numel - skipped
    return build_table(at, placements, shares_second_moment=shared)


def _stepped(kernels: Kernels, table: SegmentTable, device: torch.device) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    param, grad = (torch.randn(table.numel, generator=generator).to(device) for _ in range(2))
    param *= 0.02
    size = table.num_blocks if table.shares_second_moment else table.numel
    exp_avg, exp_avg_sq = torch.zeros_like(param), torch.zeros(size, device=device)
    state: StepState = {"step": 0, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    item = Item(table, kernels.plan(table, device), param, state, _HYPER, grad)
    for _ in range(2):
        kernels.step_([item])
    return param, exp_avg, exp_avg_sq
