# SPDX-License-Identifier: Apache-2.0
"""Tests: units by room, hosts by promise on real engines, launch, benchmarks, the repository itself."""

import sys
from pathlib import Path

# the scripts of launch/ import their neighbours by bare name, as a launcher starts them
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launch"))
