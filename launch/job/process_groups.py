# SPDX-License-Identifier: Apache-2.0
"""What every process of a job sets up: threads, process groups, random states; and collectives on small values."""

from __future__ import annotations

import logging
import os
import random
from dataclasses import dataclass
from typing import TypedDict

import deepspeed
import numpy
import torch
from deepspeed.accelerator import get_accelerator
from megatron.core import parallel_state, tensor_parallel

import megatron_patch
from data.pool import usable_cores
from ds_blockwise.runs.reading.problems import Problems
from ds_blockwise.runs.run_file import ParallelConfig


class _RandomStatesOfGpu(TypedDict, total=False):
    cuda: torch.Tensor
    megatron: dict[str, torch.Tensor]  # of the tracker, by the name of the random state


class RandomStates(_RandomStatesOfGpu):
    """A process's random states, in plain containers and tensors: they load with `weights_only`."""

    python: tuple[object, ...]
    numpy: tuple[str, torch.Tensor, int, int, float]
    torch: torch.Tensor


@dataclass(frozen=True)
class Processes:
    """This process's ranks, and its data-parallel group.

    Attributes:
        rank: Global rank.
        world_size: Number of processes.
        dp_rank: Rank in the data-parallel group.
        dp_size: Size of the data-parallel group: copies of the model.
        dp_group: The data-parallel group.
        device: Of this process's tensors.
    """

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    dp_group: torch.distributed.ProcessGroup
    device: torch.device

    def mean(self, total: torch.Tensor, count: torch.Tensor) -> float:
        """Sum of the totals over the data-parallel ranks, divided by the sum of the counts."""
        summed, counted = self.sums(total, count)
        return summed / counted

    def sums(self, *values: torch.Tensor) -> list[float]:
        """Each value summed over the data-parallel ranks."""
        stacked = torch.stack([value.double() for value in values])
        torch.distributed.all_reduce(stacked, group=self.dp_group)
        return [float(value) for value in stacked]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process; all must call."""
        return self.sum_over_world(int(flag)) > 0

    def sum_over_world(self, value: int) -> int:
        """Sum of a whole number over all processes."""
        total = torch.tensor(value, dtype=torch.int64, device=self.device)
        torch.distributed.all_reduce(total)
        return int(total)


def make_process_groups(parallel: ParallelConfig, seed: int, store: torch.distributed.Store) -> Processes:
    """Make torch's, DeepSpeed's and Megatron's process groups, and seed the initial weights.

    Args:
        parallel: Sizes of the groups.
        seed: Of the weights; equal on all ranks of a data-parallel group by construction.
        store: From `rendezvous.connect`.
    """
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    timeout = deepspeed.constants.default_pg_timeout  # DEEPSPEED_TIMEOUT
    if not torch.distributed.is_initialized():
        backend = get_accelerator().communication_backend_name()
        rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    deepspeed.init_distributed()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        distributed_timeout_minutes=timeout.total_seconds() / 60,
    )
    megatron_patch.cpu_shims()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Processes(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_group=parallel_state.get_data_parallel_group(),
        device=torch.device(get_accelerator().current_device_name()),
    )


def prepare_process(verbose: bool = False) -> None:
    """Set log levels and threads; call it before the first collective.

    Args:
        verbose: Show what DeepSpeed reports of itself.
    """
    deepspeed.utils.logger.setLevel(logging.INFO if verbose else logging.WARNING)
    if not torch.cuda.is_available():
        _share_cores()


def agree(problems: Problems) -> None:
    """Raise on every rank if any rank has found a problem, with the problems of all ranks.

    Raises:
        ValueError: Lists each different problem once.
    """
    gathered: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, problems.lines)
    problems.lines = list(dict.fromkeys(line for lines in gathered for line in lines))
    problems.raise_if_any()


def random_states() -> RandomStates:
    """The random states of this process."""
    state = numpy.random.get_state(legacy=False)
    keys, position = state["state"]["key"], state["state"]["pos"]
    states: RandomStates = {
        "python": random.getstate(),
        # the order of numpy's older format, which `restore_random_states` gives back
        "numpy": (
            state["bit_generator"],
            torch.from_numpy(keys.astype(numpy.int64)),
            position,
            state["has_gauss"],
            state["gauss"],
        ),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
        states["megatron"] = tensor_parallel.get_cuda_rng_tracker().get_states()
    return states


def restore_random_states(states: RandomStates) -> None:
    """Set this process's random states to what `random_states` returned."""
    random.setstate(states["python"])
    name, keys, position, has_gauss, gauss = states["numpy"]
    numpy.random.set_state((name, keys.numpy().astype(numpy.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
        tensor_parallel.get_cuda_rng_tracker().set_states(states["megatron"])


def _share_cores() -> None:
    """Give each process its share of the cores; torch would give all of them to each."""
    if "OMP_NUM_THREADS" not in os.environ:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        torch.set_num_threads(max(1, usable_cores() // local))
