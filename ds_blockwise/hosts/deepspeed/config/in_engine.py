# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed takes from the JSON of an engine without a word: keys that it never reads, no norm to clip to."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ds_blockwise.hosts.deepspeed.config.check import clipping_mistake
from ds_blockwise.hosts.deepspeed.config.models import unread
from ds_blockwise.hosts.deepspeed.engine import Engine

logger = logging.getLogger(__name__)


def check_json(engine: Engine) -> None:
    """Refuse a wrong norm, and warn on rank 0 of keys without an effect; before the optimizer is built.

    A key that DeepSpeed does not read may be one of the user's own program, so it is no error here;
    ``ds-blockwise check`` refuses it.

    Args:
        engine: a ``DeepSpeedEngine`` with its configuration read.

    Raises:
        ValueError: ``"gradient_clipping"`` is no finite number of at least 0.
    """
    if engine.global_rank == 0:
        read: Mapping[str, Any] = getattr(getattr(engine, "_config", None), "_param_dict", {})
        for key, _, _, remedy in unread(read):
            logger.warning('DeepSpeed ignores "%s" in its JSON: it has no such key; %s', key, remedy)
    norm = engine.gradient_clipping()
    if (allowed := clipping_mistake(norm)) is not None:
        raise ValueError(f'"gradient_clipping": {norm!r}: allowed: {allowed}; correct the DeepSpeed JSON')
