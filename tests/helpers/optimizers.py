# SPDX-License-Identifier: Apache-2.0
"""What the names of tests call each optimizer.

`SHORT_NAMES` are those of Adam's update, which most tests compare with one oracle on every host; `OTHERS` have tests of
their own.

Imports nothing of ds_blockwise: the settings in ``tests/conftest.py`` must be in place before torch is imported.
"""

from __future__ import annotations

SHORT_NAMES = {"BlockwiseAdamW": "adamw", "BlockwiseAdamMini": "mini"}
OTHERS = {"BlockwiseLion": "lion", "BlockwiseMuon": "muon"}
ALL_NAMES = SHORT_NAMES | OTHERS
FULL_NAME = {short: name for name, short in ALL_NAMES.items()}
