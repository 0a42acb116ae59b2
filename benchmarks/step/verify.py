# SPDX-License-Identifier: Apache-2.0
"""Before anything is timed: every contender makes the update that its family is defined by.

AdamW's are compared with torch's plain AdamW, Adam-mini's and Lion's with our reference backend; ours also with the
reference at their default multipliers on fused weights, which is what is timed.
"""

from __future__ import annotations

import torch

from benchmarks.step.peers import ADAM_MINI, ADAMW, Contender, build_ours, families
from benchmarks.step.shapes import Case, make_case

SIZE = "1M"
STEPS = 2  # the second sees moments that are not zero
HYPER = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
OURS_TOLERANCE = 1e-5
UNIT = {"lr_multipliers": dict.fromkeys(("emb", "head", "qk", "ffn", "vo", "norm", "other"), 1.0)}
# what the published package does: its partition, norms are not decayed, query, key and value are weights of their own
PUBLISHED = {**UNIT, "weight_decay_multipliers": {"norm": 0.0}, "granularity": "published"}


def verify(contenders: list[Contender], layouts: list[str], device: torch.device) -> list[str]:
    """Compare the updates of all contenders.

    Returns:
        One line per comparison.

    Raises:
        ValueError: a contender's update is another; its time would mean nothing.
    """
    lines = []
    for layout in layouts:
        for contender in contenders:
            if layout == "flat" and not contender.ours and contender.family == ADAM_MINI:
                continue
            lines.append(_compare(contender, layout, device))
    return lines


def _compare(contender: Contender, layout: str, device: torch.device) -> str:
    checks = [("multipliers 1", contender.tolerance, UNIT, True)]
    if contender.ours:
        tolerance = OURS_TOLERANCE if contender.momentum == "fp32" else 2.0**-8
        checks = [("multipliers 1", max(tolerance, contender.tolerance), UNIT, True), ("default", tolerance, {}, True)]
    elif contender.family == ADAM_MINI:
        checks = [("as published", contender.tolerance, PUBLISHED, False)]
    worst = []
    for what, tolerance, settings, fused in checks:
        expected = _update(_definition(contender, what), layout, device, settings, fused)
        actual = _update(contender.build, layout, device, settings, fused)
        error = float((actual - expected).abs().max() / expected.abs().max())
        if not error <= tolerance:
            raise ValueError(
                f"{contender.name} on {layout} tensors ({what}) makes another update than its family: error "
                f"{error:.1e} of the largest update, allowed {tolerance:.0e}. Its time would mean nothing."
            )
        worst.append(f"{what} {error:.0e}")
    return f"{contender.name}, {layout}: {', '.join(worst)} of the largest update"


def _definition(contender: Contender, what: str):
    if contender.family == ADAMW and what == "multipliers 1":
        return lambda case, **settings: torch.optim.AdamW(case.params, **settings, foreach=False, fused=False)
    cls = families()[contender.family]
    return lambda case, **settings: build_ours(cls, case, **settings, backend="reference")


def _update(build, layout: str, device: torch.device, settings: dict[str, object], fused: bool) -> torch.Tensor:
    """Change of all parameters in two steps, fp64, divided by the learning rate."""
    case: Case = make_case(SIZE, layout, device, fused=fused, **settings)
    before = case.param.double()
    optimizer = build(case, **HYPER)
    for _ in range(STEPS):
        optimizer.step()
    return (before - case.param.double()) / HYPER["lr"]
