# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise schedule``: the schedule that a finished run's gradient norms ask for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ds_blockwise.optimizers.schedules.refine import NORMS, refine
from ds_blockwise.optimizers.schedules.table import table_text, write_table
from ds_blockwise.runs.metrics import METRICS_CSV, metric_names, read_metric
from ds_blockwise.values import as_count, unknown

HELP = "make a learning-rate schedule from a finished run: refine"
_TRAINER_STATE = "trainer_state.json"  # of Hugging Face's Trainer
_GRAD_NORM = "blockwise/grad_norm/"  # then a block type: the norm of the whole model is the same for each
_TELEMETRY = 'Train with "telemetry": {"interval": 10} in the optimizer\'s params: docs/telemetry.md'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what each command of ``schedule`` is given."""
    own = parser.add_subparsers(required=True, metavar="COMMAND")
    command = own.add_parser("refine", help="the refined schedule of arXiv 2310.07831, as a table for shape table")
    command.add_argument(
        "source",
        type=Path,
        metavar="RUN",
        help=f"output folder of the main job (with {METRICS_CSV}), or a folder with Trainer's {_TRAINER_STATE}",
    )
    command.add_argument("--output", type=Path, metavar="CSV", help="write the table there; default: print it")
    command.add_argument("--metric", metavar="NAME", help="name of the norm; default: telemetry's, or Trainer's")
    command.add_argument(
        "--norm",
        choices=NORMS,
        default=NORMS[0],
        help="weights are inverse squares of L2 norms, inverses of L1 norms",
    )
    command.add_argument(
        "--tau", type=float, default=0.1, help="width of the running median as a part of the readings; default 0.1"
    )
    command.add_argument(
        "--skip",
        type=int,
        default=0,
        metavar="N",
        help="leave out the first N updates, for a schedule with a warm-up of its own; default: leave out nothing",
    )
    command.set_defaults(run=run_refine, awaited="refining the schedule")


def run_refine(args: argparse.Namespace) -> tuple[str, int]:
    """Refine, write the table if asked to, and return the text to print with the exit status."""
    skip = as_count("--skip", args.skip, low=0)
    norms = {step: value for step, value in _norms(args.source, args.metric).items() if step > skip}
    table = refine(norms, norm=args.norm, tau=args.tau)
    if args.output is None:
        return table_text(table).rstrip("\n"), 0
    write_table(args.output, table)
    peak = table.fractions[table.factors.index(1.0)]
    schedule = {"type": "BlockwiseLR", "params": {"shape": "table", "table": str(args.output)}}
    return "\n".join(
        [
            f"{len(norms)} gradient norms, of updates {min(norms)} to {max(norms)}",
            f"factor {table.factors[0]:.3g} at first, 1 after {peak:.1%}, {table.at(0.5):.3g} half-way, 0 at the end",
            f"wrote {args.output}. Add total_num_steps and min_lr where the launcher does not write them:",
            f'"scheduler": {json.dumps(schedule)}',
        ]
    ), 0


def _norms(source: Path, metric: str | None) -> dict[int, float]:
    if (source / METRICS_CSV).is_file():
        return _of_main_job(source, metric)
    state = source / _TRAINER_STATE
    if state.is_file():
        return _of_trainer(state, metric or "grad_norm")
    raise ValueError(
        f"{source} is no folder with {METRICS_CSV} (the main job's output) or {_TRAINER_STATE} (in a checkpoint of "
        f"Hugging Face's Trainer)"
    )


def _of_main_job(folder: Path, metric: str | None) -> dict[int, float]:
    names = metric_names(folder)
    if metric is None:
        metric = next((name for name in names if name.startswith(_GRAD_NORM)), None)
        if metric is None:
            raise ValueError(f"{folder / METRICS_CSV} has no gradient norms ({_GRAD_NORM}...). {_TELEMETRY}")
    elif metric not in names:
        raise ValueError(f"{folder / METRICS_CSV}: {unknown('metric', metric, names)}")
    return read_metric(folder, metric)


def _of_trainer(path: Path, metric: str) -> dict[int, float]:
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        found = {int(entry["step"]): float(entry[metric]) for entry in history if metric in entry}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not what Trainer writes ({type(error).__name__}: {error})") from error
    if not found:
        raise ValueError(f"{path} has no {metric} in its log_history: set logging_steps in Trainer's arguments")
    return found
