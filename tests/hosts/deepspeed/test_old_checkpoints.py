# SPDX-License-Identifier: Apache-2.0
"""A ZeRO-2 checkpoint of an earlier version on a real engine of two ranks, as it was saved and in its portable form."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from tests.data.checkpoints.format_1 import write as old
from tests.helpers import ROOT
from tests.helpers.deepspeed.engines import masters, open_engine, prepare_deepspeed
from tests.helpers.distributed import RankContext, run_cases
from tests.helpers.oracle import Hyper, Oracle, assert_same_update
from tests.helpers.tables.oracle_names import hf_llama_classes

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None or find_spec("transformers") is None, reason="needs deepspeed and transformers"
)

FOLDER = ROOT / "tests/data/checkpoints/format_1"


def goes_on(context: RankContext, form: str) -> None:
    """Every tensor is what it was in memory; one further step is the oracle's."""
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers

    with open_engine(old.engine_json("BlockwiseAdamMini"), old.build, feed=False) as run:
        _, client_state = run.engine.load_checkpoint(str(FOLDER / form))
        assert client_state["note"] == "kept"
        assert run.engine.global_steps == old.STEPS

        loaded = old.partition_of(run.engine)
        for kind, value in load_file(FOLDER / "deepspeed" / f"memory_rank_{context.rank}.safetensors").items():
            assert torch.equal(loaded[kind], value), kind

        before = masters(run)
        old.feed(run.engine, old.STEPS)
        model = old.build()
        hyper = Hyper(old.SETTINGS["lr"], old.SETTINGS["betas"], old.SETTINGS["eps"], old.SETTINGS["weight_decay"])
        oracle = Oracle(
            dict(model.named_parameters()),
            hf_llama_classes(layers=1, **old.SIZES),
            True,
            hyper,
            lr_multipliers=old.LR_MULTIPLIERS,
        )
        for step in range(old.STEPS):
            oracle.step(old.gradients(model, step))
        expected_before = oracle.weights()
        oracle.step(old.gradients(model, old.STEPS))
        assert_same_update(
            (before, masters(run)), (expected_before, oracle.weights()), old.SETTINGS["lr"], weight_roundings=2
        )


def test_an_old_checkpoint_goes_on_where_it_was() -> None:
    results = run_cases(goes_on, old.WORLD_SIZE, {form: form for form in ("deepspeed", "portable")})
    failures = [f"{form}\n{text}" for form, text in results.items() if text is not None]
    assert not failures, "\n".join(failures)
