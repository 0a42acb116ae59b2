# SPDX-License-Identifier: Apache-2.0
"""Whether what a file gave as an optimizer's state can be one, whoever wrote it: its form, its kind and its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch

from ds_blockwise.checkpoint.record import PER_BLOCK_KEY, Recorded
from ds_blockwise.checkpoint.record_types import RunRecord
from ds_blockwise.checkpoint.typed_data import LARGEST_INTEGER, typed

# moments of AdamW and ours, and of the published Adam-mini
_MOMENTS = ("exp_avg", "exp_avg_sq", PER_BLOCK_KEY, "m", "v", "vmean")

SECOND_MOMENT = "exp_avg_sq"


class _Group(TypedDict):
    params: list[int]


class _StateDict(TypedDict):
    state: dict[str, dict[str, Any]]
    param_groups: list[_Group]


def check_state_dict(state_dict: object) -> Mapping[str, Any]:
    """The state dict itself.

    Raises:
        ValueError: it is none, with the place: ``state`` by number, each with plain tensors as moments and a number of
            steps, and ``param_groups`` with the numbers of their tensors, which are those of ``state``.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"the state of an optimizer must be a mapping, got a {type(state_dict).__name__}")
    state = state_dict.get("state")
    # numbers of tensors as strings, so that an error can name one
    named = {str(key): value for key, value in state.items()} if isinstance(state, Mapping) else state
    checked = typed({"state": named, "param_groups": state_dict.get("param_groups")}, _StateDict, "the state dict")
    for number, entries in checked["state"].items():
        for key, value in entries.items():
            where = f"state[{number}][{key!r}]"
            if key in _MOMENTS:
                typed(value, torch.Tensor, where)
                if not value.is_floating_point():
                    raise ValueError(f"{where} is {value.dtype}; moments are floating-point")
            elif key == "step":
                _check_step(value, where)
    for index, group in enumerate(state_dict["param_groups"]):
        if group.get("step") is not None:
            _check_step(group["step"], f"param_groups[{index}]['step']")
    _check_numbers(state_dict["state"], checked["param_groups"])
    return state_dict


def _check_numbers(state: Mapping[object, object], groups: Sequence[_Group]) -> None:
    """A state whose number no group has would be passed over, and its tensor start from zero."""
    numbers = [number for group in groups for number in group["params"]]
    known = set(numbers)
    if len(known) < len(numbers):
        raise ValueError(f"param_groups has a number twice ({_shown(sorted(numbers))}); each tensor has its own")
    unknown = [key for key in state if key not in known]
    if unknown:
        raise ValueError(
            f"state[{unknown[0]!r}] belongs to no tensor of param_groups, whose numbers are {_shown(numbers)}"
        )


def _shown(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:3])) + (", ..." if len(numbers) > 3 else "") or "none"


def _check_step(value: object, where: str) -> None:
    if isinstance(value, torch.Tensor):
        typed(value, torch.Tensor, where)
        if value.numel() != 1:
            raise ValueError(f"{where} has {value.numel()} elements; it must be one number")
        value = value.item()
    number = typed(value, float, where)
    if not 0 <= number < LARGEST_INTEGER or number != int(number):
        raise ValueError(f"{where} must be a whole number of 0 or more, got {number!r}")


def check_kind(optimizer: Recorded, record: RunRecord | None) -> str | None:
    """`check_second_moments` of a state with its record; None if another optimizer wrote it, which then is Adam's."""
    if record is None:
        return check_second_moments(optimizer, "another optimizer", "gradients")
    return check_second_moments(optimizer, record["optimizer"], record.get("second_moment_of", "gradients"))


def check_second_moments(optimizer: Recorded, wrote: str, saved: str) -> str | None:
    """Refuse second moments that mean something else than the optimizer's own, and cannot be replaced.

    An optimizer without second moments takes the first moments of any other. One whose second moments are of updates
    takes over those of gradients: they serve what it steps as Adam does, and its matrices' start anew. Not the other
    way round: one step count corrects both of Adam's moments, and there is none that is right for a first moment that
    is kept beside a second one that starts anew.

    Args:
        optimizer: one of ours, which is to go on with the state.
        wrote: class name of the optimizer that wrote the state, or other words for it.
        saved: what its second moments are of (`SecondMomentOf`).

    Returns:
        What starts anew, a sentence for the log; None if all goes on as it is.

    Raises:
        ValueError: the two do not fit.
    """
    own = optimizer.second_moment_of
    if own in ("nothing", saved):
        return None
    name = type(optimizer).__name__
    if (own, saved) == ("updates", "gradients"):
        return (
            f"the optimizer state was written by {wrote}: {name} takes its exp_avg over as momentum. The second "
            f"moments of the rows of matrices start anew, those of everything else go on."
        )
    kept = "no second moment" if saved == "nothing" else f"a second moment of {saved}"
    raise ValueError(
        f"the optimizer state was written by {wrote}, which keeps {kept}; {name} keeps one of {own}. Load weights only "
        f"(DeepSpeed: load_optimizer_states=False), and start with fresh optimizer state."
    )


def bad_values(kind: str, tensor: torch.Tensor) -> str | None:
    """What is wrong with the values of a tensor, in words that follow its name; None if nothing is.

    Args:
        kind: what it is: ``weights``, ``exp_avg``, ``exp_avg_sq``, ``frozen`` or ``buffers``. A buffer may hold
            infinities (masks do).
        tensor: its values, in any shape and dtype; what is not floating-point has no bad ones.
    """
    if not tensor.is_floating_point():
        return None
    if tensor.element_size() == 1:
        tensor = tensor.float()  # torch compares no 8-bit floats
    found = {"NaN": torch.isnan(tensor)}
    if kind != "buffers":
        found["infinity"] = torch.isinf(tensor)
    if kind == SECOND_MOMENT:
        found["values below zero"] = tensor < 0
    counted = {what: int(where.sum()) for what, where in found.items()}
    listed = [f"{what} in {count}" for what, count in counted.items() if count]
    return f"holds {' and '.join(listed)} of {tensor.numel()} elements" if listed else None
