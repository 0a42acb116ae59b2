# SPDX-License-Identifier: Apache-2.0
"""What telemetry takes from the JSON's schedule."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_blockwise import BlockwiseAdamW, BlockwiseLR
from ds_blockwise.hosts.deepspeed.monitor import connect


def warmup_without_alarms(name: str | None, params: dict[str, Any] | None, client: object = None) -> int | None:
    optimizer = BlockwiseAdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3, telemetry={"interval": 5})
    engine: Any = SimpleNamespace(
        scheduler_name=lambda: name, scheduler_params=lambda: params, client_lr_scheduler=client, optimizer=None
    )
    connect(engine, optimizer)
    assert optimizer.meter is not None and optimizer.meter.settings is not None
    return optimizer.meter.settings.warmup_num_steps


def test_the_warm_up_is_the_schedules_however_it_is_given() -> None:
    """Alarms in a warm-up that was given as a fraction would be false ones."""
    shape = {"shape": "cosine", "total_num_steps": 200}
    assert warmup_without_alarms("BlockwiseLR", {**shape, "warmup_num_steps": 20}) == 20
    assert warmup_without_alarms("BlockwiseLR", {**shape, "warmup_fraction": 0.1}) == 20
    assert warmup_without_alarms("WarmupLR", {"warmup_num_steps": 7}) == 7
    assert warmup_without_alarms(None, None) == 0
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    ours = BlockwiseLR(optimizer, 200, shape="linear", warmup_fraction=0.05)
    assert warmup_without_alarms(None, None, ours) == 10


def test_a_warm_up_that_is_given_twice_is_refused() -> None:
    params = {"shape": "cosine", "total_num_steps": 200, "warmup_num_steps": 20, "warmup_fraction": 0.1}
    with pytest.raises(ValueError, match="say the same thing"):
        warmup_without_alarms("BlockwiseLR", params)
