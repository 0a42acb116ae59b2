# SPDX-License-Identifier: Apache-2.0
"""Multipliers from ratios of sharpness: clamped powers, near the published ones, refused where they make no sense."""

from __future__ import annotations

import math

import pytest

from ds_blockwise.blocks.settings.defaults import DEFAULT_EXPONENT
from ds_blockwise.measure.ratios import multipliers_from_sharpness

PAPER = {"emb": 8.5e-7, "qk": 1.45e-6, "ffn": 2.9e-6, "vo": 5.4e-6, "norm": 3.1e-5}  # LLaMA 0.25B, step 40000


def test_multipliers_are_clamped_powers_of_the_ratios():
    found = multipliers_from_sharpness({"norm": 8.0, "vo": 2.0, "ffn": 0.5, "emb": 1e-9, "other": 32.0}, exponent=0.5)
    assert found == {"norm": 1.0, "vo": 2.0, "ffn": 4.0, "emb": 16.0, "other": 1.0}
    assert multipliers_from_sharpness({"norm": 8.0, "vo": 2.0}, exponent=1.0, low=5.0) == {"norm": 5.0, "vo": 5.0}


def test_the_default_exponent_is_between_those_that_give_the_published_multipliers():
    published = {"emb": 10.0, "qk": 8.0, "ffn": 6.0, "vo": 4.0}
    exponents = [math.log(r) / math.log(PAPER["norm"] / PAPER[name]) for name, r in published.items()]
    assert min(exponents) < DEFAULT_EXPONENT < max(exponents)
    found = multipliers_from_sharpness(PAPER, exponent=DEFAULT_EXPONENT)
    for name, value in published.items():
        assert found[name] == pytest.approx(value, rel=0.25)


@pytest.mark.parametrize(
    ("sharpness", "settings", "text"),
    [
        ({"emb": 1.0}, {}, "no sharpness of 'norm'"),
        ({"norm": 1.0, "emb": 0.0}, {}, "sharpness of 'emb' is 0.0"),
        ({"norm": 1.0, "emb": math.nan}, {}, "sharpness of 'emb' is nan"),
        ({"norm": -1.0}, {}, "sharpness of 'norm' is -1.0"),
        ({"norm": 1.0}, {"exponent": 0.0}, "exponent = 0.0: allowed: above 0"),
        ({"norm": 1.0}, {"high": 0.5}, "low = 1.0, high = 0.5"),
    ],
)
def test_ratios_that_cannot_be_made(sharpness, settings, text):
    with pytest.raises(ValueError, match=text):
        multipliers_from_sharpness(sharpness, **{"exponent": 0.7, **settings})
