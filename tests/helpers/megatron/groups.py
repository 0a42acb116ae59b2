# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's process groups for one test case."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


@contextmanager
def megatron_groups(**sizes: Any) -> Iterator[None]:
    """``initialize_model_parallel(**sizes)``, and on leaving nothing of it remains.

    Megatron-core forgets its groups and never ends them. Each of gloo's has threads: after twenty cases a process had a
    thousand, and the kernel took most of the time.
    """
    from megatron.core import parallel_state

    registered = dist.distributed_c10d._world.pg_map
    before = set(registered)
    parallel_state.initialize_model_parallel(**sizes)
    made = [group for group in registered if group not in before]
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        for group in made:
            if group in registered:  # Megatron-core ends some
                dist.destroy_process_group(group)
