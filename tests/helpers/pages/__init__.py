# SPDX-License-Identifier: Apache-2.0
"""What is made from the code, in `docs/reference` and `configs/schema`: ``python -m tests.helpers.pages`` writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.helpers import ROOT
from tests.helpers.pages import commands, run_file, schemas, settings_json

FOLDER = ROOT / "docs" / "reference"
PAGES: dict[Path, Callable[[], str]] = {
    FOLDER / "run_file.md": run_file.page,
    FOLDER / "settings_json.md": settings_json.page,
    FOLDER / "commands.md": commands.page,
    **{schemas.FOLDER / f"{name}.json": schemas.text_of(schema) for name, schema in schemas.SCHEMAS.items()},
}
