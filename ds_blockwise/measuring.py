# SPDX-License-Identifier: Apache-2.0
"""The part of an optimizer that looks at itself: telemetry, and multipliers that are measured or changed during a run.

Nothing here communicates or waits for a device except on the steps that are read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ds_blockwise.auto_multipliers import MeasuredMultipliers
from ds_blockwise.blocks import BlockSpec
from ds_blockwise.naming import BlockType
from ds_blockwise.policy import BlockPolicy
from ds_blockwise.reduce import ReductionGroups
from ds_blockwise.stored_state import StoredState
from ds_blockwise.table import Placement, SegmentTable
from ds_blockwise.telemetry import Alarm, Readings, TelemetrySettings, TypeTelemetry, type_telemetry
from ds_blockwise.type_sums import ALL, SECOND_MOMENT, NormSource, TypeSums
from ds_blockwise.work import Binding, StepObserver, Work

Listener = Callable[[Readings], None]


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
        auto = MeasuredMultipliers.of(self.policy)
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
        BlockPolicy().with_lr_multipliers(multipliers)  # checks them before anything changes
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
        present = {id(p.spec.policy): p.spec.policy.with_lr_multipliers(self._lr_multipliers) for p in placements}
        return [_with_multipliers(p, present[id(p.spec.policy)]) for p in placements]

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


def _with_multipliers(placement: Placement, policy: BlockPolicy) -> Placement:
    spec: BlockSpec = placement.spec
    bias = spec.structure.is_bias
    rates = [policy.resolve(spec.fqn, part.role, bias).lr_multiplier for part in spec.parts]
    if rates == [part.lr_multiplier for part in spec.parts]:
        return placement
    parts = tuple(replace(part, lr_multiplier=rate) for part, rate in zip(spec.parts, rates, strict=True))
    return replace(placement, spec=replace(spec, parts=parts))


class Meter:
    """Counts updates, reads the ones that are due, and acts on what it reads.

    A host may call ``step()`` several times for one update (DeepSpeed: once per param group or sub-group): the update
    is complete when every bound tensor had its turn.

    Args:
        optimizer: what is measured.
        settings: of telemetry; None: off.
        auto: the measurement of multipliers; None: they are fixed.
    """

    def __init__(
        self, optimizer: Measuring, settings: TelemetrySettings | None, auto: MeasuredMultipliers | None
    ) -> None:
        self._optimizer = optimizer
        self.settings = settings
        self.auto = auto
        self.listeners: list[Listener] = []
        self.last: Readings = {}
        self.steps = 0
        self.norm_source: NormSource = lambda: (None, 0.0)
        #: set by a host when every tensor is bound; a rank may then have none and still take part
        self.is_hosted = False
        self._alarm = None if settings is None else Alarm(settings)
        self._seen: set[int] = set()
        self._gone: set[int] = set()
        self._sums: TypeSums | None = None
        self._summed: list[Binding] = []
        self._types_known = False

    def facts(self) -> tuple[Any, ...]:
        """What all ranks must agree on, or one would wait for the others."""
        auto = self.auto
        return (self.settings, None if auto is None else (auto.settings, sorted(auto.pinned), auto.total_num_steps))

    def host(self, *, total_num_steps: int | None, warmup_num_steps: int | None, norm_source: NormSource) -> None:
        """Tell what a host knows; called once, when every tensor is bound (hosts only).

        Args:
            total_num_steps: updates of the run, if its schedule says.
            warmup_num_steps: updates of its warm-up, likewise.
            norm_source: see `NormSource`.

        Raises:
            ValueError: multipliers are to be measured and nobody says how long the run is, or it is too short.
        """
        if self.auto is not None:
            if self.auto.total_num_steps is None and total_num_steps is not None:
                self.auto.set_total(total_num_steps)
            self.auto.require_total()
        if self.settings is not None and self.settings.warmup_num_steps is None:
            self.settings = replace(self.settings, warmup_num_steps=warmup_num_steps or 0)
            self._alarm = Alarm(self.settings)
        self.norm_source = norm_source
        self.is_hosted = True

    def before_update(self, work: Sequence[Work]) -> bool:
        """See `StepObserver`; a run of unknown length ends here."""
        if self.auto is not None and (work or self.is_hosted):
            self.auto.require_total()
        return True

    def after_update(self, work: Sequence[Work]) -> None:
        """See `StepObserver`.

        Raises:
            TelemetryAlarm: see `Alarm.look`.
            ValueError: multipliers cannot be measured on this model.
        """
        optimizer = self._optimizer
        bindings = optimizer.bindings()
        if not bindings and not self.is_hosted:
            return  # a host's constructor steps before anything is bound
        now = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        if now & self._seen:  # a second turn: what had none by now was taken out of the groups
            self._gone |= self._stepped(bindings) - self._seen
            self._seen.clear()
            self._sums = None
        names = self._names_due(self.steps + 1)
        if names:
            self._read(work, names)
        self._seen |= now
        if not self._seen.issuperset(self._stepped(bindings) - self._gone):
            return
        self._seen.clear()
        self.steps += 1
        check = self.auto is not None and not self._types_known
        if names or check:
            sums = self._sums_of(bindings).completed(names)
            if self.auto is not None and check:
                self.auto.check_types(sums)
                self._types_known = True
            if names:
                self._act(sums)
        if self.auto is not None:
            optimizer._apply_lr_multipliers(self.auto.multipliers_after(self.steps))

    def _stepped(self, bindings: Sequence[Binding]) -> set[int]:
        absent = {id(binding.tensor) for binding in self._optimizer._absent}
        return {id(binding.tensor) for binding in bindings} - absent

    def _names_due(self, step: int) -> tuple[str, ...]:
        if self.settings is not None and step % self.settings.interval == 0:
            return ALL
        return SECOND_MOMENT if self.auto is not None and self.auto.is_due(step) else ()

    def _sums_of(self, bindings: Sequence[Binding]) -> TypeSums:
        if (
            self._sums is None
            or len(self._summed) != len(bindings)
            or any(a is not b for a, b in zip(self._summed, bindings, strict=True))
        ):
            self._sums, self._summed = TypeSums(bindings), list(bindings)
        return self._sums

    def _read(self, work: Sequence[Work], names: Sequence[str]) -> None:
        sums = self._sums_of(self._optimizer.bindings())
        updated = {id(w.binding.tensor) for w in work if w.item.grad is not None}
        for group in self._optimizer.param_groups:
            for tensor in group["params"]:
                binding = self._optimizer._bindings.get(id(tensor))
                if binding is not None:
                    state = self._optimizer.state.get(tensor, {})
                    sums.add(binding, group, state, names, id(tensor) in updated)

    def _act(self, sums: Mapping[BlockType, Mapping[str, float]]) -> None:
        if self.auto is not None and self.auto.is_due(self.steps):
            self.auto.take(self.steps, {kind: of["second_moment"] / of["numel"] for kind, of in sums.items()})
        if self.settings is None or self.steps % self.settings.interval:
            return
        norm, clip = self.norm_source()
        self.last = {kind: type_telemetry(kind, self.steps, of, norm, clip) for kind, of in sums.items()}
        for listener in self.listeners:
            listener(self.last)
        if self._alarm is not None:
            self._alarm.look(self.last)

    def state(self) -> dict[str, Any]:
        """See `Measuring.run_state`."""
        return {"steps": self.steps, "auto": None if self.auto is None else self.auto.state()}

    def load(self, state: Mapping[str, Any] | None, steps: int) -> None:
        """See `Measuring.load_run_state`."""
        self.steps = steps if state is None else int(state["steps"])
        self._seen.clear()
        if self.auto is not None:
            self.auto.load(None if state is None else state.get("auto"))
            ready = self.auto.target is not None and self.auto.total_num_steps is not None
            self._optimizer._apply_lr_multipliers(self.auto.multipliers_after(self.steps) if ready else {})
