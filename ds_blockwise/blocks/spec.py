# SPDX-License-Identifier: Apache-2.0
"""Blocks of one parameter, in coordinates of the unsharded tensor.

Says where each block starts and ends and which multipliers it has. Knows nothing of ranks, shards or flat buffers.
Partition: arXiv 2406.16793 (Adam-mini), algorithm 2; block types: arXiv 2502.19002, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ds_blockwise.blocks.ranges import AxisSpan, Batch
from ds_blockwise.blocks.roles import BLOCK_TYPE_OF, BlockType, Role
from ds_blockwise.blocks.rule_needed import CHOOSE, RuleNeeded
from ds_blockwise.blocks.settings.block_settings import BlockSettings, Resolved
from ds_blockwise.blocks.settings.defaults import HEAD_ROLES, NOT_ORTHOGONALIZED, Granularity, Orthogonalize
from ds_blockwise.blocks.settings.rules import Rule
from ds_blockwise.blocks.settings.update_settings import UpdateSettings
from ds_blockwise.blocks.structure import RoleSpan, TensorStructure

STATE_BYTES_PER_VALUE = 4  # exp_avg and exp_avg_sq are fp32 unless momentum_dtype says otherwise


@dataclass(frozen=True, slots=True)
class BlockPart:
    """A role span with its settings and the id of its first block.

    ``rows_per_block`` is 0 for element-wise parts, which have no block ids. ``orthogonalize`` is what Muon takes for
    one matrix; None: nothing of it.
    """

    start: int
    end: int
    role: Role
    block_type: BlockType
    granularity: Granularity
    update: UpdateSettings
    rows_per_block: int
    first_block: int
    orthogonalize: Orthogonalize | None = None


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """The blocks of one parameter: its structure with settings applied.

    Attributes:
        structure: roles along the block axis.
        parts: role spans with their multipliers and blocks; they tile the block axis in order.
        num_blocks: blocks of the whole tensor, those of all its matrices included; element-wise parts have none.
        block_settings: the settings that were applied.
    """

    structure: TensorStructure
    parts: tuple[BlockPart, ...]
    num_blocks: int
    block_settings: BlockSettings

    @property
    def fqn(self) -> str:
        """Fully qualified name of the parameter."""
        return self.structure.fqn

    @property
    def shape(self) -> tuple[int, ...]:
        """Unsharded shape."""
        return self.structure.shape

    @property
    def axis(self) -> int:
        """The block axis."""
        return self.structure.axis

    @property
    def numel(self) -> int:
        """Elements of the unsharded tensor."""
        return math.prod(self.shape)

    @property
    def batch(self) -> Batch | None:
        """The matrices that have blocks of their own, in the form of `ranges`; None for a single one."""
        matrices = self.structure.matrices
        return None if matrices is None else Batch(matrices[0], self.num_blocks // matrices[0])

    def axis_spans(self) -> tuple[AxisSpan, ...]:
        """The parts as plain integers, in the form of `ranges`."""
        return tuple(
            AxisSpan(p.start, p.end, p.first_block, p.rows_per_block, index) for index, p in enumerate(self.parts)
        )

    def blocks_of(self, part: BlockPart) -> Iterator[int]:
        """Ids of the blocks of one of `parts`, in all matrices."""
        count = (part.end - part.start) // part.rows_per_block if part.rows_per_block else 0
        per_matrix = self.num_blocks // self.structure.num_matrices
        for matrix in range(self.structure.num_matrices):
            first = part.first_block + matrix * per_matrix
            yield from range(first, first + count)

    def block_rows(self) -> list[int]:
        """Indices of the block axis per block id (a block may consist of several runs of a fused weight)."""
        rows = [0] * (self.num_blocks // self.structure.num_matrices)
        for part in self.parts:
            if part.rows_per_block:
                for block in range((part.end - part.start) // part.rows_per_block):
                    rows[part.first_block + block] += part.rows_per_block
        return rows * self.structure.num_matrices


def apply_settings(structure: TensorStructure, block_settings: BlockSettings) -> BlockSpec:
    """Cut a parameter into blocks.

    Args:
        structure: roles along the block axis.
        block_settings: multipliers, granularity and rules.

    Returns:
        The blocks; ids count up along the block axis, then from matrix to matrix. Spans of one role with granularity
        ``tensor`` share one id in each matrix.

    Raises:
        ValueError: the granularity is not allowed for the role, or it is ``head`` and the number of heads is unknown,
            or the width rule needs a width that is unknown.
    """
    parts: list[BlockPart] = []
    whole_of_role: dict[Role, int] = {}
    num_blocks = 0
    for span in structure.spans:
        settings = resolved(structure, span.role, block_settings)
        size = span.end - span.start
        # where rows belong to no head (MLA's latent), granularity "head" means one block per row
        granularity = "row" if settings.granularity == "head" and span.head_rows == 1 else settings.granularity
        how = _orthogonalize(structure, span, settings)
        if how is not None:
            granularity = "row"  # of NorMuon's second moment
        shared = granularity == "tensor" and span.role in whole_of_role
        rows = _rows_per_block(structure, span, granularity)
        first = whole_of_role[span.role] if shared else num_blocks
        if granularity == "tensor":
            whole_of_role[span.role] = first
        if rows and not shared:
            num_blocks += size // rows
        parts.append(
            BlockPart(
                span.start,
                span.end,
                span.role,
                BLOCK_TYPE_OF[span.role],
                granularity,
                settings.update,
                rows,
                first,
                how,
            )
        )
    return BlockSpec(structure, tuple(parts), num_blocks * structure.num_matrices, block_settings)


def _orthogonalize(structure: TensorStructure, span: RoleSpan, settings: Resolved) -> Orthogonalize | None:
    how = settings.orthogonalize
    if how is None or (not settings.by_rule and (structure.is_factor or not structure.is_matrix)):
        return None
    if not structure.is_matrix:
        raise RuleNeeded(
            f"{{parameter}} is no matrix of several rows and columns, so it cannot be orthogonalised. Remove "
            f'"orthogonalize" from its rule, or write "{NOT_ORTHOGONALIZED}".',
            structure.fqn,
            structure.shape,
        )
    if how == "head" and span.role not in HEAD_ROLES:
        return "role"
    if how == "head" and span.head_rows is None:
        raise RuleNeeded(
            f'{{parameter}} (role {span.role.value}) has "orthogonalize": "head", but the number of its heads is not '
            f"known. Give it.",
            structure.fqn,
            structure.shape,
            {"role": span.role.value, "num_heads": CHOOSE},
        )
    return how


def resolved(structure: TensorStructure, role: Role, block_settings: BlockSettings) -> Resolved:
    """The settings of one role in a parameter, its learning rate moved to the model's width.

    Raises:
        RuleNeeded: as `BlockSettings.resolve` and `Transfer.factor`.
    """
    place = structure.norm_place
    found = block_settings.resolve(structure.fqn, role, structure.is_bias, structure.other_names, place)
    factor = transfer_factor(structure, role, block_settings)
    return replace(found, update=found.update.with_lr_times(factor))


def transfer_factor(structure: TensorStructure, role: Role, block_settings: BlockSettings) -> float:
    """What the width rule multiplies the learning rate of one role in a parameter by; 1 where none is set.

    Raises:
        RuleNeeded: as `Transfer.factor`.
    """
    if block_settings.transfer is None:
        return 1.0
    rule = block_settings.rule_for(*structure.names) or Rule(match="")
    return block_settings.transfer.factor(structure, role, rule.width)


def _rows_per_block(structure: TensorStructure, span: RoleSpan, granularity: Granularity) -> int:
    if granularity == "element":
        return 0
    if granularity == "row":
        # a row of a vector is one element: stored and updated element-wise
        return 1 if structure.numel_per_row > 1 else 0
    if granularity == "tensor":
        return span.end - span.start
    if span.head_rows is None:
        raise RuleNeeded(
            f'{{parameter}} (role {span.role.value}) has granularity "head", but the number of its heads is not known. '
            f"Give it.",
            structure.fqn,
            structure.shape,
            {"role": span.role.value, "num_heads": CHOOSE},
        )
    return span.head_rows
