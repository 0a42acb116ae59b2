# SPDX-License-Identifier: Apache-2.0
"""State dicts that other optimizers wrote, brought into the form of ours: AdamW in its variants, published Adam-mini.

AdamW variants read: ``torch.optim.AdamW``, DeepSpeed's ``FusedAdam`` (which may keep its step count in the group) and
``DeepSpeedCPUAdam``. Adam-mini: version 1.1.1 of the published package, whose state is ``m`` with ``v`` (per element)
or ``vmean`` (one value per run of consecutive elements).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ds_blockwise.kernels.param_groups import ParamGroup, StateDict

logger = logging.getLogger(__name__)

# Keys of AdamW's groups that say how it computes, not what; they mean nothing here.
_ADAMW_SWITCHES = (
    "amsgrad",
    "bias_correction",
    "capturable",
    "decoupled_weight_decay",
    "differentiable",
    "foreach",
    "fused",
    "maximize",
    "step",
)
# What DeepSpeed's AdamW kernels look up in a loaded group without a default.
FOR_ADAMW = {"bias_correction": True}


def group_to_load(saved: ParamGroup, own: ParamGroup, index: int) -> ParamGroup:
    """A saved param group without what only AdamW's kernels understand.

    Args:
        saved: the group in the state dict.
        own: the optimizer's group, for keys that the saved one lacks.
        index: of the group, for messages.

    Raises:
        ValueError: the state belongs to an optimizer that maximized.
    """
    if saved.get("maximize"):
        raise ValueError(
            f"param_groups[{index}] of the state dict has maximize=True: its moments are of negated gradients, which "
            f"this optimizer does not follow. Negate the loss and start with fresh optimizer state."
        )
    if saved.get("amsgrad"):
        logger.warning("param_groups[%d] used amsgrad: its running maximum (max_exp_avg_sq) is not loaded.", index)
    kept = {key: _number(value) for key, value in saved.items() if key not in _ADAMW_SWITCHES}
    return {**{key: value for key, value in own.items() if key != "params"}, **kept}


def _number(value: object) -> object:
    """AdamW may keep its learning rate in a tensor, so that a captured graph sees it change."""
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def step_of(saved: Mapping[str, Any], group: ParamGroup) -> int:
    """Number of updates that a tensor's saved state has seen.

    Raises:
        ValueError: neither the state nor its group says.
    """
    step = saved.get("step", group.get("step"))
    if step is None:
        raise ValueError(
            'the state dict has neither state["step"] nor param_groups["step"], so bias correction cannot go on. It is '
            "not the state of AdamW or Adam-mini."
        )
    return int(step)


def is_published_adam_mini(state_dict: StateDict) -> bool:
    """Whether the published Adam-mini package wrote a state dict."""
    return any("m" in state and ("vmean" in state or "v" in state) for state in state_dict["state"].values())


def from_published_adam_mini(
    state_dict: StateDict,
    own_groups: Sequence[ParamGroup],
    names: Sequence[str | None],
) -> StateDict:
    """A published Adam-mini state dict in AdamW's form, in the groups of ours.

    Its one-parameter groups are found by their lower-cased names. Betas, eps and weight decay stay our groups' own.

    Args:
        state_dict: of ``adam_mini.Adam_mini``.
        own_groups: our param groups.
        names: our parameters' names in the order of the groups; None where unknown.

    Returns:
        ``state`` with ``step exp_avg exp_avg_sq`` (flat, one second moment per element) and ``param_groups``.

    Raises:
        ValueError: it holds a parameter that ours lacks, two of one name, a group of several parameters, or a state
            that does not fit its parameter.
    """
    states = _by_name(state_dict)
    wanted = [str(name).lower() for name in names]
    unknown, missing = sorted(set(states) - set(wanted)), sorted(set(wanted) - set(states))
    if unknown:
        raise ValueError(
            f"the Adam-mini state dict holds {len(unknown)} parameters that this optimizer does not step, such as "
            f"{unknown[0]!r}; it steps {wanted[:3]} and others. Tag the model under the names that it was trained with."
        )
    if missing:
        logger.warning("the Adam-mini state dict has no state for %s; it starts from zero.", ", ".join(missing[:5]))
    groups, at = [], 0
    for group in own_groups:
        numbers = list(range(at, at + len(group["params"])))
        groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": numbers})
        at += len(numbers)
    state = {index: _as_adamw(states[name], name) for index, name in enumerate(wanted) if name in states}
    return {"state": state, "param_groups": groups}


def _by_name(state_dict: StateDict) -> dict[str, Mapping[str, Any]]:
    """The states of a published Adam-mini, each in a group of its own that has the parameter's name."""
    states: dict[str, Mapping[str, Any]] = {}
    for index, group in enumerate(state_dict["param_groups"]):
        held = [state for number in group["params"] if (state := state_dict["state"].get(number))]
        name = str(group.get("name"))
        if held and (len(group["params"]) > 1 or name in states):
            what = f"{len(group['params'])} parameters" if len(group["params"]) > 1 else "the name of another one"
            raise ValueError(
                f"param_groups[{index}] ({name!r}) of the Adam-mini state dict has {what}: the published package keeps "
                f"one named parameter in each group, and only by that name its state is found."
            )
        if held:
            states[name] = held[0]
    return states


def _as_adamw(saved: Mapping[str, Any], name: str) -> dict[str, Any]:
    if "m" not in saved or "step" not in saved or not saved.keys() & {"v", "vmean"}:
        raise ValueError(f"Adam-mini state of {name!r} must have step, m and v or vmean, it has {', '.join(saved)}")
    exp_avg = saved["m"].reshape(-1)
    second = (saved["v"] if "v" in saved else saved["vmean"]).reshape(-1)
    if second.numel() == 0 or exp_avg.numel() % second.numel():
        raise ValueError(
            f"Adam-mini state of {name!r}: {second.numel()} second moments do not divide {exp_avg.numel()} elements"
        )
    return {
        "step": int(saved["step"]),
        "exp_avg": exp_avg,
        "exp_avg_sq": torch.repeat_interleave(second, exp_avg.numel() // second.numel()),
    }
