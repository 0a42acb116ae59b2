# SPDX-License-Identifier: Apache-2.0
"""Which rows of an attention weight a tensor-parallel rank may hold: whole heads, in the order of the QKV layout.

Works on role spans and integer ranges. Knows nothing of modules or process groups.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.roles import QKV_LAYOUT_MEANING, QKVLayout
from ds_blockwise.blocks.structure import RoleSpan, TensorStructure

_CONCATENATED: tuple[QKVLayout, ...] = ("concat", "key_value_concat")
_ONE_SPAN_PER_ROLE: tuple[QKVLayout | None, ...] = (None, "latent_rope", *_CONCATENATED)


def cut_by_role(structure: TensorStructure, shard: TensorShard | None, layout: QKVLayout | None) -> TensorShard | None:
    """The rows that each rank holds of a weight whose host says only how many ranks there are.

    Args:
        structure: roles along the block axis.
        shard: an even split over the ranks.
        layout: QKV layout of a fused weight, else None. If the weight is concatenated, each rank holds its share of Q,
            then of K, then of V; otherwise ``shard`` is right as it is.

    Raises:
        ValueError: a role's rows do not divide by the number of ranks.
    """
    if shard is None or shard.dim != structure.axis or layout not in _CONCATENATED:
        return shard
    try:
        return shard.part_by_part([span.end for span in structure.spans])
    except ValueError as error:
        raise ValueError(
            f'parameter {structure.fqn!r} of shape {structure.shape} (layout "{layout}": {QKV_LAYOUT_MEANING[layout]}) '
            f"cannot be split: {error}. Use a tensor-parallel size that divides the number of key and value heads."
        ) from error


def check_cut(structure: TensorStructure, shard: TensorShard | None, layout: QKVLayout | None) -> None:
    """Refuse a split with which a rank's attention would take rows for another head or role than they are.

    Args:
        structure: roles along the block axis.
        shard: the exact rows that each rank holds, in storage order.
        layout: QKV layout of a fused weight, else None.

    Raises:
        ValueError: a head lies on two ranks, or a rank's own rows do not have the QKV layout.
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
            meaning = "" if layout is None else f' (layout "{layout}": {QKV_LAYOUT_MEANING[layout]})'
            listed = ", ".join(f"{start} to {end - 1}" for start, end in ranges)
            raise ValueError(
                f"tensor-parallel rank {rank} holds rows {listed} of parameter {structure.fqn!r} of shape "
                f"{structure.shape}{meaning}: {problem}. The ranks together would compute another attention than one "
                f'rank does. Describe the split in "tensor_parallel": {{"partition_config": ...}} with a "shape" that '
                f"lists queries, keys and values, or do not split this weight."
            )


def _problem(spans: Sequence[RoleSpan], held: Sequence[tuple[int, int, int]], layout: QKVLayout | None) -> str | None:
    for index, start, end in held:
        rows = spans[index].head_rows or 1
        if start % rows or end % rows:
            return f"a {spans[index].role.value} head of {rows} rows lies on two ranks"
    if not held:
        return None
    if layout in _ONE_SPAN_PER_ROLE:
        sizes = [0] * len(spans)
        for index, start, end in held:
            sizes[index] += end - start
        whole = [span.end - span.start for span in spans]
        in_order = [index for index, _, _ in held] == sorted(index for index, _, _ in held)
        even = all(size * whole[0] == sizes[0] * full for size, full in zip(sizes, whole, strict=True))
        if not even:
            return "they are not the same share of the rows of each role"
        return None if in_order else "the roles are not in the order of the whole weight"
    unit = next((i for i in range(1, len(spans)) if spans[i].role is spans[0].role), len(spans))
    at = [index % unit for index, start, end in held if (start, end) == (0, spans[index].end - spans[index].start)]
    whole_units = len(at) == len(held) and at == [i % unit for i in range(len(held))] and len(held) % unit == 0
    return None if whole_units else "they are not whole query groups with their keys and values"
