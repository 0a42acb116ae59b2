# SPDX-License-Identifier: Apache-2.0
"""Sharpness of the model inside a DeepSpeed engine, between two steps of its training.

A forward and a backward pass go through the engine, then its wrapper's step hands the gradients to our optimizer, whose
only observer adds up their squares and holds the step back. Weights, optimizer states, schedule, counters, loss scale
and random states are afterwards what they were.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ds_blockwise.hosts.deepspeed.engine import Engine, sequence_parallel_size
from ds_blockwise.kernels.bindings import Binding, Work
from ds_blockwise.measure.predictions import Batch, Forward, Predictions, causal_lm, summed_loss
from ds_blockwise.measure.role_sums import RoleSums
from ds_blockwise.measure.sharpness import check_arguments, finish, labels_for
from ds_blockwise.measure.sharpness_report import SharpnessReport
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.parallel.agree import gather, place_in, raise_together, together

# what the wrappers' step() leaves behind besides weights and states
_LEFT_BEHIND = ("clip_grad", "overflow", "_global_grad_norm", "is_gradient_accumulation_boundary", "skipped_steps")
_SCALERS = ("loss_scaler", "loss_scale_config")  # their scale and counters move with every step


def probe_engine(
    engine: Engine,
    batches: Iterable[Batch],
    forward: Forward[Engine, Batch] = causal_lm,
    *,
    estimator: str = "gauss_newton",
    draws: int = 1,
    seed: int = 0,
    step: int | None = None,
) -> SharpnessReport:
    """Measure the average sharpness of every block of an engine's model; all ranks must call it.

    The training that follows is bit for bit what it would have been. Costs a forward and a backward pass, and the
    step's communication, for each batch and draw.

    Args:
        engine: a ``DeepSpeedEngine`` with one of our optimizers, at any ZeRO stage and precision, with data and tensor
            parallelism; between two optimizer steps.
        batches: of this rank, equally many on all; tensor-parallel ranks must be given the same. A batch of all ranks
            together is one sample.
        forward: `causal_lm`, `megatron_gpt` or one of your own; gets the engine.
        estimator: ``gauss_newton`` or ``fisher``; see `ds_blockwise.measure.sharpness`.
        draws: labels drawn for each batch.
        seed: of the draws.
        step: for the report; default: the engine's ``global_steps``.

    Returns:
        The same report on every rank.

    Raises:
        ValueError: on every rank: an argument or an engine that cannot be measured, with the reason.
        FloatingPointError: no sample was finite (samples that overflow are left out and counted).
    """
    optimizer, chosen = together(lambda: _checked(engine, batches, estimator, draws))
    counts = gather(len(chosen))
    if len(set(counts)) > 1:
        raise ValueError(f"ranks were given different numbers of batches, {counts}: every rank needs as many")

    sums = RoleSums(optimizer.bindings())
    local: list[torch.Tensor] = []
    tokens: list[int] = []
    device = torch.device(engine.device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), _megatron_random_states(), _between_steps(engine, optimizer, sums) as recorder:
        for index, batch in enumerate(chosen):
            for draw in range(draws):
                found = forward(engine, batch)
                share = _share(engine, found)
                labels = labels_for(found, estimator, share.first, seed, index, draw)
                # DeepSpeed divides the sum over data-parallel ranks by their number
                loss = summed_loss(found, labels) * (share.size / max(share.tokens, 1))
                engine.backward(loss, scale_wrt_gas=False)
                local.append(recorder.one_step(engine) * share.tokens)
                tokens.append(share.tokens)
    return finish(sums, local, tokens, estimator=estimator, step=engine.global_steps if step is None else step)


def _checked(
    engine: Engine, batches: Iterable[Batch], estimator: str, draws: int
) -> tuple[BlockwiseOptimizer, list[Batch]]:
    check_arguments(estimator, draws)
    return check_engine(engine, estimator), list(batches)


def check_engine(engine: Engine, estimator: str) -> BlockwiseOptimizer:
    """Raise why an engine cannot be measured, now or at all.

    Returns:
        Its optimizer.

    Raises:
        ValueError: with the reason.
    """
    optimizer = getattr(engine, "basic_optimizer", None)
    if not isinstance(optimizer, BlockwiseOptimizer):
        raise ValueError(
            f"the engine's optimizer is {type(optimizer).__name__}, which does not know where blocks lie. Train with "
            f'BlockwiseAdamW; with "lr_multipliers": "uniform" it is AdamW.'
        )
    if not optimizer.bindings():
        raise ValueError("the engine's optimizer is not attached: call ds_blockwise.attach(engine) first")
    if estimator == "hutchinson":
        raise ValueError(
            "estimator 'hutchinson' is for models in one process: use measure_sharpness, or 'gauss_newton' or 'fisher'"
        )
    wrapper = engine.optimizer
    reasons = {
        "pipeline parallelism: its engine runs whole batches only": bool(engine.pipeline_parallelism),
        "sequence parallelism: a rank's labels are only a part of its sequences'": sequence_parallel_size(engine) > 1,
        "DeepSpeed's own mixture of experts": bool(getattr(engine, "has_moe_layers", False)),
        "torch_autocast with fp16: its scaler decides on each rank alone": bool(
            getattr(engine, "torch_autocast_z0_gradscaler", None) or getattr(wrapper, "torch_autocast_gradscaler", None)
        ),
        '"managed_gradient_accumulation": false': not getattr(engine, "managed_gradient_accumulation", lambda: True)(),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"sharpness cannot be measured under {reason}; measure a checkpoint without it instead")
    accumulated = engine.micro_steps % engine.gradient_accumulation_steps()
    if accumulated:
        raise ValueError(
            f"{accumulated} of {engine.gradient_accumulation_steps()} micro batches are accumulated: measuring would "
            f"mix with their gradients. Measure right after the engine.step() that updates the weights."
        )
    return optimizer


@dataclass(frozen=True, slots=True)
class _Share:
    """This rank's share of a batch.

    Attributes:
        first: number of its first sequence in the batch of all ranks.
        tokens: predictions in the batch of all ranks.
        size: data-parallel ranks.
    """

    first: int
    tokens: int
    size: int


def _share(engine: Engine, found: Predictions) -> _Share:
    """Collective over all ranks."""
    failure: Exception | None = None
    try:
        found.check()
    except ValueError as error:
        failure = error
    raise_together(failure)
    rank, size = place_in(engine.seq_data_parallel_group)
    held: dict[int, tuple[int, int]] = {}
    for other, sequences, tokens in gather((rank, found.targets.shape[0], found.tokens)):
        if held.setdefault(other, (sequences, tokens)) != (sequences, tokens):
            raise ValueError(
                f"tensor-parallel ranks of data-parallel rank {other} were given different batches: "
                f"{held[other][0]} sequences with {held[other][1]} predictions and {sequences} with {tokens}"
            )
    first = sum(sequences for other, (sequences, _) in held.items() if other < rank)
    return _Share(first, sum(tokens for _, tokens in held.values()), size)


class _Recorder:
    """Adds up the squares of the gradients that the optimizer is called with, and holds every step back."""

    def __init__(self, sums: RoleSums) -> None:
        self._sums = sums
        self._squares: torch.Tensor | None = None

    def before_update(self, work: Sequence[Work]) -> bool:
        """ZeRO calls the optimizer for each group, or sub-group, by itself."""
        gradients = {id(w.binding.tensor): w.item.grad for w in work}

        def gradient_of(binding: Binding) -> torch.Tensor | None:
            return gradients.get(id(binding.tensor))

        squares = self._sums.squares(gradient_of)
        self._squares = squares if self._squares is None else self._squares + squares
        return False

    def after_update(self, work: Sequence[Work]) -> None:
        """Never called: no step is taken."""

    def take(self) -> torch.Tensor | None:
        """The sums since the last call; None if the optimizer was not called."""
        squares, self._squares = self._squares, None
        return squares

    def one_step(self, engine: Engine) -> torch.Tensor:
        """Let the wrapper finish the gradients; this rank's sums, NaN if it found an overflow."""
        wrapper = engine.optimizer
        wrapper.step()
        if wrapper is engine.basic_optimizer:
            engine.zero_grad()
        else:
            wrapper.zero_grad()
        squares = self.take()
        if squares is None and not wrapper.overflow:
            raise RuntimeError(
                f"{type(wrapper).__name__}.step() called no optimizer of ours although nothing overflowed; this "
                f"version of DeepSpeed steps in a way that ds_blockwise does not know"
            )
        if squares is None or wrapper.overflow:
            return torch.full_like(self._sums.squares(lambda binding: None), torch.nan)
        return squares


@contextmanager
def _between_steps(engine: Engine, optimizer: BlockwiseOptimizer, sums: RoleSums) -> Iterator[_Recorder]:
    """Every backward pass is a boundary, nothing is clipped; all is put back at the end."""
    wrapper = engine.optimizer
    left = {name: getattr(wrapper, name) for name in _LEFT_BEHIND if hasattr(wrapper, name)}
    scalers = [getattr(wrapper, name) for name in _SCALERS if hasattr(wrapper, name)]
    kept = [(scaler, dict(vars(scaler))) for scaler in scalers if hasattr(scaler, "__dict__")]
    boundary = engine._is_gradient_accumulation_boundary
    recorder = _Recorder(sums)
    with optimizer.observed_only_by(recorder):
        try:
            engine.set_gradient_accumulation_boundary(True)
            if "clip_grad" in left:  # at ZeRO-0 in fp32 the engine clips, not the step that is called here
                wrapper.clip_grad = 0.0
            yield recorder
        finally:
            engine._is_gradient_accumulation_boundary = boundary
            for name, value in left.items():
                setattr(wrapper, name, value)
            for scaler, values in kept:
                vars(scaler).update(values)


@contextmanager
def _megatron_random_states() -> Iterator[None]:
    """Megatron-core's dropout on GPUs draws from states of its own."""
    module = sys.modules.get("megatron.core.tensor_parallel.random")
    tracker = module.get_cuda_rng_tracker() if module is not None and torch.cuda.is_available() else None
    if tracker is None:
        yield
        return
    states = tracker.get_states()
    try:
        yield
    finally:
        tracker.set_states(states)
