# SPDX-License-Identifier: Apache-2.0
"""Measure the average sharpness of a checkpoint of the main job, block type by block type, without training.

deepspeed --num_gpus 2 launch/probe_sharpness.py --run configs/run/tiny.yaml

Takes the newest checkpoint of the run's output folder, or the one that `--checkpoint` names, on as many processes as
wrote it (or any number, for a portable one), and changes nothing there. The CSV is for `ds-blockwise sharpness`.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

import quiet  # noqa: F401
from ds_blockwise.checkpoint.folder import resolve_tag
from ds_blockwise.checkpoint.manifest import CheckpointError, once_more
from ds_blockwise.hosts.deepspeed.checkpoint.load import load_checkpoint
from ds_blockwise.measure.sharpness_report import LEVELS, write_csv
from ds_blockwise.runs.reading.problems import Problems
from ds_blockwise.runs.run_file import check_sharpness
from job.batches import check_data
from job.options import run_options
from job.process_groups import agree
from job.rendezvous import exit_status
from job.run_folder import checkpoints_of, folder_and_tag
from job.sharpness import measure
from job.start import build_engine, start_job


def main(arguments: list[str] | None = None) -> None:
    """Measure one checkpoint.

    Args:
        arguments: Command line without the program's name; default `sys.argv`.

    Raises:
        ValueError: Lists what is wrong with the configuration, the checkpoint or the engine.
        CheckpointError: Files of the checkpoint are damaged (all are named).
        FloatingPointError: No gradient was finite.
    """
    options = _options(arguments)
    job = start_job(options)
    run, problems = job.run, Problems()
    data = check_data(run, problems)
    count = run.training.sharpness_batches if options.batches is None else options.batches
    check_sharpness(run, job.processes.dp_size, count, "--batches or training.sharpness_batches", problems)
    named = options.checkpoint
    folder, tag = (checkpoints_of(run), None) if named is None else folder_and_tag(Path(named))
    try:
        found = once_more(lambda: resolve_tag(folder, tag))
        remedy = "train first, or give --checkpoint with a folder of checkpoints, or one of them"
    except (CheckpointError, ValueError) as error:
        found, remedy = None, str(error)
    if found is None:
        problems.add(run.file, "--checkpoint", named or str(folder), "a complete checkpoint", remedy)
    agree(problems)
    assert data is not None  # else there was a problem

    # a monitor would write into the folder of the run
    config = {key: value for key, value in job.config.items() if key not in ("csv_monitor", "tensorboard", "wandb")}
    engine, batches = build_engine(dataclasses.replace(job, config=config), data)
    _, state = load_checkpoint(engine, folder, tag)
    step = int(state["progress"]["step"]) if state and "progress" in state else int(engine.global_steps)
    report = measure(
        engine, run, batches, step, estimator=options.estimator, count=options.batches, draws=options.draws
    )
    if job.processes.rank == 0:
        print(report.table(options.level), flush=True)
        if options.csv:
            write_csv([report], options.csv)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = run_options((__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", metavar="FOLDER", help="a checkpoint, or a folder of them; default: the run's")
    parser.add_argument("--estimator", choices=("gauss_newton", "fisher"), default="gauss_newton")
    parser.add_argument("--batches", type=int, help="default: the run file's training.sharpness_batches")
    parser.add_argument("--draws", type=int, default=1, help="labels drawn for each batch")
    parser.add_argument("--level", choices=LEVELS, default=LEVELS[0], help="rows of the table")
    parser.add_argument("--csv", type=Path, metavar="CSV", help="also write all entries to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    exit_status(main)
