# SPDX-License-Identifier: Apache-2.0
"""Sharpness against exact traces: Hessians and Gauss-Newton matrices of models with a few hundred weights, by hand."""

from __future__ import annotations

import itertools
import math
import random

import numpy
import pytest
import torch
from torch import Tensor, nn

from ds_blockwise import tag_parameters
from ds_blockwise.blocks.roles import Role
from ds_blockwise.measure.predictions import Predictions, causal_lm, megatron_gpt
from ds_blockwise.measure.sharpness import measure_sharpness
from ds_blockwise.measure.sharpness_report import SharpnessReport
from tests.helpers.models import gpt2_conv1d, llama

TINY = {
    **{"vocab_size": 7, "hidden_size": 4, "intermediate_size": 5, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8},
}
ROUNDING = 1e-5  # the model has norms and softmax in fp32, whatever its weights
TYPE_OF = {  # of the tiny LLaMA's names, by hand
    **{"embed_tokens": "emb", "lm_head": "head", "q_proj": "qk", "k_proj": "qk", "v_proj": "vo", "o_proj": "vo"},
    **{"gate_proj": "ffn", "up_proj": "ffn", "down_proj": "ffn", "norm": "norm"},
}


def _tiny(dtype: torch.dtype = torch.float64, **changes: object) -> nn.Module:
    torch.manual_seed(3)
    model = llama(**{**TINY, **changes}).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for labels, attention and curvature of all signs
            parameter.add_(0.5 * torch.randn_like(parameter))
    tag_parameters(model)
    return model


def _tokens(sequences: int = 2, length: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(7, (sequences, length), generator=torch.Generator().manual_seed(seed))


def _type_of(name: str) -> str:
    (found,) = {block_type for part, block_type in TYPE_OF.items() if part in name}
    return found


def _squares_by_type(model: nn.Module, gradients: dict[str, Tensor]) -> dict[str, float]:
    """Of the trained parameters, divided by their number."""
    sums: dict[str, float] = {}
    numels: dict[str, int] = {}
    for name, gradient in gradients.items():
        block_type = _type_of(name)
        sums[block_type] = sums.get(block_type, 0.0) + float(gradient.sum())
        numels[block_type] = numels.get(block_type, 0) + gradient.numel()
    return {block_type: value / numels[block_type] for block_type, value in sums.items()}


def _exact_gauss_newton(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Diagonal of the Gauss-Newton matrix of the mean loss: all labels of all predictions, one gradient each."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in named.items()}
    log_p = model(input_ids=tokens).logits[:, :-1].log_softmax(-1).flatten(0, 1)
    for row, label in itertools.product(*map(range, log_p.shape)):
        gradient = torch.autograd.grad(log_p[row, label], list(named.values()), retain_graph=True, allow_unused=True)
        for name, g in zip(named, gradient, strict=True):
            if g is not None:
                total[name] += log_p[row, label].exp().detach() * g.square() / len(log_p)
    return total


def _exact_hessian(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Diagonal of the mean loss's Hessian, by differentiating the whole gradient once more, entry by entry."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    logits = model(input_ids=tokens).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    gradient = torch.autograd.grad(loss, list(named.values()), create_graph=True)
    diagonal = {}
    for (name, parameter), g in zip(named.items(), gradient, strict=True):
        second = [torch.autograd.grad(value, parameter, retain_graph=True)[0].flatten() for value in g.flatten()]
        diagonal[name] = torch.stack([row[i] for i, row in enumerate(second)]).view_as(parameter)
    return diagonal


def _agree(report: SharpnessReport, exact: dict[str, float], small: float) -> None:
    """Within four standard errors, which are themselves a small part of the largest value's own."""
    found = {entry.block_type: entry for entry in report.at("type")}
    assert found.keys() == exact.keys()
    for block_type, value in exact.items():
        entry = found[block_type]
        assert abs(entry.sharpness - value) < 4 * entry.standard_error, (block_type, value, entry)
        assert entry.standard_error < small * max(map(abs, exact.values())), (block_type, value, entry)


# ------------------------------------------------------------------------------------ exactness


def test_weighted_over_all_labels_the_estimate_is_the_gauss_newton_trace():
    """The estimator's expectation by enumeration, without a random number: over all combinations of labels."""
    model, tokens = _tiny(vocab_size=3), _tokens(1, 4) % 3
    log_p = model(input_ids=tokens).logits[0, :-1].log_softmax(-1).detach()
    expected = dict.fromkeys(_squares_by_type(model, _exact_gauss_newton(model, tokens)), 0.0)
    total = 0.0
    for labels in itertools.product(range(3), repeat=3):
        weight = float(sum(log_p[i, label] for i, label in enumerate(labels)).exp())
        batch = {"input_ids": tokens, "labels": torch.tensor([[0, *labels]])}
        for block_type, value in measure_sharpness(model, [batch], estimator="fisher").by_type().items():
            expected[block_type] += weight * value
        total += weight
    assert total == pytest.approx(1.0, rel=1e-12)
    assert expected == pytest.approx(_squares_by_type(model, _exact_gauss_newton(model, tokens)), rel=ROUNDING)


def test_gauss_newton_finds_the_exact_trace():
    model, tokens = _tiny(), _tokens()
    exact = _squares_by_type(model, _exact_gauss_newton(model, tokens))
    report = measure_sharpness(model, [tokens], draws=600)
    _agree(report, exact, 0.1)
    for entry in report.at("type"):
        assert entry.standard_error < 0.1 * exact[entry.block_type], entry
    assert (report.samples, report.tokens, report.skipped) == (600, 600 * 8, 0)


def test_batches_of_different_sizes_weigh_by_their_predictions():
    """The mean of traces must be the trace for the mean loss over all predictions."""
    model = _tiny()
    batches = [_tokens(1, 3, seed=1), _tokens(3, 6, seed=2)]
    exact = [_squares_by_type(model, _exact_gauss_newton(model, b)) for b in batches]
    together = {t: (2 * exact[0][t] + 15 * exact[1][t]) / 17 for t in exact[0]}
    report = measure_sharpness(model, batches, draws=300)
    for entry in report.at("type"):
        assert abs(entry.sharpness - together[entry.block_type]) < 4 * entry.standard_error
        assert entry.standard_error < 0.12 * entry.sharpness


def test_hutchinson_finds_the_exact_hessian_trace():
    model, tokens = _tiny(), _tokens()
    exact = _squares_by_type(model, _exact_hessian(model, tokens))
    report = measure_sharpness(model, [tokens], estimator="hutchinson", draws=250)
    _agree(report, exact, 0.1)
    assert min(exact.values()) < 0 < max(exact.values()), "the model must show both signs of curvature"


def test_differences_are_the_products_of_autograd():
    """Same directions: the two ways must agree far below the noise of directions."""
    model, tokens = _tiny(), _tokens()
    one, two = (
        measure_sharpness(
            model, [tokens], estimator="hutchinson", draws=3, products=products, difference=1e-4
        ).by_type()
        for products in ("autograd", "differences")
    )
    assert one == pytest.approx(two, rel=5e-3, abs=1e-4 * max(map(abs, two.values())))


def test_fisher_is_n_times_the_squared_gradient_of_the_data():
    model, tokens = _tiny(), _tokens()
    logits = model(input_ids=tokens).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    named = {n: 8 * g.square() for (n, _), g in zip(model.named_parameters(), gradient, strict=True)}
    report = measure_sharpness(model, [tokens], estimator="fisher")
    assert report.by_type() == pytest.approx(_squares_by_type(model, named), rel=ROUNDING)
    assert math.isnan(report.at("type")[0].standard_error)


def test_a_fused_weight_and_a_tied_embedding_are_taken_apart_and_counted_once():
    """GPT-2: queries, keys and values are columns of one weight; the head is the embedding."""
    torch.manual_seed(3)
    model = gpt2_conv1d().double().eval()
    tag_parameters(model)
    tokens = torch.randint(23, (2, 5))
    report = measure_sharpness(model, [tokens], estimator="fisher")
    logits = model(input_ids=tokens).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    fused = model.transformer.h[0].attn.c_attn
    found = {(e.parameter, e.role): e.sharpness for e in report.at("parameter")}
    for role, part in zip((Role.QUERY, Role.KEY, Role.VALUE), fused.weight.grad.chunk(3, dim=1), strict=True):
        name = "transformer.h.0.attn.c_attn.weight"
        assert found[name, role] == pytest.approx(8 * float(part.square().mean()), rel=ROUNDING)
    names = [e.parameter for e in report.at("parameter") if e.block_type in ("emb", "head")]
    assert sorted(names) == ["transformer.wpe.weight", "transformer.wte.weight"]
    wte = model.transformer.wte.weight.grad
    assert found["transformer.wte.weight", Role.EMBEDDING] == pytest.approx(
        8 * float(wte.square().mean()), rel=ROUNDING
    )
    assert sum(e.numel for e in report.at("type")) == sum(p.numel() for p in model.parameters())


def test_megatrons_interleaved_queries_keys_and_values_are_told_apart():
    """Each query group's rows are its queries, then its key, then its value."""
    pytest.importorskip("megatron.core", reason="needs Megatron-core")
    import megatron_patch
    from tests.helpers.megatron import models as megatron_models
    from tests.helpers.megatron.gpt_shards import SHAPES, gpt

    megatron_patch.cpu_shims()
    sizes = SHAPES["gqa"]
    tokens = torch.randint(sizes["vocab"], (2, 9), generator=torch.Generator().manual_seed(4))
    inputs = {"tokens": tokens[:, :-1], "position_ids": torch.arange(8).expand(2, -1), "labels": tokens[:, 1:]}
    with megatron_models.alone():
        model = gpt("gqa", torch.float32)
        tag_parameters(model)
        report = measure_sharpness(model, [inputs], megatron_gpt, estimator="fisher")
        model(inputs["tokens"], inputs["position_ids"], None, labels=inputs["labels"]).mean().backward()
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    gradient = model.get_parameter(name).grad
    size, queries = sizes["head_dim"], sizes["heads"] // sizes["groups"]
    per_group = gradient.view(sizes["groups"], queries + 2, size, -1)
    rows = {Role.QUERY: per_group[:, :queries], Role.KEY: per_group[:, queries], Role.VALUE: per_group[:, queries + 1]}
    found = {e.role: e.sharpness for e in report.at("parameter") if e.parameter == name}
    assert found == pytest.approx({role: 16 * float(part.square().mean()) for role, part in rows.items()}, rel=1e-4)
    assert len({round(math.log(value), 3) for value in found.values()}) == 3


# ---------------------------------------------------------------------------------------- traps


@pytest.mark.parametrize("estimator", ["gauss_newton", "fisher"])
def test_padding_counts_neither_in_the_loss_nor_in_n(estimator):
    """The padded batch is the unpadded one: same numbers drawn for the same places, same N."""
    model = _tiny()
    short = _tokens(2, 4)
    padded = torch.cat([short, torch.full((2, 2), 6)], dim=1)
    mask = torch.ones_like(padded)
    mask[:, 4:] = 0
    labels = padded.masked_fill(mask == 0, -100)
    for batch in ({"input_ids": padded, "attention_mask": mask}, {"input_ids": padded, "labels": labels}):
        report = measure_sharpness(model, [batch], estimator=estimator)
        alone = measure_sharpness(model, [_cut(short)], forward=_as_if_padded, estimator=estimator)
        assert report.tokens == alone.tokens == 6
        assert report.by_type() == pytest.approx(alone.by_type(), rel=ROUNDING)


def _cut(tokens: Tensor) -> dict[str, Tensor]:
    return {"input_ids": tokens}


def _as_if_padded(model: nn.Module, batch: dict[str, Tensor]) -> Predictions:
    """The short batch's predictions in a frame of the padded one's size, so that draws fall in the same places."""
    found = causal_lm(model, batch)
    logits = torch.nn.functional.pad(found.logits, (0, 0, 0, 2))
    mask = torch.tensor([True, True, True, False, False]).expand(2, 5)
    return Predictions(logits, torch.nn.functional.pad(found.targets, (0, 2)), mask)


def test_frozen_parameters_are_left_out():
    model = _tiny()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name and "layers.1" not in name)
    report = measure_sharpness(model, [_tokens()], draws=2)
    assert "norm" not in report.by_type()
    assert {e.layer for e in report.at("layer")} == {0, None}
    whole = measure_sharpness(_tiny(), [_tokens()], draws=2)
    one, two = ({e.parameter: e.sharpness for e in r.at("parameter")} for r in (report, whole))
    assert one == pytest.approx({name: two[name] for name in one}, rel=ROUNDING)


def test_nothing_of_the_caller_moves():
    """Weights, gradients and random numbers: a measurement between two steps must not be noticed."""
    model = _tiny(attention_dropout=0.3)
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [(p.detach().clone(), p.grad.clone(), p.grad) for p in model.parameters()]
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    for estimator in ("gauss_newton", "fisher"):
        measure_sharpness(model, [_tokens()], estimator=estimator)
    measure_sharpness(model, [_tokens()], estimator="hutchinson", products="differences")
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    for parameter, (weight, value, grad) in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, weight)
        assert parameter.grad is grad
        assert torch.equal(grad, value)


def test_a_sample_with_an_overflow_is_left_out_and_counted():
    model = _tiny()

    def forward(model: nn.Module, batch: tuple[Tensor, float]) -> Predictions:
        found = causal_lm(model, batch[0])
        return Predictions(found.logits * batch[1], found.targets)

    report = measure_sharpness(model, [(_tokens(), 1.0), (_tokens(), math.inf)], forward, estimator="fisher")
    assert (report.samples, report.skipped) == (1, 1)
    assert report.by_type() == measure_sharpness(model, [_tokens()], estimator="fisher").by_type()
    with pytest.raises(FloatingPointError, match="all 1 samples had a gradient that was not finite"):
        measure_sharpness(model, [(_tokens(), math.nan)], forward, estimator="fisher")


# --------------------------------------------------------------------------------------- refusals


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2.0

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2.0


def test_hutchinson_does_not_trust_custom_functions():
    """Their second derivative is wrong in silence where backward depends on what autograd does not see."""
    model = _tiny()

    def forward(model: nn.Module, batch: Tensor) -> Predictions:
        found = causal_lm(model, batch)
        return Predictions(_Doubled.apply(found.logits), found.targets)

    with pytest.raises(ValueError, match=r"_DoubledBackward.*products='differences'"):
        measure_sharpness(model, [_tokens()], forward, estimator="hutchinson")
    measure_sharpness(model, [_tokens()], forward, estimator="hutchinson", products="differences")


def test_hutchinson_names_attention_that_cannot_be_differentiated_twice():
    torch.manual_seed(3)
    model = llama(**TINY, attn_implementation="sdpa")
    tag_parameters(model)
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        measure_sharpness(model, [_tokens()], estimator="hutchinson")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"estimator": "gauss-newton"}, "allowed: gauss_newton, fisher, hutchinson"),
        ({"draws": 0}, "draws = 0: allowed: 1 and more"),
        ({"estimator": "fisher", "draws": 2}, "its labels are the data's"),
        ({"estimator": "hutchinson", "products": "twice"}, "allowed: autograd, differences"),
        ({"estimator": "hutchinson", "products": "differences", "difference": 0.0}, "difference = 0.0"),
    ],
)
def test_wrong_arguments_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        measure_sharpness(_tiny(), [_tokens()], **arguments)


def test_models_and_batches_that_cannot_be_measured():
    with pytest.raises(ValueError, match=r"not tagged: call ds_blockwise.tag_parameters"):
        measure_sharpness(llama(**TINY), [_tokens()])
    with pytest.raises(ValueError, match="no batches"):
        measure_sharpness(_tiny(), [])
    with pytest.raises(ValueError, match="no batches, or none with a prediction"):
        measure_sharpness(_tiny(), [{"input_ids": _tokens(), "labels": torch.full((2, 5), -100)}])
    with pytest.raises(ValueError, match="drown in the rounding of"):
        measure_sharpness(_tiny(torch.bfloat16), [_tokens()], estimator="hutchinson", products="differences")
    frozen = _tiny().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to measure"):
        measure_sharpness(frozen, [_tokens()])
    with pytest.raises(ValueError, match="do not belong to targets"):
        measure_sharpness(_tiny(), [_tokens()], lambda m, b: Predictions(m(b).logits, b[:, 1:]))
