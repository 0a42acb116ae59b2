# SPDX-License-Identifier: Apache-2.0
"""Presets of multipliers and default block sizes by block type and role, with their sources."""

from __future__ import annotations

from typing import Literal

from ds_blockwise.blocks.roles import Role

Granularity = Literal["head", "row", "tensor", "element"]
GRANULARITIES: tuple[Granularity, ...] = ("head", "row", "tensor", "element")


ADAMW_RATE = 8.0
"""AdamW's best learning rate in the unit of ``"paper"``, which is the rate of the norms.

In our comparisons the best base rate of Blockwise AdamW in that unit was 1/8, 1/8 and 1/11 of the best rate of AdamW
(docs/evidence.md), so with all multipliers divided by 8 a tuned rate of AdamW is right as it stands. A power of two:
the two units give the same bits.
"""

_PAPER: dict[str, float] = {"emb": 10.0, "head": 10.0, "qk": 8.0, "ffn": 6.0, "vo": 4.0, "norm": 1.0, "other": 1.0}
_ADAMW_SCALE = {block_type: multiplier / ADAMW_RATE for block_type, multiplier in _PAPER.items()}

LR_PRESETS: dict[str, dict[str, float]] = {
    "adamw_scale": _ADAMW_SCALE,
    "tuned": {**_ADAMW_SCALE, "norm": 1.0},
    "paper": _PAPER,
    "uniform": dict.fromkeys(_PAPER, 1.0),
    "muon": {**dict.fromkeys(_PAPER, 1.0), "emb": 3.0, "norm": 3.0},
}
"""Multipliers by block type, by the name that the setting ``lr_multipliers`` uses.

``adamw_scale``, the default: the ratios of arXiv 2502.19002, section 5; ``lr`` is AdamW's. ``paper``: the same ratios
as published; ``lr`` is the rate of the norms. ``tuned``: the best of our comparison (docs/evidence.md), with norms at
AdamW's rate. ``uniform``: no block type differs; plain AdamW or Adam-mini. ``muon``, the default of `BlockwiseMuon`:
the embedding and norms at three times the rate of the matrices, which helped most in our runs (docs/evidence.md) and
which tuned public recipes for Muon agree with (modded-nanogpt, track 3: 3.1 and 3.3).
"""
DEFAULT_PRESET = "adamw_scale"
MUON_PRESET = "muon"
UNITS = {**dict.fromkeys(LR_PRESETS, "AdamW"), "paper": "norms"}
"""Whose learning rate ``lr`` is under each preset, for readers."""
MEASURABLE = ("adamw_scale", "paper")
"""The presets that measured multipliers can take the place of: those whose ratios follow from sharpness."""


Orthogonalize = Literal["matrix", "role", "head"]
"""What is one matrix for Muon: the whole weight, the rows of one role, the rows of one head."""
ORTHOGONALIZE: tuple[Orthogonalize, ...] = ("matrix", "role", "head")
NOT_ORTHOGONALIZED = "none"
DEFAULT_ORTHOGONALIZE: dict[Role, Orthogonalize] = {
    Role.QUERY: "head",
    Role.KEY: "head",
    Role.VALUE: "head",
    Role.ATTN_OUT: "role",
    Role.FFN: "role",
}
"""The roles of hidden matrices. Each role of a fused weight, gate and up of a fused FFN, and each expert are apart.

Each head by itself ended lower than each role in our runs (docs/evidence.md). Kimi K3 (arXiv 2607.24653, section 2.5)
and GLM-5 (arXiv 2602.15763) do so too. The other roles' weights are tables, vectors, or small.
"""


PUBLISHED = "published"
PUBLISHED_GRANULARITY: dict[Role, Granularity] = {
    Role.EMBEDDING: "row",
    Role.OUTPUT: "row",
    Role.QUERY: "head",
    Role.KEY: "head",
    Role.VALUE: "row",
    Role.ATTN_OUT: "row",
    Role.FFN: "row",
    Role.ROUTER: "row",
    Role.NORM: "tensor",
    Role.OTHER: "row",
}
DEFAULT_GRANULARITY: dict[Role, Granularity] = {**PUBLISHED_GRANULARITY, Role.NORM: "element"}

HEAD_ROLES = (Role.QUERY, Role.KEY, Role.VALUE)

DEFAULT_EXPONENT = 0.7
"""The power of a measured ratio of sharpness that gives a multiplier. Read off the figures of arXiv 2502.19002: its
multipliers 10/8/6/4 are its measured ratios to powers from 0.64 to 0.80.

At step 40000 of LLaMA 0.25B S(norm) / S(type) was 36 (emb), 21 (qk), 10.7 (ffn) and 5.7 (vo); to the power 0.7 these
are 12.3, 8.4, 5.3 and 3.4. A square root, which a diagonal quadratic model would suggest, gives 6.0, 4.6, 3.3 and 2.4.
"""
