# SPDX-License-Identifier: Apache-2.0
"""The part of an optimizer that looks at itself: telemetry, and multipliers that are measured or changed during a run.

Nothing here communicates or waits for a device except on the steps that are read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ds_blockwise.blocks.block_settings import BlockSettings
from ds_blockwise.blocks.roles import BlockType
from ds_blockwise.blocks.segment_table import Placement, SegmentTable
from ds_blockwise.blocks.spec import BlockSpec
from ds_blockwise.kernels.binding import Binding, StepObserver
from ds_blockwise.measure.auto_multipliers import MeasuredMultipliers
from ds_blockwise.measure.meter import Listener, Meter
from ds_blockwise.measure.readings import TelemetrySettings, TypeTelemetry
from ds_blockwise.optimizers.state_dict import StoredState
from ds_blockwise.parallel.reduce import ReductionGroups


class Measuring(StoredState):
    """Base of `BlockwiseOptimizer`: what it measures, and its present multipliers."""

    _meter: Meter | None
    _lr_multipliers: dict[str, float]
    _has_changed_multipliers: bool
    _absent: list[Binding]
    _bindings: dict[int, Binding]

    @abstractmethod
    def bindings(self) -> list[Binding]:
        """The tensors bound so far."""

    @abstractmethod
    def bind(self, tensor: torch.Tensor, placements: Sequence[Placement], groups: ReductionGroups) -> SegmentTable:
        """Tell the optimizer what lies in a tensor."""

    @abstractmethod
    def observe(self, observer: StepObserver) -> None:
        """Let an observer see every step."""

    def _measure_from_now(self, settings: TelemetrySettings | None) -> None:
        """Set up what the settings ask for; nothing if they ask for nothing."""
        auto = MeasuredMultipliers.of(self.block_settings)
        self._meter, self._lr_multipliers, self._has_changed_multipliers = None, {}, False
        if settings is not None or auto is not None:
            self._meter = Meter(self, settings, auto)
            self.observe(self._meter)

    def _measuring_state(self) -> dict[str, Any]:
        """What a pickled or copied optimizer needs to measure on; its listeners stay behind, as its observers do."""
        settings = None if self._meter is None else self._meter.settings
        return {"_measured": (settings, self.run_state(), self._lr_multipliers)}

    def _measure_again(self) -> None:
        if "_measured" not in self.__dict__ and "_meter" in self.__dict__:
            return  # torch's load_state_dict comes here too
        settings, state, multipliers = self.__dict__.pop("_measured", (None, None, {}))
        self._measure_from_now(settings)
        self._apply_lr_multipliers(multipliers)
        self.load_run_state(state, 0)

    @property
    def meter(self) -> Meter | None:
        """What measures during steps; None without telemetry and measured multipliers (hosts only)."""
        return self._meter

    @property
    def has_telemetry(self) -> bool:
        """Whether the setting ``telemetry`` was given."""
        return self._meter is not None and self._meter.settings is not None

    def telemetry(self) -> dict[BlockType, TypeTelemetry]:
        """The last reading per block type, the same on every rank; empty before the first, or without the setting."""
        return {} if self._meter is None else dict(self._meter.last)

    def on_telemetry(self, listener: Listener) -> None:
        """Call ``listener`` with every new reading, on every rank, at the end of the step.

        Args:
            listener: gets `TypeTelemetry` by block type. What it raises ends the step; all ranks must decide alike.

        Raises:
            ValueError: telemetry is off.
        """
        if self._meter is None or not self.has_telemetry:
            raise ValueError(
                f'telemetry is off. Give {type(self).__name__} telemetry={{"interval": 100}} (in a DeepSpeed JSON '
                f'under "optimizer": {{"params": ...}}).'
            )
        self._meter.listeners.append(listener)

    @property
    def lr_multipliers(self) -> dict[str, float]:
        """The multipliers that were measured, or given to `set_lr_multipliers`, in effect now; empty: the settings'."""
        return dict(self._lr_multipliers)

    def set_lr_multipliers(self, multipliers: Mapping[str, float]) -> None:
        """Change multipliers from the next step on; all state is kept.

        Every rank must make the same call between the same steps; nothing is communicated. Checkpoints hold moments
        and not multipliers: after a resume call it again (a load under other multipliers is reported). Costs building
        the segment tables anew, so not for every step; a captured CUDA graph must be captured again.

        Args:
            multipliers: by block type or role, as the setting ``lr_multipliers``. What is not named stays; a role's
                multiplier wins over its type's, and a rule's over both.

        Raises:
            ValueError, TypeError: an unknown key, a value outside its range; ``lr_multipliers`` is ``"auto"``.
        """
        if self._meter is not None and self._meter.auto is not None:
            raise ValueError(
                'lr_multipliers is "auto", which sets them itself. Pin types in the settings ({"auto": {...}, "head": '
                "10}), or give fixed multipliers and change these."
            )
        self._apply_lr_multipliers({**self._lr_multipliers, **multipliers})

    def _apply_lr_multipliers(self, multipliers: Mapping[str, float]) -> None:
        BlockSettings().with_lr_multipliers(multipliers)  # checks them before anything changes
        if multipliers == self._lr_multipliers:
            return
        self._lr_multipliers, self._has_changed_multipliers = dict(multipliers), True
        for binding in self.bindings():
            self.bind(binding.tensor, binding.table.placements, binding.groups)
        self._absent = [self._bindings[id(binding.tensor)] for binding in self._absent]

    def _with_present_multipliers(self, placements: Sequence[Placement]) -> Sequence[Placement]:
        """Placements with the multipliers in effect instead of those of the settings."""
        if not self._has_changed_multipliers:
            return placements
        present = {
            id(p.spec.block_settings): p.spec.block_settings.with_lr_multipliers(self._lr_multipliers)
            for p in placements
        }
        return [_with_multipliers(p, present[id(p.spec.block_settings)]) for p in placements]

    def run_state(self) -> dict[str, Any] | None:
        """Position and measurements of the run, plain containers for a checkpoint; None if nothing is measured."""
        return None if self._meter is None else self._meter.state()

    def load_run_state(self, state: Mapping[str, Any] | None, steps: int) -> None:
        """Go on from `run_state`.

        Args:
            state: what was saved; None if that run measured nothing.
            steps: updates that the loaded state has seen, for that case.
        """
        if self._meter is not None:
            self._meter.load(state, steps)


def _with_multipliers(placement: Placement, block_settings: BlockSettings) -> Placement:
    spec: BlockSpec = placement.spec
    bias = spec.structure.is_bias
    rates = [block_settings.resolve(spec.fqn, part.role, bias).lr_multiplier for part in spec.parts]
    if rates == [part.lr_multiplier for part in spec.parts]:
        return placement
    parts = tuple(replace(part, lr_multiplier=rate) for part, rate in zip(spec.parts, rates, strict=True))
    return replace(placement, spec=replace(spec, parts=parts))
