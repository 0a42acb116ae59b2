# SPDX-License-Identifier: Apache-2.0
"""Cases with Hugging Face's Trainer, Accelerate, PEFT and torch.compile, each run by every rank of one spawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.helpers.deepspeed.engines import engine_config, forget_groups, open_engine, prepare_deepspeed
from tests.helpers.distributed import RankContext
from tests.helpers.huggingface.runs import (
    CLIP,
    EPS,
    LR,
    MULTIPLIERS,
    SAVED,
    SIZES,
    STEPS,
    Batch,
    Recorder,
    Tokens,
    all_batches,
    close,
    gradients_of,
    join_accelerate,
    lora_classes,
    lora_model,
    start_model,
    train_with_trainer,
    weights_of,
)
from tests.helpers.muon_oracle import oracle_for, trained_tolerance_for
from tests.helpers.optimizers import ALL_NAMES
from tests.helpers.oracle import Hyper, assert_same_update, clipped
from tests.helpers.tables.oracle_names import Classes, hf_llama_classes


def check_against_oracle(
    twin: nn.Module, recorder: Recorder, batches: list[Batch], classes: Classes, *, optimizer: str, decay: float
) -> None:
    """Every step of a recorded run against the oracle, which gets autograd's gradient on one process."""
    hyper = Hyper(LR, (0.9, 0.95), EPS, decay)
    oracle = oracle_for(ALL_NAMES[optimizer], recorder.weights[0], classes, hyper, lr_multipliers=MULTIPLIERS)
    for step, batch in enumerate(batches):
        before, after, was = recorder.weights[step], recorder.weights[step + 1], oracle.weights()
        hyper.lr = recorder.lrs[step]
        oracle.step(clipped(gradients_of(twin, before, batch), CLIP))
        if hyper.lr == 0.0:
            assert all(torch.equal(before[name], after[name]) for name in before)
            continue
        # the gradients of both sides are sums in another order, and half an ulp of a weight is not nothing beside
        # a rate of 1e-4
        what = f"step {step}, lr {hyper.lr}"
        assert_same_update(
            (before, after),
            (was, oracle.weights()),
            hyper.lr,
            tolerance=max(1e-4, trained_tolerance_for(ALL_NAMES[optimizer])),
            weight_roundings=8,
            what=what,
        )


def trainer_against_plain_loop(context: RankContext, optimizer: str, model: str) -> None:
    """`auto` values are Trainer's, every update is the oracle's, a plain loop with our optimizer gets there too."""
    build, classes = MODELS[model]
    trainer, recorder = train_with_trainer(context, optimizer, build())
    engine = trainer.model_wrapped
    assert type(engine.basic_optimizer).__name__ == optimizer
    group = engine.basic_optimizer.param_groups[0]
    assert (tuple(group["betas"]), group["eps"], group["weight_decay"]) == ((0.9, 0.95), EPS, 0.1)
    assert max(recorder.lrs) == LR
    assert {int(state["step"]) for state in engine.basic_optimizer.state.values()} == {STEPS}
    batches = all_batches(context, recorder.batches, STEPS)
    halves = [batch["input_ids"].chunk(context.world_size) for batch in batches]
    assert not any(torch.equal(*half) for half in halves), "ranks must learn from different samples"
    check_against_oracle(build(), recorder, batches, classes(), optimizer=optimizer, decay=0.1)
    plain = plain_loop(optimizer, build(), batches, recorder.lrs)
    # over several steps the noise of the gradients' sums adds up: it is judged against the whole way
    way = sum(recorder.lrs)
    assert_same_update((recorder.weights[0], recorder.weights[-1]), (recorder.weights[0], plain), way, tolerance=1e-3)
    close(engine)


def plain_loop(optimizer: str, model: nn.Module, batches: list[Batch], lrs: list[float]) -> dict[str, Tensor]:
    """The same training as a user without any host writes it, on one process."""
    import ds_blockwise

    ds_blockwise.tag_parameters(model, lr_multipliers=MULTIPLIERS)
    trained = [p for p in model.parameters() if p.requires_grad]
    ours = getattr(ds_blockwise, optimizer)(trained, LR, (0.9, 0.95), EPS, 0.1)
    for lr, batch in zip(lrs, batches, strict=True):
        ours.param_groups[0]["lr"] = lr
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        ours.step()
        ours.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def trainer_resumes_bitwise(context: RankContext, optimizer: str, model: str, *way: str) -> None:
    """A resume that starts the moments or the schedule again would train another model; from a converted one too."""
    build, more = (start_model, MORE[model]) if model in MORE else (MODELS[model][0], {})
    first, whole = train_with_trainer(context, optimizer, build(), more)
    split = first.model_wrapped.module.get_parameter(next(n for n in whole.weights[0] if "down_proj" in n)).block_shard
    assert (split is not None) == (model == "autotp")
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    close(first.model_wrapped)
    if model == "schedule":  # two updates of warm-up and one at the peak, then 1 - sqrt over three
        heights = [1 - math.sqrt(x / 3) for x in range(3)]
        assert_close(whole.lrs, [0.0, LR / 2, LR, *(1e-4 + height * (LR - 1e-4) for height in heights)])
    converted = Path(first.args.output_dir) / "converted" if way else None
    if converted is not None:
        if context.rank == 0:
            convert_for_trainer(Path(first.args.output_dir) / f"checkpoint-{SAVED}", converted)
        context.barrier()
    again, rest = train_with_trainer(context, optimizer, build(), more, resume=True, folder=converted)
    assert again.state.global_step == STEPS and len(rest.lrs) == STEPS - SAVED
    assert rest.lrs == whole.lrs[SAVED:]
    assert [entry["loss"] for entry in again.state.log_history if "loss" in entry][-STEPS + SAVED :] == losses[SAVED:]
    for name, weight in whole.weights[-1].items():
        assert torch.equal(weight, rest.weights[-1][name]), name
    close(again.model_wrapped)


def convert_for_trainer(source: Path, output: Path) -> None:
    """What Trainer keeps beside DeepSpeed's folder must be there afterwards; without its state it does not resume."""
    from ds_blockwise.hosts.deepspeed.checkpoint.inspect import convert_checkpoint

    written, notes = convert_checkpoint(source, output)
    assert any("files of Hugging Face's Trainer were copied" in note for note in notes), notes
    beside = {p.name for p in source.iterdir() if p.is_file()}
    assert {"trainer_state.json", "rng_state_0.pth"} <= beside <= {p.name for p in output.iterdir()}
    assert (written / "portable.json").is_file() and (output / "latest").read_text() == written.name


# -------------------------------------------------------------------------------------- Accelerate


def accelerated(context: RankContext, config: Mapping[str, Any], make: Callable[[nn.Module], Any]) -> Any:
    """An engine as ``accelerator.prepare(model, optimizer)`` makes it from a client optimizer."""
    from accelerate import Accelerator, DeepSpeedPlugin

    join_accelerate(context)
    model = start_model()
    optimizer = make(model)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=dict(config)))
    engine, _ = accelerator.prepare(model, optimizer)
    return engine


def offload_config(**changes: Any) -> dict[str, Any]:
    config = engine_config("BlockwiseAdamMini", stage=2, zero={"offload_optimizer": {"device": "cpu"}}, **changes)
    del config["optimizer"]
    return config


def client(model: nn.Module) -> Any:
    from ds_blockwise import BlockwiseAdamMini, tag_parameters

    tag_parameters(model, lr_multipliers=MULTIPLIERS)
    return BlockwiseAdamMini(model.parameters(), LR, (0.9, 0.95), EPS, 0.1)


def accelerate_replaces_a_client_optimizer(context: RankContext) -> None:
    """Under offload Accelerate hands DeepSpeedCPUAdam over in its place; plain Adam would train, without a word."""
    import deepspeed.ops.adam as adam
    import pytest

    class CPUAdam(torch.optim.AdamW):
        """DeepSpeedCPUAdam's signature without its C++ code, which would be compiled for minutes."""

        def __init__(self, groups: Any, adamw_mode: bool, **hyper: Any) -> None:
            super().__init__(groups, **hyper)

    upstream, adam.DeepSpeedCPUAdam = adam.DeepSpeedCPUAdam, CPUAdam
    try:
        with pytest.raises(ValueError, match=r"BlockwiseAdamMini was replaced by CPUAdam") as caught:
            accelerated(context, offload_config(), client)
    finally:
        adam.DeepSpeedCPUAdam = upstream
    for remedy in ('"zero_force_ds_cpu_optimizer": false', '"optimizer": {"type": "BlockwiseAdamMini"', "DummyOptim"):
        assert remedy in str(caught.value)
    forget_groups()


def accelerate_keeps_a_client_optimizer(context: RankContext) -> None:
    """Either way that the error recommends trains what DeepSpeed alone would from the JSON, bit for bit."""
    from accelerate.utils import DummyOptim

    params = {"lr": LR, "betas": [0.9, 0.95], "eps": EPS, "weight_decay": 0.1, "lr_multipliers": MULTIPLIERS}
    config = engine_config("BlockwiseAdamMini", stage=2, zero={"offload_optimizer": {"device": "cpu"}}, params=params)
    with open_engine(config, start_model, feed=False) as run:
        expected = weights_after(run.engine, context)
    for ways in (
        (offload_config(zero_force_ds_cpu_optimizer=False), client),
        (config, lambda model: DummyOptim(model.parameters())),
    ):
        engine = accelerated(context, *ways)
        assert type(engine.basic_optimizer).__name__ == "BlockwiseAdamMini"
        ended = weights_after(engine, context)
        close(engine)
        assert {n: torch.equal(ended[n], expected[n]) for n in expected} == dict.fromkeys(expected, True)


def weights_after(engine: Any, context: RankContext, steps: int = 3) -> dict[str, Tensor]:
    """Full weights after some steps, each rank on its own samples; they have moved."""
    start = weights_of(engine)
    data = Tokens()
    for step in range(steps):
        batch = data[step * context.world_size + context.rank]
        engine.backward(engine(**{key: value[None] for key, value in batch.items()}).loss)
        engine.step()
    ended = weights_of(engine)
    assert not any(torch.equal(start[name], weight) for name, weight in ended.items())
    return ended


# ------------------------------------------------------------------------------------ torch.compile


def compiled_engines(context: RankContext, optimizer: str) -> None:
    """A model compiled before `initialize`, and an engine compiled after it: names change, updates do not.

    With the "eager" backend the operations are the same ones, so the bits are too.
    """
    config = engine_config(optimizer, stage=2, params={"lr": LR, "eps": EPS, "lr_multipliers": MULTIPLIERS})
    with open_engine(config, start_model, feed=False) as run:
        expected = weights_after(run.engine, context)
    with open_engine(config, lambda: torch.compile(start_model(), backend="eager"), feed=False) as run:
        found = {name.removeprefix("_orig_mod."): w for name, w in weights_after(run.engine, context).items()}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with open_engine(config, start_model, feed=False) as run:
        run.engine.compile(backend="eager")
        found = weights_after(run.engine, context)
    assert {name: torch.equal(found[name], expected[name]) for name in expected} == dict.fromkeys(expected, True)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Classes]]] = {
    "whole": (start_model, lambda: hf_llama_classes(**SIZES)),
    "lora": (lora_model, lora_classes),
}
_SCHEDULE = {"shape": "wsd", "decay_shape": "1-sqrt", "decay_num_steps": 3, "min_lr": 1e-4}
_FILLED = {"warmup_num_steps": "auto", "total_num_steps": "auto"}
MORE: dict[str, dict[str, Any]] = {
    "autotp": {"tensor_parallel": {"autotp_size": 2}},
    "schedule": {"scheduler": {"type": "BlockwiseLR", "params": {**_SCHEDULE, **_FILLED}}},
}
_FUNCTIONS: tuple[tuple[Callable[..., None], tuple[tuple[str, ...], ...]], ...] = (
    (trainer_against_plain_loop, tuple(product(ALL_NAMES, MODELS))),
    (trainer_resumes_bitwise, (*product(ALL_NAMES, ("whole",)), ("BlockwiseAdamMini", "lora"))),
    (trainer_resumes_bitwise, (("BlockwiseAdamMini", "whole", "converted"), ("BlockwiseAdamW", "schedule"))),
    (accelerate_replaces_a_client_optimizer, ((),)),
    (accelerate_keeps_a_client_optimizer, ((),)),
    (compiled_engines, tuple((name,) for name in ALL_NAMES)),
    # last: DeepSpeed remembers tensor parallelism in its modules, and would check later engines' batches by it
    (trainer_resumes_bitwise, (("BlockwiseAdamMini", "autotp"),)),
)
CASES = {"-".join((f.__name__, *arguments)): (f, arguments) for f, variants in _FUNCTIONS for arguments in variants}


def run_case(context: RankContext, name: str) -> None:
    """One case on every rank, with DeepSpeed prepared for the CPU."""
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers

    function, arguments = CASES[name]
    function(context, *arguments)
