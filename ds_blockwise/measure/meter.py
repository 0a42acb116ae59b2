# SPDX-License-Identifier: Apache-2.0
"""The meter: counts updates, reads the ones that are due, and acts on what it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from ds_blockwise.blocks.roles import BlockType
from ds_blockwise.kernels.base import Item, StepState
from ds_blockwise.kernels.bindings import Bindings, Work
from ds_blockwise.kernels.param_groups import ParamGroup
from ds_blockwise.measure.auto_multipliers import MeasuredMultipliers, RunState
from ds_blockwise.measure.readings import Alarm, Readings, TelemetrySettings, type_telemetry
from ds_blockwise.measure.type_sums import ALL, SECOND_MOMENT, UPDATE, NormSource, TypeSums

Listener = Callable[[Readings], None]


class Measured(Protocol):
    """What a meter looks at of an optimizer."""

    @property
    def param_groups(self) -> list[ParamGroup]:
        """As ``torch.optim.Optimizer`` has them."""
        ...

    @property
    def state(self) -> Mapping[torch.Tensor, StepState]:
        """Of the stepped tensors."""
        ...

    @property
    def second_moment_of(self) -> str:
        """What its second moments are of, if it keeps any."""
        ...

    def bindings(self) -> Bindings:
        """What lies in the stepped tensors."""
        ...


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
        self, optimizer: Measured, settings: TelemetrySettings | None, auto: MeasuredMultipliers | None
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
        self._summed_version = -1
        self._types_known = False

    def facts(self) -> tuple[object, ...]:
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
        # a host's constructor steps before anything is bound, and before it knows how long the run is
        if work and UPDATE in self._names_due(self.steps + 1):
            for w in work:
                w.item.keeps_update = True
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
            self._gone |= _stepped(bindings) - self._seen
            self._seen.clear()
            self._sums = None
        names = self._names_due(self.steps + 1)
        if names:
            self._read(work, names)
        self._seen |= now
        if not self._seen.issuperset(_stepped(bindings) - self._gone):
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
            bindings.change_lr_multipliers(self.auto.multipliers_after(self.steps))

    def _names_due(self, step: int) -> tuple[str, ...]:
        if self.settings is not None and step % self.settings.interval == 0:
            adam = self._optimizer.second_moment_of == "gradients"
            return ALL if adam else tuple(name for name in ALL if name not in SECOND_MOMENT)
        return SECOND_MOMENT if self.auto is not None and self.auto.is_due(step) else ()

    def _sums_of(self, bindings: Bindings) -> TypeSums:
        if self._sums is None or self._summed_version != bindings.version:
            self._sums, self._summed_version = TypeSums(bindings), bindings.version
        return self._sums

    def _read(self, work: Sequence[Work], names: Sequence[str]) -> None:
        bindings = self._optimizer.bindings()
        sums = self._sums_of(bindings)
        updated: dict[int, Item] = {id(w.binding.tensor): w.item for w in work if w.item.grad is not None}
        for group in self._optimizer.param_groups:
            for tensor in group["params"]:
                binding = bindings.of(tensor)
                if binding is not None:
                    state = self._optimizer.state.get(tensor, {})
                    sums.add(binding, group, state, names, updated.get(id(tensor)))

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

    def state(self) -> RunState:
        """See `BlockwiseOptimizer.run_state`."""
        return {"steps": self.steps, "auto": None if self.auto is None else self.auto.state()}

    def load(self, state: RunState | None, steps: int) -> None:
        """See `BlockwiseOptimizer.load_run_state`."""
        self.steps = steps if state is None else int(state["steps"])
        self._seen.clear()
        if self.auto is not None:
            self.auto.load(None if state is None else state["auto"])
            ready = self.auto.target is not None and self.auto.total_num_steps is not None
            self._optimizer.bindings().change_lr_multipliers(self.auto.multipliers_after(self.steps) if ready else {})


def _stepped(bindings: Bindings) -> set[int]:
    return {id(binding.tensor) for binding in bindings if not binding.is_absent}
