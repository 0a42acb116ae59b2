# SPDX-License-Identifier: Apache-2.0
"""``fused_step`` on real engines: the oracle's updates, and the bits of the step that it takes the place of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import product
from typing import Any

import pytest

from tests.helpers.deepspeed import engine_checks
from tests.helpers.deepspeed.engine_cases import Case
from tests.helpers.deepspeed.engines import prepare_deepspeed
from tests.helpers.deepspeed.fused_twins import CLIP, TWINS, opened
from tests.helpers.distributed import Outcome, RankContext, passes
from tests.helpers.oracle import BY_ROLE
from tests.helpers.suites import Suite, notices_a_wrong_multiplier

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

FUSED = {"fused_step": True}
VECTOR = "model.layers.0.self_attn.q_norm.weight"
FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}
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
    client: str = ""


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


def check_refused(refused: Refused) -> None:
    """Before the first step, with the setting, its value, and the line to write."""
    case = Case(refused.optimizer, refused.stage, refused.dtype, zero=refused.zero, config=refused.config)
    changed = refused.changed_method
    if changed:
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Known

        kept = getattr(Known, changed)
        setattr(Known, changed, lambda self, *args, **kwargs: kept(self, *args, **kwargs))
    try:
        with pytest.raises((ValueError, TypeError)) as caught, opened(case, fused=True, client=refused.client):
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
        "accumulated": {"clip": CLIP, "gas": 2, "poison": (1,)},
        "fp32 gradients": {"clip": CLIP, "config": FP32_GRADIENTS, "gas": 2, "poison": (1,)},
        "without norm": {"zero": {"compute_grad_norm": False}, "poison": (1,)},
        "unchecked": {"clip": CLIP, "config": {"bf16": {"enabled": True, "check_grad_overflow": False}}},
        "other buffers": {"clip": CLIP, "zero": {"contiguous_gradients": False, "reduce_scatter": False}},
        "overlapped": {"clip": CLIP, "zero": {"overlap_comm": True, "reduce_bucket_size": 500}},
        "tied": {"clip": CLIP, "model": "nano", "groups": "tied", "poison": (1,)},
        "frozen in groups": {"clip": CLIP, "groups": "mixed", "frozen": ("k_proj.weight", "0.self_attn.v_proj")},
        "no gradient in a group": {"clip": CLIP, "groups": "vector", "absent": (VECTOR,)},
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
    for check in ("client", "engines", "moved", "compiled", "resume"):
        yield check, 2, Twins(check, clipped)
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
        "tied": {"model": "nano", "groups": "tied", "poison": (1,), "gas": 2},
        "frozen in groups": {"groups": "mixed", "frozen": ("k_proj.weight", "0.self_attn.v_proj")},
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
        "nvme": Refused('"device": "nvme"', "adamw", zero={"offload_optimizer": {"device": "nvme"}}),
        "offload of an optimizer": Refused('"device": "cpu"', zero=offload, client="optimizer"),
        "offload of a function": Refused('"device": "cpu"', zero=offload, client="function"),
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


@SUITE.cases("client", "engines", "moved", "compiled")
def test_other_ways_to_use_an_engine_step_alike(outcome: Outcome, name: str) -> None:
    """One engine would write into another's model, or into memory that DeepSpeed has taken back."""
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
