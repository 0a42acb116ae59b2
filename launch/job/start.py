# SPDX-License-Identifier: Apache-2.0
"""From a command line to a model in its engine: what the main job and the probe of its checkpoints do alike."""

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
from job.batches import Batches
from job.process_groups import Processes, prepare_process, start
from job.rendezvous import Host, Place, connect
from preflight import load_and_check


@dataclass(frozen=True)
class Job:
    """A run whose processes have met.

    Attributes:
        run: The run, checked.
        config: DeepSpeed's configuration for it.
        place: Where this process was started.
        store: Where the processes met.
        hosts: All hosts.
        processes: Where this process stands.
    """

    run: RunConfig
    config: dict[str, Any]
    place: Place
    store: torch.distributed.Store
    hosts: tuple[Host, ...]
    processes: Processes


def begin(options: argparse.Namespace) -> Job:
    """Meet the other processes, check the run with them, make the process groups.

    Raises:
        ValueError: Lists what is wrong with the configuration or differs between hosts.
        TimeoutError: Ranks did not come up.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    place = Place.of_this_process()
    prepare_process()
    store = connect(place)
    run, config, hosts = load_and_check(options, place, store)
    processes = start(run.parallel, run.training.seed, store)
    return Job(run, config, place, store, hosts, processes)


def build(job: Job, metadata: dict[str, Any]) -> tuple[deepspeed.DeepSpeedEngine, Batches]:
    """The engine around a new model, and its data.

    Args:
        job: The run and its processes.
        metadata: Description of the prepared data, checked by `check_data`.
    """
    run, processes = job.run, job.processes
    batches = Batches(run, metadata, dp_rank=processes.dp_rank, dp_size=processes.dp_size, device=processes.device)
    model = megatron_patch.build_gpt(
        run.shape, dtype=parameter_dtype(job.config), activation_checkpointing=run.training.activation_checkpointing
    )
    engine, _, _, _ = deepspeed.initialize(model=model, config=job.config, mpu=megatron_patch.mpu_adapter())
    return engine, batches
