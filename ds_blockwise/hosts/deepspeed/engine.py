# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: D102 - the methods are DeepSpeed's, and most of their names say what they return
"""What we use of DeepSpeed's engine and of its optimizer wrappers, as types, and a few questions put to every engine.

DeepSpeed has no types. A name that a later version drops or renames has to be changed here first. Checked with
DeepSpeed 0.19.8; does not import it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypedDict, TypeGuard

import torch
import torch.distributed as dist
from torch import nn

Loaded: TypeAlias = tuple[str | None, dict[str, object] | None]
"""What ``load_checkpoint`` returns: the path and the client state, or None for both."""


class LoadOptions(TypedDict):
    """Arguments of ``load_checkpoint`` that DeepSpeed and we take alike."""

    load_module_strict: bool
    load_optimizer_states: bool
    load_lr_scheduler_states: bool
    load_module_only: bool
    custom_load_fn: object


class OffloadConfig(Protocol):
    """The section ``"offload_optimizer"`` of the JSON, parsed."""

    device: object
    ratio: float


class EventWriter(Protocol):
    """What takes numbers of a run: TensorBoard, CSV, W&B."""

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        """Write (name, value, step) triples."""


class Monitor(EventWriter, Protocol):
    """Where the engine writes curves: it passes them on to the writers that the JSON asks for."""

    enabled: bool
    csv_monitor: EventWriter | None


class Schedule(Protocol):
    """A learning rate schedule."""

    def state_dict(self) -> Mapping[str, object]:
        """Its position."""

    def load_state_dict(self, state_dict: Any) -> None:
        """Take a position."""


class CheckpointEngine(Protocol):
    """What writes and reads the files of a checkpoint (``runtime/checkpoint_engine/checkpoint_engine.py``)."""

    def create(self, info: object) -> object:
        """Called when a checkpoint begins."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder."""

    def save(self, state_dict: dict[str, object], path: str) -> object:
        """Write one file, if this rank is one that writes."""

    def commit(self, info: object) -> object:
        """Called when all files of a checkpoint have been saved."""

    def is_decoupled(self) -> bool:
        """Whether files are written while training goes on."""


class Wrapper(Protocol):
    """What ``engine.optimizer`` is, whether it wraps the basic optimizer or is that itself.

    Attributes:
        overflow: whether the last step was skipped.
        clip_grad: norm that gradients are clipped to; the basic optimizer itself has none.
    """

    overflow: bool
    clip_grad: float

    def step(self) -> object:
        """Step the basic optimizer."""

    def zero_grad(self) -> None:
        """Forget the gradients."""


class EngineConfig(Protocol):
    """What ``deepspeed.initialize`` was given as JSON, parsed."""

    _param_dict: Mapping[str, Any]


class Engine(Protocol):
    """A ``DeepSpeedEngine`` or ``PipelineEngine``.

    Attributes:
        module: the model.
        optimizer: the wrapper, or the basic optimizer where DeepSpeed needs none.
        basic_optimizer: the optimizer that was named in the JSON or given by the client.
        client_optimizer: what ``deepspeed.initialize`` was given as ``optimizer``.
        param_names: name of every parameter of the model, after AutoTP.
        mpu: what says how ranks are grouped; a module or an object.
        seq_data_parallel_group: ranks over which gradients are averaged; None for all.
        pipeline_parallelism: whether the model is a ``PipelineModule``.
    """

    module: nn.Module
    optimizer: Wrapper
    basic_optimizer: object
    client_optimizer: object
    param_names: Mapping[torch.Tensor, str]
    mpu: object
    monitor: Monitor
    lr_scheduler: Schedule | None
    client_lr_scheduler: object
    checkpoint_engine: CheckpointEngine
    device: torch.device | str
    global_rank: int
    local_rank: int
    global_steps: int
    micro_steps: int
    seq_data_parallel_group: dist.ProcessGroup | None
    seq_parallel_group: dist.ProcessGroup
    seq_dp_world_size: int
    mp_world_size: int
    has_moe_layers: bool
    pipeline_parallelism: bool
    destroy: Callable[..., None]
    save_checkpoint: Callable[..., bool]
    load_checkpoint: Callable[..., Loaded]
    _is_gradient_accumulation_boundary: bool | None
    _config: EngineConfig

    def __call__(self, *inputs: object, **options: object) -> Any: ...
    def optimizer_name(self) -> str | None: ...
    def scheduler_name(self) -> str | None: ...
    def scheduler_params(self) -> Mapping[str, object] | None: ...
    def gradient_clipping(self) -> float: ...
    def gradient_accumulation_steps(self) -> int: ...
    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None: ...
    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> object: ...
    def zero_grad(self) -> None: ...
    def bfloat16_enabled(self) -> bool: ...
    def fp16_enabled(self) -> bool: ...
    def bf16_master_weights_and_gradients(self) -> bool: ...
    def fp16_master_weights_and_gradients(self) -> bool: ...
    def torch_autocast_enabled(self) -> bool: ...
    def torch_autocast_dtype(self) -> object: ...
    def autotp_size(self) -> int: ...
    def super_offload(self) -> bool: ...
    def zero_optimization(self) -> bool: ...
    def zero_optimization_stage(self) -> int: ...
    def zero_optimization_partition_weights(self) -> bool: ...
    def zero_offload_optimizer(self) -> OffloadConfig | None: ...
    def zero_elastic_checkpoint(self) -> bool: ...
    def zero_compute_grad_norm(self) -> bool: ...
    def zero_round_robin_gradients(self) -> bool: ...
    def use_node_local_storage(self) -> bool: ...
    def load_universal_checkpoint(self) -> bool: ...
    def _configure_basic_optimizer(self, model_parameters: Iterable[object] | None) -> Any: ...
    def _configure_zero_optimizer(self, optimizer: None) -> Any: ...
    def _get_all_ckpt_names(self, checkpoints_path: str, tag: str) -> list[str]: ...
    def _get_zero_ckpt_name(self, checkpoints_path: str, tag: str) -> str | Path: ...
    def _get_buffer_names(self) -> list[str]: ...
    def _get_zero_param_shapes(self) -> list[Mapping[str, Sequence[int]]]: ...


class FrozenEngineOptimizer(Wrapper, Protocol):
    """``DeepSpeedZeRoOffload``, which is an engine's ``optimizer`` where it has none, with what we add to it."""

    optimizer: object
    param_groups: list[dict[str, Any]]


class ZeroStages1And2(Wrapper, Protocol):
    """``DeepSpeedZeroOptimizer``: per group one flat buffer, of which each rank steps one window."""

    round_robin_bit16_groups: Sequence[Sequence[nn.Parameter]]
    bit16_groups_flat: Sequence[torch.Tensor]
    single_partition_of_fp32_groups: Sequence[torch.Tensor]
    partition_size: Sequence[int]
    offload_states: Callable[..., None]
    reload_states: Callable[..., None]
    real_dp_process_group: Sequence[dist.ProcessGroup | None]
    _hp_optimizer_states_linked: bool
    _link_all_hp_params: Callable[..., None]

    def update_lp_params(self) -> None:
        """Round the fp32 weights into the model's; a collective."""


class Timer(Protocol):
    """One of DeepSpeed's timers."""

    def start(self) -> None:
        """Start it."""

    def stop(self) -> None:
        """Stop it."""


class Timers(Protocol):
    """DeepSpeed's timers, by name."""

    def __call__(self, name: str) -> Timer:
        """The timer of a name."""

    def log(self, names: Sequence[str]) -> None:
        """Write what they measured."""


class ZeroStep(ZeroStages1And2, Protocol):
    """``DeepSpeedZeroOptimizer`` as its ``step`` uses it."""

    step: Callable[..., None]  # ours is put in its place
    dtype: torch.dtype
    loss_scale: float
    compute_grad_norm: bool
    check_grad_overflow: bool
    partition_gradients: bool
    micro_step_id: int
    has_moe_layers: bool
    gradient_accumulation_dtype: torch.dtype
    nccl_start_alignment_factor: int
    allgather_bucket_size: int
    timers: Timers
    averaged_gradients: dict[int, Sequence[torch.Tensor] | None]
    all_grad_tensors: dict[int, Sequence[torch.Tensor] | None]
    bit16_groups: Sequence[Sequence[nn.Parameter]]
    params_in_partition: Sequence[Sequence[nn.Parameter]]
    params_not_in_partition: Sequence[Sequence[nn.Parameter]]
    parallel_partitioned_bit16_groups: Sequence[Sequence[torch.Tensor]]
    _global_grad_norm: torch.Tensor | float | None
    check_overflow: Callable[..., None]
    scaled_global_norm: Callable[[], torch.Tensor]
    unscale_and_clip_grads: Callable[[list[torch.Tensor], torch.Tensor | None], None]
    flatten: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    flatten_dense_tensors_aligned: Callable[[Sequence[torch.Tensor], int], torch.Tensor]
    free_grad_in_param_list: Callable[[Sequence[nn.Parameter]], None]
    _get_preflattened_grad_partition: Callable[[int], torch.Tensor | None]
    _release_preflattened_grad_buffers: Callable[..., None]
    _update_model_bit16_weights: Callable[[int], None]
    _update_scale: Callable[[bool], None]
    _optimizer_step: Callable[[int], None]


class BF16Optimizer(Wrapper, Protocol):
    """``BF16_Optimizer``: as ZeRO stages 1 and 2, with fp32 gradients."""

    bf16_groups: Sequence[Sequence[nn.Parameter]]
    fp32_groups_flat_partition: Sequence[torch.Tensor]
    real_dp_process_group: Sequence[dist.ProcessGroup | None]
    _hp_optimizer_states_linked: bool
    _link_all_hp_params: Callable[..., None]

    def update_lp_params(self) -> None:
        """Round the fp32 weights into the model's; a collective."""


class PartitionedParameter(Protocol):
    """What zero.Init adds to a parameter: each rank of a group holds one piece of it."""

    data: torch.Tensor
    ds_numel: int
    ds_shape: torch.Size
    ds_tensor: torch.Tensor
    ds_process_group: dist.ProcessGroup

    def partition_numel(self) -> int:
        """Elements of one piece, padding included."""


def is_partitioned(param: object) -> TypeGuard[PartitionedParameter]:
    """Whether zero.Init has cut a parameter."""
    return hasattr(param, "ds_tensor")


def whole_numel(param: torch.Tensor) -> int:
    """Elements of a parameter before zero.Init cut it."""
    return int(getattr(param, "ds_numel", param.numel()))


class ZeroStage3(Wrapper, Protocol):
    """``DeepSpeedZeroOptimizer_Stage3``: per sub-group one flat tensor of pieces of its parameters."""

    fp16_groups: Sequence[Sequence[PartitionedParameter]]
    fp16_partitioned_groups: Sequence[Sequence[PartitionedParameter]]
    fp16_partitioned_groups_flat: Sequence[torch.Tensor]
    fp32_partitioned_groups_flat: Sequence[torch.Tensor]
    dp_process_group: dist.ProcessGroup | None
    swap_optimizer: bool
    offloaded_states: set[object]
    hp_params_pin_buffers: Sequence[torch.Tensor]
    get_full_hp_param: Callable[..., torch.Tensor | None]
    set_full_hp_param: Callable[..., None]
    get_local_fp32_param: Callable[..., torch.Tensor | None]
    set_local_hp_param: Callable[..., None]
    get_hp_param_device: Callable[..., torch.device | None]
    set_fp32_grad_for_param: Callable[..., None]
    update_fp32_grad_for_param_vectorized: Callable[..., None]
    offload_states: Callable[..., None]

    def unflatten(self, flat: torch.Tensor, like: Sequence[PartitionedParameter]) -> Sequence[torch.Tensor]:
        """Views of a flat tensor, one for each piece."""

    def checkpoint_event_prologue(self) -> None:
        """Cut the small parameters that every rank keeps whole."""

    def checkpoint_event_epilogue(self) -> None:
        """Gather them again; a collective."""


class UnfusedOptimizer(Wrapper, Protocol):
    """``FP16_UnfusedOptimizer``: ZeRO stage 0 in 16 bit, an fp32 copy of each parameter."""

    fp16_groups: Sequence[Sequence[nn.Parameter]]
    fp32_groups: Sequence[Sequence[torch.Tensor]]


def is_wrapped(engine: Engine) -> bool:
    """Whether DeepSpeed steps the basic optimizer through a wrapper of its own; not at ZeRO stage 0 in fp32."""
    return engine.optimizer is not engine.basic_optimizer


def set_optimizers(engine: Engine, basic: object, optimizer: Any) -> None:
    """Give an engine its optimizer, and the basic one inside that, as its ``_configure_optimizer`` does."""
    engine.basic_optimizer, engine.optimizer = basic, optimizer


def offload_device(engine: Engine) -> str:
    """Where the optimizer's state is kept: ``cpu``, ``nvme``, or ``none`` without optimizer offload."""
    offload = engine.zero_offload_optimizer()
    return "none" if offload is None else str(getattr(offload.device, "value", offload.device))


VERIFY = ("all", "own", "size")
"""Values of ``"checkpoint": {"verify": ...}`` in the JSON; see `verifies`."""


def sequence_parallel_size(engine: Engine) -> int:
    """Ranks that share each sequence; 1 without sequence parallelism."""
    return int(getattr(engine, "sequence_parallel_size", 1))


def tensor_parallel_mpu(engine: Engine) -> object:
    """The engine's ``mpu`` if it says how tensors are split, else None.

    That of DeepSpeed's Ulysses (``parallel_state_sp``) calls sequence-parallel ranks, which hold the same tensors,
    model-parallel.
    """
    return None if hasattr(engine.mpu, "initialize_sequence_parallel") else engine.mpu


def trusts(engine: Engine) -> bool:
    """Whether the DeepSpeed JSON says ``"checkpoint": {"trust": true}``: load files that can run code.

    Raises:
        ValueError: it says something else than true or false.
    """
    value = _of_checkpoint(engine, "trust", False)
    if not isinstance(value, bool):
        raise ValueError(f'"checkpoint": {{"trust": ...}} must be true or false, got {value!r}')
    return value


def verifies(engine: Engine) -> str:
    """What of a checkpoint's contents is compared with its manifest: the JSON's ``"checkpoint": {"verify": ...}``.

    ``all`` (default): every file, each by one rank of its storage. ``own``: on each rank the files that it reads (of
    pipelines, experts, portable and universal checkpoints: all). ``size``: none. Names and sizes are compared in every
    case.

    Raises:
        ValueError: it says something else.
    """
    value = _of_checkpoint(engine, "verify", VERIFY[0])
    if value not in VERIFY:
        raise ValueError(f'"checkpoint": {{"verify": ...}} must be one of {", ".join(VERIFY)}, got {value!r}')
    return str(value)


def _of_checkpoint(engine: Engine, key: str, default: object) -> object:
    section = engine._config._param_dict.get("checkpoint")
    return section.get(key, default) if isinstance(section, Mapping) else default
