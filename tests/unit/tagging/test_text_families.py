# SPDX-License-Identifier: Apache-2.0
"""Every parameter of encoders, encoder-decoders, hybrids and heads, from the real classes, against tables by hand."""

import pytest

pytest.importorskip("transformers", reason="the models are transformers' own")

from tests.helpers.tables.text import ENCODERS
from tests.helpers.tables.text_families import TEXT_FAMILIES, build_text
from tests.helpers.tables.text_hybrids import DECODERS
from tests.unit.tagging.test_families import tags_of

TEXT = ENCODERS | DECODERS


@pytest.mark.parametrize("model", TEXT)
def test_every_parameter_is_what_the_model_code_makes_of_it(model):
    """None needs a rule, and none is read as something that it is not."""
    assert tags_of(build_text(model)) == TEXT[model]


def test_every_model_has_a_table():
    """One without would be built and never looked at."""
    assert set(TEXT) == set(TEXT_FAMILIES)
