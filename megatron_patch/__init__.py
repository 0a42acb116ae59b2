# SPDX-License-Identifier: Apache-2.0
"""Everything that knows Megatron: process groups for DeepSpeed, CPU shims, models, tagging, Megatron's optimizers.

Import it before ``deepspeed.initialize``: the import registers the reader of Megatron-core's layers
with `ds_blockwise`. Without DeepSpeed, give `convert_` what ``get_megatron_optimizer`` returned.
"""

from ds_blockwise.runs.model_shape import GPTShape
from megatron_patch import apex_guard  # apex_guard first: see there
from megatron_patch import reader as tagging  # apex_guard first: see there
from megatron_patch.convert import convert_
from megatron_patch.cpu_shims import cpu_shims
from megatron_patch.meta import build_meta_gpt, build_small_gpt
from megatron_patch.model import build_gpt
from megatron_patch.mpu import MpuAdapter, mpu_adapter

__all__ = [
    "GPTShape",
    "MpuAdapter",
    "apex_guard",
    "build_gpt",
    "build_meta_gpt",
    "build_small_gpt",
    "convert_",
    "cpu_shims",
    "mpu_adapter",
    "tagging",
]
