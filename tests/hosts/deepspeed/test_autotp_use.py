# SPDX-License-Identifier: Apache-2.0
"""What a user does with an AutoTP model besides a step: check it, save it, move it, get it wrong."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.deepspeed.autotp_engines import DECAY_MULTIPLIERS, Case, engine_of, feed, held
from tests.helpers.deepspeed.autotp_models import classes_of, cut, small
from tests.helpers.deepspeed.compared import Compared, check_counters, check_resume, hyper
from tests.helpers.deepspeed.engine_cases import LR, betas_of
from tests.helpers.deepspeed.engines import DTYPES, model_weights, prepare_deepspeed
from tests.helpers.deepspeed.reshard import largest_difference, whole_state
from tests.helpers.distributed import Outcome, RankContext, passes
from tests.helpers.models import GradientPlan
from tests.helpers.muon_oracle import oracle_for, trained_tolerance_for
from tests.helpers.optimizers import FULL_NAME
from tests.helpers.oracle import LionOracle, Weights, assert_same_update, told
from tests.helpers.suites import Suite, notices_a_wrong_multiplier

_MISSING = [name for name in ("deepspeed", "transformers") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(_MISSING), reason="needs deepspeed and transformers")


@dataclass(frozen=True)
class Use:
    """A case and what is done with it.

    Attributes:
        what: name of the function of this file that does it.
        case: the engine.
        target: a second engine, for moved checkpoints.
        expected: what must be in the error.
    """

    what: str
    case: Case
    target: Case | None = None
    expected: tuple[str, ...] = field(default=())


def run_use(context: RankContext, use: Use) -> None:
    """Entry of every rank."""
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers

    globals()[use.what](context, use)


# ----------------------------------------------------------------------------------- end to end


def trains_like_one_rank(context: RankContext, use: Use) -> None:
    """The same batches through one rank and through AutoTP, forward and backward by the model itself."""
    whole = _train(context, replace(use.case, tp=1))
    parts = _train(context, use.case)
    for step, ((was, now), (part_was, part_now)) in enumerate(zip(whole, parts, strict=True)):

        def part(weights: dict[str, Tensor]) -> dict[str, Tensor]:
            found = {n: cut(use.case.model, n, w, context.rank % 2) for n, w in weights.items()}
            return {n: w for n, w in found.items() if w.numel()}

        # 1e-4: matrix products add up in another order; an element far below eps keeps that noise below eps
        assert_same_update((part_was, part_now), (part(was), part(now)), LR, tolerance=1e-4, what=f"step {step}")


def trains_like_autograd(context: RankContext, use: Use) -> None:
    """The same for updates that magnify the last bits of a gradient: that of whole tensors goes to the oracle."""
    case, alone = use.case, small(use.case.model)
    start = {n: p.detach().clone() for n, p in alone.named_parameters()}
    own = hyper(betas=betas_of(case.optimizer))
    settings = {"weight_decay_multipliers": DECAY_MULTIPLIERS, **told(case.params, case.oracle_multipliers)}
    oracle = oracle_for(case.optimizer, start, classes_of(case.model), own, **settings)
    if isinstance(oracle, LionOracle):
        oracle.noise = 1e-6

    def part(weights: Weights) -> dict[str, Tensor]:
        found = {n: cut(case.model, n, w, context.rank % 2) for n, w in weights.items()}
        return {n: w for n, w in found.items() if w.numel()}

    with engine_of(context, case, feed=False) as run:
        pair = Compared(run, oracle, part, held)
        pair.check_start()
        for step in range(case.steps):
            pair.set_lr(step)
            tokens = _tokens(step)
            alone.load_state_dict(oracle.weights())
            alone.zero_grad()
            alone(input_ids=tokens, labels=tokens).loss.backward()
            run.engine.backward(run.engine(input_ids=tokens, labels=tokens).loss)
            run.engine.step()
            gradients = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
            pair.check_step(gradients, what=f"step {step}", tolerance=trained_tolerance_for(case.optimizer))


def _tokens(step: int) -> Tensor:
    return torch.randint(1, 37, (2, 9), generator=torch.Generator().manual_seed(step))


def _train(context: RankContext, case: Case) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    history = []
    with engine_of(context, case, feed=False) as run:
        now = held(run)
        for step in range(case.steps):
            tokens = _tokens(step)
            run.engine.backward(run.engine(input_ids=tokens, labels=tokens).loss)
            run.engine.step()
            before, now = now, held(run)
            history.append((before, now))
            check_counters(run, step + 1)
    return history


def layout_is_verified(context: RankContext, use: Use) -> None:
    """verify_layout runs the split model, and still notices a wrong layout."""
    from ds_blockwise import verify_layout

    with engine_of(context, use.case, feed=False) as run:
        found = verify_layout(run.engine.module)
        assert found.num_checks > 0 and any("query_key_value" in name for name in found.parameters)
        wrong = [{"match": "query_key_value", "role": "qkv", "layout": "concat", "num_heads": 4, "num_kv_heads": 4}]
        with pytest.raises(ValueError, match="Describe the split in"):
            verify_layout(run.engine.module, rules=wrong)


# ---------------------------------------------------------------------------------- checkpoints


def _shared_folder(context: RankContext, name: str) -> Path:
    folder = context.tmp_path / name
    if context.rank == 0:
        folder.mkdir()
    dist.barrier()
    return folder


def resumes_bitwise(context: RankContext, use: Use) -> None:
    plan = GradientPlan(context.world_size // use.case.tp, 1, DTYPES[use.case.dtype])
    folder = _shared_folder(context, f"resume-{use.case.model}-{use.case.stage}-{use.case.optimizer}")
    check_resume(lambda: engine_of(context, use.case), lambda run, step: feed(run, plan, step), folder)


def moves_to_another_size(context: RankContext, use: Use) -> None:
    """`ds-blockwise convert`, then an engine of another tensor-parallel size with the very same state."""
    from ds_blockwise.hosts.deepspeed.checkpoint.inspect import convert_checkpoint, describe_checkpoint

    assert use.target is not None
    plan = GradientPlan(context.world_size // use.case.tp, 1, DTYPES[use.case.dtype])
    folder = _shared_folder(
        context, f"move-{use.case.model}-{use.case.stage}-{use.target.tp}-{use.case.dtype}-{use.case.zero_init}"
    )
    with engine_of(context, use.case) as run:
        for step in range(2):
            feed(run, plan, step)
        run.engine.save_checkpoint(str(folder / "own"), tag="saved")
        saved = whole_state(run)
    if context.rank == 0:
        assert describe_checkpoint(folder / "own")["problems"] == []
        _, notes = convert_checkpoint(folder / "own", folder / "portable")
        assert not notes, notes
    dist.barrier()
    with engine_of(context, use.target) as run:
        path, _ = run.engine.load_checkpoint(str(folder / "portable"))
        assert path is not None
        loaded = whole_state(run)
        assert largest_difference(loaded, saved, "weights", "exp_avg", "exp_avg_sq") == 0.0
        for name, weight in model_weights(run).items():
            expected = run.cut(name, loaded["weights"][name], run.tp_rank)
            assert torch.equal(weight, expected.to(weight.dtype)), name


def universal_keeps_its_information(context: RankContext, use: Use) -> None:
    """DeepSpeed's converter needs AutoTP's own description of the shards; ours must not take its place."""
    plan = GradientPlan(1, 1)
    with engine_of(context, use.case) as run, TemporaryDirectory() as folder:
        feed(run, plan, 0)
        own = run.engine.module.universal_checkpoint_info
        shared: list[Any] = [folder]
        dist.broadcast_object_list(shared, 0)
        run.engine.save_checkpoint(shared[0], tag="saved")
        dist.barrier()
        saved = torch.load(Path(shared[0]) / "saved" / "mp_rank_00_model_states.pt", weights_only=False)
        said = saved["universal_checkpoint_info"]
        reasons = said["autotp_unsupported_parameter_patterns"]
        assert {**said, "autotp_unsupported_parameter_patterns": {}} == {
            **own,
            "autotp_unsupported_parameter_patterns": {},
        }
        assert use.expected == tuple(reason.partition(":")[0] for reason in reasons.values())
        dist.barrier()


# -------------------------------------------------------------------------------------- refusals


def is_refused(context: RankContext, use: Use) -> None:
    """On every rank, before the first step."""
    with pytest.raises(ValueError) as caught, engine_of(context, use.case):
        pass
    for text in use.expected:
        assert text in str(caught.value), f"{text!r} is not in {caught.value}"


def _uses() -> dict[str, tuple[int, Use]]:
    table = {
        f"end_to_end-{model}-z{stage}-{optimizer}": Use(
            "trains_like_one_rank",
            Case(optimizer, stage, model=model, params={"eps": 1e-3}),
        )
        for model, stage, optimizer in (
            ("even", 0, "mini"),
            ("qwen3", 1, "mini"),
            ("qwen2", 2, "adamw"),
            ("mqa", 1, "mini"),
            ("glm", 3, "mini"),
        )
    }
    for model, stage, optimizer in (
        ("even", 0, "lion"),
        ("qwen3", 2, "lion"),
        ("qwen3", 1, "muon"),
        ("even", 3, "muon"),
    ):
        case = Case(optimizer, stage, model=model)
        table[f"end_to_end-{model}-z{stage}-{optimizer}"] = Use("trains_like_autograd", case)
    for stage, model, optimizer in (
        (1, "mqa", "lion"),
        (3, "qwen2", "lion"),
        (0, "qwen3", "muon"),
        (2, "even", "muon"),
    ):
        table[f"resume-{model}-z{stage}-{optimizer}"] = Use("resumes_bitwise", Case(optimizer, stage, model=model))
    for optimizer, value in (("lion", 4.01), ("muon", 1.01)):
        wrong = Case(optimizer, 1, model="even", oracle_multipliers={"value": value}, steps=1)
        table[f"mutant-{optimizer}"] = Use("trains_like_autograd", wrong)
    table["verify-neox"] = Use("layout_is_verified", Case(model="neox"))
    table["verify-counting"] = Use("layout_is_verified", Case(model="counting"))
    for stage, model, optimizer in (
        (0, "qwen3", "mini"),
        (1, "mqa", "mini"),
        (2, "even", "adamw"),
        (3, "qwen2", "mini"),
    ):
        table[f"resume-{model}-z{stage}-{optimizer}"] = Use("resumes_bitwise", Case(optimizer, stage, model=model))
        for tp in (1, 2):
            target = Case(optimizer, 3 if stage == 2 else 2, model=model, tp=tp)
            use = Use("moves_to_another_size", Case(optimizer, stage, model=model), target)
            if tp == 1 or stage in (0, 2):
                table[f"move-{model}-z{stage}-{optimizer}-tp{tp}"] = use
    table["move-mqa-z0-bf16"] = Use(
        "moves_to_another_size", Case("mini", 0, "bf16", "mqa"), Case("mini", 1, "bf16", "mqa", tp=1)
    )
    table["move-even-z3-zero_init"] = Use(
        "moves_to_another_size",
        Case("mini", 3, model="even", zero_init=True),
        Case("mini", 2, model="even", tp=1),
    )
    glm = Case("mini", 1, model="glm")
    table["move-glm-z1-mini-tp1"] = Use("moves_to_another_size", glm, replace(glm, stage=2, tp=1))
    table["universal-plain"] = Use("universal_keeps_its_information", Case(model="even"))
    table["universal-compact"] = Use(
        "universal_keeps_its_information",
        Case(model="even", params={"checkpoint_format": "compact"}),
        expected=("compact",),
    )
    refused = {
        **{
            f"head_norms-{optimizer}": (
                Case(optimizer, model="unsummed"),
                ("q_norm.weight", "drift apart", '"grad_allreduce": true'),
            )
            for optimizer in FULL_NAME
        },
        "persimmon": (Case(model="persimmon"), ("query_key_value.weight", "would compute another attention")),
        "nothing_split": (Case(model="nothing"), ("no parameter is known to be split", "partition_config")),
        "empty_z3": (Case(stage=3, model="mqa"), ("self_attn.q_proj.weight", "ZeRO stage 2")),
        "clip_z0": (Case(stage=0, dtype="bf16", clip=1.0), ("gradient_clipping", "ZeRO stage 1")),
    }
    table |= {f"refused-{name}": Use("is_refused", case, expected=texts) for name, (case, texts) in refused.items()}
    return {name: (2, use) for name, use in table.items()}


SUITE = Suite(run_use, _uses())
outcome = SUITE.outcome()


@SUITE.cases("end_to_end")
def test_autotp_trains_like_one_rank(outcome: Outcome, name: str) -> None:
    """Setting autotp_size would change the trained model."""
    passes(outcome, name)


@SUITE.cases("mutant")
def test_the_comparison_notices_a_wrong_multiplier(outcome: Outcome, name: str) -> None:
    """The tests above would prove nothing."""
    notices_a_wrong_multiplier(outcome, name)


@SUITE.cases("verify")
def test_verify_layout_runs_a_split_model(outcome: Outcome, name: str) -> None:
    """A fused weight of a custom model could not be checked where it is trained."""
    passes(outcome, name)


@SUITE.cases("resume")
def test_resume_is_bitwise(outcome: Outcome, name: str) -> None:
    """A run that was interrupted would end elsewhere."""
    passes(outcome, name)


@SUITE.cases("move")
def test_checkpoints_move_between_sizes(outcome: Outcome, name: str) -> None:
    """Shards of uneven, fused or empty weights would be put together in the wrong order."""
    passes(outcome, name)


@SUITE.cases("universal")
def test_universal_checkpoints_keep_autotp_s_information(outcome: Outcome, name: str) -> None:
    """DeepSpeed's converter would join shards by other patterns than AutoTP cut them by."""
    passes(outcome, name)


@SUITE.cases("refused")
def test_what_autotp_gets_wrong_is_refused(outcome: Outcome, name: str) -> None:
    """Copies that drift apart and heads that are cut in two train without an error and without a sign."""
    passes(outcome, name)
