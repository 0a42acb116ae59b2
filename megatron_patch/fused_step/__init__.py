# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's cast, clipping and copy in the optimizer's own pass over memory: the setting ``fused_step``."""
