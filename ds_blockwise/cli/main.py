# SPDX-License-Identifier: Apache-2.0
"""The ``ds-blockwise`` command: how a model is cut, what a run needs, what is in a checkpoint, how sharp blocks are."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_blockwise.checkpoint.folder import CheckpointError
from ds_blockwise.cli.checkpoint import add_commands
from ds_blockwise.cli.models import MODEL_HELP, load_model
from ds_blockwise.cli.plan import add_plan_command
from ds_blockwise.cli.sharpness import add_sharpness_command
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.optimizers.settings import OPTIMIZER_KEYS, check_extra_keys
from ds_blockwise.tagging.names import canonical_fqn
from ds_blockwise.tagging.tag import tag_parameters
from ds_blockwise.tagging.verify_layout import LayoutReport, verify_layout

_SETTING_KEYS = ("lr_multipliers", "weight_decay_multipliers", "granularity", "rules")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; default ``sys.argv[1:]``.

    Returns:
        Exit status: 0; 1 if ``check`` found problems; 2 for an error, which is printed to stderr without a traceback.
    """
    args = _parser().parse_args(argv)
    try:
        text, status = args.run(args)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, CheckpointError) as error:
        print(f"ds-blockwise: error: {error}", file=sys.stderr)
        return 2
    try:
        print(text)
    except BrokenPipeError:
        # the reader (head, less) has seen enough; leave without Python's own complaint at shutdown
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ds-blockwise", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    blocks = commands.add_parser(
        "blocks", help="print each parameter's role, multiplier, blocks and optimizer-state bytes"
    )
    blocks.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    blocks.add_argument("--ds-config", type=Path, metavar="JSON", help="DeepSpeed JSON with the optimizer's settings")
    blocks.add_argument("--json", action="store_true", help="print JSON instead of a table")
    blocks.add_argument(
        "--verify",
        action="store_true",
        help="also run a small model of this kind, forward and backward, and check that queries, keys and values are "
        "where the table says",
    )
    blocks.set_defaults(run=_run_blocks)
    add_commands(commands)
    add_plan_command(commands)
    add_sharpness_command(commands)
    return parser


def _run_blocks(args: argparse.Namespace) -> tuple[str, int]:
    settings = {} if args.ds_config is None else read_optimizer_settings(args.ds_config)
    report = tag_parameters(load_model(args.model), **settings)
    verified = _verify(args.model, settings.get("rules", ())) if args.verify else None
    if args.json:
        found = report.to_dict()
        if verified is not None:
            found["verified"] = {"parameters": list(verified.parameters), "checks": verified.num_checks}
        return json.dumps(found, indent=2), 0
    return str(report) if verified is None else f"{report}\n{verified}", 0


def _verify(source: str, rules: Sequence[Mapping[str, Any]]) -> LayoutReport:
    model = load_model(source, small=True)
    names = [canonical_fqn(name) for name, _ in model.named_parameters(remove_duplicate=False)]
    # a rule for one of the layers that the small model lacks has nothing to match there
    present = [rule for rule in rules if any(re.search(rule["match"], name) for name in names)]
    return verify_layout(model, rules=present)


def read_optimizer_settings(path: Path) -> dict[str, Any]:
    """Read the block settings (multipliers, granularity, rules) from a DeepSpeed JSON.

    Raises:
        ValueError: not JSON, no optimizer of ours, or an unknown key.
        OSError: the file cannot be read.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    optimizer = config.get("optimizer", {}) if isinstance(config, dict) else {}
    name = optimizer.get("type")
    if name not in OPTIMIZERS:
        raise ValueError(f'{path}: "optimizer": {{"type": {name!r}}} is not one of {", ".join(OPTIMIZERS)}')
    params = optimizer.get("params", {})
    check_extra_keys(name, {k: v for k, v in params.items() if k not in OPTIMIZER_KEYS})
    return {key: params[key] for key in _SETTING_KEYS if key in params}
