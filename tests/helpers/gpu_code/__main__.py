# SPDX-License-Identifier: Apache-2.0
"""One line of JSON a launch: ``python -m tests.helpers.gpu_code 90 80``, without TRITON_INTERPRET."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable

from ds_blockwise.kernels.base import Kernels
from tests.helpers.gpu_code.compiled import codes, step_of
from tests.helpers.gpu_code.mixes import MIXES, PARTS


def say(name: str, work: Callable[[Kernels], None]) -> None:
    """Compile what is done with the kernels for every chip that was asked for."""
    for capability in map(int, sys.argv[1:]):
        for code in codes(work, capability):
            print(json.dumps({"mix": name, "capability": capability, **dataclasses.asdict(code)}, default=str))


for name, make in MIXES.items():
    say(name, step_of(make()))
for name, work in PARTS.items():
    say(name, work)
