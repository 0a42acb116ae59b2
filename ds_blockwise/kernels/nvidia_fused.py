# SPDX-License-Identifier: Apache-2.0
"""BlockwiseAdamW by the fused Adam of NVIDIA apex or of Transformer Engine, where one of them is installed.

Both packages have one kernel for lists of tensors that share a learning rate. The slices of a stepped tensor that share
their multipliers are such a list, so there is one launch per pair of multipliers, group and step. Neither kernel knows
one second moment per block: Adam-mini needs the other backends. Nothing here is required; ``"auto"`` never takes it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ds_blockwise.blocks.segment_table import SegmentTable
from ds_blockwise.kernels.base import Item, Kernels
from ds_blockwise.kernels.update import block_lr

FUSED = ("apex", "te")
_DEVICE = "cuda"  # what both packages' kernels are written for
_DECOUPLED, _CORRECTED = 1, 1  # adam_w_mode, bias_correction
_BUILD_APEX = "build NVIDIA's from source (https://github.com/NVIDIA/apex, with its CUDA extensions)"

# Called with (operation, overflow flag, lists of tensors, scalars ...)
Applier = Callable[..., Any]


def foreign_apex() -> str | None:
    """What is wrong with an installed package ``apex`` that is not NVIDIA's; None if there is none.

    The package of that name on PyPI is an unrelated web toolkit. Megatron-core asks only whether ``import apex`` works,
    and then fails to build its norms.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "multi_tensor_apply").is_dir() and (folder / "optimizers").is_dir() for folder in folders):
        return None
    where = spec.origin or ", ".join(map(str, folders))
    return (
        f"the installed package 'apex' ({where}) is not NVIDIA's Apex but another project of that name, which PyPI "
        f"installs for `pip install apex`. Megatron-core takes it for NVIDIA's and fails when it builds a model. Run "
        f"`pip uninstall apex`; nothing here needs Apex. If you want it, {_BUILD_APEX}"
    )


def unavailable(name: str, device: torch.device) -> str | None:
    """Why ``backend`` = ``name`` cannot step tensors of a device; None if it can.

    Args:
        name: ``"apex"`` or ``"te"``.
        device: where the stepped tensors lie.
    """
    if device.type != _DEVICE:
        return f"it steps {_DEVICE.upper()} tensors, and these are on {device}"
    try:
        _load(name)
    except ImportError as error:
        return str(error)
    return None


def _load(name: str) -> tuple[Applier, Any]:
    """The function that walks lists of tensors, and the Adam operation to give it.

    Raises:
        ImportError: with the reason and what to do.
    """
    return _load_apex() if name == "apex" else _load_te()


def _load_apex() -> tuple[Applier, Any]:
    foreign = foreign_apex()
    if foreign is not None:
        raise ImportError(foreign)
    if importlib.util.find_spec("apex") is None:
        raise ImportError(f"NVIDIA's Apex is not installed, and PyPI does not have it: {_BUILD_APEX}")
    try:
        applier = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
        if not applier.available:
            raise ImportError("its multi_tensor_applier says that it is not available")
        return applier, importlib.import_module("amp_C").multi_tensor_adam
    except (ImportError, AttributeError) as error:
        raise ImportError(f"NVIDIA's Apex is installed without its CUDA extensions ({error}): {_BUILD_APEX}") from error


def _load_te() -> tuple[Applier, Any]:
    if importlib.util.find_spec("transformer_engine") is None:
        raise ImportError("Transformer Engine is not installed: pip install 'transformer_engine[pytorch]'")
    try:
        module = importlib.import_module("transformer_engine.pytorch.optimizers.multi_tensor_apply")
        operations = importlib.import_module("transformer_engine_torch")
        return module.multi_tensor_applier, operations.multi_tensor_adam
    except (ImportError, AttributeError, OSError) as error:  # OSError: a shared library that does not load
        raise ImportError(f"Transformer Engine is installed but has no fused Adam to offer: {error}") from error


@dataclass(frozen=True)
class FusedPlan:
    """Ranges ``[start, end)`` of a flat tensor by their multipliers of learning rate and weight decay."""

    slices: dict[tuple[float, float], tuple[tuple[int, int], ...]]


class FusedAdamKernels(Kernels):
    """See `ds_blockwise.kernels.base.Kernels`; fp32 parameters and state only.

    Args:
        name: ``"apex"`` or ``"te"``.

    Raises:
        ImportError: the package, or its kernel, cannot be had.
    """

    name = "fused"

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc] # two packages, one class
        self._apply, self._adam = _load(name)
        self._overflow: dict[torch.device, torch.Tensor] = {}

    def plan(self, table: SegmentTable, device: torch.device) -> FusedPlan:
        """Sort the table's elements by their multipliers.

        Raises:
            ValueError: second moments are shared by blocks, which these kernels do not know.
        """
        if table.shares_second_moment:
            raise ValueError(
                f'backend "{self.name}" keeps one second moment per element, so it works with BlockwiseAdamW only. Use '
                f'"auto" (Triton on a GPU) for BlockwiseAdamMini.'
            )
        slices: dict[tuple[float, float], list[tuple[int, int]]] = {}
        for run in table.multiplier_runs:
            ranges = slices.setdefault((run.lr_multiplier, run.weight_decay_multiplier), [])
            starts = (run.start + index * run.repeat_stride for index in range(run.repeat))
            ranges += [(start, start + run.count) for start in starts if run.count]
        return FusedPlan({key: tuple(ranges) for key, ranges in slices.items()})

    def sum_split_blocks(self, items: Sequence[Item]) -> None:
        """Never due: only shared second moments have sums."""

    def step_(self, items: Sequence[Item]) -> None:
        """See `Kernels.step_`; one launch per pair of multipliers, settings and step count.

        Raises:
            ValueError: a parameter or its state is not fp32.
        """
        launches: dict[tuple[Any, ...], list[list[torch.Tensor]]] = {}
        for item in items:
            item.state["step"] = int(item.state["step"]) + 1
            flats = _flat_tensors(self.name, item)
            for multipliers, ranges in cast("FusedPlan", item.plan).slices.items():
                key = (item.hyper, item.state["step"], item.param.device, *multipliers)
                lists = launches.setdefault(key, [[] for _ in flats])
                for found, flat in zip(lists, flats, strict=True):
                    found += [flat[start:end] for start, end in ranges]
        for (hyper, step, device, lr_multiplier, decay_multiplier), lists in launches.items():
            lr = block_lr(lr_multiplier, lr=float(hyper.lr), lr_floor=hyper.lr_floor)
            decay = hyper.weight_decay * decay_multiplier
            scalars = (lr, hyper.beta1, hyper.beta2, hyper.eps, step, _DECOUPLED, _CORRECTED, decay)
            self._apply(self._adam, self._flag(device), lists, *scalars)
        for item in items:
            if item.param_copy is not None:
                item.param_copy.view(-1).copy_(item.param.detach().view(-1))

    def _flag(self, device: torch.device) -> torch.Tensor:
        # the kernels report infinities here, which DeepSpeed's and Megatron's own checks have looked for already
        if device not in self._overflow:
            self._overflow[device] = torch.zeros(1, dtype=torch.int32, device=device)
        return self._overflow[device]


def _flat_tensors(name: str, item: Item) -> list[torch.Tensor]:
    """Gradient, parameter, first and second moment, 1-D, in the order in which both kernels take them."""
    assert item.grad is not None
    tensors = [item.param.detach(), item.state["exp_avg"], item.state["exp_avg_sq"]]
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        raise ValueError(
            f'backend "{name}" steps fp32 parameters with fp32 moments; one of shape {tuple(item.param.shape)} has '
            f"{', '.join(str(tensor.dtype) for tensor in tensors)} (parameter, exp_avg, exp_avg_sq). Keep fp32 master "
            f'weights (DeepSpeed and Megatron-core do) and "momentum_dtype": "fp32", or use "auto".'
        )
    return [tensor.view(-1) for tensor in (item.grad.to(torch.float32), *tensors)]
