# SPDX-License-Identifier: Apache-2.0
"""Pre-train a LLaMA-shaped Megatron-core model with DeepSpeed.

deepspeed --num_gpus 2 launch/pretrain_llama.py --run configs/run/tiny.yaml

The run file names the model, the data and the DeepSpeed JSON, which decides the optimizer;
`--deepspeed-config` takes another JSON. `--resume` continues from the newest checkpoint, bit for bit;
`--auto-resume` does so if there is one, for schedulers that start a failed job again.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from typing import Any, NoReturn

import torch

import quiet  # noqa: F401
from ds_blockwise import block_report
from ds_blockwise.cli.progress import waiting
from ds_blockwise.hosts.deepspeed.monitor import add_monitor
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.runs.engine_json import optimizer_type, zero_stage
from ds_blockwise.runs.metrics import METRICS_CSV, MetricsFile
from ds_blockwise.runs.reading.problems import Problems
from ds_blockwise.runs.run_file import RunConfig
from job import run_folder
from job.batches import RunData, check_data
from job.heartbeat import HeartbeatMonitor, name_lost_host
from job.interrupt import INTERRUPTED
from job.options import job_options
from job.process_groups import Processes, agree
from job.rendezvous import exit_status
from job.report import plot_loss, plot_telemetry, state_bytes_per_parameter, summarize, table, write_summary
from job.run_folder import (
    check_output,
    check_source,
    checkpoints_of,
    find_checkpoint,
    json_digest,
    prepare_output,
)
from job.start import build_engine, start_job
from job.trainer import Trainer


def main(arguments: list[str] | None = None) -> None:
    """Train one run file.

    Args:
        arguments: Command line without the program's name; default `sys.argv`.

    Raises:
        ValueError: Lists what is wrong with the configuration or differs between hosts, before the first step.
        TimeoutError: Ranks did not come up.
        RuntimeError: The connection to a host was lost; names it.
    """
    started = time.perf_counter()
    options = job_options(arguments, __doc__.splitlines()[0])
    job = start_job(options)
    logging.getLogger(run_folder.__name__).setLevel(logging.INFO)
    run, config, processes = job.run, job.config, job.processes
    problems = Problems()
    data = check_data(run, problems)
    record = _record(run, config, data, processes)
    checkpoint = find_checkpoint(run, problems) if options.resume or options.auto_resume else None
    check_output(run, record, checkpoint, options, problems)
    source = check_source(options.init_from, record, problems) if checkpoint is None else None
    agree(problems)
    assert data is not None  # else there was a problem
    prepare_output(run, record, processes, checkpoint)

    with waiting("building the model, its data and DeepSpeed's engine", quiet=processes.rank != 0):
        engine, batches = build_engine(job, data)
    name = optimizer_type(config)
    if processes.rank == 0 and name in OPTIMIZERS:
        print(block_report(engine.module), flush=True)
    trainer = Trainer(engine, run, batches, processes, started=started)
    if checkpoint is not None:
        trainer.resume()
    elif source is not None:
        trainer.start_from(source)
    if processes.rank == 0 and run.wants_metrics_csv:
        add_monitor(engine, MetricsFile(run.output / METRICS_CSV, trainer.state.step))
    with HeartbeatMonitor(job.this_rank, job.hosts, job.store), name_lost_host(job.hosts):
        done = trainer.train(options.stop_at_step, options.stop_after_minutes)
    if not done:
        _end_interrupted(run, trainer.state.step, processes)

    stage = zero_stage(config)
    state_bytes = state_bytes_per_parameter(engine.basic_optimizer, engine.module, processes, zero_stage=stage)
    state = trainer.finish()
    if processes.rank == 0:
        summary = summarize(
            run,
            state,
            processes,
            optimizer=name,
            zero_stage=stage,
            state_bytes=state_bytes,
            config_sha256=json_digest(record),
        )
        write_summary(summary, run.output / "summary.json")
        plot_loss(run, state, name, run.output / "loss.png")
        if state.telemetry:
            plot_telemetry(run, state, run.output / "telemetry.png")
        print(table(summary, run.output), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _end_interrupted(run: RunConfig, step: int, processes: Processes) -> NoReturn:
    torch.distributed.barrier()
    if processes.rank == 0:
        print(
            f"stopped at step {step} of {run.training.steps}, saved in {checkpoints_of(run)}: to go on, start it again "
            f"with --resume and without --overwrite (make train ARGS=--resume)",
            flush=True,
        )
    torch.distributed.destroy_process_group()
    sys.exit(INTERRUPTED)


def _record(run: RunConfig, config: dict[str, Any], data: RunData | None, processes: Processes) -> dict[str, object]:
    """Everything that decides the result of a run; folders are left out, because a result doesn't depend on them."""
    training = dataclasses.asdict(run.training)
    engine = {
        f"deepspeed.{key}": value
        for key, value in config.items()
        if key not in ("csv_monitor", "tensorboard", "wandb", "steps_per_print")
    }
    return {
        "model": dataclasses.asdict(run.shape),
        "model_class": run.model_class,
        "parallel": dataclasses.asdict(run.parallel),
        "processes": processes.world_size,
        # Not the fingerprint of the data, which depends on file times: a copy of the same text is the same data.
        "data": data or {"tokenizer": None, "splits": None},
        **training,
        **engine,
    }


if __name__ == "__main__":
    exit_status(main)
