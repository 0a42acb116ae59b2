# SPDX-License-Identifier: Apache-2.0
"""Write every generated page."""

from tests.helpers.pages import PAGES

for path, page in PAGES.items():
    path.write_text(page(), encoding="utf-8")
