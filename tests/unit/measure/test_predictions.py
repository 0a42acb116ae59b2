# SPDX-License-Identifier: Apache-2.0
"""Predictions of a batch, the labels drawn from them, and their loss."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from ds_blockwise.measure.predictions import (
    Predictions,
    causal_lm,
    draw_labels,
    generator,
    megatron_gpt,
    summed_loss,
    uniforms,
)


def test_labels_are_drawn_from_the_models_distribution():
    """Numbers spread evenly over [0, 1) must give each label its probability, up to one of them."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)) * 3
    count = 20_000
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    for row in logits:
        labels = draw_labels(row.expand(count, 50), numbers)
        found = torch.bincount(labels, minlength=50).double() / count
        assert float((found - row.double().softmax(-1)).abs().max()) < 2 / count
    edges = draw_labels(torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2), torch.tensor([0.0, 1 - 1e-16]))
    assert edges.tolist() == [1, 2]


def test_draws_differ_between_predictions_sequences_and_draws():
    """A number that came twice would make two scores dependent, and the estimate biased."""
    shape = torch.Size([3, 5])
    numbers = torch.stack([uniforms(shape, 0, 0, batch, draw) for batch in range(2) for draw in range(2)])
    assert len(numbers.unique()) == numbers.numel()
    assert torch.equal(uniforms(torch.Size([1, 5]), 2, 0, 0, 0), uniforms(shape, 0, 0, 0, 0)[2:])


def test_draws_move_nobody_elses_random_numbers():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    uniforms(torch.Size([2, 3]), 0, "key")
    assert torch.equal(torch.rand(3), expected)
    first, again, other = (torch.rand(2, generator=generator(*key)) for key in (("a", 1), ("a", 1), ("a", 2)))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_rank_without_sequences_draws_nothing():
    assert uniforms(torch.Size([0, 5]), 3, 0).shape == (0, 5)
    assert draw_labels(torch.empty(0, 5, 7), torch.empty(0, 5, dtype=torch.float64)).shape == (0, 5)


def test_the_loss_is_summed_over_what_counts():
    """By hand: two of three predictions count; each is the log of the sum of exponentials minus the target's logit."""
    logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [5.0, 5.0]]])
    found = Predictions(logits, torch.tensor([[1, 1, 0]]), torch.tensor([[True, True, False]]))
    by_hand = (math.log(1 + math.e) - 1.0) + math.log(math.e**2 + 1)
    assert float(summed_loss(found, found.targets)) == pytest.approx(by_hand, rel=1e-6)
    assert found.tokens == 2
    everything = Predictions(logits, found.targets)
    assert float(summed_loss(everything, found.targets)) == pytest.approx(by_hand + math.log(2), rel=1e-6)
    assert everything.tokens == 3


def test_a_loss_of_bf16_logits_is_summed_in_fp32():
    """256 predictions of log 2 nats each: bf16 would lose the sum's last digits."""
    found = Predictions(torch.zeros(1, 256, 2, dtype=torch.bfloat16), torch.zeros(1, 256, dtype=torch.int64))
    loss = summed_loss(found, found.targets)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(256 * math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("predictions", "words"),
    [
        (Predictions(torch.zeros(2, 5, 7), torch.zeros(2, 4, dtype=torch.int64)), r"shape \(2, 5, 7\).*\(2, 4\)"),
        (Predictions(torch.zeros(7), torch.zeros((), dtype=torch.int64)), r"\[sequences, ..., vocabulary\]"),
        (
            Predictions(torch.zeros(2, 5, 7), torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5)),
            "the mask is torch.float32",
        ),
        (
            Predictions(torch.zeros(2, 5, 7), torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 4).bool()),
            r"shape \(2, 4\); it must be bool, of the targets' shape \(2, 5\)",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(predictions, words):
    with pytest.raises(ValueError, match=words):
        predictions.check()


def test_a_hugging_face_batch_is_shifted_and_its_padding_does_not_count():
    ids = torch.tensor([[3, 1, 4, 1]])
    seen = {}

    def model(**inputs):
        seen.update(inputs)
        return SimpleNamespace(logits=torch.arange(4.0).view(1, 4, 1))

    bare = causal_lm(model, ids)
    assert seen.keys() == {"input_ids"}
    assert bare.logits.flatten().tolist() == [0.0, 1.0, 2.0] and bare.targets.tolist() == [[1, 4, 1]]
    assert bare.tokens == 3
    attention = torch.tensor([[1, 1, 1, 0]])
    labels = torch.tensor([[3, -100, 4, 1]])
    masked = causal_lm(model, {"input_ids": ids, "attention_mask": attention, "labels": labels})
    assert seen.keys() == {"input_ids", "attention_mask"}
    assert masked.mask is not None and masked.mask.tolist() == [[False, True, False]]


def test_a_megatron_batch_is_shifted_already():
    def model(tokens, positions, attention_mask, *, runtime_gather_output):
        assert attention_mask is None and runtime_gather_output
        return torch.stack([tokens, positions], -1).float()

    batch = {"tokens": torch.tensor([[7, 8]]), "position_ids": torch.tensor([[0, 1]]), "labels": torch.tensor([[1, 0]])}
    found = megatron_gpt(model, batch)
    assert found.logits.tolist() == [[[7.0, 0.0], [8.0, 1.0]]]
    assert found.targets.tolist() == [[1, 0]] and found.mask is None
    masked = megatron_gpt(model, {**batch, "loss_mask": torch.tensor([[1.0, 0.0]])})
    assert masked.mask is not None and masked.mask.tolist() == [[True, False]]


def test_a_batch_that_is_neither_a_mapping_nor_a_tensor_is_named() -> None:
    with pytest.raises(TypeError, match=r'must be \{"input_ids": tensor\} or a tensor of token ids, got list'):
        causal_lm(torch.nn.Identity(), [[1, 2, 3]])
