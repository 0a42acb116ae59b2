# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed settings under which the optimizers would be wrong or silently replaced, each with its reason.

One list for a JSON before anything runs (``ds-blockwise check``, without DeepSpeed installed) and for an engine before
its optimizer is built (`checks.check_config`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ds_blockwise.optimizers.registry import OPTIMIZERS


@dataclass(frozen=True)
class EngineFacts:
    """What the refusals depend on.

    Attributes:
        optimizer: class name of ours.
        zero_stage: 0 to 3.
        is_pipeline: the model is a DeepSpeed PipelineModule.
        zenflow: ``"zenflow"`` is set.
        super_offload: ``"super_offload"`` is true.
        offload_device: ``"cpu"``, ``"nvme"``; None without optimizer offload.
        offload_ratio: share of the optimizer that is offloaded.
        master_weights_16_bit: names of the settings that keep master weights in 16 bits.
        elastic_checkpoint: ``"elastic_checkpoint"`` is true.
        skips_rank_by_rank: fp16 autocast with ``"compute_grad_norm": false``.
        fused_step: the optimizer's ``"fused_step"`` is true.
        precision: ``"fp16"``, ``"torch_autocast"``, ``"bf16"`` or ``"fp32"``.
        grad_accum_dtype: what ``"data_types"`` say; None if nothing.
        deepcompile: ``"compile"`` has ``"deepcompile": true``.
        has_experts: the model has MoE layers of DeepSpeed's.
        managed_accumulation: ``"managed_gradient_accumulation"`` is not false.
    """

    optimizer: str
    zero_stage: int = 0
    is_pipeline: bool = False
    zenflow: bool = False
    super_offload: bool = False
    offload_device: str | None = None
    offload_ratio: float = 1.0
    master_weights_16_bit: tuple[str, ...] = ()
    elastic_checkpoint: bool = False
    skips_rank_by_rank: bool = False
    fused_step: bool = False
    precision: str = "fp32"
    grad_accum_dtype: str | None = None
    deepcompile: bool = False
    has_experts: bool = False
    managed_accumulation: bool = True


def refusals(facts: EngineFacts) -> Iterator[str]:
    """Every reason why these settings are refused: the setting, why, what to set instead."""
    cls = OPTIMIZERS.get(facts.optimizer)
    per_block = cls is not None and cls.second_moment == "block"  # and ranks wait for each other in a step
    if facts.zenflow:
        yield (
            '"zenflow": it updates selected columns with an AdamW of its own and stores weights transposed. Remove '
            '"zenflow" from "zero_optimization".'
        )
    if facts.super_offload:
        yield (
            '"super_offload": it steps the offloaded parameters with DeepSpeedCPUAdam and never calls ours. Set '
            '"super_offload": false.'
        )
    if facts.is_pipeline and facts.zero_stage > 1:
        yield (
            f'"zero_optimization": {{"stage": {facts.zero_stage}}} with a PipelineModule: DeepSpeed\'s pipeline engine '
            f'works with ZeRO stage 0 and 1 only. Set "stage": 1.'
        )
    if facts.offload_device is not None and facts.offload_ratio < 1.0:
        yield (
            f'"offload_optimizer": {{"ratio": {facts.offload_ratio}}}: partial offload works with DeepSpeedCPUAdam '
            f'only. Set "ratio": 1.0.'
        )
    if per_block and facts.offload_device == "nvme":
        yield (
            '"offload_optimizer": {"device": "nvme"}: the swapper needs state in the shape of the parameters, and one '
            'second moment per block is not. Use "device": "cpu".'
        )
    for name in facts.master_weights_16_bit:
        yield f'"{name}": the master weights are updated in fp32. Set it to false.'
    if facts.elastic_checkpoint:
        yield (
            '"elastic_checkpoint": it cuts state tensors by the padding of the parameters and cannot be loaded. Set it '
            "to false; use universal checkpoints to change the number of ranks."
        )
    if per_block and facts.skips_rank_by_rank:
        yield (
            '"compute_grad_norm": false with fp16 torch_autocast: the gradient scaler then skips steps rank by rank, '
            "and the others would wait for ever. Set it to true."
        )
    if facts.fused_step:
        yield from _without_fused_step(facts)


def _without_fused_step(facts: EngineFacts) -> Iterator[str]:
    """Every reason why DeepSpeed's cast, clipping and copy cannot be done in the optimizer's pass."""
    either = 'Write "fused_step": false, or'
    if facts.zero_stage not in (1, 2):
        yield (
            f'"fused_step": true with "zero_optimization": {{"stage": {facts.zero_stage}}}: it takes the place of '
            f'the step of ZeRO stages 1 and 2. {either} "stage": 1 or 2.'
        )
    if facts.is_pipeline:
        yield '"fused_step": true with a PipelineModule, whose steps nobody has compared. Write "fused_step": false.'
    if facts.precision in ("fp16", "torch_autocast"):
        yield (
            f'"fused_step": true with "{facts.precision}": its scale changes between steps in a way that was not '
            f'compared. {either} train in "bf16" or fp32.'
        )
    if facts.offload_device is not None:
        yield (
            f'"fused_step": true with "offload_optimizer": {{"device": "{facts.offload_device}"}}: gradients are cast '
            f"on their way to the host there. {either} remove the offload."
        )
    if facts.zero_stage == 1 and facts.precision == "bf16" and facts.grad_accum_dtype == "fp32":
        yield (
            '"fused_step": true with "grad_accum_dtype": "fp32" in bf16 at ZeRO stage 1: DeepSpeed then steps in '
            f'another class, BF16_Optimizer. {either} "stage": 2, or leave "grad_accum_dtype" out.'
        )
    elif facts.grad_accum_dtype not in (None, "fp32", facts.precision):
        yield (
            f'"fused_step": true with "grad_accum_dtype": "{facts.grad_accum_dtype}": the kernels scale gradients of '
            f'bf16 models in bf16 or fp32, of fp32 models in fp32. {either} leave "grad_accum_dtype" out.'
        )
    if facts.deepcompile:
        yield (
            '"fused_step": true with "deepcompile": true: its compiled graphs hand over gradients in a form of their '
            f'own. {either} "deepcompile": false.'
        )
    if facts.has_experts:
        yield '"fused_step": true with MoE layers, whose steps nobody has compared. Write "fused_step": false.'
    if not facts.managed_accumulation:
        yield (
            '"fused_step": true with "managed_gradient_accumulation": false, whose steps nobody has compared. '
            f'{either} "managed_gradient_accumulation": true.'
        )


def facts_of_json(config: Mapping[str, object]) -> EngineFacts:
    """The facts in a DeepSpeed JSON, with DeepSpeed's defaults for what it leaves out.

    Args:
        config: the JSON, of which sections that are not objects count as absent.
    """
    zero = _section(config, "zero_optimization")
    offload = _section(zero, "offload_optimizer")
    device = str(offload.get("device", "none"))
    autocast = _section(config, "torch_autocast")
    fp16 = bool(autocast.get("enabled")) and "bfloat16" not in str(autocast.get("dtype", "bfloat16"))
    stage = zero.get("stage", 0)
    params = _section(_section(config, "optimizer"), "params")
    accumulated = _section(config, "data_types").get("grad_accum_dtype")
    ratio = offload.get("ratio", 1.0)
    return EngineFacts(
        optimizer=str(_section(config, "optimizer").get("type")),
        zero_stage=stage if isinstance(stage, int) else 0,
        zenflow=bool(zero.get("zenflow")),
        super_offload=bool(offload.get("super_offload")),
        offload_device=None if device == "none" else device,
        offload_ratio=float(ratio) if isinstance(ratio, (int, float)) else 1.0,
        master_weights_16_bit=tuple(
            name
            for precision in ("bf16", "fp16")
            if _section(config, precision).get(name := f"{precision}_master_weights_and_grads")
        ),
        elastic_checkpoint=bool(zero.get("elastic_checkpoint")),
        skips_rank_by_rank=fp16 and zero.get("compute_grad_norm") is False,
        fused_step=params.get("fused_step") is True,
        precision=_precision(config),
        grad_accum_dtype=None if accumulated is None else _DTYPE_NAMES.get(str(accumulated), str(accumulated)),
        deepcompile=bool(_section(config, "compile").get("deepcompile")),
        managed_accumulation=config.get("managed_gradient_accumulation") is not False,
    )


_DTYPE_NAMES = {
    name: short
    for short, names in {
        "fp32": "torch.float32 float32 float",
        "bf16": "torch.bfloat16 bfloat16 bfloat",
        "fp16": "torch.float16 float16 half",
    }.items()
    for name in names.split()
}


def _precision(config: Mapping[str, object]) -> str:
    names = {"fp16": "fp16", "torch_autocast": "torch_autocast", "bf16": "bf16", "bfloat16": "bf16"}
    return next((of for name, of in names.items() if _section(config, name).get("enabled")), "fp32")


def _section(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    found = config.get(key)
    return found if isinstance(found, Mapping) else {}
