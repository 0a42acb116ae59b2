# SPDX-License-Identifier: Apache-2.0
"""Every model class of the installed transformers against the record of what its parameters are tagged as.

The record says what the rules do, not what is right: it was read against the classes' ``forward`` when it was written,
and every later difference has to be read as well. It is written anew by ``python -m tests.helpers.tables.survey``.
"""

import difflib

import pytest

from ds_blockwise.blocks.roles import Role
from ds_blockwise.tagging.module_facts import _FUSED
from ds_blockwise.tagging.owner_class import _CHILDREN
from tests.helpers.tables import survey

transformers = pytest.importorskip("transformers", reason="the model classes are transformers' own")

# One of each kind: fused in every layout, latent attention, state space, experts, encoders, towers, convolutions
SAMPLE = (
    "bert",
    "bloom",
    "clip",
    "dbrx",
    "deepseek_v3",
    "falcon",
    "gpt2",
    "gpt_bigcode",
    "gpt_oss",
    "llama",
    "mamba2",
    "minimax",
    "mobilebert",
    "modernbert",
    "mpt",
    "openai",
    "phi3",
    "qwen2_vl",
    "qwen3_next",
    "siglip",
    "t5",
    "whisper",
)


def compare(files):
    """Fail with what changed, family by family, and the command that writes the record anew."""
    recorded_with, recorded = survey.read_record()
    changed, diff = [], []
    for file in files:
        found, known = survey.survey(file).lines(), recorded.get(file, [])
        if found == known or survey.is_incomplete(found) or survey.is_incomplete(known):
            continue
        changed.append(file)
        lines = list(difflib.unified_diff(known, found, f"{file}: recorded", f"{file}: installed", lineterm="", n=1))
        diff += lines[:40] + ([f"... and {len(lines) - 40} lines more"] if len(lines) > 40 else [])
    gone = sorted(set(recorded) - set(survey.modeling_files()))
    if changed or gone:
        pytest.fail(
            f"transformers {transformers.__version__} (recorded: {recorded_with}): {len(changed)} families are tagged "
            f"differently: {', '.join(changed)}. Gone: {', '.join(gone) or 'none'}.\nA kind of parameter that moves to "
            f"another line trains at another rate: read each against its class, then write the record anew with\n"
            f"  {survey.COMMAND}\n" + "\n".join(diff[:400]),
            pytrace=False,
        )


def test_a_sample_of_the_families():
    """Enough of them for every change of a rule to show in `make test`."""
    compare(f"{name}.modeling_{name}" for name in SAMPLE)


@pytest.mark.slow
def test_all_families():
    """A new version of transformers, or a new rule, shows here what it changes."""
    compare(survey.modeling_files())


def test_no_class_of_the_record_crashes():
    """A traceback of ours is no answer to a model of theirs."""
    _, recorded = survey.read_record()
    lines = [(file, line) for file, section in recorded.items() for line in section]
    assert len(recorded) > 400
    assert not [found for found in lines if found[1].strip().startswith(("crash", "rules disagree"))]


def test_every_fused_weight_of_the_record_belongs_to_a_checked_class():
    """The table of classes and the record have to agree on what was read."""
    _, recorded = survey.read_record()
    fused = {"query key value", "key value", "value key", "query attn_out"}
    tag, found = "", set()
    for section in recorded.values():
        for line in section:
            if not line.startswith("    "):
                tag = line.strip().removeprefix("per head: ").removesuffix(" [inputs, outputs]")
            elif tag.removesuffix(" headless") in fused:
                name, _, parent = line.strip().partition(" in ")
                if "in_proj_weight" not in name:  # of PyTorch's own attention
                    found.add((parent.replace("Sdpa", ""), name.split(".")[-2]))  # they derive from a checked class
    checked = {(name.rpartition(".")[2], linear) for name, linear in _FUSED}
    checked |= {(of.strip("^$"), name) for of, name, what in _CHILDREN if not isinstance(what, Role)}
    assert found <= checked
