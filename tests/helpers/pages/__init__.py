# SPDX-License-Identifier: Apache-2.0
"""The pages of `docs/reference` that are made from the code: ``python -m tests.helpers.pages`` writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.helpers import ROOT
from tests.helpers.pages import commands, run_file, settings_json

FOLDER = ROOT / "docs" / "reference"
PAGES: dict[Path, Callable[[], str]] = {
    FOLDER / "run_file.md": run_file.page,
    FOLDER / "settings_json.md": settings_json.page,
    FOLDER / "commands.md": commands.page,
}
