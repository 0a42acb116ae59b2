# SPDX-License-Identifier: Apache-2.0
"""Imported before the rest of this package: refuses what is installed and would fail later, in ways that name nothing.

That is a package ``apex`` that is not NVIDIA's, and a Megatron-core that is too old.

Raises:
    ImportError: one of the two is installed.
"""

from __future__ import annotations

import importlib
import logging
import re

from ds_blockwise.kernels.foreign_apex import foreign_apex

OLDEST, TOO_NEW = (0, 16), (0, 20)
SUPPORTED = f">={OLDEST[0]}.{OLDEST[1]},<{TOO_NEW[0]}.{TOO_NEW[1]}"

logger = logging.getLogger(__name__)


def release_of(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def check_release(version: str) -> None:
    """Refuse a release of Megatron-core that is too old; warn of one that nobody has tried.

    A later release is not refused: `megatron_patch.convert_` looks for every name that it relies on.

    Args:
        version: such as ``"0.19.2"``.

    Raises:
        ImportError: it is older than `SUPPORTED`.
    """
    release = release_of(version)
    known = f"ds_blockwise supports megatron-core {SUPPORTED}: pip install 'megatron-core{SUPPORTED}'"
    if release < OLDEST:
        raise ImportError(f"megatron-core {version} is too old. {known}")
    if release >= TOO_NEW:
        logger.warning("megatron-core %s was never tried. %s", version, known)


_problem = foreign_apex()
if _problem is not None:
    raise ImportError(_problem)
# Megatron-core itself imports apex
MEGATRON_VERSION: str = importlib.import_module("megatron.core.package_info").__version__
check_release(MEGATRON_VERSION)
