# SPDX-License-Identifier: Apache-2.0
"""Run a training script that does not import ds_blockwise: ``python -m ds_blockwise.run SCRIPT [ARGUMENTS]``.

``-m MODULE`` in the place of the script runs a module. With launchers: ``deepspeed --module ds_blockwise.run
SCRIPT ...``, ``torchrun -m ds_blockwise.run SCRIPT ...``, ``accelerate launch -m ds_blockwise.run SCRIPT ...``. The
environment variable ``DS_BLOCKWISE_AUTOLOAD=1`` does the same without another command line.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import ds_blockwise  # noqa: F401 - registers the optimizers and schedules, now or when DeepSpeed is imported

_USAGE = "usage: python -m ds_blockwise.run SCRIPT [ARGUMENTS], or python -m ds_blockwise.run -m MODULE [ARGUMENTS]"
_OF_LAUNCHERS = ("--local_rank", "--local-rank")  # put before all other arguments


def main(arguments: Sequence[str]) -> None:
    """Run a script or a module as Python would, with its own arguments in ``sys.argv``.

    Args:
        arguments: those after ``-m ds_blockwise.run``; what a launcher puts before the script goes to the script.

    Raises:
        SystemExit: there is no script or module, or no such file.
    """
    given = list(takewhile(lambda word: word.startswith(_OF_LAUNCHERS), arguments))
    words = list(arguments[len(given) :])
    is_module = words[:1] == ["-m"]
    target, rest = words[is_module : is_module + 1], words[is_module + 1 :]
    if not target or target[0].startswith("-"):
        raise SystemExit(_USAGE)
    sys.argv = [target[0], *given, *rest]
    if is_module:
        sys.path.insert(0, "")
        runpy.run_module(target[0], run_name="__main__", alter_sys=True)
        return
    script = Path(target[0])
    if not script.is_file():
        raise SystemExit(f"there is no file {target[0]}. {_USAGE}")
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(target[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
