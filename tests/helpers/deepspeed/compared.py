# SPDX-License-Identifier: Apache-2.0
"""An engine and the oracle side by side: the same rates and gradients, the same updates; and bitwise comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.deepspeed.engine_cases import BETAS, EPS, FULL_NAME, LR, LR_FACTORS, WEIGHT_DECAY
from tests.helpers.deepspeed.engines import engine_config, masters
from tests.helpers.oracle import Hyper, LionOracle, Oracle, Weights, assert_same_update


def case_config(case: Any, *, gas: int = 1, params: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The DeepSpeed JSON of a case with the fields ``optimizer``, ``stage``, ``dtype`` and ``config``.

    Args:
        case: any suite's.
        gas: micro-batches of a step.
        params: of the optimizer, on top of ``hyper()``'s.
        changes: more of the JSON.
    """
    own = {"lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY, **(params or {})}
    name = FULL_NAME[case.optimizer]
    return engine_config(name, stage=case.stage, dtype=case.dtype, gas=gas, params=own, **changes, **case.config)


def hyper(**changes: Any) -> Hyper:
    """What `case_config` sets, for the oracle."""
    return Hyper(**{"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY, **changes})


def set_lr(run: SimpleNamespace, step: int) -> float:
    """Give all groups of an engine the step's rate, another one each time."""
    lr = LR * LR_FACTORS[step]
    for group in run.engine.basic_optimizer.param_groups:
        group["lr"] = lr
    return lr


def set_progress(run: SimpleNamespace, progress: float) -> None:
    """Say how much of the decay is done, as a schedule of ours does beside the rate."""
    from ds_blockwise.kernels import param_groups

    for group in run.engine.basic_optimizer.param_groups:
        param_groups.set_progress(group, progress)


class Compared:
    """A real engine and the oracle, which starts from its weights; every step of one is compared with the other's.

    Args:
        run: the engine.
        oracle: on unsharded tensors, or on those of this rank.
        part: what this rank holds of the oracle's weights.
        read: the engine's fp32 weights, under the names that ``part`` gives them.

    Attributes:
        now: fp32 weights after the last step that was compared.
        before: those before it.
        applied: steps that the optimizer has taken.
    """

    def __init__(
        self,
        run: SimpleNamespace,
        oracle: Oracle,
        part: Callable[[Weights], Weights] = lambda whole: whole,
        read: Callable[[SimpleNamespace], dict[str, Tensor]] = masters,
    ) -> None:
        self.run, self.oracle, self._part, self._read = run, oracle, part, read
        self.now = self.before = read(run)
        self.lr, self.applied = LR, 0

    def check_start(self) -> None:
        """The engine begins with the oracle's weights."""
        start = self._part(self.oracle.weights())
        assert self.now.keys() == start.keys(), self.now.keys() ^ start.keys()
        for name, value in self.now.items():
            assert torch.equal(value, start[name].to(value.dtype)), f"start of {name}"

    def set_lr(self, step: int) -> None:
        """As `set_lr`, for the engine and the oracle; multipliers that move are further at each step."""
        self.lr = set_lr(self.run, step)
        if self.oracle.end_multipliers:
            self.oracle.progress = (step + 1) / 8
            set_progress(self.run, self.oracle.progress)
        own = self.oracle.hyper
        for settings in (own,) if isinstance(own, Hyper) else own.values():
            settings.lr = self.lr

    def check_step(self, gradients: Weights, *, what: str, tolerance: float = 1e-6) -> None:
        """The engine has just stepped: the oracle does the same, and the updates divided by the rate must agree."""
        self.before, self.now, was = self.now, self._read(self.run), self.oracle.weights()
        self.oracle.step(gradients)
        then = self._part(self.oracle.weights())
        if isinstance(self.oracle, LionOracle) and self.oracle.noise:
            then = _nearer(self.now, then, self._part(self.oracle.turned))
        assert_same_update((self.before, self.now), (self._part(was), then), self.lr, tolerance=tolerance, what=what)
        self.applied += 1
        check_counters(self.run, self.applied)

    def check_skipped(self) -> None:
        """The engine has just skipped a step whose gradients overflow."""
        self.before, self.now = self.now, self._read(self.run)
        assert all(torch.equal(self.now[n], self.before[n]) for n in self.now), "moved on an overflow"
        check_counters(self.run, self.applied)


def _nearer(found: Weights, one: Weights, other: Weights) -> dict[str, Tensor]:
    """Of two weights that an element may have, the one that is nearer to what was found; few elements may have two."""
    pairs = {name: (weight, other[name]) for name, weight in one.items()}
    undecided = sum(int((a != b).sum()) for a, b in pairs.values()) / sum(a.numel() for a, _ in pairs.values())
    assert undecided < 0.02, f"noise decides {undecided:.1%} of the signs"
    return {n: torch.where((found[n] - a).abs() <= (found[n] - b).abs(), a, b) for n, (a, b) in pairs.items()}


def check_counters(run: SimpleNamespace, applied: int) -> None:
    """Our step ran once per optimizer step and flat tensor, and never for anything else."""
    base, wrapper = run.engine.basic_optimizer, run.engine.optimizer
    calls = {
        "DeepSpeedZeroOptimizer": lambda: len(wrapper.single_partition_of_fp32_groups),
        "DeepSpeedZeroOptimizer_Stage3": lambda: len(wrapper.fp32_partitioned_groups_flat),
    }.get(type(wrapper).__name__, lambda: 1)()
    assert base.step_calls == applied * calls, (
        f"{base.step_calls} calls of step() after {applied} optimizer steps, expected {calls} each"
    )
    steps = {int(state["step"]) for state in base.state.values() if "step" in state}
    assert steps <= {applied}, f"state steps {steps} after {applied} optimizer steps"
    assert applied == 0 or steps, "no state was created: our step() never ran"


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str = "tensors") -> None:
    """The same names and bits."""
    assert found.keys() == wanted.keys(), f"{what}: {found.keys() ^ wanted.keys()}"
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different, f"{what} differ: {different}"


def check_resume(
    opened: Callable[[], AbstractContextManager[SimpleNamespace]],
    feed: Callable[[SimpleNamespace, int], object],
    folder: Path,
    look: Callable[[], object] = lambda: None,
) -> None:
    """Two steps, a checkpoint, a third step; a new engine loads and repeats the third step with the same bits.

    Args:
        opened: an engine.
        feed: takes a step.
        folder: of the checkpoint, the same on all ranks.
        look: what rank 0 does with the checkpoint before it is loaded.
    """
    with opened() as run:
        for step in range(2):
            feed(run, step)
        run.engine.save_checkpoint(str(folder), tag="saved")
        feed(run, 2)
        wanted = masters(run)
    if dist.get_rank() == 0:
        look()
    dist.barrier()
    with opened() as run:
        path, _ = run.engine.load_checkpoint(str(folder))
        assert path is not None
        feed(run, 2)
        assert_same(masters(run), wanted, "masters after resuming")


def to_universal(source: Path, target: Path) -> None:
    """DeepSpeed's own converter, in this process."""
    from deepspeed.checkpoint import ds_to_universal

    arguments = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    ds_to_universal.main(
        SimpleNamespace(input_folder=str(source), output_folder=str(target), inject_missing_state=False, **arguments)
    )
