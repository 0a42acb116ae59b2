# SPDX-License-Identifier: Apache-2.0
"""Save, build a new engine, load, go on: the same bits as without a break; and to and from DeepSpeed's AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.deepspeed.compared import assert_same, to_universal
from tests.helpers.deepspeed.engine_cases import LION_BETAS, LR, Case, build, config_of, groups_of, hyper_of, oracle_of
from tests.helpers.deepspeed.engines import DTYPES, feed_step, masters, model_weights, open_engine, prepare_deepspeed
from tests.helpers.distributed import Outcome, RankContext, passes
from tests.helpers.models import GradientPlan
from tests.helpers.muon_oracle import tolerance_for
from tests.helpers.oracle import assert_same_update
from tests.helpers.suites import Suite

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

SAVED, LAST = 3, 5  # steps before the checkpoint, and in all
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
BF16_OPTIMIZER = {"data_types": {"grad_accum_dtype": "fp32"}}
ONES = dict.fromkeys(("emb", "head", "qk", "ffn", "vo", "norm", "other"), 1.0)
SCHEDULE = {"scheduler": "BlockwiseCosineLR", "scheduler_params": {"total_num_steps": 7, "warmup_num_steps": 2}}


def run_case(context: RankContext, what: tuple[str, Case]) -> None:
    """Entry of every rank."""
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers

    kind, case = what
    checks = {
        "resume": check_resume,
        "portable": check_portable,
        "universal": check_universal,
        "from_adamw": check_from_adamw,
        "from_mini": check_from_mini,
        "from_universal": check_from_universal,
        "to_adamw": check_to_adamw,
    }
    checks[kind](context, case)


def train(run: SimpleNamespace, context: RankContext, case: Case, steps: range) -> None:
    plan = GradientPlan(context.world_size, case.gas, DTYPES[case.dtype])
    for step in steps:
        feed_step(run, plan, step, context.rank)


def check_resume(context: RankContext, case: Case) -> None:
    config = config_of(case)
    folder = str(context.tmp_path / "resume")
    with open_engine(config, lambda: build(case, config), groups=groups_of(case)) as run:
        train(run, context, case, range(SAVED))
        then = masters(run)
        run.engine.save_checkpoint(folder, tag="saved", client_state={"note": [1, 2]})
        train(run, context, case, range(SAVED, LAST))
        wanted, wanted_model, wanted_state = masters(run), model_weights(run), moments(run)
        wanted_lr = run.engine.get_lr()
    assert any(not torch.equal(wanted[name], then[name]) for name in then)
    with open_engine(config, lambda: build(case, config), groups=groups_of(case)) as run:
        path, client_state = run.engine.load_checkpoint(folder)
        assert path is not None
        assert client_state["note"] == [1, 2]
        assert run.engine.global_steps == SAVED
        assert_same(masters(run), then, "loaded masters")
        held = {b.tensor: run.engine.basic_optimizer.state[b.tensor] for b in run.engine.basic_optimizer.bindings()}
        if case.optimizer in ("mini", "muon"):  # already in blocks, before the first step
            assert all(s["exp_avg_sq"].numel() == blocks(run, t) for t, s in held.items())
        train(run, context, case, range(SAVED, LAST))
        assert_same(masters(run), wanted, "masters")
        assert_same(model_weights(run), wanted_model, "model weights")
        assert_same(moments(run), wanted_state, "optimizer state")
        assert run.engine.get_lr() == wanted_lr
    if case.zero.get("round_robin_gradients") and context.rank == 0:
        reason = "round_robin_gradients: the converter mixes up parameters"  # each release stops in a way of its own
        with pytest.raises((AssertionError, ValueError), match=reason):
            to_universal(Path(folder) / "saved", Path(folder) / "universal")


def check_portable(context: RankContext, case: Case) -> None:
    """The portable form into another ZeRO stage: element-wise state goes on bit for bit, whatever the cut."""
    folder = context.tmp_path / f"portable-{case.optimizer}"
    config = config_of(case)
    with open_engine(config, lambda: build(case, config)) as run:
        train(run, context, case, range(SAVED))
        run.engine.save_checkpoint(str(folder / "saved"), tag="saved")
        train(run, context, case, range(SAVED, LAST))
        wanted = masters(run)
    portable = portable_of(context, folder / "saved")
    other = replace(case, stage=3 if case.stage < 3 else 1)
    config = config_of(other)
    with open_engine(config, lambda: build(other, config)) as run:
        run.engine.load_checkpoint(str(portable))
        train(run, context, other, range(SAVED, LAST))
        assert_same(masters(run), wanted, "masters")


def portable_of(context: RankContext, folder: Path) -> Path:
    """The portable form of a checkpoint, beside it."""
    from ds_blockwise.hosts.deepspeed.checkpoint.inspect import convert_checkpoint

    portable = folder.with_name(f"{folder.name}-portable")
    if context.rank == 0:
        convert_checkpoint(folder, portable)
    context.barrier()
    return portable


def to_universal_beside(context: RankContext, folder: Path) -> Path:
    """The universal form of the checkpoint ``saved`` in a folder, which is then the folder's newest."""
    if context.rank == 0:
        to_universal(folder / "saved", folder / "universal")
        (folder / "latest_universal").write_text("universal", encoding="utf-8")
    context.barrier()
    return folder


def check_universal(context: RankContext, case: Case) -> None:
    """DeepSpeed's converter and its restore at the same topology: nothing may differ, in no group."""
    config = config_of(case)
    folder = context.tmp_path / f"universal-{case.optimizer}-{case.stage}-{case.scheduler}"
    with open_engine(config, lambda: build(case, config), groups=groups_of(case)) as run:
        train(run, context, case, range(SAVED))
        run.engine.save_checkpoint(str(folder), tag="saved", client_state={"note": "kept"})
        settings = group_settings(run)
        train(run, context, case, range(SAVED, LAST))
        wanted = masters(run)
    if context.rank == 0:
        to_universal(folder / "saved", folder / "universal")
    context.barrier()
    if case.optimizer == "muon" and case.stage == 2:
        check_muons_is_refused(case, folder)
    config["checkpoint"] = {"load_universal": True}
    with open_engine(config, lambda: build(case, config), groups=groups_of(case)) as run:
        _, client_state = run.engine.load_checkpoint(str(folder), tag="universal")
        assert client_state["note"] == "kept"
        assert group_settings(run) == settings
        train(run, context, case, range(SAVED, LAST))
        assert_same(masters(run), wanted, "masters")


def check_muons_is_refused(case: Case, folder: Path) -> None:
    """Adam would divide by the second moments of orthogonal rows."""
    other = config_of(replace(case, optimizer="mini")) | {"checkpoint": {"load_universal": True}}
    with open_engine(other, lambda: build(case, other), groups=groups_of(case)) as run:
        before = masters(run)
        with pytest.raises(ValueError, match="written by BlockwiseMuon, which keeps a second moment of updates"):
            run.engine.load_checkpoint(str(folder), tag="universal")
        assert_same(masters(run), before, "masters")


def group_settings(run: SimpleNamespace) -> list[dict[str, Any]]:
    groups = run.engine.basic_optimizer.param_groups
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def moments(run: SimpleNamespace) -> dict[str, Tensor]:
    optimizer = run.engine.basic_optimizer
    found = {}
    for index, binding in enumerate(optimizer.bindings()):
        for key, value in optimizer.state[binding.tensor].items():
            found[f"{index}.{key}"] = torch.as_tensor(value).clone()
    return found


def blocks(run: SimpleNamespace, tensor: Tensor) -> int:
    return run.engine.basic_optimizer.binding_of(tensor).table.num_blocks


# ------------------------------------------------------------------------------------------ AdamW


def adamw_config(case: Case) -> dict[str, Any]:
    ours = config_of(case)
    params = {key: ours["optimizer"]["params"][key] for key in ("lr", "betas", "eps", "weight_decay")}
    return ours | {"optimizer": {"type": "AdamW", "params": params | {"torch_adam": True}}}


def check_from_adamw(context: RankContext, case: Case) -> None:
    """A uniform AdamW run goes on with ours; the oracle does the same on whole tensors."""
    uniform = replace(case, optimizer="adamw", params=case.params | {"lr_multipliers": ONES})
    switch(context, (adamw_config(case), uniform), (config_of(case), case))


def check_from_mini(context: RankContext, case: Case) -> None:
    """A Blockwise Adam-mini run goes on with another of ours at another stage, through the portable form."""
    mini = replace(case, optimizer="mini", stage=2, params={"lr_multipliers": ONES})
    switch(context, (config_of(mini), mini), (config_of(case), case), through=portable_of)


def check_from_universal(context: RankContext, case: Case) -> None:
    """The same at one stage, through DeepSpeed's universal form."""
    mini = replace(case, optimizer="mini", params={"lr_multipliers": ONES})
    universal = config_of(case) | {"checkpoint": {"load_universal": True}}
    switch(context, (config_of(mini), mini), (universal, case), through=to_universal_beside)


def check_to_adamw(context: RankContext, case: Case) -> None:
    uniform = replace(case, optimizer="adamw", params=case.params | {"lr_multipliers": ONES})
    switch(context, (config_of(case), case), (adamw_config(case), uniform))


def switch(
    context: RankContext,
    first: tuple[dict[str, Any], Case],
    second: tuple[dict[str, Any], Case],
    *,
    through: Callable[[RankContext, Path], Path] = lambda context, folder: folder,
) -> None:
    (config, case), (next_config, next_case) = first, second
    name = f"switch-{case.optimizer}{case.stage}-{next_case.optimizer}{next_case.stage}"
    folder = context.tmp_path / name  # others save without manifests, which then must not be there
    plan = GradientPlan(context.world_size, 1, DTYPES[case.dtype])
    with open_engine(config, lambda: build(case, config)) as run:
        start = masters(run)
        oracle = oracle_of(case, start, hyper_of(case, list(start)))
        for step in range(SAVED):
            feed_step(run, plan, step, context.rank)
            oracle.step({n: plan.mean(n, tuple(p.shape), step) for n, p in start.items()})
        run.engine.save_checkpoint(str(folder), tag="saved")
    folder = through(context, folder)
    with open_engine(next_config, lambda: build(next_case, next_config)) as run:
        run.engine.load_checkpoint(str(folder))
        now = masters(run)
        follower = oracle_of(next_case, oracle.weights(), hyper_of(next_case, list(now)))
        follower.take_over(oracle.state)
        for step in range(SAVED, LAST):
            feed_step(run, plan, step, context.rank)
            before, now, was = now, masters(run), follower.weights()
            follower.step({n: plan.mean(n, tuple(p.shape), step) for n, p in start.items()})
            # the weights have moved by several lr: each update rounds twice at their new size
            assert_same_update(
                (before, now), (was, follower.weights()), LR,
                tolerance=tolerance_for(next_case.optimizer), weight_roundings=4, what=f"step {step}",
            )  # fmt: skip


# ------------------------------------------------------------------------------------------ cases


def _cases() -> Iterator[tuple[str, tuple[int, tuple[str, Case]]]]:
    def resume(name: str, dp: int, case: Case) -> tuple[str, tuple[int, tuple[str, Case]]]:
        return f"{name}-{case.optimizer}-z{case.stage}-{case.dtype}-dp{dp}", (dp, ("resume", case))

    for optimizer, stage, dtype in product(("mini", "adamw"), (0, 1, 2, 3), ("fp32", "bf16")):
        yield resume("resume", 2, Case(optimizer, stage, dtype, **SCHEDULE))
    for stage in (0, 2, 3):
        yield resume("resume", 3, Case("mini", stage, "bf16", **SCHEDULE))
        compact = {"checkpoint_format": "compact"}
        yield resume("resume_compact", 2 + stage // 3, Case("mini", stage, "bf16", params=compact))
        yield (
            resume("resume_offload", 2, Case("mini", stage, "bf16", zero=OFFLOAD))
            if stage
            else resume("resume_groups", 2, Case("mini", stage, groups="mixed"))
        )
    yield resume("resume_groups", 2, Case("mini", 2, "bf16", groups="mixed", **SCHEDULE))
    yield resume("resume_groups", 2, Case("mini", 3, "fp32", groups="mixed", zero={"sub_group_size": 300}))
    yield resume("resume_offload", 2, Case("adamw", 2, "bf16", zero=OFFLOAD))
    yield resume("resume_bf16_optimizer", 2, Case("mini", 1, "bf16", config=BF16_OPTIMIZER))
    yield resume("resume_momentum", 2, Case("mini", 2, "bf16", params={"momentum_dtype": "bf16"}))
    for optimizer, stage, form in (("mini", 2, "compact"), ("mini", 3, "expanded"), ("adamw", 1, "expanded")):
        params = BY_ROLE | {"checkpoint_format": form}
        yield resume("resume_by_role", 2, Case(optimizer, stage, params=params, **SCHEDULE))
    yield resume("resume_round_robin", 2, Case("mini", 2, "bf16", zero={"round_robin_gradients": True}))
    yield resume("resume_slim", 3, Case("mini", 2, "fp32", model="slim", groups="vector"))
    yield resume("resume_deepspeed_schedule", 2, Case("mini", 2, scheduler="WarmupLR", scheduler_params=WARMUP))
    yield resume("resume", 2, Case("lion", 3, "bf16", **SCHEDULE))
    yield resume("resume", 3, Case("muon", 2, "bf16", **SCHEDULE))
    yield resume("resume_compact", 2, Case("muon", 3, params={"checkpoint_format": "compact"}))
    for optimizer in ("adamw", "lion", "muon"):
        yield f"portable-{optimizer}-z2", (2, ("portable", Case(optimizer, 2)))
    for optimizer, stage in product(("mini", "adamw"), (1, 2, 3)):
        case = Case(optimizer, stage, "bf16" if stage > 1 else "fp32", groups="mixed", **SCHEDULE)
        yield f"universal-{optimizer}-z{stage}", (2, ("universal", case))
    for stage in (2, 3):
        case = Case("muon", stage, groups="mixed", **SCHEDULE)
        yield f"universal-muon-z{stage}", (2, ("universal", case))
        case = Case("muon", stage, decay_multipliers=False)
        yield f"from_universal-muon-z{stage}-dp2", (2, ("from_universal", case))
    warmup = Case("mini", 3, scheduler="WarmupLR", scheduler_params=WARMUP, groups="mixed")
    yield "universal_deepspeed_schedule-z3", (2, ("universal", warmup))
    for kind, (optimizer, stage) in product(("from_adamw", "to_adamw"), product(("mini", "adamw"), (0, 1, 2, 3))):
        # the same decay everywhere, because AdamW has one
        case = Case(optimizer, stage, "fp32", decay_multipliers=False)
        yield f"{kind}-{optimizer}-z{stage}", (2, (kind, case))
    for dp, stage in ((2, 0), (1, 1), (2, 2), (2, 3)):
        case = Case("muon", stage, decay_multipliers=False)
        yield f"from_adamw-muon-z{stage}-dp{dp}", (dp, ("from_adamw", case))
    for stage in range(4):
        # AdamW's momentum may not cancel a gradient either
        case = Case("lion", stage, decay_multipliers=False, params={"betas": list(LION_BETAS)})
        yield f"from_adamw-lion-z{stage}-dp2", (2, ("from_adamw", case))
    for dp, stage in ((1, 1), (2, 3)):
        yield f"from_mini-muon-z{stage}-dp{dp}", (dp, ("from_mini", Case("muon", stage, decay_multipliers=False)))


BY_ROLE = {
    "betas_by_type": {"norm": [0.8, 0.99], "key": [None, 0.9]},
    "lr_multipliers": {"norm": {"start": 1.0, "end": 0.25}, "value": {"start": 0.5, "end": 2.0}},
    "cautious_weight_decay": True,
}
WARMUP = {"warmup_max_lr": 0.04, "warmup_num_steps": 6}
SUITE = Suite(run_case, dict(_cases()))
outcome = SUITE.outcome()


@SUITE.cases("resume", "portable")
def test_resume_is_bitwise(outcome: Outcome, name: str) -> None:
    """A restart would change the run: a rounded second moment, a stale lr, a lost group setting."""
    passes(outcome, name)


@SUITE.cases("universal")
def test_universal_checkpoint_at_the_same_topology(outcome: Outcome, name: str) -> None:
    """DeepSpeed's ZeRO-3 restore would give every param group the settings of the first."""
    passes(outcome, name)


@SUITE.cases("from_adamw", "from_mini", "from_universal")
def test_a_run_goes_on_with_another_optimizer(outcome: Outcome, name: str) -> None:
    """Moments would be dropped, or second moments averaged over a rank's part of a block only; or Muon's rows would
    begin with those of gradients."""
    passes(outcome, name)


@SUITE.cases("to_adamw")
def test_ours_goes_on_with_deepspeeds_adamw(outcome: Outcome, name: str) -> None:
    """A user who leaves would lose the optimizer's state."""
    passes(outcome, name)
