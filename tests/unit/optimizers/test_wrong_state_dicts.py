# SPDX-License-Identifier: Apache-2.0
"""State dicts that do not fit although every shape does: taken in, they would train wrongly and say nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ds_blockwise import BlockwiseAdamMini, BlockwiseAdamW, tag_parameters
from ds_blockwise.optimizers.registry import OPTIMIZERS

NAMES = ("one", "two", "three")
BOTH = pytest.mark.parametrize("cls", OPTIMIZERS.values())
Change = Callable[[dict[str, Any]], object]


def build(cls: Any, names: tuple[str, ...] = NAMES, prefix: str = "", **settings: Any) -> tuple[nn.Module, Any]:
    """Three matrices of one shape, given to the optimizer in the order of ``names``."""
    layers: nn.Module = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in NAMES})
    model = nn.ModuleDict({prefix: layers}) if prefix else layers
    tag_parameters(model, rules=[{"match": ".", "role": "ffn"}])
    return layers, cls([layers[name].weight for name in names], lr=1e-2, **settings)


def trained(cls: Any, **settings: Any) -> dict[str, Any]:
    """A state dict in which each matrix has moments of its own."""
    layers, optimizer = build(cls, **settings)
    for step, scale in enumerate((1.0, 2.0)):
        for index, name in enumerate(NAMES):
            layers[name].weight.grad = torch.full((4, 4), scale * (index + 1 + step))
        optimizer.step()
    return optimizer.state_dict()


def refused(cls: Any, saved: dict[str, Any], match: str, names: tuple[str, ...] = NAMES) -> None:
    _, optimizer = build(cls, names)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved)
    assert not optimizer.state


@pytest.mark.parametrize("form", ["expanded", "compact"])
@BOTH
def test_parameters_in_another_order_are_refused(cls: Any, form: str) -> None:
    """States are found by their place: two matrices of one shape exchanged their moments."""
    saved = trained(cls, checkpoint_format=form)
    match = r"has the state of 'two.weight' for tensor 1, but this optimizer has it in tensor 0"
    refused(cls, saved, match, ("two", "one", "three"))


@BOTH
def test_moments_of_a_transposed_weight_are_refused(cls: Any) -> None:
    """As many elements, each of another weight."""
    model = nn.ModuleDict({"one": nn.Linear(3, 5, bias=False)})
    tag_parameters(model, rules=[{"match": ".", "role": "ffn"}])
    optimizer = cls(model.parameters())
    wrong = {"exp_avg": torch.zeros(3, 5), "exp_avg_sq": torch.zeros(3, 5), "step": 1}
    saved = {"state": {0: wrong}, "param_groups": [{"params": [0]}]}
    with pytest.raises(ValueError, match=r"state 'exp_avg' has the shape \(3, 5\) but its parameter \(5, 3\)"):
        optimizer.load_state_dict(saved)
    flat = {"exp_avg": torch.arange(15.0), "exp_avg_sq": torch.ones(15), "step": 1}
    optimizer.load_state_dict(saved | {"state": {0: flat}})
    assert torch.equal(optimizer.state[model["one"].weight]["exp_avg"], torch.arange(15.0).view(5, 3))


@BOTH
def test_parameters_of_a_wrapped_model_load_by_their_place(cls: Any) -> None:
    """A wrapper changes every name, and nothing else."""
    saved = trained(cls)
    layers, optimizer = build(cls, prefix="policy")
    optimizer.load_state_dict(saved)
    for index, name in enumerate(NAMES):
        assert torch.equal(optimizer.state[layers[name].weight]["exp_avg"], saved["state"][index]["exp_avg"])


def rename_numbers(state_dict: dict[str, Any]) -> None:
    state_dict["state"] = {str(number): state for number, state in state_dict["state"].items()}


def add_a_state(state_dict: dict[str, Any]) -> None:
    state_dict["state"][7] = state_dict["state"][0]


def give_a_number_twice(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["params"] = [0, 1, 1]


NUMBERS: dict[Change, str] = {
    rename_numbers: r"state\['0'\] belongs to no tensor of param_groups, whose numbers are 0, 1, 2",
    add_a_state: r"state\[7\] belongs to no tensor of param_groups",
    give_a_number_twice: r"param_groups has a number twice \(0, 1, 1\)",
}


@pytest.mark.parametrize("change", NUMBERS)
@BOTH
def test_states_that_belong_to_no_tensor_are_refused(cls: Any, change: Change) -> None:
    """Numbers that became text on the way (JSON) were passed over: the moments began at zero."""
    saved = trained(cls)
    change(saved)
    refused(cls, saved, NUMBERS[change])


@pytest.mark.parametrize(
    "step", [-5, 2.5, float("nan"), True, "3", [1], 1e300, 10**400, 2**62, torch.zeros(2)], ids=str
)
@pytest.mark.parametrize("where", ["state", "group"])
def test_step_counts_that_cannot_be_are_refused(step: Any, where: str) -> None:
    """-5 in a group, where FusedAdam keeps its step count, made every weight NaN."""
    saved = trained(BlockwiseAdamW)
    for state in saved["state"].values():
        state.pop("step")
        if where == "state":
            state["step"] = step
    if where == "group":
        saved["param_groups"][0]["step"] = step
    place = r"state\[0\]\['step'\]" if where == "state" else r"param_groups\[0\]\['step'\]"
    refused(BlockwiseAdamW, saved, rf"{place} (must be a (whole|finite) number|has 2 elements)")


# ------------------------------------------------------------------------------ published Adam-mini


def published() -> dict[str, Any]:
    """A state dict as the published package writes it: one named parameter in each group."""
    state = {i: {"m": torch.full((4, 4), i + 1.0), "vmean": torch.ones(4, 1), "step": 3} for i in range(3)}
    return {"state": state, "param_groups": [{"name": f"{n}.weight", "params": [i]} for i, n in enumerate(NAMES)]}


def two_in_a_group(state_dict: dict[str, Any]) -> None:
    first, second, _ = state_dict["param_groups"]
    first["params"] += second["params"]
    state_dict["param_groups"].remove(second)


def one_name_twice(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][2]["name"] = "one.weight"


def without(key: str) -> Change:
    def change(state_dict: dict[str, Any]) -> None:
        del state_dict["state"][0][key]

    change.__name__ = f"without_{key}"
    return change


PUBLISHED: dict[Change, str] = {
    two_in_a_group: r"param_groups\[0\] \('one.weight'\) of the Adam-mini state dict has 2 parameters",
    one_name_twice: r"param_groups\[2\] \('one.weight'\) of the Adam-mini state dict has the name of another one",
    without("step"): "Adam-mini state of 'one.weight' must have step, m and v or vmean, it has m, vmean",
    without("m"): "Adam-mini state of 'one.weight' must have step, m and v or vmean, it has vmean, step",
    without("vmean"): "Adam-mini state of 'one.weight' must have step, m and v or vmean, it has m, step",
}


def test_published_state_as_these_tests_make_it_loads() -> None:
    layers, optimizer = build(BlockwiseAdamMini, ("two", "three", "one"))
    optimizer.load_state_dict(published())
    assert [float(optimizer.state[layers[name].weight]["exp_avg"][0, 0]) for name in NAMES] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("change", PUBLISHED, ids=lambda change: change.__name__)
def test_published_states_that_are_lost_are_refused(change: Change) -> None:
    """The second parameter of a group, and the first of two with one name, began at zero."""
    saved = published()
    change(saved)
    refused(BlockwiseAdamMini, saved, PUBLISHED[change])
