# SPDX-License-Identifier: Apache-2.0
"""Everything that knows Megatron: process groups for DeepSpeed, models, roles of weights, Megatron's optimizers.

Import it before ``deepspeed.initialize``: the import registers the reader of Megatron-core's layers
with `ds_blockwise`. Without DeepSpeed, give `convert_` what ``get_megatron_optimizer`` returned, or (since
Megatron-core 0.18) ask that function for one of `MEGATRON_NAMES`.
"""

from ds_blockwise.runs.model_shape import GPTShape
from ds_blockwise.tagging.module_reader import register_reader
from megatron_patch import guard  # first of this package: see there
from megatron_patch.convert import MEGATRON_NAMES, convert_, register_optimizers
from megatron_patch.model import build_gpt, build_meta_gpt, build_small_gpt
from megatron_patch.mpu import MpuAdapter, mpu_adapter
from megatron_patch.reader import MegatronReader
from megatron_patch.without_cuda import cpu_shims

__all__ = [
    "MEGATRON_NAMES",
    "GPTShape",
    "MpuAdapter",
    "build_gpt",
    "build_meta_gpt",
    "build_small_gpt",
    "convert_",
    "cpu_shims",
    "guard",
    "mpu_adapter",
    "register_optimizers",
]

register_reader(MegatronReader())
register_optimizers()
