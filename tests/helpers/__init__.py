# SPDX-License-Identifier: Apache-2.0
"""What tests share; imported as ``tests.helpers.<module>``, also by the processes that tests start."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
