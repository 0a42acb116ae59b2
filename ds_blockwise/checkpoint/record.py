# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says about itself: settings, blocks, and which element of which parameter lies where.

The record is part of the optimizer's state dict, so it travels with every host that saves one. It consists of plain
containers only: it loads with ``weights_only`` and can be written as JSON. Offline tools rebuild segment tables from
it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Protocol, TypeVar

import torch

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.roles import BLOCK_TYPE_OF, Role
from ds_blockwise.blocks.segment_table import Placement, SegmentTable, build_table
from ds_blockwise.blocks.settings.auto_settings import AUTO
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.settings.defaults import DEFAULT_GRANULARITY, LR_PRESETS
from ds_blockwise.blocks.settings.rules import Rule
from ds_blockwise.blocks.settings.update_settings import MovingMultiplier, UpdateSettings
from ds_blockwise.blocks.spec import BlockPart, BlockSpec
from ds_blockwise.blocks.structure import RoleSpan, TensorStructure
from ds_blockwise.checkpoint.record_check import check_record, check_run_record
from ds_blockwise.checkpoint.record_types import (
    PackedGroup,
    PackedMatrices,
    PackedPlacement,
    PackedShard,
    PortableRecord,
    Record,
    RunRecord,
    SecondMomentOf,
    Settings,
)
from ds_blockwise.kernels.param_groups import ParamGroup
from ds_blockwise.measure.auto_multipliers import RunState

KEY = "ds_blockwise"  # of the record in a state dict
FORMAT = 1
VERSION = "0.1.0"  # of this package
_DAMAGED = "the state dict's entry 'ds_blockwise', which says what lies where, is damaged"
_ANOTHER = "Restore the file from a copy, or load another checkpoint."
_T = TypeVar("_T")
PER_BLOCK_KEY = "exp_avg_sq_blocks"  # instead of exp_avg_sq in compact checkpoints: no other optimizer mistakes it


class Recorded(Protocol):
    """What of an optimizer goes into a record."""

    block_settings: BlockSettings

    @property
    def momentum_dtype(self) -> str:
        """The setting ``momentum_dtype``."""
        ...

    @property
    def checkpoint_format(self) -> str:
        """The setting ``checkpoint_format``."""
        ...

    @property
    def shares_second_moment(self) -> bool:
        """Whether the second moment is one value per block."""
        ...

    @property
    def own_settings(self) -> tuple[str, ...]:
        """Names of settings that only its class has."""
        ...

    @property
    def second_moment_of(self) -> SecondMomentOf:
        """What the second moment is the mean square of."""
        ...

    @property
    def param_groups(self) -> list[ParamGroup]:
        """As ``torch.optim.Optimizer`` has them."""
        ...

    @property
    def cautious_weight_decay(self) -> bool:
        """The setting ``cautious_weight_decay``."""
        ...

    def placements_in(self, tensor: torch.Tensor) -> tuple[Placement, ...] | None:
        """The parameters in a stepped tensor; None if they are not known."""

    @property
    def lr_multipliers(self) -> dict[str, float]:
        """The multipliers in effect where they are not those of the settings."""

    def run_state(self) -> RunState | None:
        """Position and measurements of the run; None if there are none."""


# ------------------------------------------------------------------------------- writing


def record_of(optimizer: Recorded, version: str) -> Record:
    """Describe an optimizer's settings and the contents of its stepped tensors.

    Args:
        optimizer: one of ours, with the groups that ``state_dict()`` will number.
        version: of this package.

    Returns:
        Plain containers; a tensor whose contents are unknown is None.
    """
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    placements = [optimizer.placements_in(tensor) for tensor in tensors]
    specs = {p.spec.fqn: p.spec for found in placements for p in found or ()}
    return {
        "format": FORMAT,
        "version": version,
        "optimizer": type(optimizer).__name__,
        "second_moment_of": optimizer.second_moment_of,
        "shares_second_moment": optimizer.shares_second_moment,
        "settings": settings_of(optimizer),
        "parameters": {fqn: _packed_spec(spec) for fqn, spec in specs.items()},
        "tensors": [
            None if found is None else {"numel": tensor.numel(), "placements": [_packed_placement(p) for p in found]}
            for tensor, found in zip(tensors, placements, strict=True)
        ],
    }


def settings_of(optimizer: Recorded) -> Settings:
    """An optimizer's settings, with the defaults spelt out, and a digest of its blocks (``layout``).

    The digest does not depend on the number of ranks or the ZeRO stage. It is empty while no tensor is known.
    """
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    specs = {p.spec.fqn: p.spec for tensor in tensors for p in optimizer.placements_in(tensor) or ()}
    given = optimizer.block_settings
    if given.is_default and specs:
        given = next(iter(specs.values())).block_settings  # settings may have been given to tag_parameters instead
    settings: Settings = {
        "optimizer": type(optimizer).__name__,
        "preset": given.preset,
        "lr_multipliers": _packed_multipliers(given, optimizer.lr_multipliers),
        "weight_decay_multipliers": dict(given.weight_decay_multipliers),
        "granularity": {
            **{role.value: size for role, size in DEFAULT_GRANULARITY.items()},
            **given.granularity,
        },
        "rules": [_packed_rule(rule) for rule in given.rules],
        "momentum_dtype": str(optimizer.momentum_dtype),
        "checkpoint_format": str(optimizer.checkpoint_format),
        "layout": _digest(specs) if specs else "",
        "groups": [_packed_group(group) for group in optimizer.param_groups],
    }
    if optimizer.own_settings:
        settings["own"] = {name: getattr(optimizer, name) for name in optimizer.own_settings}
    if given.transfer is not None:
        settings["transfer"] = asdict(given.transfer)
    if given.betas_by_type:
        settings["betas_by_type"] = {key: list(betas) for key, betas in given.betas_by_type.items()}
    if optimizer.cautious_weight_decay:
        settings["cautious_weight_decay"] = True
    if (run := optimizer.run_state()) is not None:
        settings["run"] = run
    return settings


def _packed_multipliers(given: BlockSettings, present: Mapping[str, float]) -> dict[str, object]:
    fixed = {key: _plain(value) for key, value in given.lr_multipliers.items()}
    if given.auto is not None:  # what was measured is no setting; it is part of "run"
        return {AUTO: asdict(given.auto), **fixed}
    return {**LR_PRESETS[given.preset], **fixed, **present}


def _packed_group(group: ParamGroup) -> PackedGroup:
    beta1, beta2 = group["betas"]
    return {
        "lr": float(group["lr"]),
        "betas": [float(beta1), float(beta2)],
        "eps": float(group["eps"]),
        "weight_decay": float(group["weight_decay"]),
    }


def _packed_rule(rule: Rule) -> dict[str, object]:
    # whether a rule has to match says nothing about the model that was trained
    values = {f.name: getattr(rule, f.name) for f in fields(rule) if f.name != "optional"}
    return {k: _plain(v) for k, v in values.items() if v is not None}


def _plain(value: object) -> object:
    """The value of a setting as a JSON has it."""
    if isinstance(value, MovingMultiplier):
        return value.packed()
    return value.value if isinstance(value, Role) else list(value) if isinstance(value, tuple) else value


def _digest(specs: Mapping[str, BlockSpec]) -> str:
    digest = hashlib.sha256()
    for fqn in sorted(specs):
        spec = specs[fqn]
        blocks = [(p.start, p.end, p.role.value, p.rows_per_block, p.first_block) for p in spec.parts]
        digest.update(repr((fqn, tuple(spec.shape), spec.axis, spec.structure.is_bias, blocks)).encode())
        if spec.structure.matrices is not None:
            digest.update(repr(spec.structure.matrices).encode())
    return digest.hexdigest()


def _packed_spec(spec: BlockSpec) -> PackedMatrices:
    packed: PackedMatrices = {
        "shape": list(spec.shape),
        "axis": spec.axis,
        "is_bias": spec.structure.is_bias,
        "num_blocks": spec.num_blocks,
        "parts": [
            [
                part.start,
                part.end,
                part.role.value,
                span.head_rows,
                part.granularity,
                part.update.lr_multiplier,
                part.update.weight_decay_multiplier,
                part.rows_per_block,
                part.first_block,
            ]
            for part, span in zip(spec.parts, spec.structure.spans, strict=True)
        ],
    }
    if spec.structure.matrices is not None:
        packed["matrices"] = list(spec.structure.matrices)
    return packed


def _packed_placement(p: Placement) -> PackedPlacement:
    shard: PackedShard | None = None
    if p.shard is not None:
        chunks = [[list(span) for span in rank] for rank in p.shard.chunks]
        shard = {"dim": p.shard.dim, "rank": p.shard.rank, "chunks": chunks}
    return {
        "fqn": p.spec.fqn,
        "flat_start": p.flat_start,
        "param_start": p.param_start,
        "numel": p.numel,
        "shard": shard,
        "cuts": list(p.cuts),
    }


# ------------------------------------------------------------------------------- reading


def record_in(state_dict: Mapping[str, Any]) -> Record | None:
    """The whole record in an optimizer's state dict; None if another optimizer wrote it, or Megatron-core's wrappers.

    Raises:
        ValueError: the record is damaged, or of a later format than this version reads.
    """
    record = run_record_in(state_dict)
    if record is None or not record.keys() & {"parameters", "tensors"}:
        return None
    return _checked(record, check_record)


def run_record_in(state_dict: Mapping[str, Any]) -> RunRecord | None:
    """What a record says about the whole run; None if another optimizer wrote the state dict.

    Raises:
        ValueError: it is damaged, or of a later format than this version reads.
    """
    record = state_dict.get(KEY)
    if record is None:
        return None
    if not isinstance(record, Mapping):
        raise ValueError(f"{_DAMAGED} (it is a {type(record).__name__}, not a mapping). {_ANOTHER}")
    if record.get("format") != FORMAT:
        raise ValueError(
            f"the checkpoint was written in format {record.get('format')!r} by ds_blockwise {record.get('version')!r}; "
            f"this version reads format {FORMAT}. Install that version or a later one."
        )
    return _checked(record, check_run_record)


def _checked(record: Mapping[str, Any], check: Callable[[object], _T]) -> _T:
    try:
        return check(record)
    except ValueError as error:
        raise ValueError(f"{_DAMAGED}: {error}. {_ANOTHER}") from error


def spec_of(record: PortableRecord, fqn: str) -> BlockSpec:
    """The blocks of a parameter as they were when the record was written.

    Raises:
        ValueError: the record does not hold that parameter.
    """
    packed = record["parameters"].get(fqn)
    if packed is None:
        raise ValueError(f"the checkpoint has no parameter {fqn!r}; it has {_few(record['parameters'])}")
    spans, parts = [], []
    for start, end, role_name, head_rows, granularity, lr, weight_decay, rows, first in packed["parts"]:
        role = Role(role_name)
        spans.append(RoleSpan(start, end, role, head_rows))
        update = UpdateSettings(lr, weight_decay)  # of the start; the settings in the record say what else there was
        parts.append(BlockPart(start, end, role, BLOCK_TYPE_OF[role], granularity, update, rows, first))
    matrices = None
    if "matrices" in packed:
        count, rows, columns = packed["matrices"]
        matrices = (count, rows, columns)
    structure = TensorStructure(fqn, tuple(packed["shape"]), packed["axis"], tuple(spans), packed["is_bias"], matrices)
    return BlockSpec(structure, tuple(parts), packed["num_blocks"], BlockSettings())


def placements_of(record: Record, index: int) -> tuple[Placement, ...]:
    """What lay in the stepped tensor with number ``index`` of the state dict.

    Raises:
        ValueError: the record does not know that tensor.
    """
    packed = record["tensors"][index] if index < len(record["tensors"]) else None
    if packed is None:
        raise ValueError(
            f"the checkpoint does not say which parameters lie in tensor {index} of its optimizer state: it was saved "
            f"before the model was tagged. Tag it (tag_parameters or deepspeed.initialize) and save again."
        )
    return tuple(_unpacked_placement(record, p) for p in packed["placements"])


def _unpacked_placement(record: Record, packed: PackedPlacement) -> Placement:
    spec = spec_of(record, packed["fqn"])
    shard = None
    if packed["shard"] is not None:
        said = packed["shard"]
        chunks = tuple(tuple((start, end) for start, end in rank) for rank in said["chunks"])
        shard = TensorShard(spec.shape, said["dim"], said["rank"], chunks)
    return Placement(spec, shard, packed["flat_start"], packed["param_start"], packed["numel"], tuple(packed["cuts"]))


def numel_of(record: Record, index: int) -> int:
    """Elements of the stepped tensor with number ``index`` of the state dict; 0 if the record does not know it."""
    packed = record["tensors"][index] if index < len(record["tensors"]) else None
    return 0 if packed is None else packed["numel"]


def table_of(record: Record, index: int) -> SegmentTable:
    """The segment table of the stepped tensor with number ``index`` of the state dict."""
    placements = placements_of(record, index)
    return build_table(numel_of(record, index), placements, shares_second_moment=record["shares_second_moment"])


def same_ranges(one: Sequence[Placement], two: Sequence[Placement]) -> bool:
    """Whether two lists place the same elements of the same parameters at the same offsets."""

    def facts(placements: Sequence[Placement]) -> list[tuple[object, ...]]:
        return [
            (p.spec.fqn, tuple(p.spec.shape), p.shard, p.flat_start, p.param_start, p.numel)
            for p in placements
            if p.numel
        ]

    return facts(one) == facts(two)


def same_blocks(one: Sequence[Placement], two: Sequence[Placement]) -> bool:
    """Whether two lists with the same ranges also cut their parameters into the same blocks."""

    def facts(placements: Sequence[Placement]) -> list[tuple[object, ...]]:
        return [
            (p.spec.axis, [(q.start, q.end, q.rows_per_block, q.first_block) for q in p.spec.parts])
            for p in placements
            if p.numel
        ]

    return facts(one) == facts(two)


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
