# SPDX-License-Identifier: Apache-2.0
"""What a record looks like: plain containers, which load with ``weights_only`` and can be written as JSON."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from ds_blockwise.measure.auto_multipliers import RunState

SecondMomentOf = Literal["gradients", "updates", "nothing"]
"""What ``exp_avg_sq`` is the mean square of: gradients (Adam), orthogonalised updates in part (Muon), or there is none.

What an optimizer does with state of another kind says `checkpoint.state_dicts.check_kind`.
"""


class PackedSpec(TypedDict):
    """The blocks of one parameter. A row of ``parts`` holds start, end, role, rows of a head (None: no heads),
    granularity, both multipliers, rows of a block, number of the first block.
    """

    shape: list[int]
    axis: int
    is_bias: bool
    num_blocks: int
    parts: list[list[Any]]


class PackedMatrices(PackedSpec, total=False):
    """`PackedSpec` with the matrices in a parameter that holds several experts."""

    matrices: list[int]


class PackedShard(TypedDict):
    """The tensor-parallel split of a parameter: ``chunks`` are the ranges of ``dim`` that each rank holds."""

    dim: int
    rank: int
    chunks: list[list[list[int]]]


class PackedPlacement(TypedDict):
    """`Placement`, its parameter by name."""

    fqn: str
    flat_start: int
    param_start: int
    numel: int
    shard: PackedShard | None
    cuts: list[int]


class PackedTensor(TypedDict):
    """What lies in one stepped tensor."""

    numel: int
    placements: list[PackedPlacement]


class PackedGroup(TypedDict):
    """The hyper-parameters of a param group."""

    lr: float
    betas: list[float]
    eps: float
    weight_decay: float


class _Settings(TypedDict, total=False):  # a record of an earlier version may lack some
    optimizer: str
    preset: str
    own: dict[str, object]
    lr_multipliers: dict[str, object]
    weight_decay_multipliers: dict[str, float]
    betas_by_type: dict[str, list[float | None]]
    cautious_weight_decay: bool
    granularity: dict[str, str]
    rules: list[dict[str, object]]
    momentum_dtype: str
    checkpoint_format: str
    layout: str
    groups: list[PackedGroup]


class Settings(_Settings, total=False):
    """An optimizer's settings with the defaults spelt out; ``layout`` is a digest of its blocks.

    ``transfer`` is there only if the width rule is set; ``lr_multipliers`` are those before it.
    """

    transfer: dict[str, object]
    run: RunState


class _RunRecord(TypedDict, total=False):
    """``second_moment_of``: see `SecondMomentOf`; missing where an earlier version wrote it, which knew Adam alone."""

    second_moment_of: str


class RunRecord(_RunRecord):
    """What is the same for all parameters and ranks: Megatron-core's checkpoints hold this part of a `Record`."""

    format: int
    version: str
    optimizer: str
    shares_second_moment: bool
    settings: Settings


class PortableRecord(RunRecord):
    """What does not depend on the ranks of the run: a portable checkpoint holds this part of a `Record`."""

    parameters: dict[str, PackedMatrices]


class Record(PortableRecord):
    """What a state dict holds under `KEY`. ``tensors`` is in the order of the ids in ``state_dict()["state"]``."""

    tensors: list[PackedTensor | None]


def has_second_moments(record: RunRecord) -> bool:
    """Whether the optimizer that wrote a record keeps second moments."""
    return record.get("second_moment_of") != "nothing"
