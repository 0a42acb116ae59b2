# SPDX-License-Identifier: Apache-2.0
"""What the process imports from which ranks are forked: only what is slow, and nothing that changes a host."""

import gc
from importlib import import_module
from importlib.util import find_spec

import torch

_SLOW = {
    "deepspeed": ("deepspeed", "deepspeed.checkpoint.ds_to_universal", "deepspeed.moe.layer", "deepspeed.pipe"),
    "megatron": ("megatron.core.models.gpt", "megatron.core.optimizer", "megatron.core.distributed"),
    "transformers": ("transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3"),
    "triton": ("triton", "triton.language"),
}

torch.set_num_threads(1)  # a process with more threads must not be forked
import_module("torch._dynamo")
for host, modules in _SLOW.items():
    if find_spec(host) is not None:
        for module in modules:
            import_module(module)
gc.collect()
gc.freeze()  # a million objects that no collection of a rank need look at, or copy
