# SPDX-License-Identifier: Apache-2.0
"""A DeepSpeed engine in one process, over a model that is nothing but large matrices."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator

import torch
from torch import nn

RULES = [{"match": "proj", "role": "ffn"}]
"""What our optimizers need to know of `matrices`."""


class _Layer(nn.Module):
    """Two matrices, as large as most are."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden, 4 * hidden, bias=False)
        self.down_proj = nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A residual layer."""
        return x + self.down_proj(self.up_proj(x))


def matrices(hidden: int, layers: int) -> nn.Module:
    """A model with 8 hidden^2 parameters in each layer."""
    return nn.Sequential(*[_Layer(hidden) for _ in range(layers)])


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0"}
    os.environ["WORLD_SIZE"] = "1"
    import torch.distributed as dist

    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints while it is imported
        import deepspeed

        deepspeed.init_distributed("gloo", verbose=False)
    try:
        yield
    finally:
        dist.destroy_process_group()
