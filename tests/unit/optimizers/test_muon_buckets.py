# SPDX-License-Identifier: Apache-2.0
"""Muon's matrices over ranks, bucket by bucket: bits, collectives, bytes that travel, bytes that are allocated."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from ds_blockwise import BlockwiseMuon
from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.segment_table import Placement
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.spec import apply_settings
from ds_blockwise.blocks.structure import HeadGeometry, TensorStructure, fused_qkv, whole_tensor
from ds_blockwise.parallel.reduce import LOCAL, ReductionGroups
from tests.unit.optimizers.threaded_ranks import PeakBytes, ThreadedGroup, ThreadedRanks

SETTINGS: dict[str, Any] = {"lr": 2e-2, "weight_decay": 0.1, "lr_multipliers": {"qk": 2.0, "norm": 0.5}}
Layers = dict[str, tuple[TensorStructure, int | None]]
"""By name a parameter, and the dimension that tensor parallelism splits."""

HEADS = HeadGeometry(4, 4, 3, "test")
LAYER: Layers = {
    "qkv": (fused_qkv("qkv", (36, 8), "grouped", HEADS, is_bias=False), 0),
    "out": (whole_tensor("out", (8, 12), Role.ATTN_OUT, is_bias=False), 1),
    "up": (replace(whole_tensor("up", (24, 8), Role.FFN, is_bias=False), fused_parts=2), 0),
    "norm": (whole_tensor("norm", (8,), Role.NORM, is_bias=False), None),
    "down": (whole_tensor("down", (8, 12), Role.FFN, is_bias=False), 1),
}
LAYERS: Layers = {f"{number}.{name}": given for number in range(2) for name, given in LAYER.items()}
SQUARE = 32  # rows of an FFN's matrix in the tests of memory


def squares(count: int) -> Layers:
    return {str(n): (whole_tensor("w", (SQUARE, SQUARE), Role.FFN, is_bias=False), None) for n in range(count)}


@dataclass
class Sharded:
    """Muon on ranks that are threads, each with a flat partition, and on one process with everything.

    Attributes:
        stage: 3 cuts every parameter, 1 the flat buffer of all.
        backend: what steps tensors.
        count: whether to find the most bytes that each rank allocates in its last step.
    """

    ranks: ThreadedRanks
    dp: int
    tp: int = 1
    stage: int = 3
    layers: Layers = field(default_factory=lambda: LAYERS)
    settings: dict[str, Any] = field(default_factory=dict)
    backend: str = "reference"
    count: bool = False
    peaks: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.params = {**SETTINGS, **self.settings}
        parsed = BlockSettings.parse(**BlockwiseMuon.block_arguments(self.params))
        parsed = replace(parsed, orthogonalize=BlockwiseMuon([torch.zeros(1)], **self.params).orthogonalize)
        self.specs = {name: apply_settings(replace(s, fqn=name), parsed) for name, (s, _) in self.layers.items()}
        grid = [(d, t) for d in range(self.dp) for t in range(self.tp)]  # rank = d * tp + t
        self.dp_groups = [self.ranks.group([grid.index((d, t)) for d in range(self.dp)]) for t in range(self.tp)]
        self.tp_groups = [self.ranks.group([grid.index((d, t)) for t in range(self.tp)]) for d in range(self.dp)]

    def whole(self, name: str, step: int) -> torch.Tensor:
        """A start value, step -1, or a gradient."""
        seed = 10_000 * (step + 2) + list(self.layers).index(name)
        shape = self.specs[name].structure.stored_shape
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def shard(self, name: str, tp_rank: int) -> TensorShard | None:
        structure, dim = self.layers[name]
        if dim is None or self.tp == 1:
            return None
        return TensorShard.even(structure.shape, dim, tp_rank, self.tp, stride=structure.fused_parts)

    def local(self, name: str, step: int, tp_rank: int) -> torch.Tensor:
        whole, shard = self.whole(name, step), self.shard(name, tp_rank)
        if shard is None:
            return whole.view(-1)
        chunks = [whole.narrow(shard.dim, start, end - start) for start, end in shard.chunks[tp_rank]]
        return torch.cat(chunks, shard.dim).reshape(-1)

    def windows(self, dp_rank: int, tp_rank: int) -> Iterator[tuple[str, int, int, tuple[int, ...]]]:
        """Name, start and end in the flattened shard, and where other ranks' ranges begin."""
        sizes = {name: self.local(name, -1, tp_rank).numel() for name in self.layers}
        starts = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
        part = -(-sum(sizes.values()) // self.dp)
        for name, size in sizes.items():
            piece, before = (part, starts[name]) if self.stage == 1 else (-(-size // self.dp), 0)
            cuts = [at - before for at in range(0, before + size, piece)]
            start, end = (min(max(piece * d - before, 0), size) for d in (dp_rank, dp_rank + 1))
            yield name, start, end, tuple(cut for cut in cuts if 0 < cut < size)

    def flat(self, step: int, dp_rank: int, tp_rank: int) -> torch.Tensor:
        pieces = [self.local(n, step, tp_rank)[a:b] for n, a, b, _ in self.windows(dp_rank, tp_rank)]
        return torch.cat([*pieces, torch.zeros(3)])  # padding

    def optimizer_of(self, dp_rank: int, tp_rank: int) -> tuple[torch.Tensor, BlockwiseMuon]:
        flat = self.flat(-1, dp_rank, tp_rank)
        optimizer = BlockwiseMuon([flat], backend=self.backend, **self.params)
        placements, at = [], 0
        for name, start, end, cuts in self.windows(dp_rank, tp_rank):
            placements.append(Placement(self.specs[name], self.shard(name, tp_rank), at, start, end - start, cuts))
            at += end - start
        groups = LOCAL
        if self.dp * self.tp > 1:
            groups = ReductionGroups(
                self.dp_groups[tp_rank] if self.dp > 1 else None, self.tp_groups[dp_rank] if self.tp > 1 else None
            )
        optimizer.bind(flat, placements, groups)
        return flat, optimizer

    def train(self, steps: int = 2) -> list[dict[str, torch.Tensor]]:
        """Per rank its piece of every parameter, and its state's block vector and momentum."""

        def of_rank(rank: int) -> dict[str, torch.Tensor]:
            dp_rank, tp_rank = divmod(rank, self.tp)
            flat, optimizer = self.optimizer_of(dp_rank, tp_rank)
            for step in range(steps):
                flat.grad = self.flat(step, dp_rank, tp_rank)
                with PeakBytes() if self.count else nullcontext() as counted:
                    optimizer.step()
                if counted is not None:
                    self.peaks[rank] = counted.peak
            sizes = [end - start for _, start, end, _ in self.windows(dp_rank, tp_rank)]
            pieces = flat[: sum(sizes)].split(sizes)
            return dict(zip(self.layers, pieces, strict=True))

        return self.ranks.run(of_rank)

    def assert_same_bits(self, found: list[dict[str, torch.Tensor]], whole: dict[str, torch.Tensor]) -> None:
        for rank, pieces in enumerate(found):
            dp_rank, tp_rank = divmod(rank, self.tp)
            for name, start, end, _ in self.windows(dp_rank, tp_rank):
                shard = self.shard(name, tp_rank)
                wanted = whole[name].view(self.specs[name].structure.stored_shape)
                if shard is not None:
                    chunks = [wanted.narrow(shard.dim, a, b - a) for a, b in shard.chunks[tp_rank]]
                    wanted = torch.cat(chunks, shard.dim)
                assert torch.equal(pieces[name], wanted.reshape(-1)[start:end]), (rank, name)

    @property
    def exchanges(self) -> list[int]:
        """Per rank how many exchanges it took part in."""
        return [sum(len(sent[rank]) for sent in self._sent if rank in sent) for rank in range(self.ranks.size)]

    @property
    def bytes_sent(self) -> list[int]:
        """Per rank what it sent to others."""
        return [sum(sum(sent[rank]) for sent in self._sent if rank in sent) for rank in range(self.ranks.size)]

    @property
    def _sent(self) -> list[dict[int, list[int]]]:
        groups: list[ThreadedGroup] = [*self.dp_groups, *self.tp_groups]
        return [group.sent for group in groups]


CASES: dict[str, dict[str, Any]] = {
    "roles": {},
    "heads in bf16": {"orthogonalize": {"qk": "head", "vo": "head"}, "newton_schulz_dtype": "bf16"},
    "weights": {"orthogonalize": {"qk": "matrix", "vo": "matrix", "ffn": "matrix"}},
}
GRIDS = [(3, 1, 1), (3, 1, 3), (1, 2, 3), (2, 2, 1), (2, 2, 3)]  # data- and tensor-parallel ranks, ZeRO stage


@pytest.mark.parametrize("name", CASES)
def test_no_bit_depends_on_ranks_or_buckets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = CASES[name]
    (whole,) = Sharded(ThreadedRanks(1, monkeypatch), 1, settings=settings).train()
    for dp, tp, stage in GRIDS:
        counted = []
        for bucket_bytes in (1, 1 << 28):
            ranks = ThreadedRanks(dp * tp, monkeypatch)
            case = Sharded(ranks, dp, tp, stage, settings={**settings, "bucket_bytes": bucket_bytes})
            case.assert_same_bits(case.train(), whole)
            counted.append((case.exchanges, case.bytes_sent))
        (many, bytes_of_many), (few, bytes_of_few) = counted
        assert bytes_of_many == bytes_of_few, (dp, tp, stage)
        assert max(few) <= 3 * 2 * 4 and sum(many) > sum(few), "an exchange per group, there and back, of both kinds"


def test_no_bit_depends_on_ranks_by_triton_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut rows, columns of shards and whole matrices take other forms of a launch."""
    module = pytest.importorskip("ds_blockwise.kernels.triton.backend", reason="Triton is not installed")
    run, one_at_a_time = module._run, threading.Lock()  # the interpreter knows one launch

    def locked(*args: Any, **meta: Any) -> None:
        with one_at_a_time:
            run(*args, **meta)

    monkeypatch.setattr(module, "_run", locked)
    settings = {"cautious_weight_decay": True, "momentum_dtype": "bf16"}
    (whole,) = Sharded(ThreadedRanks(1, monkeypatch), 1, settings=settings, backend="triton").train()
    for dp, tp, stage in GRIDS[-2:]:
        case = Sharded(ThreadedRanks(dp * tp, monkeypatch), dp, tp, stage, settings=settings, backend="triton")
        case.assert_same_bits(case.train(), whole)


def test_memory_does_not_grow_with_the_number_of_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = 4 * SQUARE * (SQUARE + 1)

    def peak(count: int, bucket_bytes: int) -> tuple[int, int]:
        case = Sharded(
            ThreadedRanks(2, monkeypatch), 2, layers=squares(count), settings={"bucket_bytes": bucket_bytes}, count=True
        )
        case.train(2)
        return max(case.peaks.values()), case.exchanges[0] // 2

    # 2 ranks own 2 matrices each in a bucket: 4 matrices, there and back
    (some, exchanges), (more, twice) = (peak(count, 2 * matrix) for count in (16, 48))
    assert (exchanges, twice) == (2 * 16 // 4, 2 * 48 // 4)
    assert some == more, "allocated"
    # what is sent, what arrives, the matrix, and Newton-Schulz on it: its input, two squares, a result
    assert more <= (2 + 2 + 1 + 4) * matrix
    (all_of_some, once), (all_of_more, _) = (peak(count, 1 << 30) for count in (16, 48))
    assert once == 2
    assert all_of_more > all_of_some + 2 * 16 * matrix - matrix > some


def test_a_rank_sends_two_nths_of_a_reduce_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO 3: its part of each matrix to the owner and, as an owner, all but its own part back."""
    for dp in (2, 4):
        case = Sharded(ThreadedRanks(dp, monkeypatch), dp, layers=squares(4 * dp))
        case.train(1)
        elements = 4 * dp * SQUARE * SQUARE
        reduce_scatter = 4 * elements * (dp - 1) // dp
        rows = 4 * 2 * 4 * (dp - 1) * (SQUARE // dp)  # their second moments, no row is cut
        assert case.bytes_sent == [2 * reduce_scatter // dp + rows] * dp


@pytest.mark.parametrize("given", [0, 1.5, True, "1G"])
def test_bucket_bytes_is_a_count(given: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="bucket_bytes must be"):
        BlockwiseMuon([torch.zeros(1)], bucket_bytes=given)
