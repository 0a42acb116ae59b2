# SPDX-License-Identifier: Apache-2.0
"""Where a rank stands when it saves or loads: the topology of its engine, and the storage that it writes to."""

from __future__ import annotations

import torch.distributed as dist
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_pipeline_parallel_world_size, bwc_tensor_model_parallel_world_size

from ds_blockwise.checkpoint.manifest import Topology
from ds_blockwise.checkpoint.tags import Validation
from ds_blockwise.hosts.deepspeed.engine import Engine, is_wrapped, offload_device, tensor_parallel_mpu


def topology_of(engine: Engine) -> Topology:
    """Numbers of ranks, wrapper and precision: what decides whether DeepSpeed's files fit an engine as they are."""
    return {
        "world_size": dist.get_world_size(),
        "dp": int(engine.seq_dp_world_size),
        "tp": int(bwc_tensor_model_parallel_world_size(tensor_parallel_mpu(engine))),
        "pp": int(bwc_pipeline_parallel_world_size(engine.mpu)),
        "zero_stage": int(engine.zero_optimization_stage()),
        "wrapper": type(engine.optimizer).__name__ if is_wrapped(engine) else "none",
        "dtype": "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32",
        "offload": offload_device(engine),
        "ep": int(groups._get_max_expert_size() or 1) if engine.has_moe_layers else 1,
    }


def tag_validation(engine: Engine) -> Validation:
    """What the JSON's ``"checkpoint": {"tag_validation": ...}`` says; ``fail`` without it.

    DeepSpeed's own default is to warn, and to let every rank write under its own tag.
    """
    said = str((engine._config._param_dict.get("checkpoint") or {}).get("tag_validation", "fail")).lower()
    return "warn" if said == "warn" else "ignore" if said == "ignore" else "fail"


def node_of(engine: Engine) -> int:
    """Number of the storage that this rank writes to: 0, or with node-local storage its node's first rank."""
    return dist.get_rank() - int(engine.local_rank) if engine.use_node_local_storage() else 0


def leads(engine: Engine) -> bool:
    """Whether this rank makes, renames and removes the folders of its storage."""
    return dist.get_rank() == node_of(engine)
