# SPDX-License-Identifier: Apache-2.0
"""Turn text into the token files that `pretrain_llama.py` reads; does nothing if up to date.

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
from pathlib import Path

import quiet  # noqa: F401
from data.corpus import PART_BYTES
from data.metadata import SPLITS
from data.pool import usable_cores
from data.token_files import check_directory, prepare
from ds_blockwise.cli.overrides import add_overrides
from ds_blockwise.runs.run_file import load_run


def main(arguments: list[str] | None = None) -> None:
    """Prepare the data of one run file.

    Args:
        arguments: Command line without the program's name; default `sys.argv`.

    Raises:
        ValueError: Lists what is wrong with the run file, the text, or (``--check``) the token files.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", "--run-file", required=True, help="run file, such as configs/run/tiny.yaml")
    parser.add_argument("--source", nargs="+", help="'stdlib', or folders, glob patterns and files of text")
    parser.add_argument("--text-key", help="entry of a JSON object, or parquet column, of the text")
    parser.add_argument("--tokenizer", help="'train', a tokenizer.json, or a folder with one")
    parser.add_argument("--directory", help="where the token files go")
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
    options = parser.parse_args(arguments)
    if options.workers < 1 or options.part_megabytes <= 0:
        parser.error("--workers must be at least 1 and --part-megabytes above 0")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    run, problems = load_run(options.run, overrides=options.set)
    problems.raise_if_any()
    assert run is not None
    given = {
        "source": tuple(options.source) if options.source else None,
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
    if options.check:
        for folder in folders if options.directory is None else [options.directory]:
            check_directory(Path(folder))
            logging.info("%s: no damage found; every token was read", folder)
        return
    start = time.perf_counter()
    metadata = prepare(
        data,
        run.shape.vocab_size,
        run.file,
        force=options.force,
        workers=options.workers,
        part_bytes=max(1, round(options.part_megabytes * (1 << 20))),
    )
    for split in SPLITS:
        counts = metadata["splits"][split]
        logging.info("%-10s %8d documents %12d tokens", split, counts["documents"], counts["tokens"])
    logging.info("%s ready in %.1f s", data.directory, time.perf_counter() - start)


if __name__ == "__main__":
    main()
