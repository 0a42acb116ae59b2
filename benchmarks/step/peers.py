# SPDX-License-Identifier: Apache-2.0
"""Who runs in the kernel benchmark: our optimizers with every backend, and their peers.

A contender that this machine cannot have is listed with the reason, never left out in silence.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.step.shapes import Case
from ds_blockwise.kernels.foreign_apex import foreign_apex
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.optimizers.settings import BACKENDS
from ds_blockwise.parallel.reduce import LOCAL

ADAMW, ADAM_MINI, LION = "AdamW", "Adam-mini", "Lion"
_FAMILY = {"element": ADAMW, "block": ADAM_MINI, "none": LION}
HYPER = {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

# fp32 parameters (read, written) and gradients (read); moments are read and written
_PARAM_AND_GRAD = 12
_MOMENT = {"fp32": 8, "bf16": 4}

Build = Callable[..., torch.optim.Optimizer]


class Unavailable(Exception):
    """Why a contender cannot run here."""


@dataclass(frozen=True)
class Contender:
    """One optimizer in the benchmark.

    Attributes:
        name: unique; how tables and the option ``--without`` call it.
        family: ``AdamW``, ``Adam-mini`` or ``Lion``: what its update must equal.
        backend: of our optimizers; empty for peers.
        momentum: dtype of the first moment.
        bytes_per_parameter: what a step must move at least; state of one value per block is not counted.
        state_bytes: state per parameter, for the estimate of memory.
        build: makes the optimizer; takes the case and settings that replace those of `HYPER`.
        tolerance: of its update against the reference, in units of the largest update.
    """

    name: str
    family: str
    backend: str
    momentum: str
    bytes_per_parameter: int
    state_bytes: int
    build: Build
    tolerance: float = 1e-4

    @property
    def ours(self) -> bool:
        """Whether it is one of this package's optimizers."""
        return bool(self.backend)


@dataclass(frozen=True)
class Missing:
    """A contender that cannot run, or not on this layout."""

    name: str
    reason: str


def bytes_that_move(family: str, momentum: str = "fp32") -> int:
    """Bytes per parameter: AdamW 28, Adam-mini and Lion 20 with fp32 momentum."""
    return _PARAM_AND_GRAD + _MOMENT[momentum] + (_MOMENT["fp32"] if family == ADAMW else 0)


# ------------------------------------------------------------------------------------------ ours


def build_ours(cls: type, case: Case, **settings: object) -> torch.optim.Optimizer:
    """Our optimizer on a case, as a host would leave it: whole tensors carry their blocks, a flat one is bound."""
    optimizer = cls(case.params, **{**HYPER, **settings})
    if case.layout == "flat":
        optimizer.bind(case.params[0], case.placements, LOCAL)
    return optimizer


def _ours(device: torch.device) -> Iterator[Contender | Missing]:
    for family, cls in families().items():
        for backend in (name for name in BACKENDS if name != "auto"):
            problem = _problem(cls, backend, device)
            if problem is None:
                yield _our_contender(cls, family, backend, "fp32")
            else:
                yield Missing(f"{cls.__name__}[{backend}]", problem)
        default = _kernels(cls, "auto", device)
        yield _our_contender(cls, family, default if default in BACKENDS else "reference", "bf16")


def families() -> dict[str, type[BlockwiseOptimizer]]:
    """Our optimizer of each family. (Muon has a benchmark of its own: its time is that of its products.)"""
    stepped = (cls for cls in OPTIMIZERS.values() if cls.second_moment != "block" or cls.can_be_measured)
    return {_FAMILY[cls.second_moment]: cls for cls in stepped}


def _kernels(cls: type[BlockwiseOptimizer], backend: str, device: torch.device) -> str:
    return cls([torch.nn.Parameter(torch.zeros(1))], backend=backend).kernels_on(device).name


def _problem(cls: type[BlockwiseOptimizer], backend: str, device: torch.device) -> str | None:
    if backend == "cpp" and device.type != "cpu":
        return f"it is not for {device.type}"
    try:
        _kernels(cls, backend, device)
    except Exception as error:  # whatever it is, the reason goes into the table
        return _first_line(error)
    return None


def _our_contender(cls: type, family: str, backend: str, momentum: str) -> Contender:
    def build(case: Case, **settings: object) -> torch.optim.Optimizer:
        return build_ours(cls, case, **{"backend": backend, "momentum_dtype": momentum, **settings})

    suffix = "" if momentum == "fp32" else f", {momentum} momentum"
    state = _MOMENT[momentum] // 2 + (4 if family == ADAMW else 0)
    return Contender(
        f"{cls.__name__}[{backend}]{suffix}",
        family,
        backend,
        momentum,
        bytes_that_move(family, momentum),
        state,
        build,
    )


# ----------------------------------------------------------------------------------------- peers


def _deepspeed_cpu_adam() -> Build:
    cls = _import("deepspeed.ops.adam", "DeepSpeedCPUAdam", "pip install deepspeed")
    return lambda case, **settings: cls(case.params, **{**HYPER, **settings}, adamw_mode=True)


def _deepspeed_cpu_lion() -> Build:
    cls = _import("deepspeed.ops.lion", "DeepSpeedCPULion", "pip install deepspeed")

    def build(case: Case, **settings: object) -> torch.optim.Optimizer:
        taken = {**HYPER, **settings}
        del taken["eps"]
        return cls(case.params, **taken)

    return build


def _deepspeed_fused_adam() -> Build:
    cls = _import("deepspeed.ops.adam", "FusedAdam", "pip install deepspeed")
    return lambda case, **settings: cls(case.params, **{**HYPER, **settings}, adam_w_mode=True)


def _torch_fused() -> Build:
    return lambda case, **settings: torch.optim.AdamW(case.params, **{**HYPER, **settings}, fused=True)


def _torch_foreach() -> Build:
    return lambda case, **settings: torch.optim.AdamW(case.params, **{**HYPER, **settings}, foreach=True)


def _apex_fused_adam() -> Build:
    foreign = foreign_apex()
    if foreign is not None:
        raise Unavailable(foreign)
    cls = _import("apex.optimizers", "FusedAdam", "build it from NVIDIA's repository")
    return lambda case, **settings: cls(case.params, **{**HYPER, **settings}, adam_w_mode=True)


def _te_fused_adam() -> Build:
    cls = _import("transformer_engine.pytorch.optimizers", "FusedAdam", "pip install transformer-engine")
    return lambda case, **settings: cls(case.params, **{**HYPER, **settings}, adam_w_mode=True)


def _torchao_8bit() -> Build:
    cls = _import("torchao.optim", "AdamW8bit", "pip install torchao")
    return lambda case, **settings: cls(case.params, **{**HYPER, **settings})


def _published_adam_mini() -> Build:
    cls = _import("adam_mini", "Adam_mini", "pip install adam-mini")

    def build(case: Case, **settings: object) -> torch.optim.Optimizer:
        if case.layout == "flat":
            raise Unavailable("it only steps whole two-dimensional weights")
        shape = case.shape
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = cls(
                case.named,
                **{**HYPER, **settings},
                dim=shape.hidden_size,
                n_heads=shape.num_heads,
                n_kv_heads=shape.num_kv_heads,
                verbose=False,
            )
        optimizer.head_numel = shape.head_dim * shape.hidden_size  # what it means by dim * dim / heads
        return optimizer

    return build


PEERS: dict[str, tuple[str, tuple[str, ...], Callable[[], Build]]] = {
    "DeepSpeedCPUAdam": (ADAMW, ("cpu",), _deepspeed_cpu_adam),
    "DeepSpeedCPULion": (LION, ("cpu",), _deepspeed_cpu_lion),
    "torch AdamW fused": (ADAMW, ("cpu", "cuda"), _torch_fused),
    "torch AdamW foreach": (ADAMW, ("cpu", "cuda"), _torch_foreach),
    "adam-mini (published)": (ADAM_MINI, ("cpu", "cuda"), _published_adam_mini),
    "DeepSpeed FusedAdam": (ADAMW, ("cuda",), _deepspeed_fused_adam),
    "apex FusedAdam": (ADAMW, ("cuda",), _apex_fused_adam),
    "TE FusedAdam": (ADAMW, ("cuda",), _te_fused_adam),
    "torchao AdamW8bit": (ADAMW, ("cuda",), _torchao_8bit),
}
_ASKED = "left out by --without"
_EIGHT_BIT = "torchao AdamW8bit"


def _peers(device: torch.device, names: list[str]) -> Iterator[Contender | Missing]:
    for name in names:
        family, devices, find = PEERS[name]
        if device.type not in devices:
            yield Missing(name, f"it is not for {device.type}")
            continue
        try:
            build = find()
            _try_once(build, family, device)
        except Exception as error:  # whatever it is, the reason goes into the table
            yield Missing(name, _first_line(error))
            continue
        if name == _EIGHT_BIT:
            # two moments of one byte, read and written; its first update is right to what 8 bits hold
            yield Contender(name, family, "", "8 bit", _PARAM_AND_GRAD + 4, 2, build, tolerance=0.1)
        else:
            state = 8 if family == ADAMW else 4
            yield Contender(name, family, "", "fp32", bytes_that_move(family), state, build)


def _try_once(build: Build, family: str, device: torch.device) -> None:
    """Compile, if it compiles at first use, and step 4096 numbers."""
    if family == ADAM_MINI:
        return
    param = torch.nn.Parameter(torch.zeros(4096, device=device))
    param.grad = torch.ones_like(param)
    case = Case("", "flat", None, param.data, param.grad, [param], (), [])  # type: ignore[arg-type]
    build(case).step()


def _import(module: str, name: str, remedy: str) -> type:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise Unavailable(f"{_first_line(error)} ({remedy})") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def find_contenders(device: torch.device, without: list[str]) -> tuple[list[Contender], list[Missing]]:
    """Everybody who can run on a device.

    Args:
        device: where the tensors lie.
        without: names to leave out; a part of a name leaves out every contender that has it.

    Returns:
        Contenders, and those that cannot run with the reason.

    Raises:
        ValueError: an entry of ``without`` is in no name.
    """
    names = {*PEERS}
    every: list[Contender | Missing] = []
    for entry in _ours(device):
        names.add(entry.name)
        every.append(Missing(entry.name, _ASKED) if _matches(entry.name, without) else entry)
    every += [Missing(name, _ASKED) for name in PEERS if _matches(name, without)]
    every += _peers(device, [name for name in PEERS if not _matches(name, without)])
    for word in without:
        if not any(_matches(name, [word]) for name in names):
            raise ValueError(f"--without {word!r} is in no contender's name; these exist: {', '.join(sorted(names))}")
    contenders = [entry for entry in every if isinstance(entry, Contender)]
    return contenders, [entry for entry in every if isinstance(entry, Missing)]


def _matches(name: str, words: list[str]) -> bool:
    return any(word.lower() in name.lower() for word in words)
