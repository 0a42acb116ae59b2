# SPDX-License-Identifier: Apache-2.0
"""The keys of a schedule's section in a JSON: a wrong or a missing one is named, not a Python signature."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from ds_blockwise.values import unknown

Schedule = TypeVar("Schedule")
Keys = ParamSpec("Keys")
Constructor = Callable[Concatenate[Schedule, Keys], None]

_TOTAL = "total_num_steps"


def with_known_keys(constructor: Constructor[Schedule, Keys]) -> Constructor[Schedule, Keys]:
    """Let a schedule's constructor refuse keys that it does not have, and say so if the length of the run is missing.

    Raises:
        ValueError: by the constructor that is returned.
    """
    signature = inspect.signature(constructor)
    keys = [name for name in signature.parameters if name not in ("self", "optimizer")]

    @functools.wraps(constructor)
    def checked(self: Schedule, /, *args: Keys.args, **kwargs: Keys.kwargs) -> None:
        name = type(self).__name__
        for key in kwargs:
            if key not in signature.parameters:
                raise ValueError(f"{name} got an {unknown('key', key, keys)}")
        if _TOTAL not in signature.bind_partial(self, *args, **kwargs).arguments:
            raise ValueError(
                f'{name} needs the number of updates of the run. Write "{_TOTAL}": 50000, with your number, beside its '
                f"other keys. In the JSON of a run file leave it out: the main job fills it in."
            )
        constructor(self, *args, **kwargs)

    return checked
