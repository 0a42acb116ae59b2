# SPDX-License-Identifier: Apache-2.0
"""Registers ds_blockwise with DeepSpeed in programs that never import it, if the environment asks for it.

torch calls `activate` at ``import torch`` (an entry point of its group ``torch.backends``), in every program of an
environment where ds_blockwise is installed. So this file stands outside the package and imports nothing but what
Python has loaded anyway.

The rest waits for DeepSpeed's import without causing it: plain PyTorch users do not pay for it (seconds, and messages
on stdout), and the order of imports does not matter.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

SWITCH = "DS_BLOCKWISE_AUTOLOAD"
"""Environment variable: 1 registers without an import line, 0 (the default) does not."""


def activate() -> None:
    """Import ds_blockwise right after DeepSpeed, whoever imports that, if `SWITCH` is 1; called by ``import torch``.

    Raises:
        ValueError: the variable is neither 0 nor 1; it comes out of ``import torch``.
    """
    value = os.environ.get(SWITCH, "0")
    if value not in ("0", "1"):
        raise ValueError(f"the environment variable {SWITCH} is {value!r}. Allowed: 1 (on) and 0 (off)")
    if value == "1":
        after_import("deepspeed", lambda: importlib.import_module("ds_blockwise"))


def after_import(package: str, then: Callable[[], object]) -> None:
    """Call ``then`` now if ``package`` is imported already, else right after its first import.

    Args:
        package: name of a top-level package, installed or not; its import may have begun.
        then: called once, without arguments; what it raises comes out of the import.
    """
    module = sys.modules.get(package)
    spec = getattr(module, "__spec__", None)
    if module is None:
        sys.meta_path.insert(0, _AfterImport(package, then))
    elif spec is not None and getattr(spec, "_initializing", False):
        _AtItsEnd.watch(spec, then)
    else:
        then()


class _AfterImport(MetaPathFinder):
    """Finds one package as the other finders do, and adds a call after its code has run."""

    def __init__(self, package: str, then: Callable[[], object]) -> None:
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


class _AtItsEnd(ModuleSpec):
    """The spec of a module whose code is running: Python unsets ``_initializing`` when it has run, also by an error.

    So it is when DeepSpeed's own import is what brought torch in, and torch us.
    """

    _then: Callable[[], object]

    @classmethod
    def watch(cls, spec: ModuleSpec, then: Callable[[], object]) -> None:
        spec.__class__ = cls
        assert isinstance(spec, cls)
        spec._then = then

    @property
    def _initializing(self) -> bool:
        return bool(self.__dict__.get("_initializing", False))

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["_initializing"] = value
        if not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            if self.name in sys.modules:
                self.__dict__.pop("_then")()
