# SPDX-License-Identifier: Apache-2.0
"""The width rule: how learning rates that were tuned at one width move to another.

A learning rate is multiplied by ``(width / base_width) ** exponent``. The exponent depends on what a parameter is:

========================================  =======  ========
part                                      ``mup``  ``sqrt``
========================================  =======  ========
embedding (also a tied output layer)          0      -1/2
untied output layer                          -1       -1
matrices of layers (qk, vo, ffn, other)      -1       -1
norms, biases, every other vector             0        0
========================================  =======  ========

``mup``: Adam's learning rates in the maximal update parametrization (arXiv 2203.03466 and 2512.22382).
``sqrt`` differs from it in the embedding: with a vocabulary much larger than the width its rate relative to the
matrices' should grow as the root of the width, not as the width (arXiv 2506.15025). Only rates move. What those papers
also change (initial weights, attention's scale, eps, weight decay) is left as the model has it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.rule_needed import CHOOSE, RuleNeeded
from ds_blockwise.blocks.structure import TensorStructure
from ds_blockwise.values import as_count, as_mapping, check_keys, one_of

TransferRule = Literal["mup", "sqrt"]
TRANSFER_RULES: tuple[TransferRule, ...] = ("mup", "sqrt")
EXPONENTS: dict[TransferRule, dict[Role, float]] = {
    "mup": {**dict.fromkeys(Role, -1.0), Role.EMBEDDING: 0.0, Role.NORM: 0.0},
    "sqrt": {**dict.fromkeys(Role, -1.0), Role.EMBEDDING: -0.5, Role.NORM: 0.0},
}
"""Powers of ``width / base_width`` for matrices; that of a vector is 0 whatever its role."""

_READERS = (Role.QUERY, Role.KEY, Role.VALUE, Role.ROUTER)
_TABLES = (Role.EMBEDDING, Role.OUTPUT)


@dataclass(frozen=True, slots=True)
class Transfer:
    """The width rule that the user set: ``"transfer": {"base_width": 256, "rule": "mup"}``.

    The width of a model is that of its residual stream. It is read from shapes, unsharded: the columns of the embedding
    and of the output layer, the rows of attention's output projections, and whichever side of another matrix is one of
    these. Of a matrix that fits none of them, or two, a rule has to say it: ``{"match": ..., "width": 1024}``.

    Attributes:
        base_width: the width at which the learning rate and the multipliers were tuned.
        rule: ``mup``, or ``sqrt`` for vocabularies much larger than the width; they differ in the embedding.
    """

    base_width: int
    rule: TransferRule = "mup"

    def factor(self, structure: TensorStructure, role: Role, width: int | None = None) -> float:
        """What the learning rate of one role in a parameter is multiplied by.

        Args:
            structure: the parameter.
            role: the role.
            width: of the residual stream at this parameter, if a rule says it.

        Raises:
            RuleNeeded: the width has to be known, and neither the shapes nor a rule say it.
        """
        exponent = EXPONENTS[self.rule][role]
        if structure.is_vector or exponent == 0.0:
            return 1.0
        width = width or structure.width
        if width is None:
            raise RuleNeeded(
                '{parameter}: "transfer" needs the width of the residual stream that it reads or writes, and its '
                "shape does not tell it from its other sizes.",
                structure.fqn,
                structure.shape,
                {"width": CHOOSE},
            )
        return float((width / self.base_width) ** exponent)


def parse_transfer(value: object) -> Transfer | None:
    """Check a raw setting; None means that rates stay as they are.

    Raises:
        ValueError: an unknown key or rule, a width that is no whole number of at least 1, or none.
        TypeError: it is no mapping.
    """
    if value is None:
        return None
    raw = as_mapping("transfer", value)
    check_keys("transfer", raw, ("base_width", "rule"))
    if "base_width" not in raw:
        raise ValueError(
            'transfer needs "base_width", the width at which lr was tuned: write "transfer": {"base_width": 256}, or '
            "remove transfer"
        )
    base_width = as_count("transfer['base_width']", raw["base_width"])
    return Transfer(base_width, one_of("transfer['rule']", raw.get("rule", "mup"), TRANSFER_RULES))


def stream_widths(structures: Iterable[TensorStructure]) -> frozenset[int]:
    """The widths of a model's residual streams; several for one with towers, none where only other parts are trained.

    Args:
        structures: all parameters of the model.
    """
    return frozenset(
        s.numel_per_row if s.spans[0].role in _TABLES else s.axis_size
        for s in structures
        if not s.is_vector and (s.spans[0].role in _TABLES or s.spans[0].role is Role.ATTN_OUT)
    )


def width_of(structure: TensorStructure, known: frozenset[int]) -> int | None:
    """The width of the residual stream that a matrix reads or writes; None if its shape does not tell.

    Args:
        structure: the parameter.
        known: the model's, from `stream_widths`.
    """
    if structure.is_vector:
        return None
    inputs, outputs, role = structure.numel_per_row, structure.axis_size, structure.spans[0].role
    if role in _TABLES:
        return inputs
    if role is Role.ATTN_OUT and len(structure.spans) == 1:
        return outputs
    sides = {inputs, outputs} & known
    if inputs in known and role in _READERS:
        return inputs
    return sides.pop() if len(sides) == 1 else None
