# SPDX-License-Identifier: Apache-2.0
"""Does a backend work on this machine? A small model is stepped beside the reference before anybody's weights are.

Kernels that are compiled on the spot depend on drivers, compilers and chips that no test of ours has seen.
"""

from __future__ import annotations

import torch

from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.segment_table import Placement, SegmentTable, build_table, whole_placement
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.settings.update_settings import UpdateSettings
from ds_blockwise.blocks.spec import apply_settings
from ds_blockwise.blocks.structure import RoleSpan, TensorStructure
from ds_blockwise.kernels.base import Hyper, Item, Kernels, ReferenceKernels, StepState

_LR = 1e-3
_HYPER = Hyper(_LR, 0.0, 0.9, 0.95, 1e-8, 0.1)
_FFN, _COLUMNS = Role.FFN, (RoleSpan(0, 48, Role.VALUE),)
#: in one flat tensor: short rows, columns, rows and heads that are longer than what a kernel may hold at a time
_FLAT = (
    TensorStructure("query", (64, 50), 0, (RoleSpan(0, 64, Role.QUERY, 16),), False),
    TensorStructure("up", (40, 300), 0, (RoleSpan(0, 40, _FFN),), False),
    TensorStructure("bias", (40,), 0, (RoleSpan(0, 40, _FFN),), True),
    TensorStructure("norm", (300,), 0, (RoleSpan(0, 300, Role.NORM),), False),
    TensorStructure("transposed", (30, 45), 1, (RoleSpan(0, 45, Role.VALUE),), False),
    TensorStructure("down", (2, 5003), 0, (RoleSpan(0, 2, _FFN),), False),
    TensorStructure("key", (32, 1100), 0, (RoleSpan(0, 32, Role.KEY, 32),), False),
)
#: as tensors of their own, of which every row begins at an aligned address
_WHOLE = (
    TensorStructure("gate", (16, 512), 0, (RoleSpan(0, 16, _FFN),), False),
    TensorStructure("long", (2, 4608), 0, (RoleSpan(0, 2, _FFN),), False),
    TensorStructure("columns", (64, 48), 1, _COLUMNS, False),
)
_SKIPPED = 7  # the flat tensor begins inside a block, which is split then, and at an odd address


_ADAMW, _MINI, _LION = "AdamW", "Adam-mini", "Lion"
#: the update, and the dtype of gradients, first moments and copies
FORMS = (
    (_ADAMW, torch.float32),
    (_MINI, torch.float32),
    (_MINI, torch.bfloat16),
    (_LION, torch.float32),
    (_LION, torch.bfloat16),
)


#: the same for gradients that are scaled where they are read, which only hosts that do so ask for
SCALED_FORMS = ((_ADAMW, torch.bfloat16), (_MINI, torch.bfloat16))


def disagreement(kernels: Kernels, device: torch.device, grad_scale: float | None = None) -> str | None:
    """Step small tensors twice with a backend and with the reference: by each update, and in bf16.

    Parts of matrices, as Muon has them, take part if gradients are not scaled. Blocks that are split over ranks take
    part as if their sums were complete. Triton compiles all of it on a machine where it never ran, and keeps what it
    compiled.

    Args:
        kernels: the backend.
        device: where the tensors lie.
        grad_scale: of gradients; None: they are not scaled.

    Returns:
        What differs, in a sentence; None if the updates agree to 1e-5, in bf16 to a rounding.
    """
    both = (kernels, ReferenceKernels())
    for update, dtype in FORMS if grad_scale is None else SCALED_FORMS:
        problem = _difference(update, dtype, *(stepped(k, update, dtype, device, grad_scale) for k in both))
        if problem is not None:
            return f"the {kernels.name} kernels differ from the reference by {problem}"
    for dtype in (torch.float32, torch.bfloat16) if grad_scale is None else ():
        problem = _difference("Muon", dtype, *(stepped_parts(k, dtype, device) for k in both))
        if problem is not None:
            return f"the {kernels.name} kernels differ from the reference by {problem}"
    return None


def _difference(
    optimizer: str, dtype: torch.dtype, ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]
) -> str | None:
    limit = 1e-5 if dtype == torch.float32 else 2.0**-7
    for name, a in ours.items():
        error = float((a - reference[name]).abs().div(_SCALES.get(name, 1.0)).max())
        if not error <= limit:
            return f"{error:.1e} in {name} of {optimizer}{'' if dtype == torch.float32 else ' in bf16'}"
    return None


_SCALES = {"parameters": 10 * _LR, "copies": 0.1}


def _tables(*, shared: bool) -> list[SegmentTable]:
    settings = BlockSettings.parse(None, None, None, None)
    placements: list[Placement] = []
    at = 0
    for structure in _FLAT:
        spec = apply_settings(structure, settings)
        skipped = 0 if placements else _SKIPPED
        placements.append(Placement(spec, None, at, skipped, spec.numel - skipped, (skipped,) if skipped else ()))
        at += spec.numel - skipped
    whole = [whole_placement(apply_settings(structure, settings), None) for structure in _WHOLE]
    tensors = [(at, placements), *[(placement.numel, [placement]) for placement in whole]]
    return [build_table(numel, content, shares_second_moment=shared) for numel, content in tensors]


def stepped(
    kernels: Kernels, update: str, dtype: torch.dtype, device: torch.device, grad_scale: float | None = None
) -> dict[str, torch.Tensor]:
    """Parameters, moments and (in bf16) copies after two steps, in fp32, 1-D.

    Args:
        kernels: what steps.
        update: whose, as in `FORMS`.
        dtype: of gradients, first moments and copies.
        device: where the tensors lie.
        grad_scale: of gradients; None: they are not scaled.
    """
    generator = torch.Generator().manual_seed(0)
    items = []
    for table in _tables(shared=update == _MINI):
        param, grad = (torch.randn(table.numel, generator=generator).to(device) for _ in range(2))
        param *= 0.02
        size = table.num_blocks if table.shares_second_moment else table.numel
        exp_avg, exp_avg_sq = torch.zeros_like(param, dtype=dtype), torch.zeros(size, device=device)
        state: StepState = {"step": 0, "exp_avg": exp_avg}
        if update != _LION:
            state["exp_avg_sq"] = exp_avg_sq
        copy = None if dtype == torch.float32 else torch.zeros_like(param, dtype=dtype)
        items.append(Item(table, kernels.plan(table, device), param, state, _HYPER, grad.to(dtype), None, copy))
        items[-1].grad_scale = grad_scale
    for _ in range(2):
        kernels.sum_split_blocks([item for item in items if item.table.has_split_blocks])
        (kernels.step_by_sign_ if update == _LION else kernels.step_)(items)
    found = {"parameters": [item.param for item in items], "exp_avg": [item.state["exp_avg"] for item in items]}
    if update != _LION:
        found["exp_avg_sq"] = [item.state["exp_avg_sq"] for item in items]
    if dtype != torch.float32:
        found["copies"] = [item.param_copy for item in items if item.param_copy is not None]
    return {name: torch.cat([tensor.float().view(-1) for tensor in tensors]) for name, tensors in found.items()}


#: rows, their elements, the distance from one to the next, and where they begin: without a gap, short, long
_PARTS = ((3, 700, 700, 0), (70, 20, 48, 16), (20, 140, 160, 1))
_PART_SETTINGS = UpdateSettings(1.5, 0.5)


def stepped_parts(kernels: Kernels, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """What kernels make of parts of matrices in two steps, with copies in bf16, in fp32, 1-D.

    Args:
        kernels: what steps.
        dtype: of gradients, momentum and copies.
        device: where the tensors lie.
    """
    generator = torch.Generator().manual_seed(0)
    found: list[dict[str, torch.Tensor]] = []
    for height, width, stride, start in _PARTS:
        size = start + height * stride
        values = {name: torch.randn(size, generator=generator) for name in ("parameters", "exp_avg", "copies", "grads")}
        values["parameters"] *= 0.02
        tensors = {name: v.to(device, torch.float32 if name == "parameters" else dtype) for name, v in values.items()}
        rows = {name: t.as_strided((height, width), (stride, 1), start) for name, t in tensors.items()}
        tensors["updates"] = ahead = torch.empty(height, width, device=device)
        copy = None if dtype == torch.float32 else rows["copies"]
        for _ in range(2):
            kernels.momentum_part_(rows["exp_avg"], rows["grads"], ahead, momentum=0.95, nesterov=True)
            kernels.step_part_(rows["parameters"], ahead, copy, _PART_SETTINGS, _HYPER)
        found.append(tensors)
    return {name: torch.cat([tensors[name].float().view(-1) for tensors in found]) for name in found[0]}
