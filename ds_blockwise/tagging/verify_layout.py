# SPDX-License-Identifier: Apache-2.0
"""`verify_layout`: does a model use the rows of its attention weights as their tags say?

The check follows from how attention computes. Scores are products of queries and keys: if every key row is zero, no
query row has a gradient, and vice versa. If every value row is zero, the output of attention is zero for any scores, so
queries, keys and output gates have no gradient. If a QKV layout was read wrongly, some true key rows are not set to
zero, or a value row is taken for a query, and a gradient that must be zero is not.

Two errors are not found: a wrong border between two heads of one role, and queries exchanged with keys (both have the
same multiplier and blocks).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.segment_table import whole_placement
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.tagged_parameter import shard_of, tags_of
from ds_blockwise.tagging.module_reader import READERS
from ds_blockwise.tagging.names import match_name
from ds_blockwise.tagging.tag import ParameterTags, read_tags

VANISHED = 1e-5  # share of the gradient with all weights in place; expected are exact zeros, as factors are exact zeros
_SEED = 20250219
_BATCH, _LENGTH = 2, 8
_MUST_VANISH: dict[Role, tuple[Role, ...]] = {
    Role.KEY: (Role.QUERY,),
    Role.QUERY: (Role.KEY,),
    Role.VALUE: (Role.QUERY, Role.KEY, Role.ATTN_OUT),
}
# A norm after the projection has a bias that makes its output nonzero although the projection gives zero
_NORM_BIAS: dict[Role, re.Pattern[str]] = {
    Role.QUERY: re.compile(r"(?:^|\.)q_(?:a_)?(?:layer)?norm\b.*\.bias$"),
    Role.KEY: re.compile(r"(?:^|\.)k_(?:layer)?norm\b.*\.bias$"),
    Role.VALUE: re.compile(r"(?:^|\.)kv_(?:a_)?layernorm\.bias$"),
}


@dataclass(frozen=True, slots=True)
class LayoutReport:
    """What was verified.

    Attributes:
        parameters: the attention weights and biases that were probed, in the model's order.
        num_checks: gradients that had to be zero, and were.
    """

    parameters: tuple[str, ...]
    num_checks: int

    def __str__(self) -> str:
        if not self.parameters:
            return "verified: the model has no tensors of queries, keys and values"
        return (
            f"verified: the model computes attention as its {len(self.parameters)} query, key and value tensors are "
            f"tagged ({self.num_checks} gradients are zero that must be)"
        )


@dataclass(frozen=True)
class _Part:
    """Rows of one role in one parameter, as this rank holds them."""

    fqn: str
    param: nn.Parameter
    role: Role
    shape: tuple[int, int, int]  # outer, axis, inner
    rows: tuple[tuple[int, int], ...]
    is_bias: bool

    def of(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Views of the part's runs in a tensor of the parameter's shape."""
        view = tensor.reshape(self.shape)
        return [view[:, start:end] for start, end in self.rows]

    def size(self, gradient: torch.Tensor) -> list[float]:
        """Largest magnitude in each run."""
        return [float(run.abs().max()) for run in self.of(gradient.detach().float())]


def verify_layout(
    model: nn.Module,
    outputs: Callable[[nn.Module], torch.Tensor] | None = None,
    *,
    rules: Iterable[Mapping[str, object]] | None = None,
) -> LayoutReport:
    """Check by running the model that rows are the queries, keys, values and gates that their tags say.

    Runs the model forward and backward four times on a few tokens: once as it is, and three times with all rows of one
    role set to zero. Weights are restored; gradients and tags are not changed. Under tensor parallelism call it on
    every rank.

    Args:
        model: a module with real weights (not on the meta device, not ZeRO-3 placeholders) whose attention weights are
            not frozen. Random weights and a small number of layers are enough.
        outputs: runs the model and returns a tensor (logits or a loss) that depends on every attention weight.
            Default: works for Megatron-core's ``GPTModel`` and ``HybridModel``, for Hugging Face models and for any
            other model that has ``config.vocab_size`` and takes token ids of shape ``(batch, sequence)``.
        rules: as for `tag_parameters`. Default: the tags that the model has, or the default rules if it has none.

    Returns:
        What was verified; ``print`` it.

    Raises:
        ValueError: a gradient that must be zero is not, so rows are tagged with a wrong role; or the check is not
            possible (no gradient with all weights in place, frozen or missing weights, no way to run the model).
    """
    _check_weights(model)
    run: Callable[[nn.Module], object] = default_outputs if outputs is None else outputs
    with _without_dropout(model):
        parts = list(_attention_parts(_tags(model, rules)))
        if not parts:
            return LayoutReport((), 0)
        _check_roles(parts)
        usual = _gradients(model, run, parts)
        sizes = _usual_sizes(parts, usual)
        problems: list[str] = []
        num_checks = 0
        for zeroed, must_vanish in _MUST_VANISH.items():
            with _zeroed(model, parts, zeroed):
                gradients = _gradients(model, run, parts)
            for part, gradient, size in zip(parts, gradients, sizes, strict=True):
                if part.role in must_vanish:
                    num_checks += 1
                    problems += _survivors(part, gradient, size, zeroed)
    if problems:
        listed = "\n".join(f"  - {p}" for p in problems[:10])
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(
            f"the model does not compute attention as its weights are tagged:\n{listed}{more}\nGive the right layout "
            f'and head counts by a rule: {{"match": "...", "role": "qkv", "layout": "...", "num_heads": N, '
            f'"num_kv_heads": N}}'
        )
    return LayoutReport(tuple(dict.fromkeys(part.fqn for part in parts)), num_checks)


def default_outputs(model: nn.Module) -> object:
    """What a model returns for a few random tokens: its logits, if it names them, or its first output.

    Args:
        model: one that a reader can run, or one that has ``config.vocab_size`` and takes token ids.

    Raises:
        ValueError: no reader knows the model, and it has no ``config.vocab_size``.
    """
    for reader in READERS:
        found = reader.outputs(model)
        if found is not None:
            return found
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocab_size, int):
        raise ValueError(
            f"verify_layout does not know how to run a {type(model).__name__}: its config has no vocab_size. Give "
            f"outputs=, a function that takes the model and returns its logits or loss for a few tokens."
        )
    device = next(model.parameters()).device
    tokens = torch.randint(vocab_size, (_BATCH, _LENGTH)).to(device)
    result = model(tokens)
    for name in ("logits", "last_hidden_state"):
        result = getattr(result, name, result)
    if isinstance(result, (tuple, list)):
        result = result[0]
    return result


def _check_weights(model: nn.Module) -> None:
    for fqn, param in model.named_parameters():
        if param.is_meta or hasattr(param, "ds_shape"):
            where = "on the meta device" if param.is_meta else "partitioned by ZeRO-3"
            raise ValueError(
                f"parameter {fqn!r} is {where}, and verify_layout runs the model. Build it with real weights; a small "
                f"number of layers and a small vocabulary are enough."
            )
        if not param.requires_grad and _may_be_attention(fqn):
            raise ValueError(
                f"parameter {fqn!r} is frozen: verify_layout has to set rows of every attention weight to zero and to "
                f"see its gradient. Call it on the model before weights are frozen or adapters added."
            )


def _may_be_attention(fqn: str) -> bool:
    match = match_name(fqn)
    return match is not None and (match.role is None or match.role in _MUST_VANISH)


def _tags(model: nn.Module, rules: Iterable[Mapping[str, object]] | None) -> list[ParameterTags]:
    """The tags of the trainable parameters: those that they carry, or those that ``rules`` would give them."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    carried = [(p, t.block_spec, shard_of(t)) for p in trainable if (t := tags_of(p)) is not None]
    if rules is None and len(carried) == len(trainable):
        return carried
    return read_tags(model, BlockSettings.parse(rules=rules), place="python")


def _attention_parts(tags: Iterable[ParameterTags]) -> Iterator[_Part]:
    for param, spec, shard in tags:
        if not any(part.role in _MUST_VANISH for part in spec.parts):
            continue  # an output projection by itself is no gate
        view = whole_placement(spec, shard).view()
        for role in dict.fromkeys(part.role for part in spec.parts):
            rows = tuple((span.start, span.end) for span in view.spans if spec.parts[span.tag].role is role)
            if rows:
                shape = (view.outer, view.axis, view.inner)
                yield _Part(spec.fqn, param, role, shape, rows, spec.structure.is_bias)


def _check_roles(parts: list[_Part]) -> None:
    found = {part.role for part in parts}
    missing = [role.value for role in _MUST_VANISH if role not in found]
    if missing:
        raise ValueError(
            f"no rows of the model are tagged {' or '.join(missing)}, but some as {parts[0].role.value} "
            f"({parts[0].fqn!r}). Attention needs all three: correct the rules."
        )


def _gradients(model: nn.Module, run: Callable[[nn.Module], object], parts: list[_Part]) -> list[torch.Tensor]:
    params = list(dict.fromkeys(part.param for part in parts))
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(_SEED)  # every run, and every tensor-parallel rank, gets the same tokens
        result = run(model)
        if not isinstance(result, torch.Tensor):
            raise ValueError(
                f"running the {type(model).__name__} returned {type(result).__name__}, not a tensor. Give "
                f"verify_layout outputs=, a function that takes the model and returns its logits or loss."
            )
        weights = torch.randn(result.shape, dtype=torch.float32).to(result.device)
        loss = (result.float() * weights).sum()
        found = torch.autograd.grad(loss, params, allow_unused=True)
    by_param = {id(p): torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)}
    return [by_param[id(part.param)] for part in parts]


def _usual_sizes(parts: list[_Part], gradients: list[torch.Tensor]) -> list[float]:
    """Size of each part's gradient; a bias is measured by the largest of its role, for its own may be zero."""
    sizes = [max(part.size(gradient)) for part, gradient in zip(parts, gradients, strict=True)]
    for part, size in zip(parts, sizes, strict=True):
        if not part.is_bias and not size > 0:
            raise ValueError(
                f"the gradient of the {part.role.value} rows of {part.fqn!r} is {size} with all weights in place, so "
                f"nothing can be verified. Are the weights that follow it zero, or does outputs= not depend on it?"
            )
    largest = {p.role: max(s for q, s in zip(parts, sizes, strict=True) if q.role is p.role) for p in parts}
    return [largest[part.role] if part.is_bias else size for part, size in zip(parts, sizes, strict=True)]


def _survivors(part: _Part, gradient: torch.Tensor, usual: float, zeroed: Role) -> list[str]:
    for (start, end), size in zip(part.rows, part.size(gradient), strict=True):
        if not size <= VANISHED * usual:
            return [
                f"parameter {part.fqn!r}: with all rows tagged {zeroed.value} at zero, the gradient of its rows "
                f"{start} to {end - 1}, tagged {_tag(part)}, must vanish but is {size / usual:.2g} of its usual "
                f"size"
            ]
    return []


def _tag(part: _Part) -> str:
    return "gate (attn_out)" if part.role is Role.ATTN_OUT else part.role.value


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode: dropout would draw other masks in each run."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _zeroed(model: nn.Module, parts: list[_Part], role: Role) -> Iterator[None]:
    """All rows of a role at zero, biases of norms behind them included."""
    touched = [part for part in parts if part.role is role]
    norms = [p for fqn, p in model.named_parameters() if _NORM_BIAS[role].search(fqn)]
    before = {p: p.detach().clone() for p in dict.fromkeys([*(part.param for part in touched), *norms])}
    try:
        with torch.no_grad():
            for part in touched:
                for start, end in part.rows:
                    part.param.view(part.shape)[:, start:end] = 0
            for norm in norms:
                norm.zero_()
        yield
    finally:
        with torch.no_grad():
            for param, value in before.items():
                param.copy_(value)
