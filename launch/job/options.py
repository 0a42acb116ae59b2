# SPDX-License-Identifier: Apache-2.0
"""The command line of the main job, shared by its pre-flight check and by the probe of its checkpoints."""

from __future__ import annotations

import argparse

from ds_blockwise.cli.overrides import add_overrides


def run_options(description: str) -> argparse.ArgumentParser:
    """A parser with what every program that starts from a run file needs.

    Args:
        description: First line of the help text.
    """
    parser = argparse.ArgumentParser(description=description)
    # torchrun takes a script's --run for its own --run-path; --run-file gets past it.
    parser.add_argument("--run", "--run-file", required=True, help="run file, such as configs/run/tiny.yaml")
    parser.add_argument("--deepspeed-config", help="another DeepSpeed JSON than the run file's")
    add_overrides(parser)
    parser.add_argument("--verbose", action="store_true", help="show what DeepSpeed reports of itself")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    return parser


def job_options(arguments: list[str] | None, description: str) -> argparse.Namespace:
    """Read the command line of `pretrain_llama.py`.

    Args:
        arguments: Without the program's name; default `sys.argv`.
        description: First line of the help text.
    """
    parser = run_options(description)
    parser.add_argument("--stop-at-step", type=int, help="stop early, with a checkpoint")
    parser.add_argument(
        "--stop-after-minutes", type=float, help="stop after so long with a checkpoint, for machines lent by the hour"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    existing.add_argument("--auto-resume", action="store_true", help="go on if there is a checkpoint, else start")
    existing.add_argument("--overwrite", action="store_true", help="delete an earlier run's files")
    parser.add_argument(
        "--init-from", metavar="FOLDER", help="begin with weights and optimizer state of a checkpoint; new schedule"
    )
    options = parser.parse_args(arguments)
    if options.resume and options.init_from:
        parser.error("--init-from begins a new run and --resume goes on with one: leave one out")
    return options
