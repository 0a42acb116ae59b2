# SPDX-License-Identifier: Apache-2.0
"""Checks of single values: each error names the key, the value and what is allowed."""

from __future__ import annotations

import math

import pytest
import torch

from ds_blockwise.values import as_count, as_mapping, as_multiplier, check_keys, nearest, number, one_of, suggest

ALLOWED = ("lr", "betas", "eps")


def test_an_unknown_key_is_a_sentence_with_and_without_a_near_one() -> None:
    """The allowed keys are a sentence of their own either way."""
    with pytest.raises(
        ValueError, match=r"^x has an unknown key 'beta'; did you mean 'betas'\? Allowed: lr, betas, eps$"
    ):
        check_keys("x", ["lr", "beta"], ALLOWED)
    with pytest.raises(ValueError, match=r"^x has an unknown key 'foo'\. Allowed: lr, betas, eps$"):
        check_keys("x", ["foo"], ALLOWED)
    check_keys("x", ALLOWED, ALLOWED)


def test_the_nearest_word() -> None:
    """Keys of a file may be numbers or truth values."""
    assert nearest("beta", ALLOWED) == "betas"
    assert nearest("beta", ALLOWED, likeness=0.9) is None
    assert nearest("tyni", ["tiny", "large"]) == "tiny"
    assert suggest("beta", ALLOWED) == "; did you mean 'betas'?"
    assert nearest(7, ALLOWED) is None and suggest(True, ALLOWED) == ""


@pytest.mark.parametrize("value", [True, "1", None])
def test_what_is_no_number_is_a_type_error(value: object) -> None:
    for check in (as_multiplier, lambda name, given: number(name, given, low=0.0)):
        with pytest.raises(TypeError, match=r"^x must be a number.*got "):
            check("x", value)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 10**400])
def test_numbers_outside_their_range(value: float) -> None:
    with pytest.raises(ValueError, match=r"^x must be finite and >= 0, got "):
        as_multiplier("x", value)
    with pytest.raises(ValueError, match=r"^x must be >= 0 and < 1, got "):
        number("x", value, low=0.0, below=1.0)


def test_numbers_inside_their_range() -> None:
    assert number("x", torch.tensor(2), low=0.0) == as_multiplier("x", 2) == 2.0
    assert as_count("x", 3) == 3
    with pytest.raises(TypeError, match='x is "auto", which only HF Trainer and Accelerate fill in'):
        number("x", "auto", low=0.0)


@pytest.mark.parametrize("value", [0, 1.5, True, math.nan])
def test_counts_are_whole_and_positive(value: object) -> None:
    with pytest.raises(ValueError, match=r"^x must be an integer >= 1, got "):
        as_count("x", value)


def test_choices_and_mappings() -> None:
    assert one_of("x", "b", ("a", "b")) == "b"
    with pytest.raises(ValueError, match=r"^x must be one of a, b, got 'c'$"):
        one_of("x", "c", ("a", "b"))
    assert as_mapping("x", None) == {}
    with pytest.raises(TypeError, match=r"^x must be a mapping, got \[\]$"):
        as_mapping("x", [])
