# SPDX-License-Identifier: Apache-2.0
"""The block report: the role, multipliers and blocks of each parameter, and the bytes of its optimizer state."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from torch import nn

from ds_blockwise.blocks.roles import NormPlace, Role
from ds_blockwise.blocks.settings.defaults import UNITS
from ds_blockwise.blocks.settings.update_settings import Betas, shown_betas
from ds_blockwise.blocks.spec import STATE_BYTES_PER_VALUE, BlockPart, BlockSpec, transfer_factor
from ds_blockwise.blocks.tagged_parameter import tags_of

_NUMBER = re.compile(r"(?:(?<=\.)|^)[0-9]+(?=\.|$)")
_MOST_RANGES = 6  # of numbered parts in one name
ADAMW_STATE_VALUES = 2  # exp_avg and exp_avg_sq


@dataclass(frozen=True, slots=True)
class ReportRow:
    """One role inside one parameter.

    Attributes:
        fqn: fully qualified name.
        shape: unsharded shape of the parameter.
        role: see `Role`; ``bias`` is appended for biases of linears. ``norm_in`` and the like of a norm, where a
            setting asks for its place.
        block_type: ``emb head qk ffn vo norm other``.
        lr_multiplier: factor on the base learning rate; where it is to be measured (``is_measured``), the 1 until then.
        weight_decay_multiplier: factor on the weight decay.
        granularity: ``head row tensor element``, and for Muon what is one matrix.
        num_blocks: second moments that Adam-mini keeps for these elements.
        numel: elements of the role in the unsharded parameter.
        state_bytes: fp32 ``exp_avg`` plus one fp32 value per block, over all ranks, replicas not counted.
        is_measured: whether the multiplier is ``"auto"``.
        lr_multiplier_end: ``lr_multiplier`` when the schedule's decay is done; None: it does not move.
        norm_place: where a norm stands (``norm_in``, ``norm_out``, ``norm_qk``); None: no norm, or not known.
        betas: the role's own decay rates of the two moments, None for those of the param group.
        transfer: the factor in ``lr_multiplier`` that the width rule (``"transfer"``) brought.
    """

    fqn: str
    shape: tuple[int, ...]
    role: str
    block_type: str
    lr_multiplier: float
    weight_decay_multiplier: float
    granularity: str
    num_blocks: int
    numel: int
    state_bytes: int
    is_measured: bool = False
    lr_multiplier_end: float | None = None
    betas: Betas = (None, None)
    norm_place: NormPlace | None = None
    transfer: float = 1.0


@dataclass(frozen=True, slots=True)
class BlockReport:
    """The rows of a model and their totals; ``str()`` is a table, ``to_dict()`` is for JSON.

    Attributes:
        rows: one for each parameter and role.
        presets: of ``lr_multipliers``; one, unless parameters were tagged with different settings.
    """

    rows: tuple[ReportRow, ...]
    presets: tuple[str, ...] = ()

    @property
    def totals(self) -> dict[str, float]:
        """Elements, blocks and state bytes of the model, beside AdamW's."""
        numel = sum(row.numel for row in self.rows)
        state_bytes = sum(row.state_bytes for row in self.rows)
        adamw = numel * ADAMW_STATE_VALUES * STATE_BYTES_PER_VALUE
        return {
            "parameters": numel,
            "num_blocks": sum(row.num_blocks for row in self.rows),
            "adam_mini_state_bytes": state_bytes,
            "adam_mini_state_bytes_per_parameter": state_bytes / numel if numel else 0.0,
            "adamw_state_bytes": adamw,
            "adamw_state_bytes_per_parameter": adamw / numel if numel else 0.0,
        }

    def to_dict(self) -> dict[str, object]:
        """Rows and totals as plain values."""
        return {"parameters": [asdict(row) for row in self.rows], "totals": self.totals, "presets": list(self.presets)}

    def __str__(self) -> str:
        return self.table()

    def table(self, *, full: bool = False) -> str:
        """The rows and the totals as text.

        Args:
            full: a line for each row. Otherwise layers (and experts, and whatever else is numbered) with equal lines
                share them: ``layers.0-3.mlp.weight``. Blocks and bytes are those of one of them, and the last column
                says how many there are.
        """
        betas = any(row.betas != (None, None) for row in self.rows)
        lines = [_Line(row.fqn, (*_cells(row), *([shown_betas(row.betas)] if betas else []))) for row in self.rows]
        if not full:
            lines = _collapsed(lines)
        shared = any(line.count > 1 for line in lines)
        body = [(line.name, *line.cells, *([f"{line.count:,}"] if shared else [])) for line in lines]
        head: tuple[str, ...] = (
            "parameter",
            "shape",
            "role",
            "type",
            "lr x",
            "wd x",
            "granularity",
            "blocks",
            "state bytes",
            *(["betas"] if betas else []),
            *(["times"] if shared else []),
        )
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        text = [_line(head, widths), "  ".join("-" * width for width in widths)]
        text += [_line(line, widths) for line in body]
        totals = self.totals
        text.append(
            f"total: {int(totals['parameters']):,} parameters, {int(totals['num_blocks']):,} blocks; state "
            f"of Adam-mini {int(totals['adam_mini_state_bytes']):,} bytes "
            f"({totals['adam_mini_state_bytes_per_parameter']:.3f} per parameter), of AdamW "
            f"{int(totals['adamw_state_bytes']):,} ({totals['adamw_state_bytes_per_parameter']:.3f})"
        )
        text += [f'lr x: from the preset "{name}", in which lr is the rate of {UNITS[name]}' for name in self.presets]
        return "\n".join([*text, *self._moved()])

    def _moved(self) -> list[str]:
        """What the width rule did, in a line; none without it."""
        types: dict[float, dict[str, None]] = {}
        for row in self.rows:
            if row.transfer != 1.0:
                types.setdefault(row.transfer, {})[row.block_type] = None
        said = ", ".join(f"x{factor:g} ({', '.join(kinds)})" for factor, kinds in types.items())
        return [f"rates moved to this model's width: {said}"] if said else []


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of a table: a name or a part of one, the other columns, and how many parameters share it."""

    name: str
    cells: tuple[str, ...]
    count: int = 1


def _cells(row: ReportRow) -> tuple[str, ...]:
    return (
        "x".join(map(str, row.shape)) or "scalar",
        row.role,
        row.block_type,
        _lr_cell(row),
        f"{row.weight_decay_multiplier:g}",
        row.granularity,
        f"{row.num_blocks:,}",
        f"{row.state_bytes:,}",
    )


def _lr_cell(row: ReportRow) -> str:
    if row.is_measured:
        return "auto"
    end = "" if row.lr_multiplier_end is None else f" to {row.lr_multiplier_end:g}"
    return f"{row.lr_multiplier:g}{end}"


def _collapsed(lines: Sequence[_Line]) -> list[_Line]:
    """Lines of numbered parts (a layer, an expert) with equal lines become those of one part, with its numbers.

    Args:
        lines: in the model's order.
    """
    found: list[_Line] = []
    at = 0
    while at < len(lines):
        name = lines[at].name
        number = _NUMBER.search(name)
        if number is None:
            found.append(lines[at])
            at += 1
            continue
        prefix = name[: number.start()]
        parts: dict[int, list[_Line]] = {}
        while at < len(lines) and lines[at].name.startswith(prefix):
            line = lines[at]
            here = _NUMBER.match(line.name, number.start())
            if here is None:
                break
            parts.setdefault(int(here[0]), []).append(replace(line, name=line.name[here.end() :]))
            at += 1
        equal: dict[tuple[_Line, ...], list[int]] = {}
        for index, part in parts.items():
            equal.setdefault(tuple(_collapsed(part)), []).append(index)
        for shared, indices in equal.items():
            label = f"{prefix}{_ranges(indices)}"
            found += [_Line(f"{label}{line.name}", line.cells, line.count * len(indices)) for line in shared]
    return found


def _ranges(indices: Iterable[int]) -> str:
    """``0-3`` or ``0,2,4``; of many, the first and the last."""
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], index)
        else:
            ranges.append((index, index))
    words = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    return ",".join(words if len(words) <= _MOST_RANGES else [*words[: _MOST_RANGES - 2], "...", words[-1]])


def _line(cells: Sequence[str], widths: list[int]) -> str:
    # words to the left, numbers to the right
    left = (0, 1, 2, 3, 6)
    return "  ".join(
        cell.ljust(width) if i in left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ).rstrip()


def block_report(model: nn.Module) -> BlockReport:
    """Report the blocks of a tagged model.

    Args:
        model: a module whose parameters carry ``block_spec`` (after `tag_parameters` or ``deepspeed.initialize``).

    Returns:
        One row per trainable parameter and role, in the model's order, in unsharded sizes; none for parameters
        without elements.

    Raises:
        ValueError: a trainable parameter is not tagged.
    """
    rows: list[ReportRow] = []
    presets: dict[str, None] = {}
    for fqn, param in model.named_parameters():
        if not param.requires_grad:
            continue
        tags = tags_of(param)
        if tags is None and not math.prod(getattr(param, "ds_shape", param.shape)):
            continue
        if tags is None:
            raise ValueError(
                f"parameter {fqn!r} of shape {tuple(param.shape)} is not tagged. Call "
                f"ds_blockwise.tag_parameters(model) before block_report(model), or call block_report after "
                f"deepspeed.initialize."
            )
        rows.extend(_rows_of(tags.block_spec))
        presets[tags.block_spec.block_settings.preset] = None
    return BlockReport(tuple(rows), tuple(presets))


def _granularity(part: BlockPart) -> str:
    return (
        part.granularity if part.orthogonalize is None else f"{part.granularity}; {part.orthogonalize} orthogonalised"
    )


def _role_name(spec: BlockSpec, role: Role) -> str:
    place = spec.structure.norm_place if spec.block_settings.names_norm_places else None
    return place or role.value + (" bias" if spec.structure.is_bias else "")


def _rows_of(spec: BlockSpec) -> Iterator[ReportRow]:
    per_row = spec.structure.numel_per_row * spec.structure.num_matrices
    for role in dict.fromkeys(part.role for part in spec.parts):
        parts = [part for part in spec.parts if part.role is role]
        numel = sum(part.end - part.start for part in parts) * per_row
        if parts[0].rows_per_block == 0:
            num_blocks = numel
        else:
            blocks = {
                part.first_block + i for part in parts for i in range((part.end - part.start) // part.rows_per_block)
            }
            num_blocks = len(blocks) * spec.structure.num_matrices
        update = parts[0].update
        yield ReportRow(
            spec.fqn,
            spec.shape,
            _role_name(spec, role),
            parts[0].block_type,
            update.lr_multiplier,
            update.weight_decay_multiplier,
            _granularity(parts[0]),
            num_blocks,
            numel,
            (numel + num_blocks) * STATE_BYTES_PER_VALUE,
            spec.block_settings.is_measured(role, *spec.structure.names),
            update.lr_multiplier_end,
            (update.beta1, update.beta2),
            spec.structure.norm_place,
            transfer_factor(spec.structure, role, spec.block_settings),
        )
