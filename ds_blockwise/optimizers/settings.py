# SPDX-License-Identifier: Apache-2.0
"""Checks of the optimizers' own hyper-parameters; each error names the key, the value and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from ds_blockwise.kernels.param_groups import progress_of
from ds_blockwise.values import number, one_of, suggest, unknown

MomentumDtype = Literal["fp32", "bf16"]
MOMENTUM_DTYPES: tuple[MomentumDtype, ...] = ("fp32", "bf16")
CheckpointFormat = Literal["expanded", "compact"]
CHECKPOINT_FORMATS: tuple[CheckpointFormat, ...] = ("expanded", "compact")
BACKENDS = ("auto", "cpp", "triton", "reference")
_FORMER_BACKENDS = ("apex", "te")

OPTIMIZER_KEYS = (
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "lr_multipliers",
    "betas_by_type",
    "weight_decay_multipliers",
    "cautious_weight_decay",
    "granularity",
    "rules",
    "transfer",
    "momentum_dtype",
    "backend",
    "checkpoint_format",
    "telemetry",
    "fused_step",
)

# those of `BlockSettings`
BLOCK_KEYS = ("lr_multipliers", "weight_decay_multipliers", "betas_by_type", "granularity", "rules", "transfer")

# Keys that DeepSpeed's own AdamW takes in the JSON; accepted at the one value that says what we do anyway, so that only
# "type" has to change in an existing file.
_ADAMW_KEYS: dict[str, tuple[bool, ...]] = {
    "adam_w_mode": (True,),
    "bias_correction": (True,),
    "amsgrad": (False,),
    "torch_adam": (True, False),
}


def check_group(group: Mapping[str, object], where: str) -> None:
    """Check the hyper-parameters of one param group.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value outside its range.
    """
    number(f"{where}lr", group["lr"], low=0.0)
    number(f"{where}eps", group["eps"], low=0.0)
    number(f"{where}weight_decay", group["weight_decay"], low=0.0)
    betas = group["betas"]
    if isinstance(betas, str) or not isinstance(betas, Sequence) or len(betas) != 2:
        raise TypeError(f"{where}betas must be two numbers, got {betas!r}")
    for index, beta in enumerate(betas):
        number(f"{where}betas[{index}]", beta, low=0.0, below=1.0)


def check_switch(name: str, value: object) -> bool:
    """Return ``value`` if it is true or false.

    Args:
        name: of the setting.
        value: of it.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")
    return value


def check_fused_step(optimizer: str, value: object, *, is_supported: bool) -> bool:
    """Return ``value`` if it is false, or true for an optimizer that supports it.

    Args:
        optimizer: class name.
        value: of the setting.
        is_supported: whether the optimizer's kernels take gradients as a host accumulates them.

    Raises:
        TypeError: it is neither true nor false.
        ValueError: it is true and not supported.
    """
    if check_switch("fused_step", value) and not is_supported:
        raise ValueError(
            f"{optimizer} does not support fused_step=True: only the kernels of BlockwiseAdamW and BlockwiseAdamMini "
            f'take gradients before they are cast and clipped. Write "fused_step": false, or leave it out.'
        )
    return bool(value)


def check_progress(groups: Sequence[Mapping[str, object]], optimizer: str) -> None:
    """Refuse a step with multipliers that move, where no schedule says how far.

    Args:
        groups: the param groups.
        optimizer: its class name.

    Raises:
        ValueError: a group whose ``lr`` is not from a schedule of ours.
    """
    for index, group in enumerate(groups):
        if progress_of(group) is None:
            raise ValueError(
                f"{optimizer} has a multiplier with a start and an end, which moves over the decay of a schedule, but "
                f"the lr {group['lr']!r} of param group {index} is from no schedule of ds_blockwise. Write "
                f'"scheduler": {{"type": "BlockwiseCosineLR", "params": {{"total_num_steps": ...}}}} in the JSON, or '
                f"schedule = ds_blockwise.BlockwiseCosineLR(optimizer, total_num_steps=...) in Python and "
                f"schedule.step() after every step; or give plain numbers in lr_multipliers."
            )


def check_momentum_dtype(value: object) -> MomentumDtype:
    """Return ``value`` if it is a known dtype of ``exp_avg``.

    Raises:
        ValueError: unknown dtype.
    """
    return one_of("momentum_dtype", value, MOMENTUM_DTYPES)


def check_checkpoint_format(value: object) -> CheckpointFormat:
    """Return ``value`` if it is a known form of second moments in checkpoints.

    Raises:
        ValueError: unknown form.
    """
    return one_of("checkpoint_format", value, CHECKPOINT_FORMATS)


def check_backend(value: object) -> str:
    """Return ``value`` if it names a kernel backend; whether it can be had is another question.

    Raises:
        ValueError: unknown backend.
    """
    if isinstance(value, str) and value in BACKENDS:
        return value
    if value in _FORMER_BACKENDS:
        raise ValueError(
            f'backend {value!r} is not offered any more. Write "backend": "auto", which takes Triton on a GPU. '
            f"Allowed: {', '.join(BACKENDS)}"
        )
    raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {value!r}{suggest(value, BACKENDS)}")


def check_extra_keys(optimizer: str, extra: Mapping[str, object], own: Sequence[str] = ()) -> None:
    """Refuse constructor arguments that we do not know, with the nearest one that we do.

    Args:
        optimizer: class name.
        extra: what is none of its arguments.
        own: the arguments that only this class has.

    Raises:
        ValueError: an unknown key, or a key of DeepSpeed's AdamW with a value that asks for something else.
    """
    for key, value in extra.items():
        if key in _ADAMW_KEYS:
            if value not in _ADAMW_KEYS[key]:
                raise ValueError(
                    f"{optimizer} got {key}={value!r}; it only supports {_ADAMW_KEYS[key][0]!r} (AdamW with decoupled "
                    f"weight decay and bias correction, without amsgrad). Remove the key."
                )
            continue
        raise ValueError(f"{optimizer} got an {unknown('key', key, (*OPTIMIZER_KEYS, *own))}")
