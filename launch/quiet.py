# SPDX-License-Identifier: Apache-2.0
"""Import first: drops warnings about optional packages, which every process would repeat."""

import warnings

warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
warnings.filterwarnings("ignore", message="Apex is not installed")
warnings.filterwarnings("ignore", message="full scope is deprecated")  # Megatron-core's own default
warnings.filterwarnings("ignore", message="`torch.distributed.all_gather_into_tensor` is deprecated")  # in DeepSpeed
