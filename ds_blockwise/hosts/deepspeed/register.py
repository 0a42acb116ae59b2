# SPDX-License-Identifier: Apache-2.0
"""Makes the optimizers and schedules known to DeepSpeed by name.

Registers at the end of its import. The other files of this folder are imported when an engine is built: each of them
may be what brought DeepSpeed in, and is not complete when DeepSpeed's import ends and this file is imported.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import deepspeed
import torch
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import utils as zero_utils
from torch import nn

from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.registry import OPTIMIZERS, SCHEDULES

_HOOK = "_configure_optimizer"
_EARLY_HOOK = "_configure_distributed_model"  # where DeepSpeed first looks at the parameters


def register() -> None:
    """Make the optimizers and schedules available by name in a DeepSpeed JSON; called by ``import ds_blockwise``.

    Idempotent. Adds names to ``torch.optim`` and ``deepspeed.runtime.lr_schedules``, the classes to ZeRO's list of
    supported optimizers, and hooks around two methods of the engine; without the second one, only the reason of a
    refusal would be lost.

    Raises:
        ImportError: this DeepSpeed has no such method.
    """
    for name, optimizer in OPTIMIZERS.items():
        setattr(torch.optim, name, optimizer)
        if optimizer not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
            zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(optimizer)
    for name, schedule in SCHEDULES.items():
        setattr(lr_schedules, name, schedule)
    original = getattr(DeepSpeedEngine, _HOOK, None)
    if original is None:
        raise ImportError(
            f"DeepSpeed {deepspeed.__version__} has no DeepSpeedEngine.{_HOOK}; ds_blockwise was tested with 0.19.8. "
            f"Install a supported version."
        )
    if getattr(original, "calls_ds_blockwise", False):
        return

    early = getattr(DeepSpeedEngine, _EARLY_HOOK, None)
    if early is not None:

        @functools.wraps(early)
        def check_and_configure(self: Any, model: nn.Module) -> None:
            from ds_blockwise.hosts.deepspeed.checks import check_model

            if self.optimizer_name() in OPTIMIZERS or isinstance(self.client_optimizer, BlockwiseOptimizer):
                check_model(model)
            early(self, model)

        setattr(DeepSpeedEngine, _EARLY_HOOK, check_and_configure)

    @functools.wraps(original)
    def configure_and_attach(self: Any, client_optimizer: Any, model_parameters: Any) -> None:
        from ds_blockwise.hosts.deepspeed.attach import attach
        from ds_blockwise.hosts.deepspeed.checks import check_client, check_experts
        from ds_blockwise.hosts.deepspeed.refusals import check_config

        if isinstance(client_optimizer, BlockwiseOptimizer):
            check_config(self, type(client_optimizer).__name__)
            check_experts(self, client_optimizer.param_groups if self.zero_optimization() else None)
        elif client_optimizer is None and self.optimizer_name() in OPTIMIZERS:
            check_config(self, self.optimizer_name())
            check_experts(self, model_parameters)
        else:
            check_client(client_optimizer)
        original(self, client_optimizer, model_parameters)
        if isinstance(self.basic_optimizer, BlockwiseOptimizer):
            attach(self)

    cast("Any", configure_and_attach).calls_ds_blockwise = True
    setattr(DeepSpeedEngine, _HOOK, configure_and_attach)


register()
