# SPDX-License-Identifier: Apache-2.0
"""Turn text into the token files that `pretrain_llama.py` reads; does nothing if up to date.

python launch/prepare_data.py --run configs/run/tiny.yaml
python launch/prepare_data.py --run configs/run/tiny.yaml --source texts/ 'more/*.jsonl'
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time

import quiet  # noqa: F401
from token_files import SPLITS, prepare

from ds_blockwise.run_config import load_run


def main(arguments: list[str] | None = None) -> None:
    """Prepare the data of one run file.

    Args:
        arguments: Command line without the program's name; default `sys.argv`.

    Raises:
        ValueError: Lists what is wrong with the run file or the text.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", "--run-file", required=True, help="run file, such as configs/run/tiny.yaml")
    parser.add_argument("--source", nargs="+", help="'stdlib', or folders, glob patterns, .jsonl files")
    parser.add_argument("--text-key", help="entry of a JSON object that holds the text")
    parser.add_argument("--tokenizer", help="'train' or the path of a tokenizer.json")
    parser.add_argument("--directory", help="where the token files go")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--force", action="store_true", help="prepare even if up to date")
    options = parser.parse_args(arguments)
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
    start = time.perf_counter()
    metadata = prepare(data, run.shape.vocab_size, run.file, force=options.force)
    for split in SPLITS:
        counts = metadata["splits"][split]
        logging.info("%-10s %8d documents %12d tokens", split, counts["documents"], counts["tokens"])
    logging.info("%s ready in %.1f s", data.directory, time.perf_counter() - start)


if __name__ == "__main__":
    main()
