# SPDX-License-Identifier: Apache-2.0
"""Measurements, started as modules from the repository's folder: ``python -m benchmarks.step.run``."""

import sys
from pathlib import Path

# the scripts of launch/ import their neighbours by bare name, as a launcher starts them
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launch"))
