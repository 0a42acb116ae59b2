# SPDX-License-Identifier: Apache-2.0
"""Megatron-core models without memory or peers, for ``ds-blockwise blocks``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from ds_blockwise.runs.model_shape import GPTShape
from megatron_patch.cpu_shims import cpu_shims
from megatron_patch.model import build_gpt


def build_meta_gpt(path: str | Path) -> GPTModel:
    """Build the model of a file such as ``configs/model/tiny.yaml`` on the meta device.

    Initialises ``torch.distributed`` (gloo, one rank, in memory) and ``parallel_state`` if nobody has.

    Args:
        path: a model file; see `GPTShape`.

    Raises:
        ValueError: every mistake in the file.
    """
    shape = GPTShape.load(path)
    _prepare()
    with torch.device("meta"):
        return build_gpt(shape)


def build_small_gpt(path: str | Path) -> GPTModel:
    """Build a small model with the attention of a file's model and real fp32 weights on the CPU.

    One layer, a small vocabulary and a narrow FFN; hidden size and heads as in the file. Initialises what
    `build_meta_gpt` does.

    Args:
        path: a model file; see `GPTShape`.

    Raises:
        ValueError: every mistake in the file.
    """
    shape = GPTShape.load(path)
    _prepare()
    small = replace(
        shape,
        num_layers=1,
        ffn_hidden_size=min(shape.ffn_hidden_size, 64),
        vocab_size=min(shape.vocab_size, 256),
        num_parameters=None,
    )
    return build_gpt(small, cpu_initialization=True)


def _prepare() -> None:
    cpu_shims()
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but missing from its module's exports
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
