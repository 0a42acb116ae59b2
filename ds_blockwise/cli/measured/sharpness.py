# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise sharpness``: measure a trained model, look at a run's measurements, propose multipliers from them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ds_blockwise.blocks.settings.auto_settings import EARLIEST_STEP, AutoMultipliers
from ds_blockwise.blocks.settings.defaults import DEFAULT_EXPONENT, DEFAULT_PRESET, LR_PRESETS
from ds_blockwise.cli.extras import needs
from ds_blockwise.cli.models import load_trained
from ds_blockwise.cli.progress import add_quiet
from ds_blockwise.measure.auto_multipliers import first_reading
from ds_blockwise.measure.ratios import multipliers_from_sharpness
from ds_blockwise.measure.sharpness import PRODUCTS, measure_sharpness
from ds_blockwise.measure.sharpness_report import ESTIMATORS, LEVELS, SharpnessReport, read_csv, write_csv
from ds_blockwise.tagging.tag import tag_parameters
from ds_blockwise.values import as_count

_RUN_RECORD = "run.json"  # beside the CSV that the main job writes


HELP = "average sharpness of a model's blocks: measure, show, plot, ratios"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what each command of ``sharpness`` is given."""
    own = parser.add_subparsers(required=True, metavar="COMMAND")

    measure = own.add_parser("measure", help="measure a trained model on a text, in this process")
    measure.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder with weights, or package.module:function"
    )
    measure.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8; its beginning is used")
    measure.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json or a folder with it; default: MODEL")
    measure.add_argument("--estimator", choices=ESTIMATORS, default=ESTIMATORS[0])
    measure.add_argument("--batches", type=int, default=8)
    measure.add_argument("--batch-size", type=int, default=4, help="sequences in a batch")
    measure.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    measure.add_argument("--draws", type=int, default=1, help="labels or directions drawn for each batch")
    measure.add_argument("--products", choices=PRODUCTS, default=PRODUCTS[0], help="of hutchinson")
    measure.add_argument("--seed", type=int, default=0, help="of the draws")
    measure.add_argument("--random-init", action="store_true", help="measure random weights where there are no others")
    measure.add_argument("--csv", type=Path, metavar="CSV", help="also write all entries to this file")
    _add_output(measure)
    add_quiet(measure)
    measure.set_defaults(run=_run_measure, awaited="measuring, in batches")

    show = own.add_parser("show", help="print a measurement as a table")
    _add_source(show)
    _add_output(show)
    show.set_defaults(run=_run_show)

    plot = own.add_parser("plot", help="draw sharpness over time by block type, and its distribution over blocks")
    _add_source(plot)
    plot.add_argument("--output", type=Path, metavar="FOLDER", help="for the two PNGs; default: that of the CSV")
    plot.set_defaults(run=_run_plot)

    ratios = own.add_parser(
        "ratios", help="propose lr_multipliers from (S(norm) / S(type)) ** exponent; lr stays AdamW's"
    )
    _add_source(ratios)
    ratios.add_argument("--exponent", type=float, default=DEFAULT_EXPONENT, help=f"default {DEFAULT_EXPONENT}")
    ratios.add_argument("--max", type=float, default=16.0, help="largest ratio to the norms; default 16")
    head = LR_PRESETS[DEFAULT_PRESET]["head"]
    ratios.add_argument("--head", action="store_true", help=f"the output layer's too; default: its usual {head:g}")
    ratios.add_argument("--steps", type=int, help=f"of the whole run; default: from {_RUN_RECORD} beside the CSV")
    ratios.add_argument(
        "--not-before",
        type=int,
        default=EARLIEST_STEP,
        metavar="N",
        help=f'first step that is taken, as not_before of lr_multipliers "auto"; default {EARLIEST_STEP}',
    )
    ratios.add_argument("--force", action="store_true", help="also from a measurement that may be too early")
    ratios.set_defaults(run=_run_ratios)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("csv", type=Path, metavar="CSV", help="sharpness.csv of a run, or what measure --csv wrote")
    parser.add_argument("--step", type=int, help="the measurement to take; default: the last one")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--level", choices=LEVELS, default=LEVELS[0], help="rows of the table")
    parser.add_argument("--json", action="store_true", help="print all levels as JSON instead of a table")


def _run_measure(args: argparse.Namespace) -> tuple[str, int]:
    for name in ("batches", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} = {getattr(args, name)}: allowed: 1 and more")
    if args.length < 2:
        raise ValueError(f"--length = {args.length}: allowed: 2 and more, because the first token is not predicted")
    model, warning = load_trained(args.model, random_init=args.random_init)
    if warning:
        print(f"ds-blockwise: warning: {warning}", file=sys.stderr)
    model.eval()  # without dropout
    tag_parameters(model)
    batches = _read_batches(
        args.text,
        args.tokenizer or args.model,
        batches=args.batches,
        sequences=args.batch_size,
        length=args.length,
        vocabulary=getattr(getattr(model, "config", None), "vocab_size", None),
    )
    report = measure_sharpness(
        model,
        args.progress.each(batches),
        estimator=args.estimator,
        draws=args.draws,
        seed=args.seed,
        products=args.products,
    )
    if args.csv is not None:
        write_csv([report], args.csv)
    if args.json:
        return report.to_json(), 0
    return report.table(args.level), 0


def _read_batches(
    text: Path, tokenizer: str, *, batches: int, sequences: int, length: int, vocabulary: int | None
) -> list[torch.Tensor]:
    """The beginning of a text as batches of token ids.

    Args:
        text: UTF-8.
        tokenizer: a `tokenizer.json`, or a folder that holds one or that transformers can read.
        batches: how many.
        sequences: in each batch.
        length: tokens in each sequence.
        vocabulary: of the model; None if unknown.

    Returns:
        int64 tensors ``[sequences, length]``.

    Raises:
        ValueError: the text is too short, or has a token that the model does not know.
        OSError: a file cannot be read.
    """
    ids = _encode(text.read_text(encoding="utf-8"), Path(tokenizer))
    needed = batches * sequences * length
    if len(ids) < needed:
        raise ValueError(
            f"{text} has {len(ids):,} tokens, but {batches} batches of {sequences} x {length} need {needed:,}. Give "
            f"more text, or lower --batches, --batch-size or --length."
        )
    if vocabulary is not None and max(ids[:needed]) >= vocabulary:
        raise ValueError(f"{tokenizer} makes token {max(ids[:needed])}, but the model's vocabulary is {vocabulary}")
    return list(torch.tensor(ids[:needed]).view(batches, sequences, length).unbind())


def _encode(text: str, tokenizer: Path) -> list[int]:
    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if file.is_file() and file.suffix == ".json":
        with needs("hf", f"reading {file}"):
            import tokenizers
        return list(tokenizers.Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids)
    if not tokenizer.is_dir():
        raise ValueError(f"{tokenizer} is not a tokenizer: give a tokenizer.json or a folder with one (--tokenizer)")
    with needs("hf", f"reading {tokenizer}"):
        import transformers
    found = transformers.AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
    return list(found.encode(text, add_special_tokens=False))


def _run_show(args: argparse.Namespace) -> tuple[str, int]:
    report = _chosen(read_csv(args.csv), args)
    return (report.to_json() if args.json else report.table(args.level)), 0


def _run_plot(args: argparse.Namespace) -> tuple[str, int]:
    with needs("launch", "drawing"):
        from ds_blockwise.measure.sharpness_plot import draw
    reports = read_csv(args.csv)
    report = _chosen(reports, args)
    folder = args.csv.parent if args.output is None else args.output
    paths = draw(reports, report, args.csv.parent.resolve().name, folder)
    return "\n".join(f"figure: {path}" for path in paths), 0


def _run_ratios(args: argparse.Namespace) -> tuple[str, int]:
    report = _chosen(read_csv(args.csv), args)
    if not args.force:
        _check_time(report, args)
    sharpness: dict[str, float] = {str(block_type): value for block_type, value in report.by_type().items()}
    usual = LR_PRESETS[DEFAULT_PRESET]
    ratios = multipliers_from_sharpness(sharpness, exponent=args.exponent, high=args.max)
    found = {block_type: usual["norm"] * ratio for block_type, ratio in ratios.items()}
    if "head" in found and not args.head:  # wants a higher rate than its sharpness says: docs/evidence.md
        found["head"] = usual["head"]
    return json.dumps({"lr_multipliers": {name: float(f"{value:.3g}") for name, value in found.items()}}, indent=2), 0


def _check_time(report: SharpnessReport, args: argparse.Namespace) -> None:
    auto = AutoMultipliers(not_before=as_count("--not-before", args.not_before))
    steps, said_by = args.steps, "--steps"
    record = args.csv.parent / _RUN_RECORD
    if steps is None and record.is_file():
        steps, said_by = json.loads(record.read_text(encoding="utf-8")).get("steps"), f"{record}: steps"
    if steps is None or report.step is None:
        unknown = "its step" if report.step is None else f"the length of the run (no {_RUN_RECORD} beside it)"
        raise ValueError(
            f"{args.csv} does not say {unknown}. The order of the block types does not hold before step "
            f"{auto.not_before} (not_before), nor before {auto.after:.0%} of the run. Give --steps, or --force if you "
            f"know that the model is trained."
        )
    first = first_reading(auto, as_count(said_by, steps))
    if report.step < first:
        raise ValueError(
            f"{args.csv} was measured at step {report.step} of {steps}, before step {first} (not_before "
            f"{auto.not_before}, after {auto.after:g}): the order of the block types does not hold yet. Take a later "
            f"measurement, lower the limit with --not-before N, or take this one with --force."
        )


def _chosen(reports: Sequence[SharpnessReport], args: argparse.Namespace) -> SharpnessReport:
    if not reports:
        raise ValueError(f"{args.csv} holds no measurement yet")
    if args.step is None:
        return reports[-1]
    found = [report for report in reports if report.step == args.step]
    if not found:
        steps = ", ".join(str(report.step) for report in reports)
        raise ValueError(f"{args.csv} has no measurement at step {args.step}, only at {steps}")
    return found[-1]
