# SPDX-License-Identifier: Apache-2.0
"""`docs/reference/commands.md`, from the argument parsers of the commands."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Iterator
from unittest.mock import patch

from ds_blockwise.cli.main import main as ds_blockwise
from job.options import job_options
from tests.helpers import ROOT
from tests.helpers.pages.text import markdown, sentence, table

_INTRODUCTION = """\
# Commands

Written by `make docs` from the argument parsers; a test compares them. `--help` prints the same.

`ds-blockwise` comes with the package. The scripts of `launch/` run from a checkout, or from where `ds-blockwise init`
says.
"""
_FINE_TUNING = """\
## `launch/finetune_hf.py`

Tunes a Hugging Face model with Trainer and DeepSpeed. Beside the options below it takes those of transformers'
`TrainingArguments`, such as `--deepspeed`, `--learning_rate` and `--output_dir`.
"""
_MEGATRON_LM = """\
## `python -m megatron_patch.pretrain`

Starts a script of Megatron-LM with our optimizers; see [Megatron-core](../megatron.md). The script's own arguments
follow.
"""


class _Parser(Exception):
    """Carries the parser that a command was about to use."""


def page() -> str:
    """The page's text."""
    lines = [_INTRODUCTION]
    lines += _section(parser_of(lambda: ds_blockwise([])), "##", "ds-blockwise")
    lines += _section(parser_of(lambda: _script("prepare_data")), "##", "launch/prepare_data.py")
    job = parser_of(lambda: job_options([], _first_line("pretrain_llama")))
    lines += _section(job, "##", "launch/pretrain_llama.py")
    lines += ["`launch/preflight.py` takes the same options, and only checks.", ""]
    lines += _section(parser_of(lambda: _script("probe_sharpness")), "##", "launch/probe_sharpness.py")
    lines += [_FINE_TUNING, *table(("argument", "default", "meaning"), _fine_tuning())]
    lines += [_MEGATRON_LM, *_arguments(_megatron_parser())]
    return "\n".join(lines).rstrip() + "\n"


def parser_of(start: Callable[[], object]) -> argparse.ArgumentParser:
    """The parser of a command, taken when it would read its arguments.

    Args:
        start: Starts the command.
    """

    def take(self: argparse.ArgumentParser, *_: object) -> argparse.Namespace:
        raise _Parser(self)

    with patch.object(argparse.ArgumentParser, "parse_args", take):
        try:
            start()
        except _Parser as found:
            (parser,) = found.args
            assert isinstance(parser, argparse.ArgumentParser)
            return parser
    raise AssertionError("the command read no arguments")


def _script(name: str) -> None:
    __import__(name).main([])


def _megatron_parser() -> argparse.ArgumentParser:
    from megatron_patch.pretrain import add_blockwise_args

    return add_blockwise_args(argparse.ArgumentParser(add_help=False))


def _first_line(name: str) -> str:
    source = (ROOT / "launch" / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]


def _section(parser: argparse.ArgumentParser, level: str, name: str, text: str | None = None) -> list[str]:
    lines = [f"{level} `{name}`", "", sentence(markdown(text or parser.description or "")), ""]
    lines += _arguments(parser)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help for choice in action._choices_actions}
            for command, own in action.choices.items():
                lines += _section(own, f"{level}#", f"{name} {command}", helps.get(command))
    return lines


def _arguments(parser: argparse.ArgumentParser) -> list[str]:
    skipped = (argparse._SubParsersAction, argparse._HelpAction)
    shown = [a for a in parser._actions if a.help != argparse.SUPPRESS and not isinstance(a, skipped)]
    rows = [(_written(action), _default(action), _meaning(parser, action)) for action in shown]
    return table(("argument", "default", "meaning"), rows) if rows else []


def _written(action: argparse.Action) -> str:
    value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    if action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    return ", ".join(f"`{' '.join(filter(None, (option, str(value))))}`" for option in action.option_strings)


def _default(action: argparse.Action) -> str:
    optional = not action.option_strings and action.nargs in (argparse.OPTIONAL, argparse.ZERO_OR_MORE)
    if action.required and not optional:  # argparse takes some of the optional ones for required
        return "required"
    nothing = action.default is None or action.default is False or action.default in ([], argparse.SUPPRESS)
    if nothing or "default" in (action.help or ""):
        return ""
    return f"`{action.default}`"


def _meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return sentence(markdown(parser._get_formatter()._expand_help(action))) if action.help else ""


def _fine_tuning() -> Iterator[tuple[str, str, str]]:
    """Read from the source: the script's own imports need an accelerator's set-up."""
    tree = ast.parse((ROOT / "launch" / "finetune_hf.py").read_text(encoding="utf-8"))
    (cls,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "FineTuning")
    for entry in cls.body:
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.value, ast.Call):
            given = {word.arg: ast.literal_eval(word.value) for word in entry.value.keywords}
            default = "required" if "default" not in given else given["default"]
            shown = "" if default is None else default if default == "required" else f"`{default}`"
            yield f"`--{ast.unparse(entry.target)}`", str(shown), sentence(given["metadata"]["help"])
