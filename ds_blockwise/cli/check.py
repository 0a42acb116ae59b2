# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise check``: what a checkpoint, a run file or a DeepSpeed JSON holds, and what is wrong with it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from ds_blockwise.cli.convert import add_checkpoint_options
from ds_blockwise.cli.extras import needs
from ds_blockwise.cli.overrides import add_overrides
from ds_blockwise.cli.progress import add_quiet
from ds_blockwise.hosts.deepspeed.checkpoint.inspect import CHECKPOINT_HELP, CheckpointDescription, describe_checkpoint
from ds_blockwise.hosts.deepspeed.config.check import is_deepspeed_installed
from ds_blockwise.runs.reading.engine_file import check_engine_file, describe_engine_file
from ds_blockwise.runs.reading.problems import Problems

HELP = "verify a checkpoint, a run file or a DeepSpeed JSON, and print what it holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what ``check`` is given."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="CHECKPOINT_OR_FILE",
        help=f"{CHECKPOINT_HELP}; or a run file (.yaml); or a DeepSpeed JSON (.json)",
    )
    add_overrides(parser)
    parser.add_argument("--deepspeed-config", type=Path, metavar="JSON", help="use it instead of the run file's")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    add_checkpoint_options(parser)
    add_quiet(parser)
    parser.set_defaults(run=run_check, awaited="reading and checking")


def run_check(args: argparse.Namespace) -> tuple[str, int]:
    """Verify, and return the text to print with the exit status: 1 if there are problems.

    Raises:
        ValueError: it is none of these, or an option is of another kind than the source.
    """
    if args.source.suffix in (".yaml", ".yml"):
        return _check_run(args)
    for option, given in (("--set", args.set), ("--deepspeed-config", args.deepspeed_config)):
        if given:
            raise ValueError(f"{option} changes a run file (.yaml), and {args.source} is none. Leave {option} out.")
    if args.source.suffix == ".json":
        return _check_engine_file(args)
    found = describe_checkpoint(args.source, tag=args.tag, trust=args.trust)
    return json.dumps(found, indent=2) if args.json else _text(found), 1 if found["problems"] else 0


def _check_run(args: argparse.Namespace) -> tuple[str, int]:
    with needs("launch", "checking a run file"):
        from ds_blockwise.runs.check import check_run_file, describe_run
    run, problems = check_run_file(args.source, args.set, args.deepspeed_config)
    return _found(args, "run", [] if run is None or problems else describe_run(run), problems)


def _check_engine_file(args: argparse.Namespace) -> tuple[str, int]:
    config, problems = check_engine_file(args.source)
    return _found(args, "engine", [] if problems else describe_engine_file(config), problems)


def _found(
    args: argparse.Namespace, what: str, described: list[tuple[str, str]], problems: Problems
) -> tuple[str, int]:
    if args.json:
        return json.dumps({"problems": problems.lines, what: dict(described)}, indent=2), 1 if problems else 0
    if problems:
        listed = "\n".join(f"- {line}" for line in problems.lines)
        return f"{args.source}: {len(problems.lines)} problem(s)\n{listed}", 1
    width = max(len(name) for name, _ in described)
    unseen = "" if is_deepspeed_installed() else "DeepSpeed is not installed here: its sections were not looked into; "
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in described), f"{unseen}no problems"]), 0


def _text(found: CheckpointDescription) -> str:
    lines = [f"{found['checkpoint']}: {found['kind']} checkpoint"]

    def line(name: str, value: object) -> None:
        lines.append(f"  {name:<12} {value}")

    line("step", "unknown" if found["global_steps"] is None else found["global_steps"])
    line("optimizer", found["optimizer"] or "unknown")
    if found["topology"]:
        line("topology", ", ".join(f"{key} {value}" for key, value in found["topology"].items() if value is not None))
    if found["parameters"] is not None:
        elements = "" if found["elements"] is None else f", {found['elements']:,} elements"
        line("parameters", f"{found['parameters']:,}{elements}")
    if found["settings"] is not None:
        for key, value in found["settings"].items():
            if value not in ({}, [], "", None) and key not in ("optimizer", "groups", "layout"):
                line("", f"{key}: {_short(value)}")
        for index, group in enumerate(found["settings"].get("groups", [])):
            line("", f"group {index}: {_short(group)}")
    for kind, size in found["bytes"].items():
        line(f"bytes {kind}" if kind == "total" else "", f"{size:,}" if kind == "total" else f"{kind}: {size:,} bytes")
    lines += [f"  note: {note}" for note in found["notes"]]
    lines += [f"  PROBLEM: {problem}" for problem in found["problems"]]
    lines.append("  no problem found" if not found["problems"] else f"  {len(found['problems'])} problems")
    return "\n".join(lines)


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
