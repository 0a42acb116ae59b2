# SPDX-License-Identifier: Apache-2.0
"""Values on the real DeepSpeed engines: every wrapper, sharding and option against the oracle.

All cases of one world size run in one spawn; each is a test of its own here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from typing import Any

import pytest

from tests.helpers.deepspeed.engine_cases import BACKENDS, Case, takes_long
from tests.helpers.deepspeed.engine_checks import run_case
from tests.helpers.distributed import Outcome, passes
from tests.helpers.oracle import BY_ROLE, ROLE_SETTINGS
from tests.helpers.suites import Suite, notices_a_wrong_multiplier
from tests.helpers.tables import oracle_names

# Not imported here: a worker has to choose the accelerator before DeepSpeed looks for one.
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

BF16_OPTIMIZER = {"data_types": {"grad_accum_dtype": "fp32"}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
COMMUNICATION: list[tuple[int, dict[str, Any]]] = [
    (2, {"reduce_bucket_size": 500, "allgather_bucket_size": 500}),
    (2, {"overlap_comm": True}),
    (2, {"reduce_scatter": False}),
    (2, {"contiguous_gradients": False}),
    (3, {"reduce_bucket_size": 500, "stage3_prefetch_bucket_size": 0}),
    (3, {"zero_hpz_partition_size": 2}),
]
BOTH = ("adamw", "mini")
STAGES = (0, 1, 2, 3)

Named = Iterator[tuple[str, int, Case]]


def _named(prefix: str, world_size: int, case: Case) -> tuple[str, int, Case]:
    name = f"{prefix}-z{case.stage}-{case.dtype}-{case.optimizer}-dp{world_size}"
    return name, world_size, case


def _grid() -> Named:
    for optimizer, stage, dtype, dp in product(BOTH, STAGES, ("fp32", "bf16"), (1, 2, 3)):
        yield _named("grid", dp, Case(optimizer, stage, dtype))


def _model_families() -> Named:
    for model, stage in product(("nano", "gpt2", "llama"), STAGES):
        yield _named(model, 3 if stage in (1, 3) else 2, Case("mini", stage, model=model))
    yield _named("nano", 2, Case("adamw", 2, "bf16", "nano"))
    yield _named("gpt2", 2, Case("adamw", 3, "fp32", "gpt2"))


def _partitions() -> Named:
    for optimizer, dp in product(BOTH, (1, 2, 3)):
        yield _named("bf16_optimizer", dp, Case(optimizer, 1, "bf16", config=BF16_OPTIMIZER))
        yield _named("sub_groups", dp, Case(optimizer, 3, zero={"sub_group_size": 700}))
    for dp, stage in product((2, 3), (1, 2)):
        aligned = {"parameter_alignment": True}
        yield _named("aligned", dp, Case("mini", stage, "bf16", zero=aligned))
        if stage == 2:
            round_robin = {"round_robin_gradients": True}
            yield _named("round_robin", dp, Case("mini", 2, "bf16", zero=round_robin))
            yield _named("round_robin", dp, Case("adamw", 2, "fp32", zero=round_robin))
            both = aligned | round_robin
            yield _named("round_robin_aligned", dp, Case("mini", 2, "bf16", zero=both))
    for dp, threshold in product((2, 3), (0, 10**9)):
        persist = {"stage3_param_persistence_threshold": threshold}
        yield _named(f"persist{threshold:.0e}", dp, Case("mini", 3, "bf16", zero=persist))
    for dp, dtype in product((2, 3), ("fp32", "bf16")):
        yield _named("zero_init", dp, Case("mini", 3, dtype, zero_init=True))
    for i, (stage, zero) in enumerate(COMMUNICATION):
        yield _named(f"communication{i}", 2, Case("mini", stage, "bf16", zero=zero))
    small = {"sub_group_size": 300, "stage3_param_persistence_threshold": 0}
    yield _named("zero_init_sub_groups", 3, Case("mini", 3, "bf16", zero=small, zero_init=True))
    yield _named("zero_init_tied", 2, Case("mini", 3, model="nano", zero_init=True))


def _granularities() -> Named:
    for (model, granularity), (stage, dp) in product(
        (("nano", "value_tensor"), ("qwen3", "mixed"), ("slim", "published")), ((0, 1), (2, 2), (2, 3), (3, 2), (3, 3))
    ):
        yield _named(granularity, dp, Case("mini", stage, model=model, granularity=granularity))


def _offload() -> Named:
    for stage, dp in product((1, 2, 3), (2, 3)):
        yield _named("offload", dp, Case("mini", stage, "bf16", zero=OFFLOAD))
    yield _named("offload", 2, Case("adamw", 2, "bf16", zero=OFFLOAD))
    yield _named("offload", 2, Case("adamw", 3, "fp32", zero=OFFLOAD))


def _wrappers(dp: int = 2, **changes: object) -> Iterator[tuple[str, Case]]:
    """One case for each of the five wrappers (and ZeRO-3, ZeRO-0 in bf16 too)."""
    for stage in STAGES:
        yield "", Case("mini", stage, "fp32" if stage % 2 else "bf16", **changes)  # type: ignore[arg-type]
    yield "bare-", Case("mini", 0, "fp32", **changes)  # type: ignore[arg-type]
    yield "bf16_optimizer-", Case("mini", 1, "bf16", config=BF16_OPTIMIZER, **changes)  # type: ignore[arg-type]


def _accumulation_and_clipping() -> Named:
    for tag, case in _wrappers(gas=2):
        yield _named(f"{tag}gas2", 2, case)
    yield _named("gas2", 3, Case("mini", 3, "bf16", gas=2))
    yield _named("gas2", 2, Case("adamw", 2, "bf16", gas=2))
    for tag, case in _wrappers(clip=0.05):
        yield _named(f"{tag}clip", 2, case)


def _overflow() -> Named:
    for tag, case in _wrappers(poison=(0, 2), steps=6):
        yield _named(f"{tag}overflow", 2, replace(case, dtype="fp32" if tag == "bare-" else "bf16"))
    infinite = float("inf")
    for stage, value in product(STAGES, (float("nan"), infinite)):
        case = Case("mini", stage, "fp32", poison=(0, 2), poison_value=value, steps=4)
        yield _named("overflow_inf" if value == infinite else "overflow_nan", 2, case)
    yield _named("overflow_bare", 2, Case("adamw", 0, "fp32", poison=(1,), poison_value=infinite, steps=3))
    schedule = {"warmup_num_steps": 2, "total_num_steps": 8, "min_lr": 4e-3}
    case = Case("mini", 2, "bf16", poison=(1, 3), steps=6, scheduler="BlockwiseCosineLR")
    yield _named("schedule_overflow", 2, replace(case, scheduler_params=schedule))


def _parameters() -> Named:
    for tag, case in _wrappers(groups="mixed"):
        yield _named(f"{tag}two_groups", 2, case)
    yield _named("two_groups", 3, Case("adamw", 3, "bf16", groups="mixed"))
    yield _named("two_groups", 3, Case("adamw", 1, "fp32", groups="mixed"))
    for stage, dp in product(STAGES, (2, 3)):
        yield _named("empty_shards", dp, Case("mini", stage, "bf16", "slim", groups="vector"))
    for stage, dp in ((0, 2), (1, 3), (2, 2), (3, 3)):
        yield _named("groups_tied", dp, Case("mini", stage, model="nano", groups="tied"))
    for tag, case in _wrappers(frozen=("embed_tokens", "layers.1.self_attn.q_proj")):
        yield _named(f"{tag}frozen", 2, case)
    absent = ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.up_proj.weight")
    for tag, case in _wrappers(absent=absent):
        yield _named(f"{tag}no_gradient", 2, case)


MULTIPLIERS = {"lr_multipliers": {"emb": 3, "output": 0, "qk": 2, "key": 5}}
RULES = {"model.layers.1.mlp.up_proj.weight": 2.5, "model.layers.0.self_attn.v_proj.bias": 0.0}

WIDTH_RULE = {"transfer": {"base_width": 48, "rule": "sqrt"}}  # the model's width is 12: matrices x4, embeddings x2
MOVED = {block_type: oracle_names.MULTIPLIERS[block_type] * 4 for block_type in ("head", "qk", "ffn", "vo")}
MOVED["emb"] = oracle_names.MULTIPLIERS["emb"] * 2


def _settings() -> Named:
    for optimizer, (stage, dp) in product(BOTH, ((2, 3), (3, 2))):
        case = Case(optimizer, stage, model="llama", params=WIDTH_RULE, oracle_multipliers=MOVED)
        yield _named("width_rule", dp, case)
    for optimizer, (stage, dp) in product(BOTH, ((1, 2), (2, 3), (3, 2))):
        case = Case(optimizer, stage, params=MULTIPLIERS, overrides=RULES)
        yield _named("multipliers", dp, case)
        case = Case(optimizer, stage, "bf16", params={"momentum_dtype": "bf16"})
        yield _named("momentum_bf16", dp, case)


def _role_settings() -> Named:
    for optimizer, (stage, dp) in product(BOTH, ((1, 2), (2, 3), (3, 2))):
        yield _named("by_role", dp, Case(optimizer, stage, params=BY_ROLE))
    schedule = {"warmup_num_steps": 2, "total_num_steps": 7, "min_lr": 4e-3}
    for optimizer, stage in product(BOTH, (1, 2, 3)):
        case = Case(optimizer, stage, steps=8, params=ROLE_SETTINGS, scheduler="BlockwiseCosineLR")
        yield _named("moving", 2, replace(case, scheduler_params=schedule))


DEEPSPEED_SCHEDULES = {
    "WarmupLR": {"warmup_max_lr": 0.04, "warmup_num_steps": 4},
    "WarmupDecayLR": {"warmup_max_lr": 0.04, "warmup_num_steps": 3, "total_num_steps": 8},
    "WarmupCosineLR": {"warmup_num_steps": 3, "total_num_steps": 8},
    "OneCycle": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.04, "cycle_first_step_size": 3},
    "LRRangeTest": {"lr_range_test_min_lr": 0.016, "lr_range_test_step_size": 2},
}
OWN_SCHEDULES = {
    "BlockwiseCosineLR": {},
    "BlockwiseWSDLR": {"decay_num_steps": 3},
    "BlockwiseLinearLR": {},
    "BlockwiseLR": {"shape": "1-sqrt"},
}


def _schedules() -> Named:
    for (name, params), (stage, dtype) in product(
        DEEPSPEED_SCHEDULES.items(), ((0, "fp32"), (0, "bf16"), (2, "bf16"), (3, "fp32"))
    ):
        case = Case("mini", stage, dtype, steps=6, scheduler=name, scheduler_params=params)
        yield _named(name, 1, case)


def _own_schedules() -> Named:
    for (name, extra), (stage, dp) in product(OWN_SCHEDULES.items(), ((0, 1), (1, 2), (2, 2), (3, 2))):
        for optimizer in BOTH if stage == 2 else ("mini",):
            params: dict[str, Any] = {"warmup_num_steps": 2, "total_num_steps": 7, "min_lr": 4e-3, **extra}
            case = Case(optimizer, stage, steps=9, scheduler=name, scheduler_params=params)
            yield _named(name, dp, case)
            if stage >= 2 and name == "BlockwiseCosineLR":
                yield _named(f"two_groups-{name}", dp, replace(case, groups="mixed"))


def _end_to_end() -> Named:
    for optimizer, (stage, model) in product(BOTH, ((0, "nano"), (1, "llama"), (2, "nano"), (3, "llama"))):
        # A gradient of 0 +- noise becomes an update of +- 1 unless eps is above the noise; norms have a second moment
        # per element under Adam-mini too
        case = Case(optimizer, stage, model=model, gas=2, params={"eps": 1e-3}, end_to_end=True)
        yield _named(f"e2e_{model}", 2, case)


def _lion() -> Named:
    for stage, dp in ((0, 2), (1, 3), (2, 2), (3, 3)):
        yield _named("lion", dp, Case("lion", stage, model="nano" if stage == 2 else "qwen3", backend="auto"))
    for dp in (2, 3):
        yield _named("lion_bf16_optimizer", dp, Case("lion", 1, "bf16", config=BF16_OPTIMIZER))
        yield _named("lion_sub_groups", dp, Case("lion", 3, zero={"sub_group_size": 700}))
    for stage, dtype, dp in ((1, "bf16", 2), (2, "bf16", 3), (3, "fp32", 3)):
        yield _named("lion_offload", dp, Case("lion", stage, dtype, zero=OFFLOAD))
    yield _named("lion_triton", 2, Case("lion", 2, "bf16", model="nano", backend="triton"))
    yield _named("lion_overflow", 2, Case("lion", 2, "fp32", poison=(0, 2), clip=0.05, steps=4))
    yield _named("lion_mutant", 2, Case("lion", 2, oracle_multipliers={"value": 4.01}, steps=2))


MUON_ROLES: dict[str, Any] = {
    "params": {"orthogonalize": {"qk": "role", "value": "role"}},
    "oracle": {"how": dict.fromkeys(("query", "key", "value"), "role")},
}


def _muon() -> Named:
    for stage, dp in product(STAGES, (2, 3)):
        yield _named("muon", dp, Case("muon", stage, "bf16" if stage == 2 else "fp32"))
    yield _named("muon_bf16_optimizer", 3, Case("muon", 1, "bf16", config=BF16_OPTIMIZER))
    yield _named("muon_sub_groups", 3, Case("muon", 3, zero={"sub_group_size": 700}))
    yield _named("muon_round_robin", 3, Case("muon", 2, zero={"round_robin_gradients": True}))
    yield _named("muon_offload", 2, Case("muon", 1, "bf16", zero=OFFLOAD))
    yield _named("muon_offload", 2, Case("muon", 2, "bf16", zero=OFFLOAD))
    yield _named("muon_offload", 3, Case("muon", 3, zero=OFFLOAD))
    for stage in (1, 3):
        yield _named("muon_roles", 3, Case("muon", stage, model="nano", **MUON_ROLES))
        yield _named("muon_transposed", 3, Case("muon", stage, model="gpt2"))
    yield _named("muon_groups", 3, Case("muon", 2, groups="mixed", params={"lr_multipliers": {"qk": 2, "emb": 3}}))
    yield _named("muon_clip", 3, Case("muon", 3, clip=0.05, gas=2))
    yield _named("muon_overflow", 2, Case("muon", 2, "bf16", poison=(0, 2), steps=5))
    absent = ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.up_proj.weight")
    yield _named("muon_no_gradient", 3, Case("muon", 3, absent=absent))
    yield _named("muon_zero_init", 2, Case("muon", 3, "bf16", zero_init=True))
    yield _named("muon_mutant", 2, Case("muon", 2, oracle_multipliers={"value": 1.01}, steps=2))


def _mutants() -> Named:
    for optimizer, (role, value) in product(BOTH, (("value", 4.01), ("key", 10), ("norm", 4))):
        case = Case(optimizer, 2, "bf16", oracle_multipliers={role: value}, steps=2)
        yield _named(f"mutant_{role}", 2, case)


def _table(make: Callable[[], Named]) -> dict[str, tuple[int, Case]]:
    return {
        f"{name}-{backend}": (world_size, replace(case, backend=backend))
        for name, world_size, case in make()
        for backend in BACKENDS
    }


GRID, FAMILIES, PARTITIONS = _table(_grid), _table(_model_families), _table(_partitions)
GRANULARITY, SETTINGS, BY_ROLES = _table(_granularities), _table(_settings), _table(_role_settings)
OFFLOADED, ACCUMULATION = _table(_offload), _table(_accumulation_and_clipping)
OVERFLOW, PARAMETERS, SCHEDULES = _table(_overflow), _table(_parameters), _table(_schedules)
OWN, END_TO_END, MUTANTS = _table(_own_schedules), _table(_end_to_end), _table(_mutants)
MUON = {name: (world_size, case) for name, world_size, case in _muon()}
LION = {name: (world_size, case) for name, world_size, case in _lion()}
ALL = {
    **GRID, **FAMILIES, **PARTITIONS, **GRANULARITY, **SETTINGS, **OFFLOADED, **ACCUMULATION, **OVERFLOW, **PARAMETERS,
    **SCHEDULES, **OWN, **END_TO_END, **MUTANTS, **BY_ROLES, **LION, **MUON,
}  # fmt: skip


SUITE = Suite(run_case, ALL, slow=takes_long)
outcome = SUITE.outcome()


@SUITE.tests(GRID)
def test_zero_stages(outcome: Outcome, name: str) -> None:
    """A user who changes the ZeRO stage or adds a GPU would silently train another model."""
    passes(outcome, name)


@SUITE.tests(FAMILIES)
def test_model_families(outcome: Outcome, name: str) -> None:
    """Fused, transposed or tied weights would get another layer's multiplier or head size."""
    passes(outcome, name)


@SUITE.tests(PARTITIONS)
def test_partition_options(outcome: Outcome, name: str) -> None:
    """An option that reorders or pads the flat buffers would shift every multiplier and block."""
    passes(outcome, name)


@SUITE.tests(GRANULARITY)
def test_granularity(outcome: Outcome, name: str) -> None:
    """Blocks that a user made larger or smaller would be summed over the wrong elements."""
    passes(outcome, name)


@SUITE.tests(SETTINGS)
def test_settings_of_the_json(outcome: Outcome, name: str) -> None:
    """Multipliers, rules or the momentum's dtype from the JSON would not reach the shards."""
    passes(outcome, name)


@SUITE.tests(BY_ROLES)
def test_betas_decay_and_moving_multipliers_of_a_role(outcome: Outcome, name: str) -> None:
    """An element of a shard would get the betas, the decay or the moving multiplier of its neighbour's role."""
    passes(outcome, name)


@SUITE.tests(OFFLOADED)
def test_cpu_offload(outcome: Outcome, name: str) -> None:
    """Offloaded optimizer states would be updated with wrong block sums, or not at all."""
    passes(outcome, name)


@SUITE.tests(ACCUMULATION)
def test_accumulation_and_clipping(outcome: Outcome, name: str) -> None:
    """State would advance once per micro-batch, or block sums would see unclipped gradients."""
    passes(outcome, name)


@SUITE.tests(OVERFLOW)
def test_overflow_skips(outcome: Outcome, name: str) -> None:
    """A NaN on one rank would spoil state, hang the others, or advance the bias correction."""
    passes(outcome, name)


@SUITE.tests(PARAMETERS)
def test_groups_frozen_and_missing_gradients(outcome: Outcome, name: str) -> None:
    """Group settings would leak, frozen weights move, or a missing gradient stall the ranks."""
    passes(outcome, name)


@SUITE.tests(SCHEDULES)
def test_deepspeed_schedules(outcome: Outcome, name: str) -> None:
    """A schedule would overwrite the multipliers, or logs would show a multiplied lr."""
    passes(outcome, name)


@SUITE.tests(OWN)
def test_own_schedules(outcome: Outcome, name: str) -> None:
    """Block types would not end at the common min_lr, so the paper's runs could not be repeated."""
    passes(outcome, name)


@SUITE.tests(END_TO_END)
def test_end_to_end(outcome: Outcome, name: str) -> None:
    """With a real forward and backward something other than the mean gradient would be used."""
    passes(outcome, name)


@SUITE.tests(name for name in LION if "mutant" not in name)
def test_lion(outcome: Outcome, name: str) -> None:
    """An optimizer that keeps no second moments would miss the shards, the clipping or the skipped steps."""
    passes(outcome, name)


@SUITE.tests(name for name in MUON if "mutant" not in name)
def test_muon(outcome: Outcome, name: str) -> None:
    """A matrix cut by a partition would be orthogonalised in pieces, scaled by its part, or as another role's."""
    passes(outcome, name)


@SUITE.tests([*MUTANTS, *(name for name in (*LION, *MUON) if "mutant" in name)])
def test_the_comparison_notices_a_wrong_multiplier(outcome: Outcome, name: str) -> None:
    """The tests above would prove nothing: a wrong multiplier of one role must be seen."""
    notices_a_wrong_multiplier(outcome, name)
