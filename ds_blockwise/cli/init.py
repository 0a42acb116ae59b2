# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise init``: a folder with the files of a run, to be changed by hand."""

from __future__ import annotations

import argparse
import importlib.resources
import json
import re
import shlex
from pathlib import Path
from string import Template

from ds_blockwise.cli.configs import beside

HELP = "write the files of a first run: run file, model, DeepSpeed JSON, hostfile, Slurm script"
FILES = ("run.yaml", "model.yaml", "deepspeed.json", "hostfile", "slurm.sbatch")
_FILLED = ("run.yaml", "slurm.sbatch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what ``init`` is given."""
    parser.add_argument("folder", type=Path, metavar="DIR", help=f"for {', '.join(FILES)}; made if it is missing")
    parser.set_defaults(run=run_init)


def run_init(args: argparse.Namespace) -> tuple[str, int]:
    """Write the files, and return the text to print with the exit status.

    Raises:
        ValueError: one of them is there already; none is written.
    """
    folder: Path = args.folder
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder, or a name that is free")
    there = [name for name in FILES if (folder / name).exists() or (folder / name).is_symlink()]
    if there:
        raise ValueError(f"{folder} holds {', '.join(there)} already, and nothing is overwritten: give another folder")
    launch = beside("launch")
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", folder.resolve().name, flags=re.ASCII).strip("-") or "run"
    values = {"name": name, "checkout": shlex.quote(str(launch.parent))}
    templates = importlib.resources.files("ds_blockwise.cli") / "templates"
    for file in FILES:
        text = (templates / file).read_text(encoding="utf-8")
        filled = values | ({"name": json.dumps(name)} if file.endswith(".yaml") else {})
        with (folder / file).open("x", encoding="utf-8") as out:
            out.write(Template(text).substitute(filled) if file in _FILLED else text)
    return "\n".join([f"wrote {folder / file}" for file in FILES] + _next_steps(folder, launch)), 0


def _next_steps(folder: Path, launch: Path) -> list[str]:
    return [
        "next:",
        f"  ds-blockwise check {shlex.quote(str(folder / 'run.yaml'))}",
        f"  cd {shlex.quote(str(folder))}",
        f"  python {shlex.quote(str(launch / 'prepare_data.py'))} --run run.yaml",
        f"  GPUS_PER_NODE=2 {shlex.quote(str(launch / 'cluster' / 'local.sh'))} run.yaml",
        "with Slurm instead of the last line: sbatch slurm.sbatch",
    ]
