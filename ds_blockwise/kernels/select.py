# SPDX-License-Identifier: Apache-2.0
"""Which kernels step which tensors: what a machine can run, what was asked for, and saying so once."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import socket

import torch

from ds_blockwise.kernels.base import Kernels, ReferenceKernels
from ds_blockwise.kernels.cpp.build import BuildError
from ds_blockwise.kernels.self_check import disagreement

logger = logging.getLogger(__name__)


@functools.cache
def _reference() -> Kernels:
    return ReferenceKernels()


@functools.cache
def _cpp() -> Kernels:
    from ds_blockwise.kernels.cpp.backend import CppKernels

    return CppKernels()


@functools.cache
def _triton() -> Kernels:
    from ds_blockwise.kernels.triton.backend import TritonKernels

    return TritonKernels()


def _triton_unavailable(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    try:
        from ds_blockwise.kernels.triton.backend import unavailable
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return unavailable(device)


@functools.cache
def _chosen(device_type: str, index: int | None) -> tuple[Kernels, str | None]:
    """What ``"auto"`` means for a device, and why it is only the reference; cached, so that it is said once."""
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    try:
        kernels, problem = _preferred(device), None
    except (BuildError, ValueError) as error:
        kernels, problem = _reference(), str(error)
    rank = os.environ.get("RANK")
    if problem is not None:
        # on every rank: one alone may lack what the others have
        logger.warning(
            "ds_blockwise: %s tensors%s are stepped by the reference backend, which is several times slower: %s",
            device_type,
            "" if rank is None else f" of rank {rank} on {socket.gethostname()}",
            problem,
        )
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        logger.info("ds_blockwise: %s tensors are stepped by the %s backend", device_type, kernels.name)
    return kernels, problem


def why_reference(backend: str, device: torch.device) -> str | None:
    """Why a setting that allows other kernels means the reference for a device; None if it does not."""
    return _chosen(device.type, device.index)[1] if backend == "auto" else None


def _preferred(device: torch.device) -> Kernels:
    if device.type == "cpu":
        return _cpp()
    problem = _triton_unavailable(device) or _triton_fails(device)
    if problem is not None:
        raise ValueError(problem)
    return _triton()


def _triton_fails(device: torch.device) -> str | None:
    try:
        return disagreement(_triton(), device)
    except Exception as error:  # compilers and drivers raise whatever they like; all of it is shown
        return f"its Triton kernels cannot be compiled or run: {type(error).__name__}: {str(error)[:300]}"


def kernels_for(backend: str, device: torch.device) -> Kernels:
    """The kernels that step tensors of a device; the same object at every call.

    Args:
        backend: ``"auto"`` (C++ on the CPU, Triton elsewhere, the reference with a warning where they cannot be had),
            ``"cpp"``, ``"triton"`` or ``"reference"``.
        device: where the stepped tensor lies.

    Raises:
        ValueError: the backend that was asked for by name cannot be had here.
    """
    if backend == "auto":
        return _chosen(device.type, device.index)[0]
    if backend == "cpp":
        try:
            return _cpp()
        except BuildError as error:
            raise ValueError(f'backend "cpp" cannot be had: {error}. Or use "auto" or "reference".') from error
    if backend == "triton":
        problem = _triton_unavailable(device)
        if problem is not None:
            raise ValueError(f'backend "triton" cannot be had: {problem}. Or use "auto" or "reference".')
        return _triton()
    assert backend == "reference", "settings.check_backend refuses others"
    return _reference()
