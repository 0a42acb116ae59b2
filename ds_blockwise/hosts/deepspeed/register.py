# SPDX-License-Identifier: Apache-2.0
"""Makes the optimizers and schedules known to DeepSpeed by name.

Registers at the end of its import, which happens at the end of DeepSpeed's. Any file of this folder may be what brought
DeepSpeed in, and is then not complete yet. So this file imports its neighbours when an engine is built.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterable
from typing import TypeAlias

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import utils as zero_utils
from torch import nn

from ds_blockwise.hosts.deepspeed.engine import Engine
from ds_blockwise.hosts.deepspeed.releases import NEWEST_TESTED, check_release
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.registry import OPTIMIZERS, SCHEDULES

logger = logging.getLogger(__name__)

_HOOK = "_configure_optimizer"
_EARLY_HOOK = "_configure_distributed_model"  # where DeepSpeed first looks at the parameters
_MARK = "calls_ds_blockwise"  # of the hook that is there already
_SHARED_MEMORY = "deepspeed_shm_comm"
_BUILD_SHARED_MEMORY = "build_shm_op"
_KEEP_SHARED_MEMORY = "DS_BUILD_SHM_COMM"  # DeepSpeed's own variable for building this operator
_Parameters: TypeAlias = Iterable[object] | None


def register() -> None:
    """Make the optimizers and schedules available by name in a DeepSpeed JSON; called by ``import ds_blockwise``.

    Idempotent. Adds names to ``torch.optim`` and ``deepspeed.runtime.lr_schedules``, the classes to ZeRO's list of
    supported optimizers, and hooks around two methods of the engine; without the second one, only the reason of a
    refusal would be lost. On a CPU, DeepSpeed's shared-memory operator is no longer compiled at the first start.

    Raises:
        ImportError: this DeepSpeed is too old, or has no such method.
    """
    check_release(deepspeed.__version__)
    for name, optimizer in OPTIMIZERS.items():
        setattr(torch.optim, name, optimizer)
        if optimizer not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
            zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(optimizer)
    for name, schedule in SCHEDULES.items():
        setattr(lr_schedules, name, schedule)
    original = getattr(DeepSpeedEngine, _HOOK, None)
    if original is None:
        raise ImportError(
            f"DeepSpeed {deepspeed.__version__} has no DeepSpeedEngine.{_HOOK}; ds_blockwise was tested with "
            f"{NEWEST_TESTED}. Install a supported version."
        )
    if hasattr(original, _MARK):
        return
    early = getattr(DeepSpeedEngine, _EARLY_HOOK, None)
    if early is not None:
        setattr(DeepSpeedEngine, _EARLY_HOOK, _checking_the_model(early))
    setattr(DeepSpeedEngine, _HOOK, _attaching(original))
    backend = importlib.import_module("deepspeed.comm.torch")  # `deepspeed.comm` has torch itself under this name
    build = getattr(backend, _BUILD_SHARED_MEMORY, None)
    if build is not None:
        setattr(backend, _BUILD_SHARED_MEMORY, _if_wanted(build))


def _checking_the_model(configure: Callable[[Engine, nn.Module], None]) -> Callable[[Engine, nn.Module], None]:
    @functools.wraps(configure)
    def check_and_configure(self: Engine, model: nn.Module) -> None:
        from ds_blockwise.hosts.deepspeed.checks import check_model

        if _is_named(self) or isinstance(self.client_optimizer, BlockwiseOptimizer):
            check_model(model)
        configure(self, model)

    return check_and_configure


def _attaching(
    configure: Callable[[Engine, object, _Parameters], None],
) -> Callable[[Engine, object, _Parameters], None]:
    @functools.wraps(configure)
    def configure_and_attach(self: Engine, client_optimizer: object, model_parameters: _Parameters) -> None:
        from ds_blockwise.hosts.deepspeed.attach import attach
        from ds_blockwise.hosts.deepspeed.checks import check_client, check_config, check_experts, check_frozen_groups
        from ds_blockwise.hosts.deepspeed.config.in_engine import check_json
        from ds_blockwise.hosts.deepspeed.never_stepped import configure_frozen, trains_nothing
        from ds_blockwise.parallel.agree import together

        client = client_optimizer if isinstance(client_optimizer, BlockwiseOptimizer) else None
        named = client_optimizer is None and _is_named(self)
        if client is not None or named:
            check_json(self)
        if client is not None:
            check_config(self, type(client).__name__)
            check_experts(self, client.param_groups if self.zero_optimization() else None)
        elif named:
            check_config(self, str(self.optimizer_name()))
            check_experts(self, model_parameters)
        else:
            check_client(client_optimizer)
        if (client is not None or named) and self.zero_optimization() and trains_nothing(self):
            configure_frozen(self, client, model_parameters)
            return
        if client is not None or named:
            groups = model_parameters if client is None else client.param_groups
            together(lambda: check_frozen_groups(self, groups))
        configure(self, client_optimizer, model_parameters)
        if isinstance(self.basic_optimizer, BlockwiseOptimizer):
            attach(self)

    setattr(configure_and_attach, _MARK, True)
    return configure_and_attach


def _if_wanted(build: Callable[[], object]) -> Callable[[], object]:
    """Leave DeepSpeed's shared-memory operator out on a CPU, unless it is installed or was asked for.

    DeepSpeed compiles it while process groups are made: minutes without a word, and a compilation that was killed
    leaves a lock on which the next start hangs. Only its inference all-reduce uses it, and that has a fallback.
    """

    @functools.wraps(build)
    def build_if_wanted() -> object:
        on_cpu = get_accelerator().device_name() == "cpu"
        wanted = os.environ.get(_KEEP_SHARED_MEMORY, "0") != "0" or installed_ops.get(_SHARED_MEMORY, False)
        if not on_cpu or wanted:
            return build()
        if os.environ.get("RANK", "0") == "0":
            logger.info(
                "DeepSpeed's operator %s is not compiled: training on a CPU does not use it. Set %s=1 to have it.",
                _SHARED_MEMORY,
                _KEEP_SHARED_MEMORY,
            )
        return None

    return build_if_wanted


def _is_named(engine: Engine) -> bool:
    """Whether the JSON names one of our optimizers."""
    return engine.optimizer_name() in OPTIMIZERS


register()
