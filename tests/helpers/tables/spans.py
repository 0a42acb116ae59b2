# SPDX-License-Identifier: Apache-2.0
"""From a hand-written table to the oracle's spans."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tests.helpers.tables.huggingface import Table
from tests.helpers.tables.oracle_names import Classes, Classified, Span


def classes_of(table: Table, shapes: Mapping[str, tuple[int, ...]], columns: Collection[str] = ()) -> Classes:
    """What the oracle needs of parameters with a single role.

    Args:
        table: entries such as ``query head 4``, as `huggingface` has them; norms are cut into elements, the default.
        shapes: of every parameter of the table.
        columns: names of those whose blocks follow each other along the second dimension.
    """
    classes: Classes = {}
    for name, what in table.items():
        role, *_, granularity, count = what.split()
        axis = 1 if name in columns else 0
        length = shapes[name][axis] if shapes[name] else 1
        if granularity == "head":
            size = length // int(count)
        else:
            size = 1 if granularity == "row" else 0
            assert granularity == "tensor" or length == int(count), (name, what, shapes[name])
        classes[name] = Classified((Span(0, length, role, size),), axis)
    return classes
