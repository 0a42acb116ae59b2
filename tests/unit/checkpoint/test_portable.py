# SPDX-License-Identifier: Apache-2.0
"""The portable checkpoint by itself: windows, second moments per block, files, and what a damaged one says."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.spec import apply_settings
from ds_blockwise.blocks.structure import HeadGeometry, fused_qkv, whole_tensor
from ds_blockwise.checkpoint import portable
from ds_blockwise.checkpoint.folder import open_checkpoint, partial_folders
from ds_blockwise.checkpoint.manifest import CheckpointError, verify
from ds_blockwise.checkpoint.portable import Portable, per_block, per_element, save_portable, whole_of, window_of

pytest.importorskip("safetensors", reason="portable checkpoints are safetensors files")


def spec(
    name: str, shape: tuple[int, ...], role: Role = Role.FFN, *, bias: bool = False, axis: int = 0, **granularity: Any
):
    structure = whole_tensor(name, shape, role, is_bias=bias, axis=axis)
    return apply_settings(structure, BlockSettings.parse(None, None, granularity or None, None))


def qkv(name: str, **granularity: str):
    heads = HeadGeometry(num_heads=4, num_kv_heads=2, head_dim=3, source="test")
    structure = fused_qkv(name, (24, 5), "grouped", heads, is_bias=False)
    return apply_settings(structure, BlockSettings.parse(None, None, granularity or None, None))


# ---------------------------------------------------------------------------------- windows


@st.composite
def windows(draw: st.DrawFn) -> tuple[tuple[int, ...], TensorShard | None, int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    shard = None
    if draw(st.booleans()):
        dim = draw(st.integers(0, len(shape) - 1))
        cuts = sorted(draw(st.lists(st.integers(0, shape[dim]), min_size=3, max_size=3)))
        bounds = [0, *cuts, shape[dim]]
        pieces = list(pairwise(bounds))
        # uneven, interleaved (a fused gate and up), and possibly empty on a rank
        shard = TensorShard(shape, dim, draw(st.integers(0, 1)), ((pieces[0], pieces[2]), (pieces[1], pieces[3])))
    numel = torch.Size(shape if shard is None else shard.local_shape).numel()
    start = draw(st.integers(0, numel))
    return shape, shard, start, draw(st.integers(0, numel - start))


@given(windows())
@settings(max_examples=200, deadline=None)
def test_a_window_is_the_range_of_the_flattened_shard(case: tuple[Any, ...]) -> None:
    """A rank would get other elements of the parameter than its flat partition holds."""
    shape, shard, start, numel = case
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    local = whole
    if shard is not None:
        index = [i for low, high in shard.chunks[shard.rank] for i in range(low, high)]
        local = whole.index_select(shard.dim, torch.tensor(index, dtype=torch.long))
    assert torch.equal(window_of(whole, shape, shard, start, numel), local.reshape(-1)[start : start + numel])


@given(windows())
@settings(max_examples=200, deadline=None)
def test_shards_make_the_whole_again(case: tuple[Any, ...]) -> None:
    """Uneven, interleaved or empty shards would be put where another rank's belong."""
    shape, shard, _, _ = case
    if shard is not None:
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        ranks = [TensorShard(shape, shard.dim, rank, shard.chunks) for rank in range(len(shard.chunks))]
        locals_ = {r.rank: window_of(whole, shape, r, 0, torch.Size(r.local_shape).numel()) for r in ranks}
        assert torch.equal(whole_of(shard, locals_), whole)


# --------------------------------------------------------------------------- second moments


@pytest.mark.parametrize(
    "blocks",
    [
        qkv("a"),
        qkv("b", value="tensor", query="tensor"),
        qkv("c", key="element"),
        spec("d", (7, 3)),
        spec("e", (3, 7), axis=1),
        spec("f", (6,), bias=True),
        spec("g", (6,), Role.NORM),
        spec("h", (4, 3, 2)),
    ],
    ids=lambda s: s.fqn,
)
def test_block_values_are_exact_in_both_directions(blocks: Any) -> None:
    """Each conversion would move a run by a rounding, or put a block's value into another block."""
    table = portable.global_table(blocks)
    values = torch.rand(table.num_blocks, generator=torch.Generator().manual_seed(1))
    elements = per_element(values, blocks)
    assert elements.shape == blocks.shape
    assert torch.equal(per_block(elements, blocks), values)


def test_another_optimizers_second_moments_become_means() -> None:
    """Adam-mini started from AdamW's state needs the mean over each block: a head's rows, all of V."""
    blocks = qkv("w", value="tensor")
    elements = torch.rand(24, 5, generator=torch.Generator().manual_seed(2))
    found = per_element(per_block(elements, blocks), blocks)
    rows = torch.arange(24)
    value_rows = (rows % 12) >= 9  # per group of 12 rows: two query heads, one key head, one value head of 3
    for head in range(8):
        if head % 4 != 3:
            mean = elements[3 * head : 3 * head + 3].double().mean()
            torch.testing.assert_close(found[3 * head : 3 * head + 3].double(), mean.expand(3, 5), rtol=1e-7, atol=0)
    mean = elements[value_rows].double().mean()
    torch.testing.assert_close(found[value_rows].double(), mean.expand(6, 5), rtol=1e-7, atol=0)


# -------------------------------------------------------------------------------------- files


@dataclass
class FakeSource:
    """Three parameters, one frozen one and a buffer, in memory."""

    specs: dict[str, Any] = field(default_factory=lambda: {"qkv": qkv("qkv"), "up": spec("up", (9, 4))})
    origin: dict[str, Any] = field(
        default_factory=lambda: {"tag": "step_7", "global_steps": 7, "topology": {"world_size": 2}}
    )
    breaks_at: str = ""

    def __post_init__(self) -> None:
        parameters = {
            name: {
                "shape": list(s.shape),
                "axis": s.axis,
                "is_bias": False,
                "num_blocks": s.num_blocks,
                "parts": [
                    [
                        p.start,
                        p.end,
                        p.role.value,
                        r.head_rows,
                        p.granularity,
                        1.0,
                        1.0,
                        p.rows_per_block,
                        p.first_block,
                    ]
                    for p, r in zip(s.parts, s.structure.spans, strict=True)
                ],
            }
            for name, s in self.specs.items()
        }
        self.record = {
            "format": 1,
            "optimizer": "BlockwiseAdamMini",
            "version": "0.1.0",
            "shares_second_moment": True,
            "settings": {"optimizer": "BlockwiseAdamMini"},
            "parameters": parameters,
            "tensors": ["not written"],
        }
        self.steps = dict.fromkeys(self.specs, 7)
        self.group_of = dict.fromkeys(self.specs, 0)
        self.param_groups = [{"lr": 0.5, "betas": [0.9, 0.95]}]
        self.training_state = {"lr_scheduler": None, "counters": {}, "loss_scale": {}, "client_state": {"a": [1, "b"]}}

    def names(self, kind: str) -> list[str]:
        return {"frozen": ["old"], "buffers": ["mask"]}.get(kind, list(self.specs))

    def tensor(self, kind: str, name: str) -> Tensor:
        if name == self.breaks_at:
            raise OSError("No space left on device")
        generator = torch.Generator().manual_seed(len(kind) * 100 + len(name))
        if kind == "buffers":
            return torch.tensor([True, False])
        if kind == "exp_avg_sq":
            return torch.rand(portable.global_table(self.specs[name]).num_blocks, generator=generator)
        shape = self.specs[name].shape if name in self.specs else (3, 2)
        return torch.rand(shape, generator=generator).to(torch.bfloat16 if kind == "exp_avg" else torch.float32)


@pytest.mark.parametrize("shard_bytes", [1, 300, 1 << 30])
def test_what_is_written_is_read_back(tmp_path, shard_bytes: int) -> None:
    """Whatever the size of the files, every tensor must be found with its values and its dtype."""
    source = FakeSource()
    folder = save_portable(source, tmp_path / "out", shard_bytes)
    assert folder == tmp_path / "out" / "step_7"
    assert (tmp_path / "out" / "latest").read_text() == "step_7"
    found = open_checkpoint(folder)
    assert (found.kind, found.global_steps, verify(folder)) == ("portable", 7, [])
    if shard_bytes == 1:
        assert len(list(folder.glob("weights-*"))) == 2
    opened = Portable(folder)
    for kind in portable.KINDS:
        for name in source.names(kind):
            expected, actual = source.tensor(kind, name), opened.tensor(kind, name)
            assert actual.dtype == expected.dtype and torch.equal(actual, expected), (kind, name)
    assert opened.problems() == []
    assert opened.training_state()["client_state"] == {"a": [1, "b"]}
    assert opened.parameters["up"] == {"step": 7, "group": 0} and opened.param_groups == source.param_groups
    whole = per_element(source.tensor("exp_avg_sq", "qkv"), source.specs["qkv"]).reshape(-1)
    assert torch.equal(opened.window("exp_avg_sq", "qkv", None, 13, 50), whole[13:63])
    assert torch.equal(opened.window("weights", "up", None, 5, 9), source.tensor("weights", "up").reshape(-1)[5:14])


def test_an_existing_checkpoint_is_not_overwritten(tmp_path) -> None:
    """A second conversion into the same folder would replace one that a run may depend on."""
    folder = save_portable(FakeSource(), tmp_path)
    before = (folder / portable.INDEX).read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        save_portable(FakeSource(), tmp_path)
    assert (folder / portable.INDEX).read_bytes() == before


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch) -> None:
    """Half a copy could be taken for a checkpoint."""
    save_portable(FakeSource(), tmp_path)
    later = FakeSource(origin={"tag": "step_8", "global_steps": 8, "topology": {}}, breaks_at="up")
    with pytest.raises(OSError, match="No space"):
        save_portable(later, tmp_path)
    import safetensors.torch

    def full(*_: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    later.breaks_at = ""
    with pytest.raises(CheckpointError, match=r"weights-00001\.safetensors cannot be written.*No space"):
        save_portable(later, tmp_path)
    assert (tmp_path / "latest").read_text() == "step_7"
    assert not partial_folders(tmp_path) and not (tmp_path / "step_8").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("cut", r"weights-00001\.safetensors: 'qkv' cannot be read"),
        ("gone", r"weights-00001\.safetensors: 'qkv' cannot be read"),
        ("index", r"portable\.json cannot be read"),
        ("no index", r"portable\.json cannot be read"),
        ("incomplete", r"portable\.json is incomplete: it lacks parameters"),
        ("later", r"has format 99; this version of ds_blockwise reads 1"),
        ("state", r"training_state\.pt cannot be read"),
    ],
)
def test_damage_is_named(tmp_path, damage: str, words: str) -> None:
    """A library's own message does not say which file of which checkpoint it was."""
    folder = save_portable(FakeSource(), tmp_path)
    weights, index = folder / "weights-00001.safetensors", folder / portable.INDEX
    said = json.loads(index.read_text())
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif damage == "gone":
        weights.unlink()
    elif damage == "index":
        index.write_text(index.read_text()[:-9])
    elif damage == "no index":
        index.unlink()
    elif damage == "incomplete":
        del said["parameters"]
        index.write_text(json.dumps(said))
    elif damage == "later":
        index.write_text(json.dumps(said | {"format": 99}))
    else:
        (folder / portable.TRAINING_STATE).write_bytes(b"PK nothing")

    def use() -> None:
        opened = Portable(folder)
        opened.training_state()
        opened.tensor("weights", "qkv")

    with pytest.raises(CheckpointError, match=words):
        use()
    if damage in ("cut", "gone"):
        assert any("qkv" in problem for problem in Portable(folder).problems())


def test_a_shape_that_the_file_does_not_have_is_a_problem(tmp_path) -> None:
    """``check`` would call an index sound that does not describe its files."""
    folder = save_portable(FakeSource(), tmp_path)
    index = folder / portable.INDEX
    said = json.loads(index.read_text())
    said["tensors"]["weights"]["up"]["shape"] = [4, 9]
    index.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=r"weights of 'up' have the shape \(4, 9\) instead of \(9, 4\)"):
        Portable(folder)
    said["tensors"]["weights"]["up"]["shape"] = [9, 4]
    said["tensors"]["frozen"]["old"]["shape"] = [2, 3]
    index.write_text(json.dumps(said))
    assert Portable(folder).problems() == ["frozen-00001.safetensors: 'old' has shape (3, 2) instead of (2, 3)"]
