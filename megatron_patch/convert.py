# SPDX-License-Identifier: Apache-2.0
"""Training with Megatron-core alone: its optimizer, converted in place into one of ours.

The wrappers that ``get_megatron_optimizer`` built stay, and with them gradient norm, clipping, loss scaling and
schedules: they read and write the same param groups. Only what steps inside them changes. Multipliers live in there
and never in ``group["lr"]``, so schedules, ``decoupled_lr``, overrides and resumed runs keep their meaning.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn

from ds_blockwise.blocks.block_settings import BlockPolicy
from ds_blockwise.hosts.pipeline_stages import check_rules, check_tied, rules_matched
from ds_blockwise.hosts.stepped_tensors import Stepped, check_agreement, group_of
from ds_blockwise.optimizers.adam_mini import BlockwiseAdamMini
from ds_blockwise.optimizers.adamw import BlockwiseAdamW
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.settings import MomentumDtype, check_group
from ds_blockwise.parallel.agree import is_first_rank, raise_together
from ds_blockwise.parallel.reduce import ReductionGroups
from ds_blockwise.values import suggest
from megatron_patch import checkpoint, chunks, partitions

logger = logging.getLogger(__name__)

Kind = Literal["BlockwiseAdamW", "BlockwiseAdamMini"]
KINDS: dict[str, type[BlockwiseOptimizer]] = {
    "BlockwiseAdamW": BlockwiseAdamW,
    "BlockwiseAdamMini": BlockwiseAdamMini,
}
_RUINOUS_BETA2 = 0.999  # Megatron-LM's default for --adam-beta2; Adam-mini's authors warn of it


@dataclass(frozen=True)
class _Conversion:
    """One wrapper, what will step inside it, and what that steps."""

    leaf: Any
    inner: BlockwiseOptimizer
    stepped: tuple[Stepped, ...]
    groups: tuple[ReductionGroups, ...]
    is_expert: bool


def convert_(
    optimizer: Any,
    model_chunks: nn.Module | Sequence[nn.Module],
    kind: Kind = "BlockwiseAdamMini",
    *,
    lr_multipliers: object = None,
    weight_decay_multipliers: object = None,
    granularity: object = None,
    rules: object = None,
    momentum_dtype: MomentumDtype = "fp32",
    backend: str = "auto",
    telemetry: object = None,
) -> Any:
    """Let the optimizer that ``get_megatron_optimizer`` returned step as one of ours, in place.

    A collective over all ranks. Call it once, before the first step and before a checkpoint is loaded (AdamW's
    checkpoints load into both kinds). Learning rate, betas, eps and weight decay are those of the param groups, which
    stay the same dicts. The optimizer is left as it was if an error is raised.

    A step with NaN or infinite gradients is skipped where Megatron-core looks for them, that is with a loss scale
    (fp16, or ``loss_scale`` set); otherwise ``check_for_nan_in_grad`` stops the run.

    Args:
        optimizer: a ``ChainedOptimizer`` (also layer-wise), ``FP32Optimizer``, ``Float16OptimizerWithFloat16Params``
            or ``DistributedOptimizer``.
        model_chunks: what was given to ``get_megatron_optimizer``. Their parameters are tagged, unless
            ``ds_blockwise.tag_parameters`` already did; layers count from 0 in every chunk.
        kind: ``"BlockwiseAdamMini"`` or ``"BlockwiseAdamW"``.
        lr_multipliers: see `ds_blockwise.BlockwiseAdamW`; so are the four below. ``"auto"`` needs ``total_num_steps``
            and a model that one optimizer steps (experts have another).
        weight_decay_multipliers: per block type or role.
        granularity: per block type, role or ``"bias"``.
        rules: list of ``{"match": regex, ...}``; each must match a parameter of some pipeline stage.
        momentum_dtype: ``"fp32"`` or ``"bf16"``.
        backend: ``"auto"``, ``"cpp"``, ``"triton"`` or ``"reference"``.
        telemetry: see `measure.readings.TelemetrySettings`. Readings go to ``on_telemetry`` of each wrapper's
            inner ``optimizer``; what they know of clipping is None.

    Returns:
        ``optimizer``.

    Raises:
        ValueError: on every rank: a setting that is not supported (``use_precision_aware_optimizer``,
            ``optimizer_cpu_offload``, ``use_megatron_fsdp``, ...), an unknown parameter, ranks that differ, copies of
            an embedding on several pipeline stages that would be stepped differently.
        TypeError: a setting or an optimizer of the wrong type.
        ImportError: a version of Megatron-core that lacks names the conversion relies on.

    Source: facts of Megatron-core 0.16.1, ``megatron/core/optimizer``.
    """
    settings = {
        "lr_multipliers": lr_multipliers,
        "weight_decay_multipliers": weight_decay_multipliers,
        "granularity": granularity,
        "rules": rules,
        "momentum_dtype": momentum_dtype,
        "backend": backend,
        "telemetry": telemetry,
    }
    wrapped = [model_chunks] if isinstance(model_chunks, nn.Module) else list(model_chunks)
    leaves: list[Any] = []
    models: list[nn.Module] = []
    matched: list[bool] = []
    policy = BlockPolicy()
    conversions: list[_Conversion] = []
    failure: Exception | None = None
    try:
        _check_kind(kind)
        leaves = partitions.leaves_of(optimizer)
        for leaf in leaves:
            partitions.check_version(leaf)
            partitions.check_settings(leaf)
        models = [chunks.unwrapped(chunk) for chunk in wrapped]
        policy = BlockPolicy.parse(lr_multipliers, weight_decay_multipliers, granularity, rules)
        matched = rules_matched(chunks.names_in(models), policy)
    except Exception as error:  # a rank that fails alone would leave the others waiting: all hear of it, all raise
        failure = error
    raise_together(failure)
    check_rules(matched, policy, "Layers are numbered from 0 in every stage.")
    try:
        conversions = _prepare(leaves, models, KINDS[kind], settings)
        _connect(conversions, len(leaves), asked=telemetry is not None or policy.auto is not None)
    except Exception as error:  # as above
        failure = error
    raise_together(failure)
    check_tied(chunks.tied_copies(models, functools.partial(_group_of, conversions)))
    for conversion in conversions:
        _compare(conversion, wrapped[0], whole_lists=_all_ranks_hold_all(optimizer))
    for conversion in conversions:
        _install(conversion)
    _warn_of_beta2(kind, conversions)
    return optimizer


def _check_kind(kind: object) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}{suggest(kind, KINDS)}")


def _prepare(
    leaves: Sequence[Any],
    models: Sequence[nn.Module],
    kind: type[BlockwiseOptimizer],
    settings: dict[str, Any],
) -> list[_Conversion]:
    """Build and bind the new inner optimizers; nothing of the wrappers changes."""
    inners = [None if leaf.is_stub_optimizer else _inner(leaf.optimizer, kind, settings) for leaf in leaves]
    for inner in inners:
        if inner is not None:
            chunks.tag(models, inner)
            break
    conversions = []
    for leaf, inner in zip(leaves, inners, strict=True):
        if inner is None:
            continue  # everything in it is frozen
        stepped, groups = [], []
        params = partitions.stepped_by(leaf)
        for param, item in params:
            reduced_over = partitions.groups_for(leaf, param, item)
            if item.tensor is None:
                inner.bind_absent(item.placements, reduced_over, param.device)
            else:
                inner.bind(item.tensor, item.placements, reduced_over)
            stepped.append(item)
            if reduced_over not in groups:
                groups.append(reduced_over)
        is_expert = any(group.get("is_expert_parallel", False) for group in inner.param_groups)
        conversions.append(_Conversion(leaf, inner, tuple(stepped), tuple(groups), is_expert))
    return conversions


def _inner(old: Any, kind: type[BlockwiseOptimizer], settings: dict[str, Any]) -> BlockwiseOptimizer:
    """One of ours on the very param groups of another optimizer."""
    defaults = {key: old.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
    # torch refuses to build an optimizer on fp32 shards, which are views of the model's parameters
    new = kind([nn.Parameter(torch.empty(0))], **defaults, **settings)
    for index, group in enumerate(old.param_groups):
        check_group(group, f"param_groups[{index}].")
    new.param_groups = old.param_groups
    return new


def _connect(conversions: Sequence[_Conversion], num_leaves: int, *, asked: bool) -> None:
    """Let the inner optimizers measure, where that was asked for."""
    meters = [conversion.inner.meter for conversion in conversions]
    if asked and len(meters) < num_leaves:
        raise ValueError(
            "telemetry and measured multipliers need something to train in every optimizer of every rank: readings are "
            "collectives, and this rank would not take part. Leave telemetry out, and give fixed lr_multipliers."
        )
    for meter in meters:
        if meter is None:
            continue
        if meter.auto is not None and num_leaves > 1:
            raise ValueError(
                f'lr_multipliers "auto" compares block types with norms, but {num_leaves} optimizers step parts of '
                f"this model (experts have their own), each of which sees its part alone. Give fixed multipliers."
            )
        meter.host(total_num_steps=None, warmup_num_steps=None, norm_source=lambda: (None, 0.0))


def _group_of(conversions: Sequence[_Conversion], param: nn.Parameter) -> dict[str, Any] | None:
    found = (group_of(param, conversion.inner, conversion.stepped) for conversion in conversions)
    return next((group for group in found if group is not None), None)


def _all_ranks_hold_all(optimizer: Any) -> bool:
    # the layer-wise optimizer gives whole parameters to single ranks: data-parallel peers differ by design
    return getattr(optimizer, "dp_cp_params_list", None) is None


def _compare(conversion: _Conversion, chunk: nn.Module, *, whole_lists: bool) -> None:
    leaf, is_expert = conversion.leaf, conversion.is_expert
    data_peers = partitions.data_peers_of(leaf, chunk, is_expert=is_expert) if whole_lists else None
    tensor_peers = partitions.tp_group_of(leaf, is_expert=is_expert)
    check_agreement(conversion.inner, conversion.stepped, data_peers, tensor_peers, "settings")


def _install(conversion: _Conversion) -> None:
    leaf = conversion.leaf
    if isinstance(leaf, DistributedOptimizer):
        partitions.point_to_shards(leaf)
    leaf.optimizer = conversion.inner
    leaf.init_state_fn = checkpoint.allocate_state
    leaf.reduction_groups = conversion.groups
    leaf.__class__ = checkpoint.CONVERTED[type(leaf)]


def _warn_of_beta2(kind: str, conversions: Sequence[_Conversion]) -> None:
    beta2 = max((cast("float", g["betas"][1]) for c in conversions for g in c.inner.param_groups), default=0.0)
    if kind == "BlockwiseAdamMini" and beta2 >= _RUINOUS_BETA2 and is_first_rank():
        logger.warning(
            "adam_beta2=%g is known to ruin Adam-mini. Set it to 0.95 (adam_beta2, --adam-beta2) unless you tried it.",
            beta2,
        )
