# SPDX-License-Identifier: Apache-2.0
"""Checkpoints written by an earlier version: the state comes back exactly, and the next step follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ds_blockwise
from ds_blockwise.checkpoint.portable import Portable
from ds_blockwise.hosts.deepspeed.checkpoint.inspect import convert_checkpoint, describe_checkpoint
from tests.data.checkpoints.format_1 import write as old
from tests.helpers import ROOT
from tests.helpers.oracle import Hyper, Oracle, assert_same_update
from tests.helpers.tables.oracle_names import hf_llama_classes

pytest.importorskip("transformers", reason="the model of these checkpoints needs the extra 'hf'")

FOLDER = ROOT / "tests/data/checkpoints/format_1"
CLASSES = hf_llama_classes(layers=1, **old.SIZES)


def oracle_after_the_old_run(mini: bool) -> Oracle:
    """The independent definition after as many steps as the checkpoints have."""
    model = old.build()
    hyper = Hyper(old.SETTINGS["lr"], old.SETTINGS["betas"], old.SETTINGS["eps"], old.SETTINGS["weight_decay"])
    oracle = Oracle(dict(model.named_parameters()), CLASSES, mini, hyper, lr_multipliers=old.LR_MULTIPLIERS)
    for step in range(old.STEPS):
        oracle.step(old.gradients(model, step))
    return oracle


@pytest.mark.parametrize("name", old.OPTIMIZERS)
@pytest.mark.parametrize("form", old.FORMATS)
def test_an_old_state_dict_comes_back_and_the_next_step_is_the_oracles(name: str, form: str) -> None:
    saved = torch.load(FOLDER / "plain" / f"{name}_{form}.pt", weights_only=True)
    in_memory = load_file(FOLDER / "plain" / f"{name}_memory.safetensors")
    model = old.build()
    model.load_state_dict(saved["model"])
    ds_blockwise.tag_parameters(model)
    optimizer = getattr(ds_blockwise, name)(model.parameters(), **old.SETTINGS)
    optimizer.load_state_dict(saved["optimizer"])

    loaded = old.state_of(model, optimizer)
    assert loaded.keys() == in_memory.keys()
    for key, value in in_memory.items():
        # read from an expanded file, second moments are one per element; every block is a run of rows of one size
        each = loaded[key].numel() // value.numel() if form == "expanded" else 1
        assert torch.equal(loaded[key], value.repeat_interleave(each)), key
    assert {int(optimizer.state[p]["step"]) for p in model.parameters()} == {old.STEPS}

    oracle = oracle_after_the_old_run(name == "BlockwiseAdamMini")
    before, expected_before = {n: p.detach().clone() for n, p in model.named_parameters()}, oracle.weights()
    old.train(model, optimizer, [old.STEPS])
    oracle.step(old.gradients(model, old.STEPS))
    after = {n: p.detach() for n, p in model.named_parameters()}
    assert_same_update((before, after), (expected_before, oracle.weights()), old.SETTINGS["lr"], weight_roundings=2)


def test_an_old_portable_checkpoint_holds_the_old_state() -> None:
    portable = Portable(FOLDER / "portable" / old.TAG)
    assert portable.problems() == []
    in_memory = load_file(FOLDER / "plain" / "BlockwiseAdamMini_memory.safetensors")
    for key, value in in_memory.items():
        kind, name = key.split("/")
        assert torch.equal(portable.tensor(kind, name).reshape(-1), value), key
    assert {facts["step"] for facts in portable.parameters.values()} == {old.STEPS}


def test_an_old_deepspeed_checkpoint_converts_to_the_old_portable_one(tmp_path: Path) -> None:
    """Offline tools read the old record: a key that was renamed would show here first."""
    pytest.importorskip("deepspeed", reason="DeepSpeed's files need the extra 'deepspeed'")
    folder, notes = convert_checkpoint(FOLDER / "deepspeed", tmp_path)
    assert not notes
    new, before = Portable(folder), Portable(FOLDER / "portable" / old.TAG)
    assert new.record == before.record and new.parameters == before.parameters and new.origin == before.origin
    for kind, names in before.tensors.items():
        assert new.tensors[kind].keys() == names.keys()
        for name in names:
            assert torch.equal(new.tensor(kind, name), before.tensor(kind, name)), (kind, name)


@pytest.mark.parametrize("kind", ["deepspeed", "portable"])
def test_old_checkpoints_are_described(kind: str) -> None:
    if kind == "deepspeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed's files need the extra 'deepspeed'")
    found = describe_checkpoint(FOLDER / kind)
    assert (found["kind"], found["problems"], found["notes"]) == (kind, [], [])
    assert (found["optimizer"], found["global_steps"]) == ("BlockwiseAdamMini", old.STEPS)
    assert (found["parameters"], found["elements"]) == (12, 632)
