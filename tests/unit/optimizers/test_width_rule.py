# SPDX-License-Identifier: Apache-2.0
"""The width rule in a step: updates over learning rate against the oracle, whose factors are written by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ds_blockwise import tag_parameters
from ds_blockwise.checkpoint.record import settings_of
from ds_blockwise.checkpoint.record_changes import differences
from tests.helpers import models
from tests.helpers.deepspeed.engine_cases import MODELS
from tests.helpers.models import GradientPlan
from tests.helpers.oracle import Hyper, Oracle, assert_same_update
from tests.helpers.tables.oracle_names import MULTIPLIERS
from tests.unit.optimizers.test_oracle import HYPER, OURS

BASE = 60
WIDTHS = {"llama": 12, "qwen3": 15, "gpt2": 10}  # of the residual stream, from the configs in tests/helpers/models.py
PLAN = GradientPlan(1)
LR = 0.014


def _weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("rule", ["mup", "sqrt"])
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("family", WIDTHS)
def test_updates_move_with_the_width(family, kind, rule):
    """Matrices by base / width, embeddings by its root or not at all, vectors never; inside fused weights too."""
    down = BASE / WIDTHS[family]
    factors = {**dict.fromkeys(MULTIPLIERS, down), "norm": 1.0, "emb": math.sqrt(down) if rule == "sqrt" else 1.0}
    moved = {block_type: MULTIPLIERS[block_type] * factor for block_type, factor in factors.items()}
    model = models.set_small_weights(MODELS[family][0]())
    tag_parameters(model)
    start, classes, mini = _weights(model), MODELS[family][1], kind == "mini"
    for_matrices = Oracle(start, classes, mini, Hyper(LR, **HYPER), lr_multipliers=moved)
    for_vectors = Oracle(start, classes, mini, Hyper(LR, **HYPER))
    optimizer = OURS[kind](model.parameters(), lr=LR, **HYPER, transfer={"base_width": BASE, "rule": rule})
    for step in range(3):
        gradients = {n: PLAN.mean(n, tuple(p.shape), step) for n, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].to(parameter)
        before = _weights(model)
        was = {**for_matrices.weights()}
        vectors = {name for name, p in model.named_parameters() if p.ndim == 1}
        was |= {name: for_vectors.weights()[name] for name in vectors}
        optimizer.step()
        for_matrices.step({n: g for n, g in gradients.items() if n not in vectors})
        for_vectors.step({n: g for n, g in gradients.items() if n in vectors})
        now = {**for_matrices.weights(), **{name: for_vectors.weights()[name] for name in vectors}}
        assert_same_update((before, _weights(model)), (was, now), LR, tolerance=1e-6, what=f"step {step}")


@pytest.mark.parametrize("kind", OURS)
def test_multipliers_that_are_set_later_are_moved_too(kind):
    """`set_lr_multipliers` speaks of the base width, as the settings do."""
    updates = []
    for multiplier, transfer in ((3.0, {"base_width": 24}), (6.0, None)):
        model = models.set_small_weights(MODELS["llama"][0]())
        tag_parameters(model)
        optimizer = OURS[kind](model.parameters(), lr=LR, **HYPER, transfer=transfer)
        optimizer.set_lr_multipliers({"ffn": multiplier})
        weight = model.model.layers[0].mlp.down_proj.weight
        before = weight.detach().clone()
        weight.grad = PLAN.mean("down", tuple(weight.shape), 0)
        optimizer.step()
        updates.append((weight.detach() - before) / LR)
    assert updates[0].abs().max() > 1 and torch.equal(*updates)


@pytest.mark.parametrize("given_to_tags", [False, True])
def test_a_checkpoint_says_the_rule_and_a_resume_without_it_is_reported(given_to_tags):
    """The record has the multipliers of the base width and the rule; rates differ, so a resume says so."""
    transfer = {"base_width": BASE, "rule": "sqrt"}
    model = MODELS["llama"][0]()
    tag_parameters(model, transfer=transfer if given_to_tags else None)
    optimizer = OURS["mini"](model.parameters(), transfer=None if given_to_tags else transfer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    saved = optimizer.state_dict()["ds_blockwise"]["settings"]
    assert saved["transfer"] == transfer and saved["lr_multipliers"] == MULTIPLIERS
    plain = MODELS["llama"][0]()
    tag_parameters(plain)
    own = settings_of(OURS["mini"](plain.parameters()))
    assert [line for line in differences(saved, own) if line.startswith("transfer")] == [
        f"transfer was {transfer}, is not set"
    ]
