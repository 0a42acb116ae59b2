# SPDX-License-Identifier: Apache-2.0
"""What a GPU would run for real models, compiled without one: no spills, wide accesses, several programs at a time."""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from ds_blockwise.kernels.triton.tables import Kind
from tests.helpers import ROOT
from tests.helpers.gpu_code.mixes import MIXES, PARTS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheel holds the GPU assembler on Linux only")
CAPABILITIES = (80, 90)


@pytest.fixture(scope="module")
def launches():
    """Every launch of every mix, from a process without the interpreter in which contraction is off by default."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])
    command = [sys.executable, "-m", "tests.helpers.gpu_code", *map(str, CAPABILITIES)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(one["mix"], one["capability"]) for one in found} == {*itertools.product((*MIXES, *PARTS), CAPABILITIES)}
    return found


SPILLED = {  # bytes of a thread: two registers, of rows of 4096 with edges; other orders of the loads spill more
    ("LLaMA 2B, cut at an odd place, fused step, bf16", 80): 8,
}


def test_nothing_is_spilled(launches):
    """A spilled register is read from memory for each element."""
    assert not [one for one in launches if one["spilled"] > SPILLED.get((one["mix"], one["capability"]), 0)]


def test_contraction_does_not_depend_on_a_default(launches):
    """Triton 3.10 turns it off by default, and weights would change with the version; Lion's signs bear none."""
    assert all(one["fused"] is ("Lion" not in one["mix"]) for one in launches)


def test_bf16_is_rounded_by_the_hardware(launches):
    updates = [one for one in launches if one["kernel"] == "update_kernel" and one["capability"] == 90]
    assert {one["mix"] for one in updates if one["bf16"]} == {name for name in MIXES if "bf16" in name}


LAUNCHES = {  # of a step, with the sums of split blocks; each costs the host some microseconds
    "LLaMA 2B": 7,
    "LLaMA 2B, bf16": 7,
    "LLaMA 2B, cautious": 7,
    "LLaMA 2B, ZeRO shard": 9,
    "LLaMA 2B, ZeRO shard, AdamW": 2,
    "LLaMA 2B, ZeRO shard, AdamW, gradient at 8 bytes": 2,
    "LLaMA 2B, ZeRO shard, AdamW, gradient at 4 bytes": 2,
    "LLaMA 2B, cut at an odd place": 9,
    "LLaMA 2B, cut at an odd place, bf16": 9,
    "LLaMA 2B, cut at an odd place, cautious AdamW": 2,
    "LLaMA 2B, ZeRO shard, fused step, bf16": 9,
    "LLaMA 2B, cut at an odd place, fused step, bf16": 9,
    "LLaMA 2B, cut at an odd place, fused step of AdamW, bf16": 2,
    "GPT-2 medium, ZeRO shard, fused step, bf16": 9,
    "LLaMA 2B, ZeRO shard, Lion": 2,
    "LLaMA 2B, cut at an odd place, Lion, bf16": 2,
    "LLaMA 2B, cut at an odd place, cautious Lion": 2,
    "GPT-2 medium": 7,
    "GPT-2 medium, ZeRO shard": 9,
    "GPT-2 medium, cut at an odd place": 12,
    "GPT-2 medium, AdamW": 3,
    "GPT-2 medium, Lion": 3,
    "MoE": 7,
    "LoRA": 4,
    "LoRA, cut at an odd place": 9,
    **dict.fromkeys(PARTS, 2),
}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_number_of_launches(launches, capability):
    """A launch for each form of job, whatever the number of tensors."""
    assert Counter(one["mix"] for one in launches if one["capability"] == capability) == LAUNCHES


OF_PARTS = ("momentum_kernel", "descend_kernel")


def of_tensors(launches):
    return [one for one in launches if one["kernel"] in ("sum_kernel", "update_kernel", *OF_PARTS)]


def test_four_programs_are_resident(launches):
    """Fewer would not hide the latency of memory. One kernel for all kinds of job had 254 registers and one program."""
    assert not [one for one in of_tensors(launches) if one["residents"] < 4]


ALIGNED = [name for name in MIXES if "odd" not in name and "at 4 bytes" not in name]


@pytest.mark.parametrize("mix", ALIGNED)
def test_updates_of_aligned_tensors_take_vectors(launches, mix):
    """All but second moments: one for a row, or an element's at any place in a table that blocks share."""
    updates = [one for one in launches if one["mix"] == mix and one["kernel"] == "update_kernel"]
    assert updates
    for one in updates:
        shares_table = one["meta"]["KIND"] == Kind.ELEMENTS and not one["meta"]["SAME"]
        for operation in ("loads", "stores"):
            narrow = sum(count for width, count in one[operation].items() if int(width) < 8)
            assert one[operation]["16"] and narrow <= (8 if shares_table else 3), one


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_lion_reads_and_writes_each_tensor_once(launches, capability):
    """Three tensors read and two written, 20 bytes an element; torch's operations move 52."""
    mix = "LLaMA 2B, ZeRO shard, Lion"
    (update,) = (
        one for one in launches if (one["mix"], one["kernel"], one["capability"]) == (mix, "update_kernel", capability)
    )
    of_each = 8 * 4  # bytes of a thread: 8 elements in fp32
    assert bytes_by_width(update, "loads") == {16: 3 * of_each}
    assert bytes_by_width(update, "stores") == {16: 2 * of_each}


def bytes_by_width(launch, operation):
    return {int(width): int(width) * count for width, count in launch[operation].items()}


@pytest.mark.parametrize(("bytes_", "capability"), [(8, 80), (8, 90), (4, 80), (4, 90)])
def test_a_gradient_at_an_odd_address_narrows_its_own_accesses_only(launches, bytes_, capability):
    """A bucket's gradient may begin anywhere; every tensor was then read by 4 bytes, with 164 registers a thread."""
    mix = f"LLaMA 2B, ZeRO shard, AdamW, gradient at {bytes_} bytes"
    (update,) = (
        one for one in launches if (one["mix"], one["kernel"], one["capability"]) == (mix, "update_kernel", capability)
    )
    of_each = 8 * 4  # bytes of a thread: 8 elements in fp32
    assert bytes_by_width(update, "loads") == {16: 3 * of_each, bytes_: of_each}
    assert bytes_by_width(update, "stores") == {16: 3 * of_each}


@pytest.mark.parametrize("mix", [name for name in PARTS if "odd" not in name])
def test_parts_of_aligned_matrices_take_vectors_alone(launches, mix):
    """Each element is read once and written once."""
    found = [one for one in launches if one["mix"] == mix]
    assert {one["kernel"] for one in found} == set(OF_PARTS)
    narrow = "bf16" in mix
    of_each = {2: 16, 4: 32}  # bytes of 8 elements, by the size of one
    for one in found:
        moment, weight = (2 if narrow else 4), (2 if "weight in bf16" in mix else 4)
        copied = of_each[2] if mix.endswith("weight, bf16") else 0
        reads, writes = {
            "momentum_kernel": (2 * of_each[moment], of_each[moment] + of_each[4]),
            "descend_kernel": (of_each[weight] + of_each[4], of_each[weight] + copied),
        }[one["kernel"]]
        assert (bytes_by_width(one, "loads"), bytes_by_width(one, "stores")) == ({16: reads}, {16: writes}), one
        assert one["residents"] >= 6, one


def test_parts_at_an_odd_place_are_read_once_too(launches):
    for one in (one for one in launches if one["mix"] == "Muon, cut at an odd place"):
        reads, writes = (64, 64) if one["kernel"] == "momentum_kernel" else (64, 32)
        assert sum(bytes_by_width(one, "loads").values()) == reads
        assert sum(bytes_by_width(one, "stores").values()) == writes
