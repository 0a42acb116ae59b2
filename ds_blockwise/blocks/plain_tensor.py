# SPDX-License-Identifier: Apache-2.0
"""Whether a tensor is a plain one, whose elements lie in its own memory."""

from __future__ import annotations

import torch

USE_ZERO = (
    'Train it with DeepSpeed, whose "zero_optimization": {"stage": 3} also shards parameters, or with replicated '
    "parameters (DDP)"
)
"""The way out for those whose parameters another library has sharded."""


def wrapper_problem(tensor: torch.Tensor) -> str | None:
    """Why the memory of a tensor is not its elements, with the way out; None if it is.

    Args:
        tensor: a parameter or a gradient.
    """
    cls = type(tensor)
    names = [base.__name__ for base in cls.__mro__]
    if "DTensor" in names:
        return f"it is a DTensor, a shard of FSDP2 or of DTensor-based tensor parallelism. {USE_ZERO}"
    if getattr(tensor, "_is_flat_param", False):
        return f"it is a flat parameter of FullyShardedDataParallel (FSDP1). {USE_ZERO}"
    if "UninitializedTensorMixin" in names:
        return "its lazy module has not seen an input yet. Run the model once first"
    if cls.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"it is a {cls.__name__}, a tensor class that keeps its elements in other tensors. Use plain tensors"
    if tensor.is_nested or tensor.layout != torch.strided:
        layout = "nested" if tensor.is_nested else str(tensor.layout)
        return f"its layout is {layout}. Use a dense tensor (for an embedding sparse=False)"
    return None
