# SPDX-License-Identifier: Apache-2.0
"""One line of JSON a launch: ``python -m tests.helpers.gpu_code 90 80``, without TRITON_INTERPRET."""

from __future__ import annotations

import dataclasses
import json
import sys

from tests.helpers.gpu_code.compiled import codes
from tests.helpers.gpu_code.mixes import MIXES

for name, make in MIXES.items():
    items = make()
    for capability in map(int, sys.argv[1:]):
        for code in codes(items, capability):
            print(json.dumps({"mix": name, "capability": capability, **dataclasses.asdict(code)}, default=str))
