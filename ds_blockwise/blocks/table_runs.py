# SPDX-License-Identifier: Apache-2.0
"""Runs of a segment table: elements that lie at regular distances and share their settings."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_blockwise.blocks.settings.update_settings import UpdateSettings


@dataclass(frozen=True, slots=True)
class TableRun:
    """A `ranges.Run` with its settings; its ``block`` is a slot of the local block vector."""

    start: int
    count: int
    numel: int
    block: int
    repeat: int
    repeat_stride: int
    block_stride: int
    update: UpdateSettings

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(repeat, count, numel)``."""
        return (self.repeat, self.count, self.numel)

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """View of the run's elements in a contiguous 1-D tensor, shape ``(repeat, count, numel)``."""
        return flat.as_strided(self.shape, (self.repeat_stride, self.numel, 1), flat.storage_offset() + self.start)

    def blocks_of(self, values: torch.Tensor) -> torch.Tensor:
        """View of the run's values in a contiguous vector of block values, shape ``(repeat or 1, count, 1)``."""
        repeat = self.repeat if self.block_stride else 1
        return values.as_strided(
            (repeat, self.count, 1), (self.block_stride, 1, 1), values.storage_offset() + self.block
        )


@dataclass(frozen=True, slots=True)
class MultiplierRun:
    """Elements that share their settings, of one or several blocks; input of the element-wise update."""

    start: int
    count: int
    repeat: int
    repeat_stride: int
    update: UpdateSettings

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """View of the run's elements in a contiguous 1-D tensor, shape ``(repeat, count)``."""
        return flat.as_strided(
            (self.repeat, self.count),
            (self.repeat_stride, 1),
            flat.storage_offset() + self.start,
        )


@dataclass(frozen=True, slots=True)
class BetaGroup:
    """Elements whose moments decay at the same rates.

    Attributes:
        update: settings with these betas.
        elements: where they lie in the stepped tensor, an index or all of it.
        values: where their second moments lie, likewise.
    """

    update: UpdateSettings
    elements: slice | torch.Tensor
    values: slice | torch.Tensor
