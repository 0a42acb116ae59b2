# SPDX-License-Identifier: Apache-2.0
"""Optimizers of other libraries under names that a DeepSpeed JSON can give, for comparisons on one process.

`register` puts them where DeepSpeed looks for a type that it does not know, as `import ds_blockwise` does with ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor


class _Weight:
    """One weight of the model, as the matrices that are stepped.

    The host may hold it flat and in another dtype than the model does: ZeRO-1's fp32 copy is.

    Args:
        weight: As the model has it.
        rows: Per matrix the numbers of its rows, for a fused weight: those that a model with separate weights would
            have. Empty: it is stepped as it is.
    """

    def __init__(self, weight: Tensor, rows: Sequence[Tensor] = ()) -> None:
        self._shape, self._rows = weight.shape, rows
        self.parts = [torch.nn.Parameter(part) for part in self._cut(weight.detach())]

    def split(self, held: Tensor, state: MutableMapping[Tensor, Any]) -> None:
        """Give the matrices their part of what the host holds: values, gradient, state."""
        values = self._cut(held.detach())
        grads = [None] * len(values) if held.grad is None else self._cut(held.grad)
        own = state.pop(held, {})
        for number, part in enumerate(self.parts):
            part.data, part.grad = values[number], grads[number]
            mark = f"{number}."
            if kept := {name.removeprefix(mark): own[name] for name in own if name.startswith(mark)}:
                state[part] = kept

    def join(self, held: Tensor, state: MutableMapping[Tensor, Any]) -> None:
        """Take the stepped matrices back."""
        for rows, part in zip(self._rows, self.parts, strict=False):
            held.detach().view(self._shape)[rows] = part.detach()
        for number, part in enumerate(self.parts):
            state[held] |= {f"{number}.{name}": value for name, value in state.pop(part, {}).items()}
            part.grad = None  # else it would step along with other groups

    def _cut(self, tensor: Tensor) -> list[Tensor]:
        """A view of the whole, or copies of the matrices."""
        if tensor.numel() != self._shape.numel():
            raise ValueError(
                f"a weight of shape {tuple(self._shape)} came as {tensor.numel()} elements: this peer wants whole "
                f"weights, as one process has them without ZeRO or under ZeRO-1"
            )
        whole = tensor.view(self._shape)
        return [whole[rows] for rows in self._rows] or [whole]


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
        heads: Query heads, key and value heads, and rows of a head: Megatron's fused QKV weight, known by its number of
            rows, is then three matrices, as in a model with separate weights. None: one matrix.
        ffn_rows: Rows of the gate, by which Megatron's fused gate and up are known; then two matrices. 0: one matrix.
        ratios: Learning rates over ``lr``: ``"emb"``, ``"head"`` (the output layer), ``"norm"`` (vectors); 1 if absent.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        vocab_size: int = 0,
        heads: tuple[int, int, int] | None = None,
        ffn_rows: int = 0,
        ratios: Mapping[str, float] | None = None,
    ) -> None:
        # one group a weight: ZeRO-1 makes one flat tensor of each, and steps groups one by one
        everything = list(params)
        groups = [{"params": [p], "number": number} for number, p in enumerate(everything)]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        hidden = [p for p in everything if _is_hidden(p, vocab_size)]
        rest = [p for p in everything if not _is_hidden(p, vocab_size)]
        if not hidden or len([p for p in rest if p.ndim == 2]) != 2:
            raise ValueError(
                f"vocab_size = {vocab_size}: expected an untied model with two matrices of so many rows and hidden "
                f"layers, got {len(hidden)} hidden matrices and {[tuple(p.shape) for p in rest if p.ndim == 2]}"
            )
        cuts = fused_rows(heads, ffn_rows, {p.shape[0] for p in hidden})
        self._weights = [_Weight(p, cuts.get(p.shape[0], ()) if _is_hidden(p, vocab_size) else ()) for p in everything]
        of = {p: weight.parts for p, weight in zip(everything, self._weights, strict=True)}
        matrices = [part for p in hidden for part in of[p]]
        self._parts = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(
                _by_type([of[p][0] for p in rest]), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
            ),
        ]
        self._ratios = {"emb": 1.0, "head": 1.0, "norm": 1.0} | dict(ratios or {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One update of both; closures are not used by DeepSpeed."""
        assert closure is None
        held = {group["number"]: group["params"][0] for group in self.param_groups}
        for number, tensor in held.items():
            self._weights[number].split(tensor, self.state)
        for part in self._parts:
            part.state = self.state  # also after a load, which makes a new one
            for group in part.param_groups:
                group["lr"] = self.param_groups[0]["lr"] * self._ratios.get(group.get("type", ""), 1.0)
            part.step()
        for number, tensor in held.items():
            self._weights[number].join(tensor, self.state)


def _is_hidden(weight: Tensor, vocab_size: int) -> bool:
    return weight.ndim == 2 and weight.shape[0] != vocab_size


def _by_type(rest: Sequence[Tensor]) -> list[dict[str, Any]]:
    """AdamW's parameter groups: embedding and output layer, in the model's order, and vectors."""
    embedding, head = (p for p in rest if p.ndim == 2)
    vectors = [p for p in rest if p.ndim != 2]
    groups = {"emb": [embedding], "head": [head], "norm": vectors}
    return [{"type": name, "params": params} for name, params in groups.items() if params]


def fused_rows(
    heads: tuple[int, int, int] | None, ffn_rows: int, sizes: Iterable[int]
) -> dict[int, tuple[Tensor, ...]]:
    """Which rows of Megatron's fused weights are one matrix, by the weight's number of rows.

    Args:
        heads: Query heads, key and value heads, rows of a head; None for no fused QKV.
        ffn_rows: Rows of the gate; 0 for no fused gate and up.
        sizes: Numbers of rows of the model's hidden matrices.

    Raises:
        ValueError: The model has no weight of so many rows, or both kinds have the same number.
    """
    cuts: dict[int, tuple[Tensor, ...]] = {}
    if heads is not None:
        queries, groups, size = heads
        # Megatron's order: for each group its query heads, its key, its value
        rows = torch.arange((queries + 2 * groups) * size).view(groups, queries // groups + 2, size)
        cuts[rows.numel()] = (rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten())
    if ffn_rows:
        if 2 * ffn_rows in cuts:
            raise ValueError(f"fused QKV and fused gate and up both have {2 * ffn_rows} rows: which is which?")
        cuts[2 * ffn_rows] = (torch.arange(ffn_rows), torch.arange(ffn_rows, 2 * ffn_rows))
    missing = cuts.keys() - set(sizes)
    if missing:
        raise ValueError(f"heads = {heads}, ffn_rows = {ffn_rows}: no hidden matrix has {sorted(missing)} rows")
    return cuts


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


def _soap() -> type[torch.optim.Optimizer]:
    from pytorch_optimizer import SOAP

    return cast("type[torch.optim.Optimizer]", SOAP)


def register(name: str) -> None:
    """Make a peer available to DeepSpeed under its name; other names are left alone."""
    if name == "MuonAndAdamW":
        torch.optim.MuonAndAdamW = MuonAndAdamW  # type: ignore[attr-defined]
    elif name == "AdamW8bit":
        torch.optim.AdamW8bit = _adamw_8bit()  # type: ignore[attr-defined]
    elif name == "SOAP":
        torch.optim.SOAP = _soap()  # type: ignore[attr-defined]
