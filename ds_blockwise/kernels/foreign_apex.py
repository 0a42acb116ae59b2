# SPDX-License-Identifier: Apache-2.0
"""Recognises a package ``apex`` that is not NVIDIA's. Nothing here needs either of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_BUILD_APEX = "build NVIDIA's from source (https://github.com/NVIDIA/apex, with its CUDA extensions)"


def foreign_apex() -> str | None:
    """What is wrong with an installed package ``apex`` that is not NVIDIA's; None if there is none.

    The package of that name on PyPI is an unrelated web toolkit. Megatron-core asks only whether ``import apex`` works,
    and then fails to build its norms.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "multi_tensor_apply").is_dir() and (folder / "optimizers").is_dir() for folder in folders):
        return None
    where = spec.origin or ", ".join(map(str, folders))
    return (
        f"the installed package 'apex' ({where}) is not NVIDIA's Apex but another project of that name, which PyPI "
        f"installs for `pip install apex`. Megatron-core takes it for NVIDIA's and fails when it builds a model. Run "
        f"`pip uninstall apex`; nothing here needs Apex. If you want it, {_BUILD_APEX}"
    )
