# SPDX-License-Identifier: Apache-2.0
"""What a sharpness measurement asks of a model: logits for targets, labels drawn from them, the mean loss.

Every draw has a generator of its own on the CPU, named by what is drawn: the same on any device and however sequences
lie on ranks, and nobody else's random numbers move.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

_CHUNK = 1 << 24  # probabilities that are cumulated at a time, in fp64


@dataclass(frozen=True, slots=True)
class Predictions:
    """A batch's predictions, next to what the data says.

    Attributes:
        logits: ``[sequences, ..., vocabulary]``, floating, with a graph; of the whole vocabulary on every rank.
        targets: ``[sequences, ...]``, int64, in the same places: already shifted. Anything where the mask is false.
        mask: bool, of the targets' shape: the places that count; None for all.
    """

    logits: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor | None = None

    def check(self) -> None:
        """Raise what is wrong with the shapes.

        Raises:
            ValueError: a shape or dtype does not fit.
        """
        if self.logits.shape[:-1] != self.targets.shape or self.targets.dim() < 1:
            raise ValueError(
                f"logits of shape {tuple(self.logits.shape)} do not belong to targets of shape "
                f"{tuple(self.targets.shape)}; they must be [sequences, ..., vocabulary] and [sequences, ...], shifted "
                f"against each other already"
            )
        if self.mask is not None and (self.mask.shape != self.targets.shape or self.mask.dtype != torch.bool):
            raise ValueError(
                f"the mask is {self.mask.dtype} of shape {tuple(self.mask.shape)}; it must be bool, of the targets' "
                f"shape {tuple(self.targets.shape)}"
            )

    @property
    def tokens(self) -> int:
        """Predictions that count."""
        return self.targets.numel() if self.mask is None else int(self.mask.sum())


Model = TypeVar("Model")
Batch = TypeVar("Batch")
Forward = Callable[[Model, Batch], Predictions]
"""Runs a model, or an engine around it, on one batch."""


class WithLogits(Protocol):
    """What Hugging Face's language models return."""

    logits: torch.Tensor


def causal_lm(model: Callable[..., WithLogits], batch: object) -> Predictions:
    """`Forward` for Hugging Face's causal language models.

    Args:
        model: called with ``input_ids`` and ``attention_mask``, returns an object with ``logits``.
        batch: ``{"input_ids": [sequences, length]}``, with ``attention_mask`` and ``labels`` (same shape, not shifted,
            -100 where nothing is to be predicted) if there are; or the ids alone.

    Raises:
        TypeError: the batch is neither a mapping nor a tensor.
    """
    fields: Mapping[str, torch.Tensor]
    if isinstance(batch, Mapping):
        fields = batch
    elif isinstance(batch, torch.Tensor):
        fields = {"input_ids": batch}
    else:
        raise TypeError(f'a batch must be {{"input_ids": tensor}} or a tensor of token ids, got {type(batch).__name__}')
    inputs = {key: fields[key] for key in ("input_ids", "attention_mask") if fields.get(key) is not None}
    logits = model(**inputs).logits[:, :-1]
    labels = fields.get("labels")
    targets = (fields["input_ids"] if labels is None else labels)[:, 1:]
    mask = targets >= 0
    if "attention_mask" in inputs:
        mask = mask & inputs["attention_mask"][:, 1:].bool()
    return Predictions(logits, targets, mask)


def megatron_gpt(model: Callable[..., torch.Tensor], batch: Mapping[str, torch.Tensor]) -> Predictions:
    """`Forward` for Megatron-core's ``GPTModel`` and ``HybridModel``; tensor-parallel ranks gather their logits.

    Args:
        model: the model, or an engine around it.
        batch: ``tokens``, ``position_ids`` and ``labels`` (shifted already), int64 ``[sequences, length]``, and
            ``loss_mask`` (0 where nothing is to be predicted) if there is one.
    """
    logits = model(batch["tokens"], batch["position_ids"], None, runtime_gather_output=True)
    mask = batch.get("loss_mask")
    return Predictions(logits, batch["labels"], None if mask is None else mask.bool())


def generator(*key: object) -> torch.Generator:
    """A CPU generator whose numbers depend on ``key`` alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def uniforms(shape: torch.Size, first: int, *key: object) -> torch.Tensor:
    """Numbers in [0, 1) for the targets of some sequences, fp64 on the CPU.

    Args:
        shape: of the targets, ``[sequences, ...]``.
        first: number of the first of these sequences in the whole batch, over all ranks.
        *key: what else names the draw.
    """
    rows = [
        torch.rand(tuple(shape[1:]), generator=generator(*key, first + i), dtype=torch.float64) for i in range(shape[0])
    ]
    return torch.stack(rows) if rows else torch.empty(tuple(shape), dtype=torch.float64)


@torch.no_grad()
def draw_labels(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """One label per prediction, from the model's own distribution, by inverting its cumulated probabilities.

    Args:
        logits: ``[..., vocabulary]``, floating.
        numbers: uniform in [0, 1), of the shape ``[...]``.

    Returns:
        int64 of the shape ``[...]``, on the logits' device.
    """
    vocabulary = logits.shape[-1]
    rows = max(1, _CHUNK // vocabulary)
    drawn = []
    flat = numbers.reshape(-1).to(logits.device)
    parts = zip(torch.split(logits.reshape(-1, vocabulary), rows), torch.split(flat, rows), strict=True)
    for part, number in parts:
        cumulated = torch.softmax(part.double(), -1).cumsum(-1)
        # rounding may leave the last sum below 1, and must not lead to labels of no probability at the end
        total = cumulated[:, -1]
        wanted = torch.minimum(number * total, torch.nextafter(total, torch.zeros_like(total)))
        found = torch.searchsorted(cumulated, wanted.unsqueeze(-1), right=True)
        drawn.append(found.squeeze(-1).clamp_(max=vocabulary - 1))  # NaN logits lead anywhere
    return torch.cat(drawn).view(logits.shape[:-1]) if drawn else numbers.to(logits.device, torch.int64)


def summed_loss(found: Predictions, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats summed over the predictions that count, with a graph.

    Args:
        found: the predictions.
        labels: int64, of the targets' shape.
    """
    logits, wanted = found.logits.flatten(0, -2), labels.flatten()
    if found.mask is not None:
        counts = found.mask.flatten()
        logits, wanted = logits[counts], wanted[counts]
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    return torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
