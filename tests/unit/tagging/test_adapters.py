# SPDX-License-Identifier: Apache-2.0
"""What PEFT trains: each parameter's role against tables written by hand, and its updates against the oracle."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import ds_blockwise
from ds_blockwise import tag_parameters
from tests.helpers.models import GradientPlan, small_weight
from tests.helpers.optimizers import SHORT_NAMES
from tests.helpers.oracle import Hyper, Oracle, assert_same_update
from tests.helpers.tables.adapters import ADAPTERS, adapted_model
from tests.helpers.tables.spans import classes_of
from tests.unit.tagging.test_families import tags_of

pytest.importorskip("peft", reason="the adapters are PEFT's")
pytest.importorskip("transformers", reason="the adapted models are transformers' own")

EVERY_KIND = pytest.mark.parametrize("kind", ADAPTERS)
LRS = (0.014, 0.022, 0.018)
PLAN = GradientPlan(1)
HYPER = {"betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def model_of(kind: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on a LLaMA that was never trained
        return adapted_model(kind)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@EVERY_KIND
def test_every_trained_parameter_is_what_the_adapter_makes_of_it(kind: str) -> None:
    """No rule is needed, and nothing that scales a layer trains at the rate of its matrices."""
    assert tags_of(model_of(kind)) == ADAPTERS[kind][2]


@pytest.mark.parametrize("optimizer", SHORT_NAMES)
@EVERY_KIND
def test_updates_of_an_adapter(kind: str, optimizer: str) -> None:
    """Three updates on fed gradients; the blocks and multipliers are those of the table."""
    model = model_of(kind)
    tag_parameters(model)
    parameters = trained(model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(small_weight(name, parameter.shape))
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    classes = classes_of(ADAPTERS[kind][2], shapes, [name for name in shapes if "lora_embedding_A" in name])
    hyper = Hyper(**HYPER)
    oracle = Oracle({n: p.detach() for n, p in parameters.items()}, classes, optimizer == "BlockwiseAdamMini", hyper)
    ours = getattr(ds_blockwise, optimizer)(parameters.values(), **HYPER)
    for step, lr in enumerate(LRS):
        hyper.lr = ours.param_groups[0]["lr"] = lr
        gradients = {name: PLAN.mean(name, shape, step) for name, shape in shapes.items()}
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
        before, was = {name: p.detach().clone() for name, p in parameters.items()}, oracle.weights()
        ours.step()
        oracle.step(gradients)
        after = {name: p.detach().clone() for name, p in parameters.items()}
        assert_same_update((before, after), (was, oracle.weights()), lr, what=f"step {step}")


def test_a_token_table_of_lora_is_cut_by_tokens() -> None:
    """The embedding's A is [rank, tokens]: rows as blocks would share one moment between all tokens."""
    model = model_of("LoRA on the embedding and the output")
    tag_parameters(model)
    found = {name.split(".")[-2]: p.block_spec for name, p in trained(model).items() if "embedding" in name}
    assert (found["lora_embedding_A"].axis, found["lora_embedding_B"].axis) == (1, 0)


@pytest.mark.parametrize(("config", "leaf"), [("HRAConfig", "hra_u"), ("FourierFTConfig", "fourierft_spectrum")])
def test_an_adapter_that_nobody_read_is_refused(config: str, leaf: str) -> None:
    """Its tensors are no factors of the matrix, and its names say nothing of what they multiply."""
    import peft

    from tests.helpers.tables.families import build

    settings = {"r": 4} if config == "HRAConfig" else {"n_frequency": 10}
    model = peft.get_peft_model(build("Llama"), getattr(peft, config)(target_modules=["q_proj"], **settings))
    with pytest.raises(ValueError, match=rf"q_proj\.{leaf}\.default"):
        tag_parameters(model)
