# SPDX-License-Identifier: Apache-2.0
"""Turn text into the token files that `pretrain_llama.py` reads; does nothing if up to date.

python launch/prepare_data.py texts/ 'more/*.jsonl.gz' --output data/mine
python launch/prepare_data.py --run configs/run/tiny.yaml
python launch/prepare_data.py --run configs/run/tiny.yaml --source texts/ 'more/*.jsonl.gz' --workers 8
python launch/prepare_data.py --run configs/run/tiny.yaml --check

The text is cut into parts, which several processes tokenize. After an interruption, start the same command again:
finished parts are kept. The files are the same for any number of processes and interruptions.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

import quiet  # noqa: F401
from data.corpus import PART_BYTES
from data.metadata import SPLITS
from data.pool import usable_cores
from data.token_files import check_directory, prepare
from data.tokenizer import TRAIN_TOKENIZER
from ds_blockwise.cli.overrides import add_overrides
from ds_blockwise.cli.progress import waiting
from ds_blockwise.runs.run_file import DataConfig, load_run
from job.interrupt import INTERRUPTED
from job.rendezvous import REFUSED

_COMMAND_LINE = "the command line"
_TRAINED_SIZE = 32_000
_ANY_SIZE = 2**31 - 1  # of a given tokenizer
_NAMED = 5  # files that a message names


def main(arguments: list[str] | None = None) -> None:
    """Prepare the data of one run file, or text that the command line names.

    Args:
        arguments: Command line without the program's name; default `sys.argv`.

    Raises:
        ValueError: Lists what is wrong with the run file, the text, or (``--check``) the token files.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.workers < 1 or options.part_megabytes <= 0:
        parser.error("--workers must be at least 1 and --part-megabytes above 0")
    if options.text and options.source:
        parser.error("TEXT and --source are the same: give one of them")
    for name, key in (("vocab_size", "the model's vocab_size"), ("validation_fraction", "data.validation_fraction")):
        if options.run is not None and getattr(options, name) is not None:
            parser.error(f"--{name.replace('_', '-')} goes without --run: a run file has {key}")
    if options.validation_fraction is not None and not 0.001 <= options.validation_fraction <= 0.5:
        parser.error(f"--validation-fraction {options.validation_fraction}: allowed: from 0.001 to 0.5")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    data, vocab_size, named_in, folders = _of_run_file(options) if options.run else _of_command_line(options, parser)
    if options.check:
        for folder in folders:
            with waiting(f"reading every token of {folder}"):
                check_directory(Path(folder))
            logging.info("%s: no damage found; every token was read", folder)
        return
    start = time.perf_counter()
    metadata = prepare(
        data,
        vocab_size,
        named_in,
        force=options.force,
        workers=options.workers,
        part_bytes=max(1, round(options.part_megabytes * (1 << 20))),
    )
    for split in SPLITS:
        counts = metadata["splits"][split]
        logging.info("%-10s %8d documents %12d tokens", split, counts["documents"], counts["tokens"])
    if skipped := metadata["files_skipped_not_utf8"]:
        names = ", ".join(skipped[:_NAMED]) + (", ..." if len(skipped) > _NAMED else "")
        logging.info("%d of %d files left out, because they are not UTF-8: %s", len(skipped), metadata["files"], names)
    logging.info("%s ready in %.1f s", data.directory, time.perf_counter() - start)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="*", metavar="TEXT", help="'stdlib', or folders, glob patterns and files of text")
    parser.add_argument("--source", nargs="+", metavar="TEXT", help="the same; default: the run file's")
    parser.add_argument("--run", "--run-file", help="run file, such as configs/run/tiny.yaml")
    parser.add_argument("--output", "--directory", dest="directory", help="where the token files go")
    parser.add_argument("--text-key", help="entry of a JSON object, or parquet column, of the text")
    parser.add_argument("--tokenizer", help="'train', a tokenizer.json, or a folder with one")
    parser.add_argument(
        "--vocab-size",
        type=int,
        help=f"without a run file: of a trained tokenizer, default {_TRAINED_SIZE}; the most of a given one",
    )
    parser.add_argument(
        "--validation-fraction", type=float, help="chance of a document to be kept for validation; default 0.05"
    )
    add_overrides(parser)
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes; default: the usable cores")
    parser.add_argument(
        "--part-megabytes",
        type=float,
        default=PART_BYTES / (1 << 20),
        help="about how much of the source is one part; an interruption loses unfinished parts; %(default)g",
    )
    parser.add_argument("--check", action="store_true", help="prepare nothing; read and check all token files")
    parser.add_argument("--force", action="store_true", help="prepare even if up to date, from the beginning")
    return parser


def _of_run_file(options: argparse.Namespace) -> tuple[DataConfig, int, str | Path, list[str]]:
    """What to prepare, for which vocabulary, where it is named, and the folders to check."""
    run, problems = load_run(options.run, overrides=options.set)
    problems.raise_if_any()
    assert run is not None
    source = options.text or options.source
    given = {
        "source": tuple(source) if source else None,
        "text_key": options.text_key,
        "tokenizer": options.tokenizer,
        "directory": options.directory,
    }
    data = dataclasses.replace(run.data, **{k: v for k, v in given.items() if v is not None})
    folders = [folder for folder, _ in data.read_blend(run.file, problems)]
    if data.blend and options.directory is None and not options.check:
        allowed = "one folder at a time: --directory with its --source"
        remedy = "prepare each folder by itself, all with the same --tokenizer (the folder of the first)"
        problems.add(run.file, "data.blend", list(data.blend), allowed, remedy)
    problems.raise_if_any()
    return data, run.shape.vocab_size, run.file, folders if options.directory is None else [options.directory]


def _of_command_line(
    options: argparse.Namespace, parser: argparse.ArgumentParser
) -> tuple[DataConfig, int, str | Path, list[str]]:
    """As `_of_run_file`, where there is none."""
    source = options.text or options.source
    if options.directory is None or not (source or options.check):
        parser.error("give a run file (--run RUN), or text and a folder for its tokens: TEXT --output DIR")
    if options.set:
        parser.error("--set changes a run file: give --run RUN")
    tokenizer = options.tokenizer or TRAIN_TOKENIZER
    size = _TRAINED_SIZE if tokenizer == TRAIN_TOKENIZER else _ANY_SIZE
    if options.vocab_size is not None:
        size = options.vocab_size
    keys = ("text_key", "validation_fraction")
    given = {key: value for key in keys if (value := getattr(options, key)) is not None}
    data = DataConfig(directory=options.directory, source=tuple(source or ()), tokenizer=tokenizer, **given)
    return data, size, _COMMAND_LINE, [options.directory]


def _without_traceback(program: Callable[[], None]) -> None:
    """Run it; a mistake of the user, an unreadable file and Ctrl-C end it with a line."""
    try:
        program()
    except (ValueError, OSError, ImportError) as error:
        print(f"prepare_data.py: error: {error}", file=sys.stderr)
        sys.exit(REFUSED)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on, finished parts are kept", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    _without_traceback(main)
