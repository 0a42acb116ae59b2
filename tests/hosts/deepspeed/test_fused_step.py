# SPDX-License-Identifier: Apache-2.0
"""``fused_step`` on real engines: the oracle's updates, and the bits of the step that it takes the place of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.deepspeed import engine_checks
from tests.helpers.deepspeed.compared import assert_same
from tests.helpers.deepspeed.engine_cases import Case, build, config_of, groups_of
from tests.helpers.deepspeed.engines import DTYPES, feed_step, masters, model_weights, open_engine, prepare_deepspeed
from tests.helpers.distributed import Outcome, RankContext, passes
from tests.helpers.models import GradientPlan
from tests.helpers.oracle import BY_ROLE
from tests.helpers.suites import Suite, notices_a_wrong_multiplier

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

FUSED = {"fused_step": True}
FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}
CLIP = 0.05  # below every norm that is fed
Named = Iterator[tuple[str, int, Any]]


@dataclass(frozen=True)
class Twins:
    """Two engines that differ in ``fused_step`` only."""

    check: str
    case: Case


@dataclass(frozen=True)
class Refused:
    """A JSON under which ``fused_step`` is refused, and what the message must say."""

    said: str
    optimizer: str = "mini"
    stage: int = 2
    dtype: str = "bf16"
    config: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    changed_method: str = ""


def run_case(context: RankContext, case: Case | Twins | Refused) -> None:
    """Entry of every rank."""
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers

    if isinstance(case, Case):
        engine_checks.run_case(context, replace(case, params=case.params | FUSED))
    elif isinstance(case, Refused):
        check_refused(case)
    else:
        TWINS[case.check](context, case.case)


def opened(case: Case, *, fused: bool) -> Any:
    case = replace(case, params=case.params | {"fused_step": fused})
    config = config_of(case)
    return open_engine(config, lambda: build(case, config), groups=groups_of(case))


def fed(context: RankContext, case: Case, run: SimpleNamespace, steps: range) -> Iterator[int]:
    """Take steps, on one rank with a bad gradient where the case says so."""
    plan = GradientPlan(context.world_size, case.gas, DTYPES[case.dtype], seed=1)
    bad_rank = min(1, context.world_size - 1)
    for step in steps:
        poison = case.poison_value if step in case.poison and context.rank == bad_rank else None
        feed_step(run, plan, step, context.rank, poison=poison)
        yield step


def everything(run: SimpleNamespace) -> dict[str, Tensor]:
    """Master weights, the model's, the whole state and what the engine tells of the step."""
    engine = run.engine
    found = {f"master {name}": value for name, value in masters(run).items()}
    found |= {f"model {name}": value for name, value in model_weights(run).items()}
    for index, state in enumerate(engine.basic_optimizer.state.values()):
        found |= {f"state {index} {key}": torch.as_tensor(value).clone() for key, value in state.items()}
    told = {"norm": engine.get_global_grad_norm(), "skipped": engine.skipped_steps, "steps": engine.global_steps}
    return found | {key: torch.tensor(float(value or 0)) for key, value in told.items()}


# --------------------------------------------------------------------------------------- the checks of twins


def check_bits(context: RankContext, case: Case) -> None:
    """Weights, state, norm and counters have the same bits after every step."""
    wanted = []
    with opened(case, fused=False) as run:
        for _ in fed(context, case, run, range(case.steps)):
            wanted.append(everything(run))
    clipped = any(case.clip < float(found["norm"]) < float("inf") for found in wanted)
    assert clipped == (case.clip in (0, CLIP)), "the case would not show what it says"
    assert int(wanted[-1]["skipped"]) == len(case.poison)
    with opened(case, fused=True) as run:
        assert "fused_step" in type(run.engine.optimizer.step).__module__
        for step in fed(context, case, run, range(case.steps)):
            assert_same(everything(run), wanted[step], f"after step {step}")


def check_resume(context: RankContext, case: Case) -> None:
    """A checkpoint of either kind goes on in either kind, with the same bits."""
    for saves, loads in ((True, False), (False, True)):
        folder = context.tmp_path / f"fused_{saves}"
        with opened(case, fused=saves) as run:
            list(fed(context, case, run, range(2)))
            run.engine.save_checkpoint(str(folder), tag="saved")
            list(fed(context, case, run, range(2, 4)))
            wanted = everything(run)
        with opened(case, fused=loads) as run:
            assert run.engine.load_checkpoint(str(folder))[0] is not None
            list(fed(context, case, run, range(2, 4)))
            found = everything(run)
        assert_same(found, wanted, f"saved with fused_step {saves}, loaded with {loads}")


def check_gradients(context: RankContext, case: Case) -> None:
    """DeepSpeed's functions for gradients say the same before a step, and the same after it."""
    from deepspeed.utils import safe_get_full_grad

    plan, found = GradientPlan(context.world_size, 1, DTYPES[case.dtype]), []
    for fused in (False, True):
        with opened(case, fused=fused) as run:
            run.feed.gradients = {n: plan.share(n, tuple(p.shape), 0, context.rank) for n, p in masters(run).items()}
            run.engine.backward(run.engine())
            before = {name: safe_get_full_grad(p) for name, p in run.model.named_parameters()}
            run.engine.step()
            after = {name: _gradient_after(safe_get_full_grad, p) for name, p in run.model.named_parameters()}
            found.append((before, after))
    assert_same(found[1][0], found[0][0], "gradients before the step")
    assert found[1][1] == found[0][1]


def _gradient_after(get: Callable[..., object], parameter: torch.nn.Parameter) -> str:
    try:
        return str(get(parameter))
    except ValueError as error:
        return str(error)


def check_telemetry(context: RankContext, case: Case) -> None:
    """Readings are those of the step that was replaced: of clipped gradients, though none were written."""
    readings = []
    for fused in (False, True):
        measured = replace(case, params={**case.params, "telemetry": {"interval": 1}})
        with opened(measured, fused=fused) as run:
            list(fed(context, case, run, range(2)))
            readings.append(run.engine.basic_optimizer.telemetry())
    unfused, fused_ = readings
    assert unfused and unfused.keys() == fused_.keys()
    for kind, wanted in unfused.items():
        numbers = {name: value for name, value in asdict(wanted).items() if isinstance(value, float)}
        assert numbers and numbers == pytest.approx({n: getattr(fused_[kind], n) for n in numbers}, rel=1e-6), kind


class Traffic(TorchDispatchMode):
    """Bytes that torch's operations read and write inside a ``with`` block, of tensors of a size or more."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self._least, self.bytes = least, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Count what goes in and, but for views, what comes out."""
        out = function(*args, **(kwargs or {}))
        if function.namespace == "aten" and not function.is_view:
            self.bytes += sum(t.nbytes for t in _tensors([args, out]) if t.numel() >= self._least)
        return out


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (list, tuple)):
        for one in found:
            yield from _tensors(one)


def check_traffic(context: RankContext, case: Case) -> None:
    """Torch reads and writes each bf16 gradient once, to lay them side by side; the rest is in the kernels."""
    per_parameter = []
    for fused in (False, True):
        with opened(case, fused=fused) as run:
            engine = run.engine
            run.feed.gradients = {name: torch.ones(p.shape) for name, p in masters(run).items()}
            (partition,) = engine.optimizer.single_partition_of_fp32_groups
            for _ in range(2):  # the first step allocates the state
                engine.backward(engine())
                with Traffic(least=32) as traffic:
                    engine.optimizer.step()
            per_parameter.append(traffic.bytes / partition.numel())
    unfused, fused_ = per_parameter
    # twice 2 for the overflow check, 10 + 8 for the norm, 4 side by side, 6 to cast, 8 to scale, 6 to copy
    assert unfused > 0.9 * (4 + 18 + 4 + 6 + 8 + 6), unfused
    assert fused_ < 4 + 1, fused_  # and some numbers for each tensor, which are small here


TWINS = {
    "bits": check_bits,
    "resume": check_resume,
    "gradients": check_gradients,
    "telemetry": check_telemetry,
    "traffic": check_traffic,
}


def check_refused(refused: Refused) -> None:
    """Before the first step, with the setting, its value, and the line to write."""
    case = Case(refused.optimizer, refused.stage, refused.dtype, zero=refused.zero, config=refused.config)
    changed = refused.changed_method
    if changed:
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Known

        kept = getattr(Known, changed)
        setattr(Known, changed, lambda self, *args, **kwargs: kept(self, *args, **kwargs))
    try:
        with pytest.raises((ValueError, TypeError)) as caught, opened(case, fused=True):
            pass
    finally:
        if changed:
            setattr(Known, changed, kept)
    for part in (refused.said, "fused_step", "false"):
        assert part in str(caught.value), str(caught.value)


# ------------------------------------------------------------------------------------------------- the cases


def _cases() -> Named:
    bf16 = Case("mini", 2, "bf16", backend="auto")
    for optimizer, stage, dp in product(("mini", "adamw"), (1, 2), (1, 2)):
        case = replace(bf16, optimizer=optimizer, stage=stage)
        yield f"bits-{optimizer}-z{stage}-dp{dp}", dp, Twins("bits", replace(case, clip=CLIP, poison=(1,)))
    for name, changes in {
        "unclipped": {},
        "not exceeded": {"clip": 1e6},
        "accumulated": {"clip": CLIP, "gas": 2},
        "fp32 gradients": {"clip": CLIP, "config": FP32_GRADIENTS, "gas": 2},
        "fp32": {"clip": CLIP, "dtype": "fp32"},
        "infinite": {"clip": CLIP, "poison": (0, 2), "poison_value": float("inf")},
        "groups": {"clip": CLIP, "groups": "mixed"},
        "momentum in bf16": {"clip": CLIP, "params": {"momentum_dtype": "bf16"}},
        "reference": {"clip": CLIP, "backend": "reference"},
    }.items():
        yield f"bits-{name}", 2, Twins("bits", replace(bf16, **changes))
    clipped = replace(bf16, clip=CLIP)
    yield "bits-small parts", 3, Twins("bits", replace(clipped, model="slim", groups="vector"))
    yield "bits-aligned", 3, Twins("bits", replace(clipped, zero={"parameter_alignment": True}))
    yield "resume", 2, Twins("resume", clipped)
    yield "gradients", 1, Twins("gradients", clipped)  # after a step some ranks raise and the others wait, upstream
    yield "telemetry", 2, Twins("telemetry", clipped)
    yield "traffic", 1, Twins("traffic", replace(clipped, stage=1))
    for stage, dp in ((1, 1), (2, 2), (1, 3)):
        yield f"oracle-z{stage}-dp{dp}", dp, replace(clipped, stage=stage)
    for name, changes in {
        "unclipped adamw": {"optimizer": "adamw", "clip": 0.0},  # bit for bit the same as whole tensors
        "fp32": {"dtype": "fp32"},
        "accumulated": {"gas": 2},
        "skipped": {"poison": (0, 2), "steps": 5},
        "groups": {"groups": "mixed"},
        "by role": {"params": BY_ROLE},
        "round robin": {"zero": {"round_robin_gradients": True}, "model": "nano"},
        "small buckets": {"zero": {"reduce_bucket_size": 500, "allgather_bucket_size": 500}},
        "frozen": {"frozen": ("embed_tokens",)},
        "no gradient": {"absent": ("model.layers.0.self_attn.k_proj.weight",)},
    }.items():
        yield f"oracle-{name}", 2, replace(clipped, **changes)
    yield "mutant", 2, replace(clipped, oracle_multipliers={"value": 4.01}, steps=2)


def _refusals() -> Named:
    offload = {"offload_optimizer": {"device": "cpu"}}
    for name, refused in {
        "muon": Refused("BlockwiseMuon", "muon"),
        "lion": Refused("BlockwiseLion", "lion"),
        "stage 0": Refused('"stage": 0', stage=0),
        "stage 3": Refused('"stage": 3', stage=3),
        "offload": Refused('"device": "cpu"', zero=offload),
        "BF16_Optimizer": Refused("BF16_Optimizer", stage=1, config=FP32_GRADIENTS),
        "autocast": Refused('"torch_autocast"', dtype="fp32", config={"torch_autocast": {"enabled": True}}),
        "deepcompile": Refused('"deepcompile"', config={"compile": {"deepcompile": True}}),
        "accumulation": Refused("managed_gradient", config={"managed_gradient_accumulation": False}),
        "another step": Refused("DeepSpeedZeroOptimizer.step", changed_method="step"),
        "another clipping": Refused("unscale_and_clip_grads", changed_method="unscale_and_clip_grads"),
    }.items():
        yield f"refused-{name}", 2, refused


CASES = {name: (world_size, case) for make in (_cases, _refusals) for name, world_size, case in make()}
SUITE = Suite(run_case, CASES)
outcome = SUITE.outcome()


@SUITE.cases("bits-")
def test_no_bit_differs_from_the_step_that_is_replaced(outcome: Outcome, name: str) -> None:
    """A setting that only saves time would change a run: its weights, its state, its norms or its skipped steps."""
    passes(outcome, name)


@SUITE.cases("oracle-")
def test_updates_are_those_of_the_oracle(outcome: Outcome, name: str) -> None:
    """A fault that both ways of stepping share would be seen by neither."""
    passes(outcome, name)


@SUITE.cases("mutant")
def test_the_comparison_notices_a_wrong_multiplier(outcome: Outcome, name: str) -> None:
    """The tests above would prove nothing."""
    notices_a_wrong_multiplier(outcome, name)


@SUITE.cases("resume")
def test_checkpoints_go_on_in_both_ways_of_stepping(outcome: Outcome, name: str) -> None:
    """A run that is resumed with the setting on, or off again, would be another run."""
    passes(outcome, name)


@SUITE.cases("gradients", "telemetry")
def test_who_reads_gradients_reads_the_same(outcome: Outcome, name: str) -> None:
    """Nobody writes the clipped fp32 gradient any more; a reader of it would get another one."""
    passes(outcome, name)


@SUITE.cases("traffic")
def test_gradients_are_not_copied_cast_or_scaled_in_memory(outcome: Outcome, name: str) -> None:
    """The setting would promise a pass over memory and take eight."""
    passes(outcome, name)


@SUITE.cases("refused-")
def test_what_is_not_known_is_refused_on_every_rank(outcome: Outcome, name: str) -> None:
    """A step of another kind would be left out, or made twice."""
    passes(outcome, name)
