# SPDX-License-Identifier: Apache-2.0
"""Python runs it at its start, in every process of a tool that is tried, before the tool."""

from ds_blockwise_autoload import after_import


def _watch() -> None:
    from tests.helpers.tools.record import watch

    watch()


after_import("deepspeed", _watch)
