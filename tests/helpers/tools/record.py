# SPDX-License-Identifier: Apache-2.0
"""What the DeepSpeed engines of a tool's run did, seen from below the tool: a file for each update, from rank 0."""

from __future__ import annotations

import functools
import os
from itertools import count
from pathlib import Path
from typing import Any

import torch

FOLDER = "TOOL_RECORDS"


def watch() -> None:
    """Note every update of every engine in the folder that the environment names; nothing without it."""
    if FOLDER not in os.environ:
        return
    import deepspeed

    folder, engines = Path(os.environ[FOLDER]), count()
    engine_class = deepspeed.DeepSpeedEngine
    start, step = engine_class.__init__, engine_class.step

    @functools.wraps(start)
    def started(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self.tool_record, self.tool_updates = next(engines), count()
        optimizer = getattr(self, "basic_optimizer", None)
        if torch.distributed.get_rank() == 0:
            known = {
                "optimizer": "" if optimizer is None else type(optimizer).__name__,
                "module": type(self.module).__name__,
                "world_size": torch.distributed.get_world_size(),
                "zero_stage": self.zero_optimization_stage(),
                "clipping": self.gradient_clipping(),
            }
            torch.save(known, folder / f"engine_{self.tool_record}.pt")

    @functools.wraps(step)
    def stepped(self: Any, *args: Any, **kwargs: Any) -> None:
        if not self.is_gradient_accumulation_boundary():
            return step(self, *args, **kwargs)
        group = self.basic_optimizer.param_groups[0]
        found = {
            "before": _weights(self),
            "gradients": _gradients(self),
            "lr": float(group["lr"]),
            "betas": tuple(group["betas"]),
            "eps": float(group["eps"]),
            "weight_decay": [float(each["weight_decay"]) for each in self.basic_optimizer.param_groups],
        }
        step(self, *args, **kwargs)
        found["after"] = _weights(self)
        if torch.distributed.get_rank() == 0:
            torch.save(found, folder / f"engine_{self.tool_record}_update_{next(self.tool_updates)}.pt")

    engine_class.__init__, engine_class.step = started, stepped


def _weights(engine: Any) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).clone() for name, p in _trained(engine)}


def _gradients(engine: Any) -> dict[str, torch.Tensor]:
    """As the ranks have averaged them, before clipping."""
    from deepspeed.utils import safe_get_full_grad

    return {name: safe_get_full_grad(p).double() for name, p in _trained(engine)}


def _trained(engine: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
