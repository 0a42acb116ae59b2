# SPDX-License-Identifier: Apache-2.0
"""``--set``: entries of a run file that a command line changes."""

from __future__ import annotations

import argparse


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add ``--set``, the same for every command that reads a run file."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change an entry of the run file, such as training.steps=100; may come several times",
    )
