# SPDX-License-Identifier: Apache-2.0
"""`docs/reliability.md`: what came of the attacks of ``tests/attacks``, written by ``make reliability``."""

from __future__ import annotations

import json
from collections.abc import Sequence

from benchmarks.provenance import provenance
from tests.helpers import ROOT
from tests.helpers.attacks import COUNTS, HANG_S, WAIT_S, Tally

PAGE = ROOT / "docs" / "reliability.md"
_HEAD = f"""# What wrong inputs do

Written by `make reliability`. Each row is one attack: inputs made from fixed seeds, most of them wrong. An input may
end in two ways. It is refused with an error that names the input, says what is allowed and what to write. Or it is
accepted and the result is right. Four columns count everything else, and a test fails if one of them is not 0:

- *internal errors*: an exception that is not meant for users,
- *hangs*: more than {HANG_S:.0f} s of processor time, or {WAIT_S:.0f} s of waiting,
- *silent*: a wrong input that was accepted, or a wrong result,
- *unhelpful*: an error that does not say what to do, or a right input that was refused.
"""
_TAIL = """
`make test` runs the same attacks; `make reliability TIMES=5` makes five times as many inputs.

| what else is attacked | command |
|---|---|
| C++ kernels under AddressSanitizer: random segment tables, replaced tensors | `make test-asan` |
| kills during saves, full disks, dead ranks | `make test-faults` |
| lost hosts and connections between two real hosts | `make test-hosts` |

What this does not show: files that an attacker made with a manifest to match (`docs/checkpoints.md`), networks that are
not trusted (`docs/launch.md`), and GPUs.
"""


def page(tallies: Sequence[Tally]) -> str:
    """The page's text."""
    total = sum(tally.inputs for tally in tallies)
    rows = [
        "| attacked | inputs | refused | accepted | internal errors | hangs | silent | unhelpful | slowest, CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for t in sorted(tallies, key=lambda tally: tally.what):
        wrong = " | ".join(str(len(found)) for found in (t.tracebacks, t.hangs, t.silent, t.unfit))
        rows.append(f"| {t.what} | {t.inputs} | {t.refused} | {t.accepted} | {wrong} | {t.slowest_s:.1f} |")
    of = provenance()
    machine = (
        f"{total:,} inputs. {of['cpu']}, {of['cores']} cores, Python {of['python']}, torch {of['torch']}, DeepSpeed "
        f"{of['deepspeed']}, {of['date']}, commit {of['commit']}."
    )
    return "\n".join([_HEAD, *rows, "", machine]) + "\n" + _TAIL


def clear() -> None:
    """Forget the counts of earlier runs."""
    for path in COUNTS.glob("*.json"):
        path.unlink()


def write() -> None:
    """Write the page from the counts that the attacks left."""
    tallies = [Tally(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(COUNTS.glob("*.json"))]
    PAGE.write_text(page(tallies), encoding="utf-8")
