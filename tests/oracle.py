# SPDX-License-Identifier: Apache-2.0
"""An independent, slow definition of both optimizers on full tensors.

Written from the papers (AdamW arXiv 1711.05101, Adam-mini 2406.16793, multipliers per block type
2502.19002) and the project's contract. It shares no line and no idea with ``ds_blockwise``: blocks
are an integer label on every element, tables of names are written by hand below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

BLOCK_TYPE = {
    "embedding": "emb",
    "output": "head",
    "query": "qk",
    "key": "qk",
    "value": "vo",
    "attn_out": "vo",
    "ffn": "ffn",
    "norm": "norm",
    "router": "other",
    "other": "other",
}
MULTIPLIERS = {"emb": 10, "head": 10, "qk": 8, "ffn": 6, "vo": 4, "norm": 1, "other": 1}


@dataclass(frozen=True)
class Span:
    """Rows [start, end) of a tensor, their role, and how Adam-mini cuts them into blocks.

    ``size`` is the number of rows of one block: a head's, 1 for a row, all for a whole tensor;
    0 means element-wise.
    """

    start: int
    end: int
    role: str
    size: int


@dataclass(frozen=True)
class Classified:
    """The spans of one parameter; ``axis`` is 1 where outputs run along columns (Conv1D)."""

    spans: tuple[Span, ...]
    axis: int = 0


Classes = dict[str, Classified]


# ------------------------------------------------------------- names, written by hand per family


def _rows(count: int, role: str, size: int = 1) -> Classified:
    return Classified((Span(0, count, role, size),))


def _norm(count: int) -> Classified:
    return _rows(count, "norm", count)


def _elements(spans: tuple[Span, ...]) -> Classified:
    return Classified(tuple(replace(span, size=0) for span in spans))


def hf_llama_classes(
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ffn: int,
    vocab: int,
    biases: bool = False,
    qk_norms: bool = False,
) -> Classes:
    """HF LLaMA / Qwen names: q, k, v apart; untied output."""
    table = {
        "model.embed_tokens.weight": _rows(vocab, "embedding"),
        "model.norm.weight": _norm(hidden),
        "lm_head.weight": _rows(vocab, "output"),
    }
    attention = {
        "q_proj": _rows(heads * head_dim, "query", head_dim),
        "k_proj": _rows(kv_heads * head_dim, "key", head_dim),
        "v_proj": _rows(kv_heads * head_dim, "value"),
        "o_proj": _rows(hidden, "attn_out"),
    }
    for i in range(layers):
        at = f"model.layers.{i}."
        for key, classified in attention.items():
            table[f"{at}self_attn.{key}.weight"] = classified
            if biases:
                table[f"{at}self_attn.{key}.bias"] = _elements(classified.spans)
        if qk_norms:
            table[f"{at}self_attn.q_norm.weight"] = _norm(head_dim)
            table[f"{at}self_attn.k_norm.weight"] = _norm(head_dim)
        table[f"{at}mlp.gate_proj.weight"] = _rows(ffn, "ffn")
        table[f"{at}mlp.up_proj.weight"] = _rows(ffn, "ffn")
        table[f"{at}mlp.down_proj.weight"] = _rows(hidden, "ffn")
        table[f"{at}input_layernorm.weight"] = _norm(hidden)
        table[f"{at}post_attention_layernorm.weight"] = _norm(hidden)
    return table


def gpt2_classes(
    *, layers: int, hidden: int, heads: int, ffn: int, vocab: int, positions: int, conv1d: bool
) -> Classes:
    """nanoGPT / HF GPT-2 names: c_attn is q, then k, then v; lm_head is wte itself."""
    axis = 1 if conv1d else 0
    head = hidden // heads
    qkv = (
        Span(0, hidden, "query", head),
        Span(hidden, 2 * hidden, "key", head),
        Span(2 * hidden, 3 * hidden, "value", 1),
    )
    table = {
        "transformer.wte.weight": _rows(vocab, "embedding"),
        "transformer.wpe.weight": _rows(positions, "embedding"),
        "transformer.ln_f.weight": _norm(hidden),
        "transformer.ln_f.bias": _norm(hidden),
    }
    linears = {
        "attn.c_attn": qkv,
        "attn.c_proj": (Span(0, hidden, "attn_out", 1),),
        "mlp.c_fc": (Span(0, ffn, "ffn", 1),),
        "mlp.c_proj": (Span(0, hidden, "ffn", 1),),
    }
    for i in range(layers):
        at = f"transformer.h.{i}."
        for key, spans in linears.items():
            table[f"{at}{key}.weight"] = Classified(spans, axis)
            table[f"{at}{key}.bias"] = _elements(spans)
        for key in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            table[at + key] = _norm(hidden)
    return table


def megatron_classes(
    *, layers: int, hidden: int, heads: int, groups: int, head_dim: int, ffn: int, vocab: int
) -> Classes:
    """Megatron-core names: linear_qkv holds [q .. q k v] per query group, linear_fc1 [gate up]."""
    qkv: list[Span] = []
    for _ in range(groups):
        for role, count, size in (
            ("query", heads // groups * head_dim, head_dim),
            ("key", head_dim, head_dim),
            ("value", head_dim, 1),
        ):
            start = qkv[-1].end if qkv else 0
            qkv.append(Span(start, start + count, role, size))
    table = {
        "embedding.word_embeddings.weight": _rows(vocab, "embedding"),
        "decoder.final_layernorm.weight": _norm(hidden),
        "output_layer.weight": _rows(vocab, "output"),
    }
    for i in range(layers):
        at = f"decoder.layers.{i}."
        table[at + "input_layernorm.weight"] = _norm(hidden)
        table[at + "pre_mlp_layernorm.weight"] = _norm(hidden)
        table[at + "self_attention.linear_qkv.weight"] = Classified(tuple(qkv))
        table[at + "self_attention.linear_proj.weight"] = _rows(hidden, "attn_out")
        table[at + "mlp.linear_fc1.weight"] = _rows(2 * ffn, "ffn")
        table[at + "mlp.linear_fc2.weight"] = _rows(hidden, "ffn")
    return table


def regroup(classes: Classes, role: str, size: Callable[[Span], int]) -> Classes:
    """The same table with another block size for the weights of one role."""
    return {
        name: replace(
            c,
            spans=tuple(replace(s, size=size(s)) if s.role == role and s.size else s for s in c.spans),
        )
        for name, c in classes.items()
    }


# ------------------------------------------------------------------------------- the optimizers


@dataclass
class Hyper:
    """What a param group may set for one parameter."""

    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    weight_decay: float = 0.1


@dataclass
class _State:
    m: Tensor
    v: Tensor
    step: int = 0


@dataclass
class Oracle:
    """Both optimizers on {name: full tensor}.

    Attributes:
        params: Weights as given; kept (and returned by ``weights``) in ``arithmetic``.
        classes: Name -> spans. Every parameter must be there and its spans must tile it.
        mini: True for Blockwise Adam-mini, False for Blockwise AdamW.
        hyper: One for all, or name -> Hyper.
        arithmetic: torch.float64 (the truth) or torch.float32 (the same formula, rounded).
        momentum: dtype that the first moment is stored in between updates.
    """

    params: Mapping[str, Tensor]
    classes: Classes
    mini: bool
    hyper: Hyper | dict[str, Hyper] = field(default_factory=Hyper)
    lr_multipliers: Mapping[str, float] = field(default_factory=dict)
    weight_decay_multipliers: Mapping[str, float] = field(default_factory=dict)
    arithmetic: torch.dtype = torch.float64
    momentum: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.set_weights(self.params)
        self._state: dict[str, _State] = {}
        self._labels = {name: self._label(name, p.shape) for name, p in self._p.items()}

    def weights(self) -> dict[str, Tensor]:
        """A copy of the current weights."""
        return {name: p.clone() for name, p in self._p.items()}

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from these weights, e.g. those that a bf16 parameter was rounded to."""
        self._p = {name: p.detach().to(self.arithmetic).clone() for name, p in weights.items()}

    def multiplier(self, role: str) -> float:
        """A key that is a role wins over the key of its block type, and that over the default."""
        block_type = BLOCK_TYPE[role]
        chosen = self.lr_multipliers
        return chosen.get(role, chosen.get(block_type, MULTIPLIERS[block_type]))

    def _decay(self, role: str) -> float:
        chosen = self.weight_decay_multipliers
        return chosen.get(role, chosen.get(BLOCK_TYPE[role], 1.0))

    def _label(self, name: str, shape: torch.Size) -> Tensor:
        """The block number of every element."""
        classified = self.classes[name]
        assert classified.spans[0].start == 0, name
        assert classified.spans[-1].end == shape[classified.axis], (name, shape, classified)
        along = torch.zeros(shape[classified.axis], dtype=torch.long)
        element_wise = torch.zeros(shape[classified.axis], dtype=torch.bool)
        block, end = 0, 0
        for span in classified.spans:
            assert span.start == end, (name, "spans must follow each other", classified)
            end = span.end
            for row in range(span.start, span.end):
                if span.size and row > span.start and (row - span.start) % span.size == 0:
                    block += 1
                along[row] = block
                element_wise[row] = span.size == 0
            block += 1
        view = [1] * len(shape)
        view[classified.axis] = -1
        labels = along.view(view).expand(shape).clone()
        own = block + torch.arange(labels.numel()).view(shape)
        return torch.where(element_wise.view(view).expand(shape), own, labels)

    def _per_element(self, name: str, value: Callable[[str], float]) -> Tensor:
        classified = self.classes[name]
        shape = self._p[name].shape
        along = torch.zeros(shape[classified.axis], dtype=self.arithmetic)
        for span in classified.spans:
            along[span.start : span.end] = value(span.role)
        view = [1] * len(shape)
        view[classified.axis] = -1
        return along.view(view).expand(shape)

    def _mean_square(self, name: str, gradient: Tensor) -> Tensor:
        """Mean of g^2 over each element's block, summed in fp64 whatever the arithmetic is."""
        square = gradient.double().square()
        if not self.mini:
            return square
        labels = self._labels[name].flatten()
        total = torch.zeros(int(labels.max()) + 1, dtype=torch.float64)
        count = torch.zeros_like(total)
        total.index_add_(0, labels, square.flatten())
        count.index_add_(0, labels, torch.ones_like(square.flatten()))
        return (total[labels] / count[labels]).view(gradient.shape)

    def step(
        self,
        gradients: Mapping[str, Tensor],
        block_lr: Callable[[float, float], float] | None = None,
    ) -> None:
        """One update of every parameter in ``gradients``; the others are left untouched.

        ``block_lr(multiplier, lr)`` gives a block type's lr; by default their product.
        """
        rate = block_lr or (lambda multiplier, lr: multiplier * lr)
        for name, gradient in gradients.items():
            h = self.hyper if isinstance(self.hyper, Hyper) else self.hyper[name]
            lr = self._per_element(name, lambda role, h=h: rate(self.multiplier(role), h.lr))
            decay = self._per_element(name, lambda role, h=h: h.weight_decay * self._decay(role))
            self._update(name, gradient, h, lr, decay)

    def _update(self, name: str, gradient: Tensor, h: Hyper, lr: Tensor, decay: Tensor) -> None:
        p = self._p[name]
        g = gradient.to(self.arithmetic)
        state = self._state.setdefault(name, _State(torch.zeros_like(p), torch.zeros_like(p)))
        state.step += 1
        beta1, beta2 = h.betas
        p = p * (1 - lr * decay)
        state.m = beta1 * state.m + (1 - beta1) * g
        state.v = beta2 * state.v + (1 - beta2) * self._mean_square(name, gradient).to(p.dtype)
        m_hat = state.m / (1 - beta1**state.step)
        v_hat = state.v / (1 - beta2**state.step)
        p = p - lr * m_hat / (v_hat.sqrt() + h.eps)
        if self.momentum is not None:
            state.m = state.m.to(self.momentum).to(self.arithmetic)
        self._p[name] = p


# ------------------------------------------------------------------- schedules, clipping, checks


def scheduled_lr(
    kind: str, k: int, *, warmup: int, total: int, min_lr: float = 0.0, decay: int = 0
) -> Callable[[float, float], float]:
    """``block_lr`` of update k = 0, 1, ...: every block type ends at the same absolute min_lr."""

    def fraction() -> float:
        if kind == "wsd":
            return min(1.0, max(0.0, (total - k) / decay))
        progress = min(1.0, (k - warmup) / (total - warmup))
        return 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress

    def block_lr(multiplier: float, peak: float) -> float:
        if k <= warmup and warmup > 0:
            return multiplier * peak * k / warmup
        return min_lr + fraction() * (multiplier * peak - min_lr)

    return block_lr


def clipped(gradients: Mapping[str, Tensor], max_norm: float) -> dict[str, Tensor]:
    """The gradients scaled to a global L2 norm of at most ``max_norm``, fp64."""
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    return {name: g.double() * min(1.0, max_norm / norm) for name, g in gradients.items()}


Weights = Mapping[str, Tensor]


def update_errors(
    actual: tuple[Weights, Weights],
    expected: tuple[Weights, Weights],
    lr: float,
    weight_roundings: int = 0,
) -> dict[str, float]:
    """Worst error of (before - after) / lr per parameter, relative to its largest update.

    A parameter whose update nowhere exceeds 1 is judged in absolute terms: with Adam an update of
    order 1 is what every multiplier starts from.
    """
    errors = {}
    for name in expected[0]:
        was, now = (weights[name].detach().double() for weights in actual)
        true = (expected[0][name].double() - expected[1][name].double()) / lr
        forgiven = weight_roundings * 2.0**-24 * torch.maximum(was.abs(), now.abs()) / lr
        error = ((was - now) / lr - true).abs() - forgiven
        worst = (error / max(1.0, float(true.abs().max()))).max()
        errors[name] = float(worst) if bool(torch.isfinite(worst)) else math.inf
    return errors


def assert_same_update(
    actual: tuple[Weights, Weights],
    expected: tuple[Weights, Weights],
    lr: float,
    *,
    tolerance: float = 1e-6,
    weight_roundings: int = 0,
    what: str = "",
) -> None:
    """Compare updates divided by lr; weights themselves would hide errors at a small lr.

    ``weight_roundings`` times half an ulp of the weight is forgiven on top: for steps whose lr is
    so small next to the weights that storing them in fp32 costs more than the tolerance.
    """
    assert set(actual[0]) == set(actual[1]) == set(expected[0]), (
        f"{what}: parameters differ: {set(actual[0]) ^ set(expected[0])}"
    )
    errors = update_errors(actual, expected, lr, weight_roundings)
    bad = {name: error for name, error in errors.items() if error > tolerance}
    listing = "".join(f"\n  {n}: {e:.2e}" for n, e in sorted(bad.items(), key=lambda x: -x[1]))
    assert not bad, f"{what}: {len(bad)} of {len(errors)} parameters off by more than {tolerance}{listing}"
