# SPDX-License-Identifier: Apache-2.0
"""Training with Megatron-core alone: its optimizer, converted in place into one of ours, or built as one by name.

The wrappers that ``get_megatron_optimizer`` built stay, and with them gradient norm, clipping, loss scaling and
schedules: they read and write the same param groups. Only the inner optimizer, which steps, is replaced. It applies
the multipliers and never writes them to ``group["lr"]``, so schedules, ``decoupled_lr``, overrides and resumed runs
keep their meaning.

Since 0.18 Megatron-core has a registry of optimizers, which it builds apart from Adam: whole on every rank, without its
distributed optimizer, and only where the package ``emerging-optimizers`` is installed. So our names are put into the
registry, but the function that would build them asks for Adam, and converts it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import megatron.core.optimizer as megatron_optimizers
import torch
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn

from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.hosts.fused_step import check_kernels
from ds_blockwise.hosts.pipeline_stages import check_rules, check_tied, rules_matched
from ds_blockwise.hosts.stepped_tensors import Stepped, check_agreement, group_of
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.optimizers.settings import OPTIMIZER_KEYS, MomentumDtype, check_group
from ds_blockwise.parallel.agree import is_first_rank, raise_together
from ds_blockwise.values import suggest
from megatron_patch import checkpoint, chunks, partitions
from megatron_patch.fused_step.distributed_optimizer import FusedDistributedOptimizer
from megatron_patch.fused_step.refusals import check_can_fuse
from megatron_patch.wrappers import Wrapper, check_settings, check_version, wrappers_in

logger = logging.getLogger(__name__)

_RUINOUS_BETA2 = 0.999  # Megatron-LM's default for --adam-beta2; Adam-mini's authors warn of it


_BUILDER = "_get_megatron_emerging_optimizer"  # what get_megatron_optimizer calls for any name but adam and sgd
_MARK = "calls_ds_blockwise"

P = ParamSpec("P")
R = TypeVar("R")
OptimizerT = TypeVar("OptimizerT")

#: {name for Megatron-core's ``OptimizerConfig.optimizer``: name of the class}
MEGATRON_NAMES: dict[str, str] = {re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", kind).lower(): kind for kind in OPTIMIZERS}


@dataclass(frozen=True)
class _Conversion:
    """One wrapper, what will step inside it, and what that steps."""

    wrapper: Wrapper
    inner: BlockwiseOptimizer
    stepped: tuple[Stepped, ...]
    is_expert: bool


def convert_(
    optimizer: OptimizerT,
    model_chunks: nn.Module | Sequence[nn.Module],
    kind: str = "BlockwiseAdamMini",
    *,
    lr_multipliers: object = None,
    weight_decay_multipliers: object = None,
    granularity: object = None,
    rules: object = None,
    transfer: object = None,
    betas_by_type: object = None,
    cautious_weight_decay: bool = False,
    momentum_dtype: MomentumDtype = "fp32",
    backend: str = "auto",
    telemetry: object = None,
    fused_step: bool = False,
    **own: Any,
) -> OptimizerT:
    """Let the optimizer that ``get_megatron_optimizer`` returned step as one of ours, in place.

    A collective over all ranks. Call it once, before the first step and before a checkpoint is loaded (AdamW's
    checkpoints load into all kinds). Learning rate, betas, eps and weight decay are those of the param groups, which
    stay the same dicts. The optimizer is left as it was if an error is raised.

    A step with NaN or infinite gradients is skipped where Megatron-core looks for them, that is with a loss scale
    (fp16, or ``loss_scale`` set); otherwise ``check_for_nan_in_grad`` stops the run.

    Args:
        optimizer: a ``ChainedOptimizer`` (also layer-wise), ``FP32Optimizer``, ``Float16OptimizerWithFloat16Params``
            or ``DistributedOptimizer``.
        model_chunks: what was given to ``get_megatron_optimizer``. Their parameters are tagged, unless
            ``ds_blockwise.tag_parameters`` already did; layers count from 0 in every chunk.
        kind: name of one of our optimizers.
        lr_multipliers: as in `ds_blockwise.BlockwiseAdamW`, like all below but ``telemetry``. ``"auto"`` needs
            ``total_num_steps`` and a model that one optimizer steps (experts have another).
        weight_decay_multipliers: per block type or role.
        granularity: per block type, role or ``"bias"``.
        rules: list of ``{"match": regex, ...}``; each must match a parameter of some pipeline stage.
        transfer: ``{"base_width": 256}``.
        betas_by_type: pairs of betas, per block type or role.
        cautious_weight_decay: weight decay only where it agrees with the update.
        momentum_dtype: ``"fp32"`` or ``"bf16"``.
        backend: ``"auto"``, ``"cpp"``, ``"triton"`` or ``"reference"``.
        telemetry: see `measure.readings.TelemetrySettings`. Readings go to ``on_telemetry`` of each wrapper's
            inner ``optimizer``; what they know of clipping is None.
        fused_step: with `BlockwiseAdamW` and `BlockwiseAdamMini` in ``DistributedOptimizer``: clip, update and write
            the model's weights in one pass over memory. The results are the same bits.
        **own: settings that only ``kind`` has, such as ``momentum`` and ``orthogonalize`` of `BlockwiseMuon`.

    Returns:
        ``optimizer``.

    Raises:
        ValueError: on every rank: a setting that is not supported (``use_precision_aware_optimizer``,
            ``optimizer_cpu_offload``, ``use_megatron_fsdp``, ...), what ``fused_step`` does not know, an unknown
            parameter, ranks that differ, copies of an embedding on several pipeline stages that would be stepped
            differently.
        TypeError: a setting or an optimizer of the wrong type.
        ImportError: a version of Megatron-core that lacks names the conversion relies on.

    Source: Megatron-core 0.16 to 0.19, ``megatron/core/optimizer``.
    """
    wrapped = [model_chunks] if isinstance(model_chunks, nn.Module) else list(model_chunks)
    with _together():
        _check_kind(kind)
        _check_own(own)
        build = functools.partial(
            OPTIMIZERS[kind],
            lr_multipliers=lr_multipliers,
            weight_decay_multipliers=weight_decay_multipliers,
            granularity=granularity,
            rules=rules,
            transfer=transfer,
            betas_by_type=betas_by_type,
            cautious_weight_decay=cautious_weight_decay,
            momentum_dtype=momentum_dtype,
            backend=backend,
            telemetry=telemetry,
            fused_step=fused_step,
            **own,
        )
        wrappers = wrappers_in(optimizer)
        for wrapper in wrappers:
            check_settings(wrapper)
            check_version(wrapper)
            if fused_step:
                check_can_fuse(wrapper)
        models = [chunks.unwrapped(chunk) for chunk in wrapped]
        block_settings = BlockSettings.parse(
            lr_multipliers, weight_decay_multipliers, granularity, rules, transfer, betas_by_type
        )
        matched = rules_matched(chunks.names_in(models), block_settings)
    check_rules(matched, block_settings, "Layers are numbered from 0 in every stage.")
    with _together():
        conversions = _prepare(wrappers, models, build)
        _connect(conversions, len(wrappers), asked=telemetry is not None or block_settings.auto is not None)
    check_tied(chunks.tied_copies(models, functools.partial(_group_of, conversions)))
    for conversion in conversions:
        _compare(conversion, wrapped[0], whole_lists=_all_ranks_hold_all(optimizer))
    for conversion in conversions:
        _install(conversion)
    _warn_of_beta2(kind, conversions)
    return optimizer


@contextmanager
def _together() -> Iterator[None]:
    """Collective over all ranks: if one of them fails inside, all raise; else the others would wait for it."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # raised below, on every rank
        failure = error
    raise_together(failure)


def _check_kind(kind: object) -> None:
    if kind not in OPTIMIZERS:
        raise ValueError(f"kind must be one of {', '.join(OPTIMIZERS)}, got {kind!r}{suggest(str(kind), OPTIMIZERS)}")


def _check_own(own: Mapping[str, object]) -> None:
    """Refuse what a converted optimizer takes from elsewhere; unknown keys its constructor refuses."""
    misplaced = next((key for key in own if key in OPTIMIZER_KEYS), None)
    if misplaced is not None:
        raise ValueError(
            f"convert_ does not take {misplaced}: lr, betas, eps and weight_decay are those of the param groups "
            f"(OptimizerConfig), and Megatron-core's checkpoints have a form of their own. Remove it."
        )


def _prepare(
    wrappers: Sequence[Wrapper], models: Sequence[nn.Module], build: Callable[..., BlockwiseOptimizer]
) -> list[_Conversion]:
    """Build the new inner optimizers and bind what they step; nothing of the wrappers changes."""
    inners = [(wrapper, _inner(wrapper.optimizer, build)) for wrapper in wrappers if not wrapper.is_stub_optimizer]
    if inners:
        chunks.tag(models, inners[0][1])
    return [_bound(wrapper, inner) for wrapper, inner in inners]


def _inner(old: torch.optim.Optimizer, build: Callable[..., BlockwiseOptimizer]) -> BlockwiseOptimizer:
    """One of ours on the very param groups of another optimizer."""
    defaults = {key: old.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
    # torch refuses to build an optimizer on fp32 shards, which are views of the model's parameters
    new = build([nn.Parameter(torch.empty(0))], **defaults)
    for index, group in enumerate(old.param_groups):
        check_group(group, f"param_groups[{index}].")
    new.param_groups = old.param_groups
    return new


def _bound(wrapper: Wrapper, inner: BlockwiseOptimizer) -> _Conversion:
    """Bind what a wrapper steps to its new inner optimizer."""
    stepped: list[Stepped] = []
    for param, item in partitions.stepped_by(wrapper):
        groups = partitions.groups_for(wrapper, param, item)
        if item.tensor is None:
            inner.bind_absent(item.placements, groups, param.device)
        else:
            inner.bind(item.tensor, item.placements, groups)
        stepped.append(item)
    if inner.fused_step:
        check_kernels(inner)
    is_expert = any(group.get("is_expert_parallel", False) for group in inner.param_groups)
    return _Conversion(wrapper, inner, tuple(stepped), is_expert)


def _connect(conversions: Sequence[_Conversion], num_wrappers: int, *, asked: bool) -> None:
    """Let the inner optimizers measure, where that was asked for."""
    meters = [conversion.inner.meter for conversion in conversions]
    if asked and len(meters) < num_wrappers:
        raise ValueError(
            "telemetry and measured multipliers need something to train in every optimizer of every rank: readings are "
            "collectives, and this rank would not take part. Leave telemetry out, and give fixed lr_multipliers."
        )
    for meter in meters:
        if meter is None:
            continue
        if meter.auto is not None and num_wrappers > 1:
            raise ValueError(
                f'lr_multipliers "auto" compares block types with norms, but {num_wrappers} optimizers step parts of '
                f"this model (experts have their own), each of which sees its part alone. Give fixed multipliers."
            )
        meter.host(total_num_steps=None, warmup_num_steps=None, norm_source=lambda: (None, 0.0))


def _group_of(conversions: Sequence[_Conversion], param: nn.Parameter) -> Mapping[str, object] | None:
    found = (group_of(param, conversion.inner, conversion.stepped) for conversion in conversions)
    return next((group for group in found if group is not None), None)


def _all_ranks_hold_all(optimizer: object) -> bool:
    # the layer-wise optimizer gives whole parameters to single ranks: data-parallel peers differ by design
    return getattr(optimizer, "dp_cp_params_list", None) is None


def _compare(conversion: _Conversion, chunk: nn.Module, *, whole_lists: bool) -> None:
    wrapper, is_expert = conversion.wrapper, conversion.is_expert
    data_peers = partitions.data_peers_of(wrapper, chunk, is_expert=is_expert) if whole_lists else None
    tensor_peers = partitions.tp_group_of(wrapper, is_expert=is_expert)
    check_agreement(conversion.inner, conversion.stepped, data_peers, tensor_peers, "settings")


def _install(conversion: _Conversion) -> None:
    wrapper = conversion.wrapper
    if isinstance(wrapper, DistributedOptimizer):
        partitions.point_to_shards(wrapper)
    wrapper.optimizer = conversion.inner
    wrapper.init_state_fn = checkpoint.allocate_state
    is_fused = conversion.inner.fused_step
    wrapper.__class__ = FusedDistributedOptimizer if is_fused else checkpoint.CONVERTED[type(wrapper)]


def _warn_of_beta2(kind: str, conversions: Sequence[_Conversion]) -> None:
    beta2 = max((group["betas"][1] for c in conversions for group in c.inner.param_groups), default=0.0)
    if kind == "BlockwiseAdamMini" and beta2 >= _RUINOUS_BETA2 and is_first_rank():
        logger.warning(
            "adam_beta2=%g is known to ruin Adam-mini. Set it to 0.95 (adam_beta2, --adam-beta2) unless you tried it.",
            beta2,
        )


# ----------------------------------------------------------------------------- Megatron-core's own registry


def register_optimizers() -> None:
    """Let ``get_megatron_optimizer`` build ours by name; called by ``import megatron_patch``, idempotent.

    ``OptimizerConfig(optimizer="blockwise_adam_mini", ...)`` asks for one (`MEGATRON_NAMES`). Settings are keyword
    arguments of `convert_`, in a dict that is set on the config:
    ``config.blockwise = {"lr_multipliers": {"emb": 10}}``. The result is that of ``optimizer="adam"`` and `convert_`.
    Does nothing before Megatron-core 0.18, which has no registry.

    Source: Megatron-core 0.18 and 0.19, ``megatron/core/optimizer/__init__.py`` and ``emerging_optimizers.py``.
    """
    build = getattr(megatron_optimizers, _BUILDER, None)
    if build is None or hasattr(build, _MARK):
        return
    from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS, EmergingOptimizerEntry

    for name, kind in MEGATRON_NAMES.items():
        _EMERGING_OPTIMIZERS[name] = EmergingOptimizerEntry(
            optimizer_cls=OPTIMIZERS[kind],
            init_state_fn=checkpoint.allocate_state,
            config_to_kwargs=functools.partial(_refuse_some_groups, name),
            default_param_overrides={},
        )
    setattr(megatron_optimizers, _BUILDER, _building_ours(build))


def _building_ours(build: Callable[P, R]) -> Callable[P, R]:
    signature = inspect.signature(build)

    @functools.wraps(build)
    def build_or_convert(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs).arguments
        config = given["config"]
        if config.optimizer not in MEGATRON_NAMES:
            return build(*args, **kwargs)
        if getattr(config, "use_layer_wise_distributed_optimizer", False):
            raise ValueError(
                f"use_layer_wise_distributed_optimizer=True with optimizer={config.optimizer!r}: set it to False, and "
                f"use_distributed_optimizer=True, which shards the state of this optimizer as well."
            )
        adam = copy.copy(config)
        adam.optimizer = "adam"
        pg_collection = given.get("pg_collection")
        optimizer: R = megatron_optimizers.get_megatron_optimizer(
            adam,
            given["model_chunks"],
            config_overrides=given.get("config_overrides"),
            # upstream does not hand on what it was told: it takes these groups only where it made all groups itself
            use_gloo_process_groups=pg_collection is None and parallel_state._DATA_PARALLEL_GROUP_GLOO is not None,
            pg_collection=pg_collection,
        )
        settings = getattr(config, "blockwise", {})
        return convert_(optimizer, given["model_chunks"], MEGATRON_NAMES[config.optimizer], **settings)

    setattr(build_or_convert, _MARK, True)
    return build_or_convert


def _refuse_some_groups(name: str, *_: object) -> dict[str, object]:
    raise ValueError(
        f"config_overrides give some parameters the optimizer {name!r}: ds_blockwise steps all of them or none. Set "
        f"OptimizerConfig.optimizer to {name!r}; what each parameter gets is told by config.blockwise."
    )
