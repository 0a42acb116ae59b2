# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise convert``: a DeepSpeed checkpoint in its portable form, without the ranks that wrote it."""

from __future__ import annotations

import argparse
from pathlib import Path

from ds_blockwise.cli.progress import add_quiet
from ds_blockwise.hosts.deepspeed.checkpoint.inspect import CHECKPOINT_HELP, convert_checkpoint

HELP = "bring a DeepSpeed checkpoint into a portable form that loads at any ZeRO stage, dp and tp"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what ``convert`` is given."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help=CHECKPOINT_HELP)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder of checkpoints to write into")
    add_checkpoint_options(parser)
    add_quiet(parser)
    parser.set_defaults(run=run_convert, awaited="reading, checking and converting")


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """What every command that opens a checkpoint is given."""
    parser.add_argument("--tag", help="the checkpoint to take from a folder of checkpoints")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="also load files that hold Python objects, which can run code: only for files of people you trust",
    )


def run_convert(args: argparse.Namespace) -> tuple[str, int]:
    """Convert, and return the text to print with the exit status."""
    folder, notes = convert_checkpoint(args.source, args.output, tag=args.tag, trust=args.trust)
    lines = [f"wrote {folder}", *(f"note: {note}" for note in notes)]
    lines.append(f"It loads at any ZeRO stage, dp and tp: engine.load_checkpoint({str(args.output)!r})")
    return "\n".join(lines), 0
