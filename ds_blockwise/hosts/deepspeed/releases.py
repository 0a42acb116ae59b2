# SPDX-License-Identifier: Apache-2.0
"""What the supported releases of DeepSpeed do differently, each asked of the release at hand and never of its number.

A release that came later than the oldest is named where something is missing before it. Does not import DeepSpeed: this
file may be needed while DeepSpeed is imported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import nn

from ds_blockwise.hosts.deepspeed.engine import Engine, ZeroStages1And2

OLDEST = (0, 18, 6)  # 0.18.5 adds up the gradients of all steps in bf16 at ZeRO stage 0
NEWEST_TESTED = "0.19.8"


def check_release(version: str) -> None:
    """Refuse a release of DeepSpeed that is known to fail.

    Args:
        version: such as ``"0.19.8"``.

    Raises:
        ImportError: it is older than `OLDEST`.
    """
    if tuple(int(number) for number in re.findall(r"\d+", version)[:3]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"DeepSpeed {version} is too old: ds_blockwise needs {oldest} or later and was tested with {NEWEST_TESTED}."
            f" Install one: pip install 'deepspeed>={oldest},<0.20'"
        )


def computes_norm(engine: Engine) -> bool:
    """Whether ``"compute_grad_norm"`` is on; 0.19.7 brought the choice, and all releases before compute it."""
    asked = getattr(engine, "zero_compute_grad_norm", None)
    return True if asked is None else bool(asked())


def flat_offsets(wrapper: ZeroStages1And2, index: int, params: Sequence[nn.Parameter]) -> list[int]:
    """Where each parameter of a group should lie in its flat buffer.

    Before 0.19.7 there is no ``parameter_alignment``, and one parameter lies behind the other.
    """
    known = getattr(wrapper, "round_robin_bit16_offsets", None)
    return offsets_of(params) if known is None else [int(offset) for offset in known[index]]


def offsets_of(params: Sequence[nn.Parameter]) -> list[int]:
    """Offset of each parameter in a flat buffer that holds them one after the other."""
    return list(accumulate((param.numel() for param in params), initial=0))[: len(params)]


def alignment_paddings(wrapper: ZeroStages1And2) -> list[list[int]]:
    """By group, the elements of padding behind each parameter in the flat buffer; see `flat_offsets`."""
    known = getattr(wrapper, "round_robin_bit16_padding", None)
    return [[0] * len(params) for params in wrapper.round_robin_bit16_groups] if known is None else known


def cut_off_autograd(engine: Engine) -> None:
    """Cut the flat weights of ZeRO stages 1 and 2 off from the graph of the parameters that they were made of.

    0.18.7 to 0.18.9 leave it on, and gathering weights after a step then fails on gloo, with any optimizer
    ("is a view and is being modified inplace"). The memory stays the same; 0.19 does this itself.
    """
    wrapper: Any = engine.optimizer
    for index, flat in enumerate(getattr(wrapper, "bit16_groups_flat", ())):
        if flat.requires_grad:
            wrapper.bit16_groups_flat[index] = flat.detach()
            pieces = wrapper.parallel_partitioned_bit16_groups[index]
            wrapper.parallel_partitioned_bit16_groups[index] = [piece.detach() for piece in pieces]
