# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise configs``: the run files, model files and DeepSpeed JSONs that come with the package."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_blockwise.cli.extras import needs
from ds_blockwise.runs.reading.problems import Problems
from ds_blockwise.values import suggest

HELP = "list the run files, model files and DeepSpeed JSONs that come with the package; print or copy one"
_KINDS = {
    "run": "run files: one run of the main job each; `ds-blockwise plan` and `check` read them",
    "recipe": "recipes: data and length, on which run files stand",
    "model": "model files",
    "deepspeed": "DeepSpeed JSONs of the main job, which writes batch sizes and lengths itself",
    "schema": "JSON Schemas, with which editors complete and check these files",
    "hf": "DeepSpeed JSONs for Hugging Face Trainer, which fills in what is auto",
}
_LONGEST_LINE = 110
_NAMES_FILES = ("base", "model", "deepspeed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what ``configs`` is given."""
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="print this one, such as run/tiny.yaml; default: a list"
    )
    parser.add_argument(
        "--to",
        type=Path,
        metavar="DIR",
        help="copy it there, with the files that it names; nothing is replaced",
    )
    parser.set_defaults(run=run_configs)


def run_configs(args: argparse.Namespace) -> tuple[str, int]:
    """List, print or copy; returns the text to print with the exit status.

    Raises:
        ValueError: no file of that name is shipped, or a copy would replace a file; none is written.
    """
    folder = beside("configs")
    if args.name is None:
        if args.to is not None:
            raise ValueError(f"--to {args.to} has no NAME: give one of the list that `ds-blockwise configs` prints")
        return _listed(folder), 0
    file = _found(folder, args.name)
    return (file.read_text(encoding="utf-8").rstrip("\n") if args.to is None else _copied(folder, file, args.to)), 0


def beside(name: str) -> Path:
    """A folder that stands beside the package in the repository; a wheel holds it inside the package.

    Args:
        name: ``configs`` or ``launch``.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for parent in (package.parent, package):
        # the repository is known by its setup.py: site-packages may hold a folder of the same name
        if (parent / name).is_dir() and (parent == package or (parent / "setup.py").is_file()):
            return parent / name
    raise FileNotFoundError(f"{package} lacks its folder {name}: install ds_blockwise again, from a wheel or a clone")


def _shipped(folder: Path) -> dict[str, Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".json"))
    return {path.relative_to(folder).as_posix(): path for path in files}


def _found(folder: Path, name: str) -> Path:
    """The file of a name: its path below ``configs``, with or without the suffix, or its end if one has it."""
    shipped = _shipped(folder)
    wanted = name.removeprefix("configs/")
    fits = [key for key in shipped if wanted in (key, key.rpartition(".")[0])]
    fits = fits or [key for key in shipped if f"/{key}".endswith((f"/{wanted}", f"/{wanted}{Path(key).suffix}"))]
    if len(fits) != 1:
        why = f"are several: {', '.join(fits)}" if fits else f"is none{suggest(wanted, shipped)}"
        raise ValueError(f"of the shipped configs {name!r} there {why}. `ds-blockwise configs` lists them")
    return shipped[fits[0]]


def _listed(folder: Path) -> str:
    shipped = _shipped(folder)
    width = max(map(len, shipped))
    lines = []
    for kind, what in _KINDS.items():
        lines += [what, *(f"  {name:<{width}}  {_line(path)}" for name, path in shipped.items() if _kind(name) == kind)]
    return "\n".join(
        [*lines, "ds-blockwise configs NAME prints one; with --to DIR it is copied, with the files that it names"]
    )


def _kind(name: str) -> str:
    return name.partition("/")[0]


def _line(path: Path) -> str:
    """What a file is: a YAML file's first sentence, or what a JSON chooses."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        config = json.loads(text)
        return str(config["title"]) if "title" in config else _choices(config)
    comment = re.match(r"(?:#(?! yaml-language-server:|   ).*\n)+", text)
    words = " ".join(re.sub(r"^# ?", "", line) for line in comment[0].splitlines()) if comment else ""
    return textwrap.shorten(re.split(r"\.(?: (?=[A-Z])|$)|: (?=[A-Z])", words)[0], _LONGEST_LINE, placeholder=" ...")


def _choices(config: Mapping[str, Any]) -> str:
    optimizer, zero = config["optimizer"], config.get("zero_optimization", {})
    params = optimizer.get("params", {})
    found = [optimizer["type"], f"lr {params['lr']}" if "lr" in params else ""]
    found.append(f"multipliers {params['lr_multipliers']}" if "lr_multipliers" in params else "")
    found += [key for key in ("bf16", "fp16") if config.get(key, {}).get("enabled") is True]
    found.append(f"ZeRO-{zero.get('stage', 0)}")
    found.append("optimizer offload" if "offload_optimizer" in zero else "")
    found.append(config.get("scheduler", {}).get("type", ""))
    return ", ".join(filter(None, found))


def _copied(folder: Path, file: Path, target: Path) -> str:
    names = _with_named(folder, file)
    there = [name for name in names if (target / name).exists() or (target / name).is_symlink()]
    if there:
        raise ValueError(f"{target} holds {', '.join(there)} already, and nothing is replaced: give another folder")
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with (target / name).open("x", encoding="utf-8") as out:
            out.write((folder / name).read_text(encoding="utf-8"))
    lines = [f"wrote {target / name}" for name in names]
    if _kind(names[0]) == "run":
        lines.append(f"next: ds-blockwise check {shlex.quote(str(target / names[0]))}")
    return "\n".join(lines)


def _with_named(folder: Path, file: Path) -> list[str]:
    """A file and what it names, directly or through a base; paths below ``folder``."""
    names = [file.relative_to(folder).as_posix()]
    if file.suffix == ".yaml":
        with needs("launch", "copying a file with those that it names"):
            from ds_blockwise.runs.reading.yaml_file import read_yaml
        problems = Problems()
        values = read_yaml(file, problems)
        problems.raise_if_any()
        for key in _NAMES_FILES:
            if key in values:
                named = (file.parent / values[key]).resolve()
                names += _with_named(folder, named)
    return list(dict.fromkeys(names))
