# SPDX-License-Identifier: Apache-2.0
"""What Megatron-core needs to run on a machine without CUDA (tests, the demo, a laptop).

Some functions of Megatron-core that every GPT model calls ask for the CUDA device, and models with experts look up a
name that only Transformer Engine defines. Each is replaced here, with the reason beside it. With CUDA nothing is.
"""

from __future__ import annotations

import functools

import torch


def cpu_shims() -> None:
    """Let a Megatron-core GPT model be built and trained on the CPU.

    Does nothing when CUDA is available, and nothing the second time. Build models after it, with
    ``use_cpu_initialization=True`` (`build_gpt` does). A model with dropout does not get separate
    random streams for each tensor-parallel rank: LLaMA shapes have no dropout.
    """
    if torch.cuda.is_available() or getattr(torch.cuda.current_device, "_is_cpu_shim", False):
        return
    from megatron.core.fusions import fused_softmax
    from megatron.core.tensor_parallel import random as tensor_parallel_random
    from megatron.core.transformer.moe import moe_utils

    # Embeddings, rotary embeddings and parameter allocation ask for the current CUDA device by
    # calling this function; torch raises without a driver.
    torch.cuda.current_device = _cpu_device  # type: ignore[assignment]
    # The default tracker saves and restores CUDA generators around attention. Megatron-core's own
    # inference tracker has the same interface and leaves generators alone.
    tensor_parallel_random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    # Activation checkpointing saves and restores the CUDA generator beside the CPU's; here there is only one.
    tensor_parallel_random._get_cuda_rng_state = _no_generator
    tensor_parallel_random._set_cuda_rng_state = _keep_generator
    # The causal mask is created with device="cuda" when the caller passes none.
    fused_softmax.get_default_causal_mask = _causal_mask
    # The router asks whether this function is None, but the name exists only where Transformer Engine is installed.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _no_generator(*_: object, **__: object) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _keep_generator(*_: object, **__: object) -> None:
    """Nothing to restore."""


def _cpu_device() -> torch.device:
    return torch.device("cpu")


_cpu_device._is_cpu_shim = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=32)  # as upstream: one mask for each sequence length
def _causal_mask(sequence_length: int) -> torch.Tensor:
    """Bool [sequence, sequence]; True where attention is forbidden (above the diagonal)."""
    return torch.ones(sequence_length, sequence_length, dtype=torch.bool).triu(diagonal=1)
