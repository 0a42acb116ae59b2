# SPDX-License-Identifier: Apache-2.0
"""Optimizers of other libraries under names that a DeepSpeed JSON can give, for comparisons on one process.

`register` puts them where DeepSpeed looks for a type that it does not know, as `import ds_blockwise` does with ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for the weights of hidden layers, torch's AdamW for embedding, output layer and vectors.

    One learning rate for both: Muon's update is scaled to the RMS of AdamW's (arXiv 2502.16982, section 2.2).

    Args:
        params: Parameters of one whole model, in its order.
        lr: Learning rate.
        betas: AdamW's; Muon's momentum is 0.95 with Nesterov.
        eps: AdamW's.
        weight_decay: Decoupled, of both.
        vocab_size: Rows of the embedding and of the output layer, by which they are known.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        vocab_size: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        everything = [p for group in self.param_groups for p in group["params"]]
        hidden = [p for p in everything if p.ndim == 2 and p.shape[0] != vocab_size]
        rest = [p for p in everything if p.ndim != 2 or p.shape[0] == vocab_size]
        if not hidden or len([p for p in rest if p.ndim == 2]) != 2:
            raise ValueError(
                f"vocab_size = {vocab_size}: expected an untied model with two matrices of so many rows and hidden "
                f"layers, got {len(hidden)} hidden matrices and {[tuple(p.shape) for p in rest if p.ndim == 2]}"
            )
        self._parts = [
            torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay),
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One update of both; closures are not used by DeepSpeed."""
        assert closure is None
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
            part.step()
            self.state.update(part.state)


def _adamw_8bit() -> type[torch.optim.Optimizer]:
    from torchao.optim import AdamW8bit

    class ScheduledAdamW8bit(AdamW8bit):  # type: ignore[misc]
        """torchao's AdamW with 8-bit states; its learning rate is a tensor, schedules write numbers."""

        def step(self, closure: Callable[[], Any] | None = None) -> None:
            rates = [group["lr"] for group in self.param_groups]
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = group.setdefault("lr_tensor", torch.zeros(()))
                group["lr"].fill_(float(rate))
            super().step(closure)
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = float(rate)

    return ScheduledAdamW8bit


def register(name: str) -> None:
    """Make a peer available to DeepSpeed under its name; other names are left alone."""
    if name == "MuonAndAdamW":
        torch.optim.MuonAndAdamW = MuonAndAdamW  # type: ignore[attr-defined]
    elif name == "AdamW8bit":
        torch.optim.AdamW8bit = _adamw_8bit()  # type: ignore[attr-defined]
