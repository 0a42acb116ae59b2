# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise convert`` and ``ds-blockwise check``: checkpoints on disk, without their ranks, and run files."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_blockwise.checkpoint.inspect import CHECKPOINT_HELP, convert_checkpoint, describe_checkpoint


def add_commands(commands: Any) -> None:
    """Add both commands to the parser of ``ds-blockwise``; each sets ``run``, called with the arguments."""
    convert = commands.add_parser(
        "convert", help="bring a DeepSpeed checkpoint into a portable form that loads at any ZeRO stage, dp and tp"
    )
    convert.add_argument("source", type=Path, metavar="SOURCE", help=CHECKPOINT_HELP)
    convert.add_argument("output", type=Path, metavar="OUTPUT", help="folder of checkpoints to write into")
    convert.set_defaults(run=_run_convert)
    check = commands.add_parser("check", help="verify a checkpoint or a run file, and print what it holds")
    check.add_argument(
        "source", type=Path, metavar="CHECKPOINT_OR_RUN", help=f"{CHECKPOINT_HELP}; or a run file (.yaml)"
    )
    check.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="of a run file")
    check.add_argument("--deepspeed-config", type=Path, metavar="JSON", help="another one than the run file's")
    check.add_argument("--json", action="store_true", help="print JSON instead of text")
    check.set_defaults(run=_run_check)
    for parser in (convert, check):
        parser.add_argument("--tag", help="the checkpoint to take from a folder of checkpoints")
        parser.add_argument(
            "--trust",
            action="store_true",
            help="also load files that hold Python objects, which can run code: only for files of people you trust",
        )


def _run_convert(args: argparse.Namespace) -> tuple[str, int]:
    folder, notes = convert_checkpoint(args.source, args.output, tag=args.tag, trust=args.trust)
    lines = [f"wrote {folder}", *(f"note: {note}" for note in notes)]
    lines.append(f"It loads at any ZeRO stage, dp and tp: engine.load_checkpoint({str(args.output)!r})")
    return "\n".join(lines), 0


def _run_check(args: argparse.Namespace) -> tuple[str, int]:
    if args.source.suffix in (".yaml", ".yml"):
        return _check_run(args)
    found = describe_checkpoint(args.source, tag=args.tag, trust=args.trust)
    return json.dumps(found, indent=2) if args.json else _text(found), 1 if found["problems"] else 0


def _check_run(args: argparse.Namespace) -> tuple[str, int]:
    try:
        checks = importlib.import_module("ds_blockwise.runs.check")
    except ModuleNotFoundError as error:
        raise ImportError(f"run files need {error.name}: pip install 'ds_blockwise[launch]'") from error
    run, problems = checks.check_run_file(args.source, args.set, args.deepspeed_config)
    described = [] if run is None or problems else checks.describe_run(run)
    if args.json:
        return json.dumps({"problems": problems.lines, "run": dict(described)}, indent=2), 1 if problems else 0
    if problems:
        listed = "\n".join(f"- {line}" for line in problems.lines)
        return f"{args.source}: {len(problems.lines)} problem(s)\n{listed}", 1
    width = max(len(name) for name, _ in described)
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in described), "no problems"]), 0


# ------------------------------------------------------------------------------- kinds


# ------------------------------------------------------------------------------- contents


def _text(found: Mapping[str, Any]) -> str:
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
    for key, value in (found["settings"] or {}).items():
        if value not in ({}, [], "", None) and key not in ("optimizer", "groups", "layout"):
            line("", f"{key}: {_short(value)}")
    for index, group in enumerate((found["settings"] or {}).get("groups", [])):
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
