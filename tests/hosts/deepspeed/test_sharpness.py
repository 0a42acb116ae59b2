# SPDX-License-Identifier: Apache-2.0
"""The probe inside DeepSpeed engines: the single process's values, and training afterwards as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import models
from tests.helpers.deepspeed.engine_cases import FULL_NAME
from tests.helpers.deepspeed.engines import (
    DTYPES,
    engine_config,
    masters,
    model_weights,
    open_engine,
    prepare_deepspeed,
)
from tests.helpers.distributed import Outcome, RankContext, passes
from tests.helpers.megatron.gpt_shards import SHAPES, gpt, join, parallel, small_gpt
from tests.helpers.suites import Suite

# Not imported here: a worker has to choose the accelerator before DeepSpeed looks for one.
_HOSTS_MISSING = find_spec("deepspeed") is None or find_spec("megatron") is None
pytestmark = pytest.mark.skipif(_HOSTS_MISSING, reason="needs deepspeed and megatron")

CLIP = 0.05  # far below the gradients' norm: a clipped measurement would be wrong by orders of magnitude
VOCABULARY = 37


@dataclass(frozen=True)
class Case:
    """An engine on two ranks; with ``tp`` 2 they hold the shards of one GPT, else each a copy of a Qwen3."""

    optimizer: str = "mini"
    stage: int = 0
    dtype: str = "fp32"
    tp: int = 1
    gas: int = 1
    dropout: float = 0.0
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    wrong: str = ""


# ----------------------------------------------------------------------------------------- models


def _tokens(vocabulary: int, rank: int, step: int, length: int = 7) -> Tensor:
    key = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(vocabulary, (2, length), generator=key)


def _batch(case: Case, rank: int, step: int) -> dict[str, Tensor]:
    """Ranks have different numbers of predictions, and different numbers of them in their sequences."""
    if case.tp > 1:
        tokens = _tokens(SHAPES["gqa"]["vocab"], 0, step, 9)
        mask = torch.ones(2, 8, dtype=torch.int64)
        mask[1, 5:] = 0
        positions = torch.arange(8).expand(2, -1)
        return {"tokens": tokens[:, :-1], "position_ids": positions, "labels": tokens[:, 1:], "loss_mask": mask}
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4 + 2 * rank :] = 0
    return {"input_ids": _tokens(VOCABULARY, rank, step), "attention_mask": mask}


def _together(case: Case, step: int) -> dict[str, Tensor]:
    """The batch of all ranks, as one process would be given it."""
    if case.tp > 1:
        return _batch(case, 0, step)
    parts = [_batch(case, rank, step) for rank in range(2)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _qwen3(case: Case) -> nn.Module:
    torch.manual_seed(5)
    model = models.qwen3()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = case.dropout
    with torch.no_grad():
        for parameter in model.parameters():  # so large that labels are far from evenly distributed
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def _gpt_shard(case: Case) -> nn.Module:
    model = small_gpt("gqa", DTYPES[case.dtype], torch.distributed.get_rank())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20.0)
    return model


@contextmanager
def _engine(case: Case) -> Iterator[SimpleNamespace]:
    import megatron_patch

    config = engine_config(
        FULL_NAME[case.optimizer],
        stage=case.stage,
        dtype=case.dtype,
        gas=case.gas,
        gradient_clipping=CLIP,
        params={"backend": "reference", "weight_decay_multipliers": {"norm": 0.0}},
        scheduler={"type": "BlockwiseCosineLR", "params": {"warmup_num_steps": 2, "total_num_steps": 9}},
        zero=case.zero,
        **case.config,
    )
    build = _qwen3 if case.tp == 1 else _gpt_shard
    with parallel(case.tp) if case.tp > 1 else nullcontext():
        mpu = megatron_patch.mpu_adapter() if case.tp > 1 else None
        with open_engine(config, lambda: build(case), mpu=mpu, feed=False) as run:
            yield run


# ----------------------------------------------------------------------------------------- checks


def run_case(context: RankContext, case: Case) -> None:
    """Entry of every rank."""
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers
    import megatron_patch

    megatron_patch.cpu_shims()
    if case.wrong:
        return _check_refused(context, case)
    probed, plain = _train(context, case, True), _train(context, case, False)
    assert plain.keys() == probed.keys()
    for name, value in plain.items():
        assert _same(value, probed[name]), f"{name} differs after a probe: {probed[name]} instead of {value}"


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_same(one[k], two[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(_same, one, two))
    return bool(one == two)


class _Bystander:
    """An observer of training, which must not see what a measurement does."""

    def __init__(self) -> None:
        self.calls = 0

    def before_update(self, work: Any) -> bool:
        self.calls += 1
        return True

    def after_update(self, work: Any) -> None:
        pass


def _train(context: RankContext, case: Case, probe: bool) -> dict[str, Any]:
    """Probe before the first step and between later ones; all that training leaves."""
    rank = 0 if case.tp > 1 else context.rank
    checks = []
    with _engine(case) as run:
        engine, bystander = run.engine, _Bystander()
        torch.manual_seed(9)  # of dropout
        engine.basic_optimizer.observe(bystander)
        for step in range(3):
            if probe:
                checks.append(_probe(context, case, run, rank, step))
            for micro in range(case.gas):
                engine.backward(_loss(case, engine, _batch(case, rank, 10 * step + micro)))
                engine.step()
        left = {f"master {n}": v for n, v in masters(run).items()}
        left |= {f"model {n}": v for n, v in model_weights(run).items()}
        left["state"] = [dict(s) for s in engine.basic_optimizer.state.values()]
        left["counters"] = [engine.global_steps, engine.micro_steps, engine.skipped_steps, engine.global_samples]
        left["schedule"] = [engine.get_lr(), engine.lr_scheduler.state_dict(), engine.basic_optimizer.step_calls]
        left["clipped"] = [float(engine.get_global_grad_norm() or 0.0), getattr(engine.optimizer, "clip_grad", None)]
        left["random"] = torch.get_rng_state()
        left["observer"] = bystander.calls
    for check in checks:
        check()
    assert left["observer"] > 0
    assert case.stage == 0 or left["clipped"][0] > 2 * CLIP, "the test must clip"
    return left


def _loss(case: Case, engine: Any, batch: dict[str, Tensor]) -> Tensor:
    if case.tp > 1:
        return engine(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).float().mean()
    return engine(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


def _probe(context: RankContext, case: Case, run: SimpleNamespace, rank: int, step: int) -> Callable[[], None]:
    """Two good batches and one that overflows on one rank; what is returned compares with one process."""
    from ds_blockwise.hosts.deepspeed.sharpness import probe_engine
    from ds_blockwise.measure.predictions import Predictions, causal_lm, megatron_gpt
    from ds_blockwise.measure.sharpness import measure_sharpness

    forward = megatron_gpt if case.tp > 1 else causal_lm
    before = model_weights(run)

    def spoilt(engine: Any, batch: tuple[int, dict[str, Tensor]]) -> Predictions:
        found = forward(engine, batch[1])
        bad = batch[0] == 1 and context.rank == 1
        return Predictions(found.logits * torch.inf, found.targets, found.mask) if bad else found

    batches = list(enumerate(_batch(case, rank, 50 + i) for i in range(3)))
    whole = [b for i, b in enumerate(_together(case, 50 + i) for i in range(3)) if i != 1]
    estimator = "fisher" if case.dtype == "bf16" or step == 1 else "gauss_newton"
    report = probe_engine(run.engine, batches, spoilt, estimator=estimator, seed=step)
    assert (report.samples, report.skipped, report.step) == (2, 1, step)
    after = model_weights(run)
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "the probe moved weights"
    assert all(p.grad is None for p in run.model.parameters()), "the probe left gradients"
    if case.dropout:
        return lambda: None
    weights = _whole(case, before)

    def check() -> None:
        with torch.random.fork_rng(), parallel(1) if case.tp > 1 else nullcontext():
            reference = _reference(case, weights)
            # where the bad batch was stands an empty one, so that the good ones keep their places among the draws
            empty = {**whole[0], **_nothing(case, whole[0])}
            _compare(
                report,
                measure_sharpness(reference, [whole[0], empty, whole[1]], forward, estimator=estimator, seed=step),
                case.dtype,
            )

    return check


def _compare(report: Any, expected: Any, dtype: str) -> None:
    """fp32: only the order of sums differs. bf16: the reference computes in bf16 as well, but on the batches of all
    ranks together, and rounds otherwise.
    """
    found, wanted = ({_key(e): e.sharpness for e in r.entries} for r in (report, expected))
    assert (report.tokens, report.samples) == (expected.tokens, expected.samples)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        relative = 1e-5 if dtype == "fp32" else 0.03 if key[0] == "type" else 0.1
        assert abs(found[key] - value) <= relative * value, (key, found[key], value)


def _key(entry: Any) -> tuple[Any, ...]:
    return entry.level, entry.block_type, entry.role, entry.layer, entry.parameter


def _nothing(case: Case, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    if case.tp > 1:
        return {"loss_mask": torch.zeros_like(batch["loss_mask"])}
    return {"labels": torch.full_like(batch["input_ids"], -100)}


def _whole(case: Case, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The unsharded weights in fp32."""
    if case.tp == 1:
        return {name: value.float() for name, value in weights.items()}
    found = {}
    for name, value in weights.items():
        both = [torch.empty_like(value) for _ in range(2)]
        torch.distributed.all_gather(both, value.contiguous())
        found[name] = join(name, [part.float() for part in both])
    return found


def _reference(case: Case, weights: dict[str, Tensor]) -> nn.Module:
    """The whole model in one process, with these weights."""
    from ds_blockwise import tag_parameters

    model = _qwen3(case) if case.tp == 1 else gpt("gqa", torch.float32)
    named = dict(model.named_parameters())
    assert named.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])
    tag_parameters(model)
    return model.to(DTYPES[case.dtype])


# --------------------------------------------------------------------------------------- refusals


def _check_refused(context: RankContext, case: Case) -> None:
    """Every rank must raise, and training must be able to go on."""
    from ds_blockwise.hosts.deepspeed.sharpness import probe_engine
    from ds_blockwise.measure.predictions import Predictions, causal_lm

    def unshifted(engine: Any, batch: dict[str, Tensor]) -> Predictions:
        found = causal_lm(engine, batch)
        return Predictions(found.logits, batch["input_ids"]) if context.rank == 1 else found

    with _engine(case) as run:
        batch = _batch(case, context.rank, 0)
        batches, forward, text = [batch], causal_lm, ""
        if case.wrong == "batches":
            batches, text = [batch] * (1 + context.rank), r"different numbers of batches, \[1, 2\]"
        elif case.wrong == "shapes":
            forward, text = unshifted, "do not belong to targets"
        elif case.wrong == "estimator":
            text = "for models in one process"
        elif case.wrong == "accumulated":
            run.engine.backward(_loss(case, run.engine, batch))
            run.engine.step()
            text = "1 of 2 micro batches are accumulated"
        estimator = "hutchinson" if case.wrong == "estimator" else "fisher"
        with pytest.raises(ValueError, match=text):
            probe_engine(run.engine, batches, forward, estimator=estimator)
        if case.wrong == "shapes":
            run.engine.backward(_loss(case, run.engine, batch))
            run.engine.step()
            assert run.engine.global_steps == 1


# -------------------------------------------------------------------------------------- the table

_FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
_CASES = {
    "z0-fp32-mini": Case("mini", 0),
    "z0-fp32-adamw-dropout": Case("adamw", 0, dropout=0.2, gas=2),
    "z0-bf16-adamw": Case("adamw", 0, "bf16"),
    "z1-fp32-adamw": Case("adamw", 1, gas=2),
    "z1-bf16-mini": Case("mini", 1, "bf16"),
    "z1-bf16_optimizer-mini": Case("mini", 1, "bf16", config=_FP32_SUMS),
    "z2-fp32-mini": Case("mini", 2, gas=2),
    "z2-fp32-mini-dropout": Case("mini", 2, dropout=0.2),
    "z2-bf16-adamw": Case("adamw", 2, "bf16", gas=2),
    "z2-fp32-adamw-offload": Case("adamw", 2, zero={"offload_optimizer": {"device": "cpu"}}, gas=2),
    "z3-fp32-adamw": Case("adamw", 3, zero={"sub_group_size": 500}),
    "z3-fp32-mini": Case("mini", 3, gas=2),
    "z3-bf16-mini": Case("mini", 3, "bf16", zero={"sub_group_size": 500}),
    "z2-fp32-muon": Case("muon", 2),
    "z3-fp32-lion": Case("lion", 3),
    "tp2-z0-fp32-mini": Case("mini", 0, tp=2),
    "tp2-z1-fp32-adamw": Case("adamw", 1, tp=2),
    "tp2-z2-bf16-mini": Case("mini", 2, "bf16", tp=2),
    "wrong-batches": Case(stage=1, wrong="batches"),
    "wrong-shapes": Case(stage=2, wrong="shapes"),
    "wrong-estimator": Case(stage=1, wrong="estimator"),
    "wrong-accumulated": Case(stage=1, gas=2, wrong="accumulated"),
}


SUITE = Suite(run_case, {name: (2, case) for name, case in _CASES.items()})
outcome = SUITE.outcome()


@SUITE.cases()
def test_probe(outcome: Outcome, name: str) -> None:
    """The single process's values on the same batches and labels; masters, states, counters, random numbers stay."""
    passes(outcome, name)
