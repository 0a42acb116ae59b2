# SPDX-License-Identifier: Apache-2.0
"""The ``ds-blockwise`` command: how a model is cut, what a run needs, what is in a checkpoint, how sharp blocks are."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ds_blockwise.checkpoint.manifest import CheckpointError
from ds_blockwise.checkpoint.record import VERSION
from ds_blockwise.cli import blocks, check, configs, convert, init, plan
from ds_blockwise.cli.extras import missing_package
from ds_blockwise.cli.measured import schedule, sharpness
from ds_blockwise.cli.progress import waiting
from ds_blockwise.cli.suggest import command as suggest

_COMMANDS = {
    "init": init,
    "configs": configs,
    "blocks": blocks,
    "suggest": suggest,
    "plan": plan,
    "check": check,
    "convert": convert,
    "schedule": schedule,
    "sharpness": sharpness,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; default ``sys.argv[1:]``.

    Returns:
        Exit status: 0; 1 if ``check`` found problems; 2 for an error, which is printed to stderr without a traceback.
    """
    args = _parser().parse_args(argv)
    try:
        with waiting(f"ds-blockwise: {args.awaited}", quiet=getattr(args, "quiet", False)) as args.progress:
            text, status = args.run(args)
    except ModuleNotFoundError as error:
        print(f"ds-blockwise: error: {missing_package(error)}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, CheckpointError) as error:
        print(f"ds-blockwise: error: {error}", file=sys.stderr)
        return 2
    try:
        print(text, flush=True)  # a closed pipe fails here, not at exit
    except BrokenPipeError:
        # the reader (head, less) has seen enough; leave without Python's own complaint at shutdown
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ds-blockwise", description=__doc__)
    parser.add_argument("--version", action="version", version=f"ds-blockwise {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        own = commands.add_parser(name, help=command.HELP)
        own.set_defaults(awaited=name)
        command.add_arguments(own)
    return parser
