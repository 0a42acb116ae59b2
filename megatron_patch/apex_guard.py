# SPDX-License-Identifier: Apache-2.0
"""Imported before Megatron-core: a package ``apex`` that is not NVIDIA's breaks it in ways that name neither.

Raises:
    ImportError: such a package is installed.
"""

from ds_blockwise.kernels.foreign_apex import foreign_apex

_problem = foreign_apex()
if _problem is not None:
    raise ImportError(_problem)
