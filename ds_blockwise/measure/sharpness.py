# SPDX-License-Identifier: Apache-2.0
"""Average sharpness of the blocks of any tagged model, in plain PyTorch: three estimators of a trace.

Let the mean loss over N predictions be L = 1/N sum_i l_i, with l_i the cross entropy of prediction i, p_i the model's
distribution there and g the gradient of L.

``gauss_newton`` (Gauss-Newton-Bartlett): labels are drawn from p_i, independently for each prediction. The score
s_i = grad l_i(drawn label) then has mean 0 over the draws, and E[s_i s_i^T] = J_i^T (diag p_i - p_i p_i^T) J_i with the
Jacobian J_i of the logits, which is the Gauss-Newton matrix of l_i. Draws are independent, so mixed terms vanish:
E ||g||^2 = 1/N^2 sum_i E ||s_i||^2 = 1/N * trace. Hence N * ||g||^2, summed over a block, estimates that block's trace
of the Gauss-Newton matrix of L without bias, from one backward pass.

``fisher``: the same N * ||g||^2 with the data's labels, the paper's own formula. Their score has no mean of 0: for
independent predictions the expectation is trace(empirical Fisher) + (N - 1) * ||E s||^2, so it is the empirical Fisher
only in so far as noise dominates the gradient, and grows with N where it does not.

``hutchinson``: v^T H v with the Hessian H of L (the data's labels) and independent signs v: estimates the Hessian's
own trace, negative curvature included. The slow truth for small models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from ds_blockwise.blocks.segment_table import build_table, whole_placement
from ds_blockwise.blocks.tagged_parameter import tags_of
from ds_blockwise.kernels.bindings import Binding
from ds_blockwise.kernels.select import kernels_for
from ds_blockwise.measure.predictions import (
    Batch,
    Forward,
    Predictions,
    causal_lm,
    draw_labels,
    generator,
    summed_loss,
    uniforms,
)
from ds_blockwise.measure.role_sums import RoleOf, RoleSums, ValuesOf
from ds_blockwise.measure.sharpness_report import ESTIMATORS, Sample, SharpnessReport, build_report
from ds_blockwise.parallel.reduce import LOCAL

_CUSTOM: type = torch.autograd.function.BackwardCFunction
PRODUCTS = ("autograd", "differences")
_STEP = {torch.float64: 1e-5, torch.float32: 1e-3}  # of differences: larger ones bend, smaller ones round


def measure_sharpness(
    model: nn.Module,
    batches: Iterable[Batch],
    forward: Forward[nn.Module, Batch] = causal_lm,
    *,
    estimator: str = "gauss_newton",
    draws: int = 1,
    seed: int = 0,
    step: int | None = None,
    products: str = "autograd",
    difference: float | None = None,
) -> SharpnessReport:
    """Measure the average sharpness of every block of a model that lies whole in this process.

    Neither weights, ``.grad`` nor any random state change. Dropout acts as the model's mode says, and is then part of
    the loss. With tensor-parallel shards all ranks of the group must call it with the same batches.

    Args:
        model: tagged (`tag_parameters`); frozen parameters are left out.
        batches: what ``forward`` takes. A sample's weight in the mean is its number of predictions.
        forward: `causal_lm`, `megatron_gpt` or one of your own.
        estimator: ``gauss_newton``, ``fisher`` or ``hutchinson``; see above.
        draws: labels, or directions, drawn for each batch. With ``fisher`` there is nothing to draw: 1.
        seed: of the draws.
        step: for the report.
        products: how Hessian-vector products are made: ``autograd`` (differentiating twice) or ``differences`` (of two
            gradients, along the direction), for models with custom autograd functions or attention kernels that cannot
            be differentiated twice.
        difference: what every weight is moved by in ``differences``; default 1e-3 in fp32, 1e-5 in fp64.

    Raises:
        ValueError: an argument, or a batch's predictions, are not as described; the model is not tagged, or cannot be
            differentiated twice.
        FloatingPointError: no sample was finite.
    """
    check_arguments(estimator, draws)
    bindings = _bindings_of(model)
    parameters = [binding.tensor for binding in bindings]
    _check_model(model, bindings, estimator, products)
    sums = RoleSums(bindings)
    locals_: list[torch.Tensor] = []
    tokens: list[int] = []
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.enable_grad():
        for index, batch in enumerate(batches):
            for draw in range(draws):
                if estimator == "hutchinson":
                    size = _step_of(parameters, difference) if products == "differences" else None
                    v = [
                        torch.randint(0, 2, p.shape, generator=generator(seed, index, draw, i)).mul_(2).sub_(1).to(p)
                        for i, p in enumerate(parameters)
                    ]
                    count, hv = _product(model, batch, forward, parameters, v, size)
                    signed = [a * b for a, b in zip(v, hv, strict=True)]
                    locals_.append(sums.totals(_lookup(parameters, signed)))
                else:
                    found = forward(model, batch)
                    labels = labels_for(found, estimator, 0, seed, index, draw)
                    count = found.tokens
                    gradient = _gradient(summed_loss(found, labels) / max(count, 1), parameters)
                    locals_.append(sums.squares(_lookup(parameters, gradient)) * count)
                tokens.append(count)
    return finish(sums, locals_, tokens, estimator=estimator, step=step)


def check_arguments(estimator: str, draws: int) -> None:
    """Raise what is wrong with the arguments that every way of measuring has.

    Raises:
        ValueError: one of them is out of range.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator = {estimator!r}: allowed: {', '.join(ESTIMATORS)}")
    if draws < 1:
        raise ValueError(f"draws = {draws}: allowed: 1 and more")
    if estimator == "fisher" and draws > 1:
        raise ValueError(f"draws = {draws} with estimator 'fisher': its labels are the data's, so allowed: 1")


def labels_for(found: Predictions, estimator: str, first: int, *key: object) -> torch.Tensor:
    """The labels that an estimator takes: drawn, or the data's.

    Args:
        found: the predictions; checked here.
        estimator: ``gauss_newton`` or ``fisher``.
        first: number of this rank's first sequence in the batch over all ranks.
        *key: names the draw.

    Raises:
        ValueError: the shapes of the predictions do not fit.
    """
    found.check()
    if estimator == "fisher":
        return found.targets
    return draw_labels(found.logits.detach(), uniforms(found.targets.shape, first, *key))


def finish(
    sums: RoleSums, local: Sequence[torch.Tensor], tokens: Sequence[int], *, estimator: str, step: int | None
) -> SharpnessReport:
    """Collective over all ranks: the report on what every rank has summed up, the same on every rank.

    Args:
        sums: of the tensors that hold the parameters.
        local: for each sample this rank's part of the traces, from `RoleSums.squares` or `RoleSums.totals`.
        tokens: of each sample, over all ranks. A sample without any, or one that is not finite, is left out.
        estimator: for the report.
        step: for the report.

    Raises:
        ValueError: there are no samples.
        FloatingPointError: none of them is finite.
    """
    # an infinity of one sign and one of the other would fail in the exact sum
    finite = {str(i): torch.where(torch.isfinite(values), values, torch.nan) for i, values in enumerate(local)}
    statistics = sums.merged(**finite)
    if not any(tokens):
        raise ValueError("no batches, or none with a prediction that counts: give at least one")
    samples, skipped = [], 0
    for name, count in zip(finite, tokens, strict=True):
        traces = {one.of: one.sums[name] for one in statistics}
        if not all(map(_is_number, traces.values())):
            skipped += 1
        elif count:
            samples.append(Sample(count, traces))
    numels: dict[RoleOf, int] = {one.of: one.numel for one in statistics}
    return build_report(samples, numels, estimator=estimator, step=step, skipped=skipped)


def _is_number(value: float) -> bool:
    return value == value  # what was infinite is NaN by now


def _lookup(parameters: Sequence[torch.Tensor], values: Sequence[torch.Tensor | None]) -> ValuesOf:
    by_id = dict(zip(map(id, parameters), values, strict=True))
    return lambda binding: by_id[id(binding.tensor)]


# ------------------------------------------------------------------------------------------ the model


def _bindings_of(model: nn.Module) -> list[Binding]:
    return list(_each_binding(model))


def _each_binding(model: nn.Module) -> Iterator[Binding]:
    for name, parameter in model.named_parameters():  # a tied weight comes once
        if not parameter.requires_grad:
            continue
        tags = tags_of(parameter)
        if tags is None and not parameter.numel() and not hasattr(parameter, "ds_shape"):
            continue  # nothing in it
        if tags is None:
            raise ValueError(
                f"parameter {name!r} is not tagged: call ds_blockwise.tag_parameters(model) first, after the last "
                f"change to the model"
            )
        placement = whole_placement(tags.block_spec, tags.block_shard)
        if parameter.numel() != placement.numel:
            raise ValueError(
                f"parameter {name!r} has {parameter.numel()} elements here, not its {placement.numel}: ZeRO-3 holds "
                f"the rest. Use probe_engine(engine, ...)."
            )
        table = build_table(parameter.numel(), [placement], shares_second_moment=False)
        yield Binding(parameter, table, table, LOCAL, kernels_for("reference", parameter.device), None)


def _check_model(model: nn.Module, bindings: Sequence[Binding], estimator: str, products: str) -> None:
    if not bindings:
        raise ValueError("no parameter of the model is trained (requires_grad), so there is nothing to measure")
    if products not in PRODUCTS:
        raise ValueError(f"products = {products!r}: allowed: {', '.join(PRODUCTS)}")
    if getattr(getattr(model, "config", None), "gradient_accumulation_fusion", False):
        raise ValueError(
            "gradient_accumulation_fusion adds weight gradients to Megatron-core's own buffers, where they cannot be "
            "measured. Build the model without it (--no-gradient-accumulation-fusion)."
        )
    shards = [getattr(binding.tensor, "block_shard", None) for binding in bindings]
    if estimator == "hutchinson" and any(shard is not None and len(shard.chunks) > 1 for shard in shards):
        raise ValueError(
            "estimator 'hutchinson' is for one process, but parameters are split over tensor-parallel ranks"
        )


def _gradient(loss: torch.Tensor, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


# --------------------------------------------------------------------------- Hessian-vector products


def _product(
    model: nn.Module,
    batch: Batch,
    forward: Forward[nn.Module, Batch],
    parameters: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    size: float | None,
) -> tuple[int, list[torch.Tensor]]:
    """Predictions that count, and the Hessian of their mean loss times ``v``."""
    if size is not None:
        return _difference(model, batch, forward, parameters, v, size)
    loss, count = _mean_loss(model, batch, forward)
    _check_twice_differentiable(loss)
    try:
        gradient = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        pairs = [(g, d) for g, d in zip(gradient, v, strict=True) if g is not None and g.requires_grad]
        along = torch.stack([(g * d).sum() for g, d in pairs]).sum()
        hv = torch.autograd.grad(along, parameters, allow_unused=True)
    except RuntimeError as error:
        raise ValueError(_not_twice(str(error))) from error
    return count, [torch.zeros_like(p) if h is None else h for p, h in zip(parameters, hv, strict=True)]


def _difference(
    model: nn.Module,
    batch: Batch,
    forward: Forward[nn.Module, Batch],
    parameters: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    size: float,
) -> tuple[int, list[torch.Tensor]]:
    kept = [p.detach().clone() for p in parameters]
    sides, count = [], 0
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    try:
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for p, k, d in zip(parameters, kept, v, strict=True):
                    p.copy_(k + sign * size * d)
            with torch.random.fork_rng(devices):  # both sides with the same dropout
                loss, count = _mean_loss(model, batch, forward)
            sides.append(_gradient(loss, parameters))
    finally:
        with torch.no_grad():
            for p, k in zip(parameters, kept, strict=True):
                p.copy_(k)
    above, below = (
        [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, s, strict=True)] for s in sides
    )
    return count, [(a.double() - b.double()) / (2.0 * size) for a, b in zip(above, below, strict=True)]


def _mean_loss(model: nn.Module, batch: Batch, forward: Forward[nn.Module, Batch]) -> tuple[torch.Tensor, int]:
    found = forward(model, batch)
    found.check()
    count = found.tokens
    return summed_loss(found, found.targets) / max(count, 1), count


def _step_of(parameters: Sequence[torch.Tensor], difference: float | None) -> float:
    if difference is not None:
        if not difference > 0.0:
            raise ValueError(f"difference = {difference}: allowed: above 0")
        return difference
    dtypes = {p.dtype for p in parameters}
    if not dtypes <= _STEP.keys():
        raise ValueError(
            f"differences of gradients drown in the rounding of {sorted(map(str, dtypes - _STEP.keys()))}: convert the "
            f"model to fp32 or fp64, or give difference=..."
        )
    return max(_STEP[dtype] for dtype in dtypes)


def _check_twice_differentiable(loss: torch.Tensor) -> None:
    """Custom functions may hide what their backward depends on: the second derivative would be wrong in silence."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if issubclass(type(node), _CUSTOM):
            raise ValueError(_not_twice(f"it runs the custom autograd function {type(node).__name__}"))
        todo += [following for following, _ in node.next_functions]


def _not_twice(reason: str) -> str:
    return (
        f"estimator 'hutchinson' cannot differentiate this model twice: {reason}. Give products='differences', or, "
        f"where an attention kernel is the reason, another one (Hugging Face: attn_implementation='eager')."
    )
