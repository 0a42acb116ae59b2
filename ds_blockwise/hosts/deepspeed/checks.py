# SPDX-License-Identifier: Apache-2.0
"""Checks of an engine while it is built, in the order in which ``deepspeed.initialize`` comes to them.

Each refuses what DeepSpeed would train wrongly or fail on later, with its reason: the model, the configuration, the
client optimizer, the param groups, then process groups and clipping.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import nn

from ds_blockwise.hosts.deepspeed.autotp import AUTOTP_MARK
from ds_blockwise.hosts.deepspeed.engine import Engine, offload_device, sequence_parallel_size, whole_numel
from ds_blockwise.hosts.deepspeed.refusals import EngineFacts, facts_of_json, refusals
from ds_blockwise.hosts.deepspeed.releases import computes_norm
from ds_blockwise.optimizers.base import BlockwiseOptimizer, built_from_ours


def check_model(model: nn.Module) -> None:
    """Refuse what DeepSpeed cannot train with any optimizer, before it fails on it.

    Args:
        model: as given to ``deepspeed.initialize``.

    Raises:
        ValueError: the model's experts are split over ranks by Megatron-core.
    """
    experts = [
        name
        for name, param in model.named_parameters()
        # DeepSpeed's own experts have a group_name beside it
        if not getattr(param, "allreduce", True) and not hasattr(param, "group_name")
    ]
    if experts:
        raise ValueError(
            f"expert parallelism of Megatron-core: {experts[0]!r} and {len(experts) - 1} more parameters hold other "
            f"experts on other ranks, and DeepSpeed knows no groups for them. Set expert_model_parallel_size to 1, or "
            f"train with Megatron-core's own optimizer and megatron_patch.convert_."
        )


def check_config(engine: Engine, optimizer: str) -> None:
    """Refuse what cannot work, before the optimizer is built.

    Args:
        engine: a ``DeepSpeedEngine`` with its configuration read.
        optimizer: class name of ours.

    Raises:
        ValueError: every refused setting with its reason, in one message.
    """
    problems = list(refusals(_facts_of(engine, optimizer)))
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"{optimizer} does not support this DeepSpeed configuration:\n{listed}")


def _facts_of(engine: Engine, optimizer: str) -> EngineFacts:
    device = offload_device(engine)
    of_json = facts_of_json(engine._config._param_dict)
    # a function that was given as optimizer has been called when this is asked for the last time
    built = (engine.client_optimizer, getattr(engine, "basic_optimizer", None))
    ours = next((one for one in built if isinstance(one, BlockwiseOptimizer)), None)
    fused = of_json.fused_step if ours is None else ours.fused_step
    return EngineFacts(
        optimizer=optimizer,
        zero_stage=int(engine.zero_optimization_stage()),
        is_pipeline=bool(engine.pipeline_parallelism),
        zenflow=bool(getattr(engine, "zenflow", None)),
        super_offload=bool(engine.super_offload()),
        offload_device=None if device == "none" else device,
        offload_ratio=float(getattr(engine.zero_offload_optimizer(), "ratio", 1.0)),
        master_weights_16_bit=tuple(
            name
            for name, on in (
                ("bf16_master_weights_and_grads", engine.bf16_master_weights_and_gradients()),
                ("fp16_master_weights_and_grads", engine.fp16_master_weights_and_gradients()),
            )
            if on
        ),
        elastic_checkpoint=bool(engine.zero_elastic_checkpoint()),
        skips_rank_by_rank=not computes_norm(engine) and _autocast_fp16(engine),
        fused_step=fused,
        precision=of_json.precision,
        grad_accum_dtype=of_json.grad_accum_dtype,
        deepcompile=of_json.deepcompile,
        has_experts=bool(engine.has_moe_layers),
        managed_accumulation=of_json.managed_accumulation,
    )


def _autocast_fp16(engine: Engine) -> bool:
    enabled = getattr(engine, "torch_autocast_enabled", None)
    if enabled is None or not enabled():
        return False
    return "float16" in str(engine.torch_autocast_dtype()).replace("bfloat16", "")


def check_client(client: object) -> None:
    """Refuse a client optimizer that took the place of one of ours on its way to ``deepspeed.initialize``.

    Accelerate does that under optimizer offload: it builds DeepSpeedCPUAdam from the groups of whatever it was given.

    Args:
        client: what ``deepspeed.initialize`` was given as ``optimizer``.

    Raises:
        ValueError: it was built from the param groups of one of ours.
    """
    name = built_from_ours(client) if isinstance(client, torch.optim.Optimizer) else None
    if name is not None:
        raise ValueError(
            f"{name} was replaced by {type(client).__name__} before DeepSpeed saw it: plain Adam would train, without "
            f"block types and with AdamW's memory. Accelerate and HF Trainer do this to every client optimizer when "
            f'"offload_optimizer" is set. Either set "zero_force_ds_cpu_optimizer": false in the DeepSpeed JSON and go '
            f'on passing {name}, or name it there, "optimizer": {{"type": "{name}", ...}}, and pass Accelerate\'s '
            f"DummyOptim(model.parameters()) (HF Trainer: nothing)."
        )


def refuse_empty_in_forward(engine: Engine) -> None:
    """At ZeRO stage 3, let the forward pass of a module with a parameter without elements say that this cannot work.

    DeepSpeed fails there, with any optimizer, on an assertion without the name. A module that is not used does no harm.

    Args:
        engine: a ``DeepSpeedEngine`` with its optimizer built.
    """
    if not engine.zero_optimization_partition_weights():
        return
    for param, name in engine.param_names.items():
        if whole_numel(param) or hasattr(param, AUTOTP_MARK):
            continue
        owner = engine.module.get_submodule(name.rpartition(".")[0])
        owner.register_forward_pre_hook(functools.partial(_refuse_empty, name), prepend=True)


def _refuse_empty(name: str, module: nn.Module, inputs: object) -> NoReturn:
    raise ValueError(
        f"parameter {name!r} of {type(module).__name__} has no elements, and DeepSpeed's ZeRO stage 3 cannot gather it "
        f"for this forward pass, with any optimizer. Remove it or make it a buffer, or use ZeRO stage 2."
    )


def check_experts(engine: Engine, model_parameters: Iterable[object] | None) -> None:
    """Refuse param groups that DeepSpeed cannot train MoE layers with, before the optimizer is built.

    Args:
        engine: a ``DeepSpeedEngine`` that has looked for MoE layers.
        model_parameters: what the user gave to ``deepspeed.initialize``: parameters or dicts, or an optimizer's groups.

    Raises:
        ValueError: experts in a group with other parameters, or ZeRO stage 3.
    """
    if not engine.has_moe_layers:
        return
    if engine.zero_optimization_stage() == 3 and any(type(m).__name__ == "MoE" for m in engine.module.modules()):
        raise ValueError(
            "DeepSpeed's MoE layers cannot be trained at ZeRO stage 3: its experts lie on other ranks than the other "
            "parameters. Use ZeRO stage 1 or 2."
        )
    groups = [group for group in model_parameters or () if isinstance(group, dict)]
    marked = any("moe" in group for group in groups)
    for index, group in enumerate(groups):
        experts = [not getattr(param, "allreduce", True) for param in group["params"]]
        mixed = any(experts) and not (group.get("moe") and all(experts))
        if mixed and (marked or "name" not in group):
            raise ValueError(
                f"param group {index} holds experts of MoE layers, which other ranks do not have, and is not marked "
                f'"moe": true with the "name" of their group. Give deepspeed.initialize plain parameters, or groups '
                f"from deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer, each given a "
                f'"name" before.'
            )


def check_frozen_groups(engine: Engine, model_parameters: Iterable[object] | None) -> None:
    """Refuse a param group in which nothing is trained where DeepSpeed fails on it: ZeRO stages 1 and 2.

    Args:
        engine: a ``DeepSpeedEngine`` that trains some parameters.
        model_parameters: as of `check_experts`.

    Raises:
        ValueError: every parameter of a group is frozen.
    """
    if engine.zero_optimization_stage() not in (1, 2):
        return
    for index, group in enumerate(group for group in model_parameters or () if isinstance(group, dict)):
        params = group["params"]
        if isinstance(params, (list, tuple)) and params and not any(param.requires_grad for param in params):
            raise ValueError(
                f"param group {index} holds {len(params)} parameters, all frozen, and DeepSpeed's ZeRO stages 1 and 2 "
                f"fail on such a group, with any optimizer. Leave it out of the groups; frozen parameters in a group "
                f"with others do no harm."
            )


def check_sequence_parallel(engine: Engine) -> None:
    """Refuse sequence parallelism whose ranks do not share their gradients.

    Args:
        engine: a ``DeepSpeedEngine`` with its process groups.

    Raises:
        ValueError: the JSON's ``sequence_parallel_size`` and ``data_parallel_size`` (or ``mesh_param``) made the
            groups: DeepSpeed then averages over data-parallel ranks only. Or the wrapper is ``BF16_Optimizer``.
    """
    size = sequence_parallel_size(engine)
    if size <= 1:
        return
    if type(engine.optimizer).__name__ == "BF16_Optimizer":
        raise ValueError(
            '"grad_accum_dtype": "fp32" with bf16 at ZeRO stage 1 and sequence parallelism: DeepSpeed\'s '
            "BF16_Optimizer fails in its first gradient norm on all but the first rank of a sequence, with any "
            'optimizer. Use ZeRO stage 2 or 3, or remove "grad_accum_dtype".'
        )
    group = engine.seq_data_parallel_group
    averaged = set(range(dist.get_world_size()) if group is None else dist.get_process_group_ranks(group))
    if not averaged.issuperset(dist.get_process_group_ranks(engine.seq_parallel_group)):
        raise ValueError(
            f'"sequence_parallel_size": {size} with "data_parallel_size" (or mesh_param): '
            f"DeepSpeed then averages gradients over ranks {sorted(averaged)} only, and each rank's are those of its "
            f"own part of the sequence, so with any optimizer the ranks drift apart. Remove both and pass "
            f"mpu=UlyssesSPAttentionHF.register_with_transformers(...), or deepspeed.runtime.sequence_parallel."
            f"parallel_state_sp after its initialize_sequence_parallel({size})."
        )


def check_clipping(engine: Engine, tp: int) -> None:
    """Refuse gradient clipping where DeepSpeed's norm is wrong: ZeRO stage 0 in 16 bit (``unfused_optimizer.py``).

    Args:
        engine: a ``DeepSpeedEngine`` with its optimizer built.
        tp: its tensor-parallel size.

    Raises:
        ValueError: with several tensor-parallel ranks (gradients are asked, not parameters, whether they are split, and
            all but the first rank's left out), or with MoE layers.
    """
    clip = float(engine.gradient_clipping())
    if clip <= 0 or type(engine.optimizer).__name__ != "FP16_UnfusedOptimizer":
        return
    where = f'"gradient_clipping": {clip} (1.0 if not set) at ZeRO stage 0 in 16 bit with'
    what_to_do = 'with any optimizer. Use ZeRO stage 1, or "gradient_clipping": 0.'
    if tp > 1:
        raise ValueError(
            f"{where} {tp} tensor-parallel ranks: DeepSpeed's norm there counts the first rank's gradients only, "
            f"{what_to_do}"
        )
    if engine.has_moe_layers:
        raise ValueError(f"{where} MoE layers: DeepSpeed's norm there leaves out all experts, {what_to_do}")
