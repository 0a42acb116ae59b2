# SPDX-License-Identifier: Apache-2.0
"""What a parameter is before any setting is applied: which rows have which role, and how many rows a head has.

Speaks of the unsharded tensor only. Knows nothing of multipliers, block sizes, ranks or shards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ds_blockwise.blocks.roles import QKV_LAYOUT_MEANING, NormPlace, QKVLayout, Role
from ds_blockwise.blocks.rule_needed import CHOOSE, RuleNeeded


@dataclass(frozen=True, slots=True)
class HeadGeometry:
    """Head counts of one attention module, unsharded.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads (query groups).
        head_dim: rows per head; None: computed from the weight's rows.
        source: where the numbers were read, for error messages.
        key_dim: key rows per head in the QKV layout ``key_value``; None: half of the head's rows.
        value_dim: value rows per head in that layout.
        rope_dim: rows of the rotary key in the QKV layout ``latent_rope``.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int | None
    source: str
    key_dim: int | None = None
    value_dim: int | None = None
    rope_dim: int | None = None


@dataclass(frozen=True, slots=True)
class RoleSpan:
    """Consecutive indices ``[start, end)`` of the block axis that have one role.

    ``head_rows`` is the number of indices per head; None for roles without heads. It is 1 where the role usually has
    heads but these rows belong to none (MLA's latent projections).
    """

    start: int
    end: int
    role: Role
    head_rows: int | None = None


@dataclass(frozen=True, slots=True)
class TensorStructure:
    """What a parameter is, before any setting is applied.

    Attributes:
        fqn: fully qualified name.
        shape: unsharded shape.
        axis: the dimension along which blocks follow each other (0, or 1 for transposed ``[in, out]`` weights).
        spans: role spans; they tile the block axis in order.
        is_bias: bias of a linear.
        matrices: if the tensor holds several matrices, each with blocks of its own (experts): their number, rows and
            columns in the order in which the elements are stored, which the registered shape may not show. ``axis``
            then is a dimension of these three.
        is_factor: rows and columns are not the layer's own: a factor of a low-rank adapter.
        fused_parts: equal parts of the block axis that are matrices of their own: 2 for a fused gate and up.
        norm_place: where a norm stands; None: it is no norm, or that is not known.
        other_names: further names that the user's rules may match: those of a tied weight, those of the module tree
            behind a host's own.
        width: of the residual stream that a matrix reads or writes (`transfer`); None if it is not known.
    """

    fqn: str
    shape: tuple[int, ...]
    axis: int
    spans: tuple[RoleSpan, ...]
    is_bias: bool
    matrices: tuple[int, int, int] | None = None
    other_names: tuple[str, ...] = ()
    # not compared: no part of what a checkpoint says of a parameter
    is_factor: bool = field(default=False, compare=False)
    fused_parts: int = field(default=1, compare=False)
    width: int | None = field(default=None, compare=False)
    norm_place: NormPlace | None = None

    def __post_init__(self) -> None:
        at = 0
        assert self.matrices is None or math.prod(self.matrices) == math.prod(self.shape), (self.fqn, self.matrices)
        for span in self.spans:
            assert span.start == at and span.end > span.start, (self.fqn, self.spans)
            at = span.end
        assert at == self.axis_size, (self.fqn, self.shape, self.spans)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, ``fqn`` first."""
        return (self.fqn, *self.other_names)

    @property
    def axis_size(self) -> int:
        """Length of the block axis (1 for a scalar)."""
        return self.stored_shape[self.axis] if self.shape else 1

    @property
    def is_vector(self) -> bool:
        """Whether it is no matrix: a norm, a bias, one number for each row."""
        return self.is_bias or self.numel_per_row == 1

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in which the elements are stored: ``matrices`` if given, else ``shape``."""
        return self.shape if self.matrices is None else self.matrices

    @property
    def num_matrices(self) -> int:
        """Number of matrices with blocks of their own; 1 unless several experts share the tensor."""
        return 1 if self.matrices is None else self.matrices[0]

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix, or several, of more than one row and column."""
        sizes = self.stored_shape[-2:]
        return not self.is_bias and len(self.stored_shape) == 2 + (self.matrices is not None) and min(sizes) > 1

    @property
    def numel_per_row(self) -> int:
        """Elements of one index of the block axis, in one matrix."""
        return math.prod(self.shape) // (self.axis_size * self.num_matrices)


def whole_tensor(
    fqn: str,
    shape: tuple[int, ...],
    role: Role,
    *,
    is_bias: bool,
    axis: int = 0,
    num_heads: int | None = None,
    head_dim: int | None = None,
    source: str = "",
    headless: bool = False,
    matrices: tuple[int, int, int] | None = None,
) -> TensorStructure:
    """Structure of a parameter with a single role.

    Args:
        fqn: name for messages.
        shape: unsharded shape.
        role: the role of all rows.
        is_bias: bias of a linear.
        axis: block axis.
        num_heads: heads in this parameter, for query, key and value weights.
        head_dim: rows per head, if the module says so; checked against the shape.
        source: where the head count was read.
        headless: the role usually has heads, but these rows belong to none: one block per row.
        matrices: see `TensorStructure`; ``axis`` counts in them.

    Raises:
        RuleNeeded: the rows do not divide into the heads.
    """
    size = (matrices or shape)[axis] if shape else 1
    head_rows = 1 if headless else None
    if num_heads is not None:
        if size % num_heads or (head_dim is not None and size != num_heads * head_dim):
            said = f" of {head_dim} rows" if head_dim is not None else ""
            raise RuleNeeded(
                f"{{parameter}} has {size} rows, which do not divide into {num_heads} {role.value} heads{said} "
                f"({source}). Correct the head counts, or give them.",
                fqn,
                shape,
                {"role": role.value, "num_heads": CHOOSE},
            )
        head_rows = size // num_heads
    return TensorStructure(fqn, shape, axis, (RoleSpan(0, size, role, head_rows),), is_bias, matrices)


def fused_qkv(
    fqn: str,
    shape: tuple[int, ...],
    layout: QKVLayout,
    heads: HeadGeometry,
    *,
    is_bias: bool,
    axis: int = 0,
) -> TensorStructure:
    """Structure of a weight or bias that holds rows of several attention roles.

    Args:
        fqn: name for messages.
        shape: unsharded shape; the block axis holds the rows in the order of the QKV layout.
        layout: the QKV layout, see `QKV_LAYOUT_MEANING`; not ``unknown``.
        heads: head counts, unsharded.
        is_bias: bias of the fused linear.
        axis: block axis.

    Raises:
        RuleNeeded: the rows do not divide into the heads, or the query heads into the query groups.
    """
    size = shape[axis]
    if layout == "latent_rope":
        unit, repeats = _latent_rope(fqn, shape, size, heads), 1
    elif layout in ("key_value", "key_value_concat", "query_gate"):
        unit, repeats = _pairs(fqn, shape, layout, size, heads)
    else:
        unit, repeats = _query_key_value(fqn, shape, layout, size, heads)
    spans: list[RoleSpan] = []
    at = 0
    for _ in range(repeats):
        for role, rows, head_rows in unit:
            spans.append(RoleSpan(at, at + rows, role, head_rows))
            at += rows
    return TensorStructure(fqn, shape, axis, tuple(spans), is_bias)


_Unit = tuple[tuple[Role, int, int | None], ...]
"""The rows that a fused weight repeats, as runs: role, rows, rows per head."""


def _wrong_heads(fqn: str, shape: tuple[int, ...], layout: QKVLayout, problem: str) -> RuleNeeded:
    return RuleNeeded(
        f"{{parameter}} {problem}. Correct the head counts, or give them.",
        fqn,
        shape,
        {"role": "qkv", "layout": layout, "num_heads": CHOOSE, "num_kv_heads": CHOOSE},
    )


def _query_key_value(
    fqn: str, shape: tuple[int, ...], layout: QKVLayout, size: int, heads: HeadGeometry
) -> tuple[_Unit, int]:
    num_heads, num_kv_heads = heads.num_heads, heads.num_kv_heads
    gates = num_heads if layout == "grouped_gate" else 0
    units = num_heads + gates + 2 * num_kv_heads
    head_dim = heads.head_dim if heads.head_dim is not None else size // units
    if head_dim * units != size or head_dim == 0:
        gated = f", {gates} gates" if gates else ""
        problem = (
            f"has {size} rows, but {num_heads} query heads{gated} and {num_kv_heads} key and value heads of "
            f"{head_dim} rows make {head_dim * units} ({heads.source})"
        )
        raise _wrong_heads(fqn, shape, layout, problem)
    if num_heads % num_kv_heads:
        problem = f"is wrong: {num_heads} query heads do not divide into {num_kv_heads} query groups ({heads.source})"
        raise _wrong_heads(fqn, shape, layout, problem)
    groups = 1 if layout == "concat" else num_kv_heads
    query = (Role.QUERY, num_heads // groups * head_dim, head_dim)
    # a gate scales the attention's output, so it has the role of the output projection: one block per row
    gate = (Role.ATTN_OUT, gates // groups * head_dim, None)
    key = (Role.KEY, num_kv_heads // groups * head_dim, head_dim)
    value = (Role.VALUE, num_kv_heads // groups * head_dim, head_dim)
    return ((query, gate, key, value) if gates else (query, key, value)), groups


def _pairs(fqn: str, shape: tuple[int, ...], layout: QKVLayout, size: int, heads: HeadGeometry) -> tuple[_Unit, int]:
    count = heads.num_heads if layout == "query_gate" else heads.num_kv_heads
    first, second = heads.head_dim, heads.head_dim
    if layout == "key_value" and heads.key_dim is not None:
        first, second = heads.key_dim, heads.value_dim
    if first is None or second is None:
        first = second = size // (2 * count)
    if (first + second) * count != size or first == 0:
        problem = (
            f'has {size} rows, but {count} heads of {first} + {second} rows (layout "{layout}": '
            f"{QKV_LAYOUT_MEANING[layout]}) make {(first + second) * count} ({heads.source})"
        )
        raise _wrong_heads(fqn, shape, layout, problem)
    if layout == "query_gate":
        return ((Role.QUERY, first, first), (Role.ATTN_OUT, second, None)), count
    if layout == "key_value":
        return ((Role.KEY, first, first), (Role.VALUE, second, second)), count
    return ((Role.KEY, first * count, first), (Role.VALUE, second * count, second)), 1


def _latent_rope(fqn: str, shape: tuple[int, ...], size: int, heads: HeadGeometry) -> _Unit:
    if heads.rope_dim is None or not 0 < heads.rope_dim < size:
        raise RuleNeeded(
            f"{{parameter}} ends with the rows of a rotary key. Their number must be 1 to {size - 1}, but "
            f"qk_rope_head_dim is {heads.rope_dim} ({heads.source}). Give the whole weight one role.",
            fqn,
            shape,
            {"role": Role.VALUE.value},
        )
    # Keys and values are both computed from the latent; it gets the smaller of their multipliers, that of values.
    # Its rows and the rotary key's belong to no single head.
    return (Role.VALUE, size - heads.rope_dim, 1), (Role.KEY, heads.rope_dim, 1)
