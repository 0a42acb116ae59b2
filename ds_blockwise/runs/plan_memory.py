# SPDX-License-Identifier: Apache-2.0
"""Bytes that one process of a run holds, from sizes alone: weights, gradients, optimizer state, activations, buffers.

A model of what DeepSpeed 0.19's wrappers and Megatron-core's local layers allocate; `tests/unit/runs/test_plan.py`
compares it with engines that run. What an allocator rounds up, fragments or caches is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_blockwise.runs.model_shape import GPT2, GPTShape

MINI = "BlockwiseAdamMini"
_FP32 = 4


@dataclass(frozen=True)
class Layout:
    """How a model is laid over processes.

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
class Matrix:
    """One kind of parameter: rows and columns of the whole tensor, its Adam-mini blocks, and how often it occurs.

    Attributes:
        numel: elements of the whole tensor.
        blocks: second moments that Adam-mini keeps for it.
        split: "rows" or "columns" if tensor-parallel ranks share it, None if each holds it whole.
        count: such tensors in the model.
    """

    numel: int
    blocks: int
    split: str | None
    count: int


def matrices(shape: GPTShape) -> list[Matrix]:
    """Every parameter of a model, by kind; blocks as the default granularity cuts them."""
    h, f, layers, vocab = shape.hidden_size, shape.ffn_hidden_size, shape.num_layers, shape.vocab_size
    gpt2 = shape.architecture == GPT2
    qkv_rows = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    heads, value_rows = shape.num_heads + shape.num_kv_heads, shape.num_kv_heads * shape.head_dim
    up_rows = f if gpt2 else 2 * f
    found = [
        Matrix(vocab * h, vocab, "rows", 1 if shape.tied_embeddings else 2),
        Matrix(qkv_rows * h, heads + value_rows, "rows", layers),
        Matrix(shape.num_heads * shape.head_dim * h, h, "columns", layers),
        Matrix(up_rows * h, up_rows, "rows", layers),
        Matrix(f * h, h, "columns", layers),
        Matrix(h, h, None, (2 * layers + 1) * (2 if gpt2 else 1)),
    ]
    if gpt2:
        found.append(Matrix(shape.sequence_length * h, shape.sequence_length, None, 1))
        found += [Matrix(rows, rows, "rows", layers) for rows in (qkv_rows, up_rows)]  # biases: one value per element
        found.append(Matrix(h, h, None, 2 * layers))
    return found


def local_parameters(shape: GPTShape, tp: int) -> int:
    """Parameters that one tensor-parallel rank holds."""
    return sum(m.count * (m.numel // tp if m.split else m.numel) for m in matrices(shape))


def local_blocks(shape: GPTShape, tp: int) -> int:
    """Second moments of Adam-mini that one tensor-parallel rank holds; a row cut into columns is held by all."""
    return sum(m.count * (-(-m.blocks // tp) if m.split == "rows" else m.blocks) for m in matrices(shape))


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
    buckets: int
    activations: int
    workspace: int
    offloaded: int

    @property
    def model_states(self) -> int:
        """Weights, gradients, master weights and both moments."""
        return self.weights + self.gradients + self.masters + self.exp_avg + self.exp_avg_sq

    @property
    def on_gpu(self) -> int:
        """The larger of the two peaks: the backward pass, and the step."""
        backward = self.activations + self.workspace + self.buckets
        return self.model_states - self.offloaded + max(backward, self.step_gradients)


def memory_of(
    shape: GPTShape,
    layout: Layout,
    optimizer: str,
    micro_batch: int,
    activation_checkpointing: str,
    accumulation: int = 1,
) -> Memory:
    """Bytes that one process holds.

    Args:
        shape: the model; its ``sequence_length`` is that of training.
        layout: see `Layout`.
        optimizer: ``BlockwiseAdamMini``; any other name counts as AdamW, one second moment per element.
        micro_batch: sequences of one forward pass.
        activation_checkpointing: ``none``, ``selective`` or ``full``.
        accumulation: micro batches of a step; ZeRO-1 keeps whole gradients between them.
    """
    local, stage, width = local_parameters(shape, layout.tp), layout.zero_stage, layout.bytes_per_weight
    part = -(-local // layout.dp) if stage else local
    has_masters = width < _FP32 or stage > 0  # ZeRO copies fp32 weights too
    seconds = -(-local_blocks(shape, layout.tp) * part // local) if optimizer == MINI else part
    masters = part * _FP32 if has_masters else 0
    exp_avg, exp_avg_sq = part * layout.momentum_bytes, seconds * _FP32
    kept, again = activations(shape, layout, micro_batch, activation_checkpointing)
    return Memory(
        weights=(part if stage == 3 else local) * width,
        gradients=(local if stage == 0 or (stage == 1 and accumulation > 1) else part) * width,
        step_gradients=part * _FP32 if stage or width < _FP32 else 0,
        masters=masters,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        buckets=min(layout.bucket_elements, local) * width * layout.buckets if stage else 0,
        activations=kept,
        workspace=again + _loss_workspace(shape, layout, micro_batch),
        offloaded=masters + exp_avg + exp_avg_sq if layout.offload else 0,
    )


def activations(shape: GPTShape, layout: Layout, micro_batch: int, checkpointing: str) -> tuple[int, int]:
    """Bytes kept for the backward pass of one micro batch, and bytes of a layer that is computed again.

    Counted on Megatron-core's local layers without sequence parallelism: norms save their input and its normal form in
    fp32, attention its queries, keys, values, output and (unfused) its probabilities, the FFN its four intermediate
    products. On a GPU torch's fused RMSNorm keeps less.
    """
    tokens, h, f = micro_batch * shape.sequence_length, shape.hidden_size, shape.ffn_hidden_size
    w, tp = layout.bytes_per_weight, layout.tp
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


def _loss_workspace(shape: GPTShape, layout: Layout, micro_batch: int) -> int:
    """Logits in the weights' type and their gradient in fp32, alive together at the start of the backward pass."""
    tokens = micro_batch * shape.sequence_length
    return tokens * shape.vocab_size // layout.tp * (layout.bytes_per_weight + _FP32)
