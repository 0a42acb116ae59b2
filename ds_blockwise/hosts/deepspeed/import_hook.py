# SPDX-License-Identifier: Apache-2.0
"""Run something once another package has been imported, without importing it.

Plain PyTorch users do not pay for DeepSpeed's import (seconds, and messages on stdout), and the order of the two
imports does not matter.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _AfterImport(MetaPathFinder):
    """Finds one package as the other finders do, and adds a call after its code has run."""

    def __init__(self, package: str, then: Callable[[], None]) -> None:
        self.package = package
        self.then = then
        self.searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.package or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return None
        loader: Loader = spec.loader
        run = loader.exec_module

        def run_and_call(module: ModuleType) -> None:
            run(module)
            # only now: libraries look for the spec (is it installed?) long before they import
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.then()

        # on this loader object only, which serves this one import
        loader.exec_module = run_and_call  # type: ignore[method-assign]
        return spec


def after_import(package: str, then: Callable[[], None]) -> None:
    """Call ``then`` now if ``package`` is imported already, else right after its first import.

    Args:
        package: name of a top-level package, installed or not.
        then: called once, without arguments; what it raises comes out of the import.
    """
    if package in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _AfterImport(package, then))
