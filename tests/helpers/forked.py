# SPDX-License-Identifier: Apache-2.0
"""Ranks that are forked from a process which has imported the hosts: a spawn in a second instead of ten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.multiprocessing as mp

from tests.helpers import ROOT, distributed


@contextmanager
def forked_hosts() -> Iterator[None]:
    """Within it, ``distributed.run_cases`` forks its processes from a fork server that has the hosts in memory."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.deepspeed.reshard_preload"])
    with pytest.MonkeyPatch.context() as patch:
        # the fork server is a process of its own, which has to find the tests and to choose the accelerator
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr(distributed.mp, "get_context", lambda method: context)
        yield
