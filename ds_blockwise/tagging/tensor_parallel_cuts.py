# SPDX-License-Identifier: Apache-2.0
"""Where a tensor-parallel split may cut attention's rows: queries, keys and values each by itself, in whole heads.

Knows blocks and integer ranges, nothing of modules or ranks that talk to each other.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.roles import LAYOUT_MEANING, QKVLayout
from ds_blockwise.blocks.structure import RoleSpan, TensorStructure

_IN_A_ROW: tuple[QKVLayout, ...] = ("concat", "key_value_concat")
_OF_ONE_UNIT: tuple[QKVLayout | None, ...] = (None, "latent_rope", *_IN_A_ROW)
_REASON = "so the model does not compute attention as one rank does, whatever the optimizer"


def cut_by_role(structure: TensorStructure, shard: TensorShard | None, layout: QKVLayout | None) -> TensorShard | None:
    """The split of a weight whose host says only how many ranks hold it.

    Args:
        structure: roles along the block axis.
        shard: what the host says.
        layout: of a fused weight; in a concatenated one each rank holds its share of Q, then of K, then of V.

    Raises:
        ValueError: a role's rows do not divide by the number of ranks.
    """
    if shard is None or shard.dim != structure.axis or layout not in _IN_A_ROW:
        return shard
    try:
        return shard.part_by_part([span.end for span in structure.spans])
    except ValueError as error:
        raise ValueError(f"parameter {structure.fqn!r} (queries, keys and values in a row): {error}") from error


def check_cut(structure: TensorStructure, shard: TensorShard | None, layout: QKVLayout | None) -> None:
    """Refuse exact ranges of rows that a rank's attention would read as other heads or roles than they are.

    Args:
        structure: roles along the block axis.
        shard: the rows that each rank holds, in storage order.
        layout: of a fused weight, else None.

    Raises:
        ValueError: a head lies on two ranks, or a rank's rows do not follow the layout by themselves.
    """
    if shard is None or shard.dim != structure.axis:
        return
    for rank, ranges in enumerate(shard.chunks):
        held = [
            (index, max(start, span.start) - span.start, min(end, span.end) - span.start)
            for start, end in ranges
            for index, span in enumerate(structure.spans)
            if max(start, span.start) < min(end, span.end)
        ]
        problem = _problem(structure.spans, held, layout)
        if problem is not None:
            meaning = "" if layout is None else f' (layout "{layout}": {LAYOUT_MEANING[layout]})'
            listed = ", ".join(f"{start} to {end - 1}" for start, end in ranges)
            raise ValueError(
                f"tensor-parallel rank {rank} holds rows {listed} of parameter {structure.fqn!r}{meaning}: {problem}, "
                f'{_REASON}. Say how it is split in "tensor_parallel": {{"partition_config": ...}}, with a "shape" '
                f"that lists queries, keys and values, or leave this weight whole."
            )


def _problem(spans: Sequence[RoleSpan], held: Sequence[tuple[int, int, int]], layout: QKVLayout | None) -> str | None:
    for index, start, end in held:
        rows = spans[index].head_rows or 1
        if start % rows or end % rows:
            return f"a {spans[index].role.value} head of {rows} rows is cut"
    if not held:
        return None
    if layout in _OF_ONE_UNIT:
        sizes = [0] * len(spans)
        for index, start, end in held:
            sizes[index] += end - start
        whole = [span.end - span.start for span in spans]
        in_order = [index for index, _, _ in held] == sorted(index for index, _, _ in held)
        even = all(size * whole[0] == sizes[0] * full for size, full in zip(sizes, whole, strict=True))
        return None if in_order and even else "its share of queries, keys and values differs, or their order"
    unit = next((i for i in range(1, len(spans)) if spans[i].role is spans[0].role), len(spans))
    at = [index % unit for index, start, end in held if (start, end) == (0, spans[index].end - spans[index].start)]
    whole_units = len(at) == len(held) and at == [i % unit for i in range(len(held))] and len(held) % unit == 0
    return None if whole_units else "they are not whole groups of queries with their keys and values"
