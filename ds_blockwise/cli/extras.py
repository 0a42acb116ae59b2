# SPDX-License-Identifier: Apache-2.0
"""Commands need packages that ``pip install ds_blockwise`` does not bring: each error names the extra that does."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_OURS = ("", "ds_blockwise", "megatron_patch")
# package -> the extra of `setup.py` that brings it, where no command names one
_EXTRA_OF = {
    "accelerate": "hf",
    "deepspeed": "deepspeed",
    "matplotlib": "launch",
    "megatron": "megatron",
    "numpy": "deepspeed",
    "pyarrow": "data",
    "pydantic": "launch",
    "safetensors": "deepspeed",
    "tokenizers": "launch",
    "transformers": "hf",
    "yaml": "launch",
}


def missing_package(error: ModuleNotFoundError) -> str:
    """What to say of a package that nobody named before it was imported.

    Raises:
        ModuleNotFoundError: the module is one of ours, so this is a fault of ours.
    """
    package = (error.name or "").partition(".")[0]
    if package in _OURS:
        raise error
    extra = _EXTRA_OF.get(package)
    wanted = package if extra is None else f"'ds_blockwise[{extra}]'"
    return f"this needs {package}, which is not installed: pip install {wanted}"


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Import inside of this: a missing package becomes an error that says what to install.

    What packages warn of while they are imported (a faster variant that is not there) is nothing that the user of a
    command can act on, and is not shown.

    Args:
        extra: of `setup.py`.
        what: needs the package, for the message.

    Raises:
        ImportError: a package of somebody else is missing.
    """
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in _OURS:
            raise
        raise ImportError(f"{what} needs {package}: pip install 'ds_blockwise[{extra}]'") from error
    finally:
        logging.disable(disabled)
