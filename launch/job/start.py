# SPDX-License-Identifier: Apache-2.0
"""From a command line to a model in its engine: shared by the main job and by the sharpness probe."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch

import megatron_patch
from ds_blockwise.runs.engine_json import parameter_dtype
from ds_blockwise.runs.run_file import RunConfig
from job.batches import BatchLoader, RunData
from job.process_groups import Processes, make_process_groups, prepare_process
from job.rendezvous import Host, RankInfo, connect
from preflight import load_and_check


@dataclass(frozen=True)
class Job:
    """One execution of a run, after the rendezvous.

    Attributes:
        run: The run, checked.
        config: DeepSpeed's configuration for it.
        this_rank: This process, as its launcher numbered it.
        store: From the rendezvous.
        hosts: All hosts.
        processes: This process's ranks, and its data-parallel group.
    """

    run: RunConfig
    config: dict[str, Any]
    this_rank: RankInfo
    store: torch.distributed.Store
    hosts: tuple[Host, ...]
    processes: Processes


def start_job(options: argparse.Namespace) -> Job:
    """Rendezvous with the other processes, compare the run with theirs, make the process groups.

    Raises:
        ValueError: Lists what is wrong with the configuration or differs between hosts.
        TimeoutError: Ranks did not come up.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    this_rank = RankInfo.from_environment()
    prepare_process(options.verbose)
    store = connect(this_rank)
    run, config, hosts = load_and_check(options, this_rank, store)
    processes = make_process_groups(run.parallel, run.training.seed, store)
    return Job(run, config, this_rank, store, hosts, processes)


def build_engine(job: Job, data: RunData) -> tuple[deepspeed.DeepSpeedEngine, BatchLoader]:
    """The engine around a new model, and its data.

    Args:
        job: The run and its processes.
        data: The prepared data, from `check_data`.
    """
    run, processes = job.run, job.processes
    batches = BatchLoader(run, data, dp_rank=processes.dp_rank, dp_size=processes.dp_size, device=processes.device)
    model = megatron_patch.build_gpt(
        run.shape,
        dtype=parameter_dtype(job.config),
        activation_checkpointing=run.training.activation_checkpointing,
        model_class=run.model_class,
    )
    engine, _, _, _ = deepspeed.initialize(model=model, config=job.config, mpu=megatron_patch.mpu_adapter())
    return engine, batches
