# SPDX-License-Identifier: Apache-2.0
"""Bytes that one process of a run holds: weights, gradients, optimizer state, activations, buffers.

Parameters and blocks are counted on the model itself, on the meta device; the rest follows from sizes. It is a model of
what DeepSpeed 0.19's wrappers and Megatron-core's local layers allocate; `tests/unit/runs/test_plan_memory.py` compares
it with engines that run. What an allocator rounds up, fragments or caches is not in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.segment_table import SegmentTable, build_table, whole_placement
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.spec import BlockSpec
from ds_blockwise.optimizers.muon.matrices import local_matrix, matrices_of
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.runs.model_shape import GPT2, GPTShape
from ds_blockwise.runs.plan_muon import MatrixKind
from ds_blockwise.tagging.module_reader import TensorSplit, tensor_splits
from ds_blockwise.tagging.tag import tag_with_settings

MINI = "BlockwiseAdamMini"
_FP32 = 4


@dataclass(frozen=True)
class Arrangement:
    """How a model is distributed over processes.

    Attributes:
        tp: tensor-parallel size.
        dp: data-parallel size.
        zero_stage: 0 to 3.
        bytes_per_weight: 2 for bf16 and fp16, 4 for fp32.
        offload: optimizer state and master weights in CPU memory.
        bucket_elements: ``reduce_bucket_size``.
        buckets: how many of them are alive: 2 with ``overlap_comm``.
        momentum_bytes: bytes of one element of ``exp_avg``.
    """

    tp: int = 1
    dp: int = 1
    zero_stage: int = 0
    bytes_per_weight: int = 2
    offload: bool = False
    bucket_elements: int = 500_000_000
    buckets: int = 1
    momentum_bytes: int = 4


@dataclass(frozen=True)
class RankCounts:
    """What one tensor-parallel rank holds of a model.

    Attributes:
        parameters: elements of its shards.
        blocks: second moments that Adam-mini keeps for them; a block that ranks share counts on each of them.
        matrices: what Muon orthogonalises, of the whole model; empty for other optimizers.
    """

    parameters: int
    blocks: int
    matrices: tuple[MatrixKind, ...] = ()


def count_rank(model: nn.Module, tp: int, settings: Mapping[str, Any]) -> RankCounts:
    """Count the parameters and blocks of the one of ``tp`` tensor-parallel ranks that holds the most.

    Args:
        model: the whole model, on any device, the meta device too; it is tagged.
        tp: tensor-parallel size.
        settings: block settings of the optimizer's JSON.

    Raises:
        ValueError: as `tag_parameters`; or a split dimension does not divide by ``tp``.
    """
    tag_with_settings(model, BlockSettings.parse(**settings))
    splits = tensor_splits(model)
    alike: dict[tuple[object, ...], list[tuple[BlockSpec, TensorSplit | None]]] = {}
    for param in model.parameters():
        spec = getattr(param, "block_spec", None)
        assert isinstance(spec, BlockSpec), param
        # layers repeat the same few tensors, and a table of a large one takes milliseconds
        key = (spec.shape, spec.axis, spec.structure.matrices, spec.parts, splits.get(param))
        alike.setdefault(key, []).append((spec, splits.get(param)))
    ranks = [[(_table(*same[0], tp, rank), len(same)) for same in alike.values()] for rank in range(tp)]
    return RankCounts(
        max(sum(count * table.numel for table, count in tables) for tables in ranks),
        max(sum(count * table.num_blocks for table, count in tables) for tables in ranks),
        tuple(kind for same in alike.values() for kind in _matrices(*same[0], tp, len(same))),
    )


def _matrices(spec: BlockSpec, split: TensorSplit | None, tp: int, count: int) -> Iterator[MatrixKind]:
    kinds: Counter[tuple[int, int, bool]] = Counter()
    for matrix in matrices_of(spec):
        shards = [_shard(spec, split, tp, rank) for rank in range(tp if split is not None else 1)]
        holders = sum(1 for shard in shards if local_matrix(spec, shard, matrix).size)
        kinds[matrix.rows, matrix.columns, holders > 1] += count
    yield from (MatrixKind(rows, columns, number, cut) for (rows, columns, cut), number in kinds.items())


def _shard(spec: BlockSpec, split: TensorSplit | None, tp: int, rank: int) -> TensorShard | None:
    return None if split is None else TensorShard.even(spec.shape, split.dim, rank, tp, stride=split.parts)


def _table(spec: BlockSpec, split: TensorSplit | None, tp: int, rank: int) -> SegmentTable:
    placement = whole_placement(spec, _shard(spec, split, tp, rank))
    return build_table(placement.numel, [placement], shares_second_moment=True)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, and in CPU memory per process.

    Attributes:
        weights: parameters as the model computes with them.
        gradients: what stays alive until the step.
        step_gradients: the fp32 gradient of the partition, alive during the step.
        masters: fp32 master weights.
        exp_avg: first moments.
        exp_avg_sq: second moments.
        matrices: Muon's, and its buffers of them, alive during the step.
        buckets: ZeRO's communication buffers.
        activations: kept for the backward pass of one micro batch.
        workspace: the loss and, with full checkpointing, the layer that is computed again.
        offloaded: of the above, what lies in CPU memory instead (already taken out of `on_gpu`).
    """

    weights: int
    gradients: int
    step_gradients: int
    masters: int
    exp_avg: int
    exp_avg_sq: int
    matrices: int
    buckets: int
    activations: int
    workspace: int
    offloaded: int

    @property
    def model_states(self) -> int:
        """Weights, gradients, master weights and both moments."""
        return self.weights + self.gradients + self.masters + self.exp_avg + self.exp_avg_sq

    @property
    def moments(self) -> int:
        """Both moments, wherever they lie."""
        return self.exp_avg + self.exp_avg_sq

    @property
    def on_gpu(self) -> int:
        """The larger of the two peaks: the backward pass, and the step."""
        backward = self.activations + self.workspace + self.buckets
        return self.model_states - self.offloaded + max(backward, self.step_gradients + self.matrices)


def memory_of(
    shape: GPTShape,
    held: RankCounts,
    arrangement: Arrangement,
    optimizer: str,
    micro_batch: int,
    activation_checkpointing: str,
    accumulation: int = 1,
    matrices: int = 0,
) -> Memory:
    """Bytes that one process holds.

    Args:
        shape: the model; its ``sequence_length`` is that of training.
        held: what one tensor-parallel rank holds of it.
        arrangement: see `Arrangement`.
        optimizer: one of ours; any other name counts as AdamW, one second moment per element.
        micro_batch: sequences of one forward pass.
        activation_checkpointing: ``none``, ``selective`` or ``full``.
        accumulation: micro batches of a step; ZeRO-1 keeps whole gradients between them.
        matrices: `MuonCosts.transient_bytes`.
    """
    local, stage, width = held.parameters, arrangement.zero_stage, arrangement.bytes_per_weight
    part = -(-local // arrangement.dp) if stage else local
    has_masters = width < _FP32 or stage > 0  # ZeRO copies fp32 weights too
    form = OPTIMIZERS[optimizer].second_moment if optimizer in OPTIMIZERS else "element"
    seconds = {"block": -(-held.blocks * part // local), "element": part, "none": 0}[form]
    masters = part * _FP32 if has_masters else 0
    exp_avg, exp_avg_sq = part * arrangement.momentum_bytes, seconds * _FP32
    kept, again = activations(shape, arrangement, micro_batch, activation_checkpointing)
    return Memory(
        weights=(part if stage == 3 else local) * width,
        gradients=(local if stage == 0 or (stage == 1 and accumulation > 1) else part) * width,
        step_gradients=part * _FP32 if stage or width < _FP32 else 0,
        masters=masters,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        matrices=0 if arrangement.offload else matrices,
        buckets=min(arrangement.bucket_elements, local) * width * arrangement.buckets if stage else 0,
        activations=kept,
        workspace=again + _loss_workspace(shape, arrangement, micro_batch),
        offloaded=masters + exp_avg + exp_avg_sq if arrangement.offload else 0,
    )


def activations(shape: GPTShape, arrangement: Arrangement, micro_batch: int, checkpointing: str) -> tuple[int, int]:
    """Bytes kept for the backward pass of one micro batch, and bytes of a layer that is computed again.

    Counted on Megatron-core's local layers without sequence parallelism: norms save their input and its normal form in
    fp32, attention its queries, keys, values, output and (unfused) its probabilities, the FFN its four intermediate
    products. On a GPU torch's fused RMSNorm keeps less.
    """
    tokens, h, f = micro_batch * shape.sequence_length, shape.hidden_size, shape.ffn_hidden_size
    w, tp = arrangement.bytes_per_weight, arrangement.tp
    attention = shape.num_heads * shape.head_dim
    norms = 2 * (2 * _FP32 + w) * h
    ffn_products = 2 if shape.architecture == GPT2 else 5
    per_token = norms + (4 * attention + ffn_products * f) * w // tp
    scores = micro_batch * shape.num_heads * shape.sequence_length**2 // tp * (6 if w < _FP32 else 4)
    layer = tokens * per_token
    ends = tokens * ((2 * _FP32 + w) * h + _FP32 * shape.vocab_size // tp)
    if checkpointing == "full":
        return shape.num_layers * tokens * w * h + ends, layer + scores
    if checkpointing == "selective":  # the result of attention lives twice, with the mask
        again = tokens * attention * w // tp + shape.sequence_length**2
        return shape.num_layers * (layer + again) + ends, scores
    return shape.num_layers * (layer + scores) + ends, 0


def _loss_workspace(shape: GPTShape, arrangement: Arrangement, micro_batch: int) -> int:
    """Logits in the weights' type and their gradient in fp32, alive together at the start of the backward pass."""
    tokens = micro_batch * shape.sequence_length
    return tokens * shape.vocab_size // arrangement.tp * (arrangement.bytes_per_weight + _FP32)
