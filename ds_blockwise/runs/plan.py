# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise plan RUN``: memory, traffic and time of a run on a cluster, before the first GPU-hour.

Time is a range from a stated model: matrix products at 40 to 55% of the GPU's peak (what well-tuned training of 1 to 8
billion parameters reaches without communication), the optimizer's bytes at 80% of the memory bandwidth, and
data-parallel traffic that is wholly hidden (best) or not at all (worst). Published runs stand beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ds_blockwise.runs.model_shape import GPTShape
from ds_blockwise.runs.plan_memory import MINI, Arrangement, Memory, RankCounts, memory_of
from ds_blockwise.runs.plan_muon import MUON, MuonCosts, muon_costs
from ds_blockwise.runs.run_file import RunConfig

COMPUTE_EFFICIENCY = (0.55, 0.40)  # of the peak: best, worst
BANDWIDTH_EFFICIENCY = 0.8
_USABLE = 0.92  # of a GPU's memory: the context, the libraries and fragmentation take the rest
# moved per parameter by the update with fp32 gradients; of BlockwiseMuon by its two kernels around Newton-Schulz
_BYTES_PER_STEP = {MINI: 20, "BlockwiseLion": 20, MUON: 28}
_ADAMW_BYTES = 28


@dataclass(frozen=True)
class Gpu:
    """Published figures of a GPU in a node of eight.

    Attributes:
        memory: bytes.
        flops: dense bf16 FLOP/s.
        fp32_flops: FLOP/s of products in fp32.
        bandwidth: of its memory, bytes/s.
        in_node: bytes/s to its neighbours, one direction.
        between_nodes: bytes/s of its network adapter, one direction.
    """

    memory: float
    flops: float
    fp32_flops: float
    bandwidth: float
    in_node: float
    between_nodes: float


GPUS: dict[str, Gpu] = {
    "a100-40g": Gpu(40e9, 312e12, 19.5e12, 1.555e12, 300e9, 25e9),
    "a100-80g": Gpu(80e9, 312e12, 19.5e12, 2.039e12, 300e9, 25e9),
    "h100-80g": Gpu(80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    "h200-141g": Gpu(141e9, 989e12, 67e12, 4.8e12, 450e9, 50e9),
}

# (what, GPUs, share of the peak), with sources in docs/scaling.md
REFERENCES = (
    ("TinyLlama 1.1B, A100-40G", 16, 0.56),
    ("nanotron 1.34B, H100, 1 node", 8, 0.443),
    ("nanotron 1.34B, H100, 8 nodes", 64, 0.325),
    ("nanotron 1.34B, H100, 32 nodes", 256, 0.232),
    ("nanotron 1.34B, H100, 64 nodes", 512, 0.053),
    ("Llama 3 8B, torchtitan, H100, 16 nodes", 128, 0.36),
)


@dataclass(frozen=True)
class Plan:
    """A run on a number of nodes; see the functions that fill the fields.

    Attributes:
        nodes, gpus_per_node, gpu: the cluster.
        tp, dp: the arrangement.
        micro_batch, accumulation: sequences of a forward pass, and passes of a step.
        memory: by optimizer.
        moments_without_zero: bytes of both moments on a GPU with ZeRO off, by optimizer.
        fits: whether the run's optimizer fits the GPU.
        largest_micro_batch: that fits with the run's optimizer and divides the batch.
        dp_bytes, tp_bytes: sent by one GPU in a step.
        optimizer_seconds: by optimizer.
        step_seconds, mfu, days: best and worst.
        gpu_hours: best and worst.
        muon: what its matrices cost, if the run's optimizer is BlockwiseMuon; part of the figures above.
    """

    nodes: int
    gpus_per_node: int
    gpu: str
    tp: int
    dp: int
    micro_batch: int
    accumulation: int
    memory: Mapping[str, Memory]
    moments_without_zero: Mapping[str, int]
    fits: bool
    largest_micro_batch: int
    dp_bytes: float
    tp_bytes: float
    optimizer_seconds: Mapping[str, float]
    step_seconds: tuple[float, float]
    mfu: tuple[float, float]
    days: tuple[float, float]
    gpu_hours: tuple[float, float]
    muon: MuonCosts | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, sums of the memory included."""
        found = asdict(self)
        for name, memory in self.memory.items():
            found["memory"][name] |= {"model_states": memory.model_states, "on_gpu": memory.on_gpu}
        return found


def arrangement_of(run: RunConfig, processes: int) -> Arrangement:
    """How a run is distributed over a number of processes, from its JSON."""
    config = run.deepspeed
    zero = config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    half = any(config.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    momentum = config.get("optimizer", {}).get("params", {}).get("momentum_dtype", "fp32")
    return Arrangement(
        tp=run.parallel.tensor,
        dp=max(1, processes // run.parallel.tensor),
        zero_stage=int(zero.get("stage", 0)),
        bytes_per_weight=2 if half else 4,
        offload=offload,
        bucket_elements=int(zero.get("reduce_bucket_size", 500_000_000)),
        buckets=2 if zero.get("overlap_comm") else 1,
        momentum_bytes=2 if momentum == "bf16" else 4,
    )


def flops_per_token(shape: GPTShape) -> float:
    """Of a forward and a backward pass: 6 per parameter that multiplies, 12 per layer, width and position attended."""
    embedding = shape.vocab_size * shape.hidden_size * (0 if shape.tied_embeddings else 1)  # a table lookup
    multiplying = shape.count_parameters() - embedding
    attention = 12 * shape.num_layers * shape.num_heads * shape.head_dim * shape.sequence_length
    return 6.0 * multiplying + attention


def computed_again(shape: GPTShape, activation_checkpointing: str) -> float:
    """FLOPs per token that checkpointing adds: a third of the layers' for full, attention's forward for selective."""
    attention = 12 * shape.num_layers * shape.num_heads * shape.head_dim * shape.sequence_length
    if activation_checkpointing == "full":
        return flops_per_token(shape) / 3
    return attention / 3 if activation_checkpointing == "selective" else 0.0


def traffic(
    shape: GPTShape, held: RankCounts, arrangement: Arrangement, micro_batch: int, accumulation: int
) -> tuple[float, float]:
    """Bytes that one GPU sends in a step: over data-parallel ranks, and over tensor-parallel ranks.

    ZeRO-0 and 1 reduce once a step, ZeRO-2 and 3 once a micro batch; stages 1 to 3 gather the new weights, stage 3
    twice in every micro batch. Tensor parallelism sums activations four times per layer and micro batch.
    """
    weights = held.parameters * arrangement.bytes_per_weight
    share = (arrangement.dp - 1) / arrangement.dp
    reductions = accumulation if arrangement.zero_stage >= 2 else 1
    gathers = {0: 1, 3: 2 * accumulation}.get(arrangement.zero_stage, 1)  # at stage 0 the second half of an all-reduce
    over_data = weights * share * (reductions + gathers)
    tokens = micro_batch * shape.sequence_length
    message = tokens * shape.hidden_size * arrangement.bytes_per_weight
    rounds = 4 * shape.num_layers * accumulation
    return over_data, rounds * message * 2 * (arrangement.tp - 1) / arrangement.tp


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def make_plan(run: RunConfig, held: RankCounts, nodes: int, gpus_per_node: int, gpu: str) -> Plan:
    """Plan a run for a cluster.

    Args:
        run: a run that `check_run_file` has found in order for some cluster.
        held: what one of its tensor-parallel ranks holds of the model.
        nodes: machines.
        gpus_per_node: GPUs of each.
        gpu: a key of `GPUS`.

    Raises:
        ValueError: an unknown GPU, or a batch that these ranks cannot share.
    """
    if gpu not in GPUS:
        raise ValueError(f"gpu {gpu!r} is not known; allowed: {', '.join(GPUS)}. Set cluster.gpu or pass --gpu.")
    machine, shape, training = GPUS[gpu], run.shape, run.training
    arrangement = arrangement_of(run, nodes * gpus_per_node)
    per_rank, rest = divmod(training.global_batch_size, arrangement.dp)
    if rest:
        raise ValueError(
            f"global_batch_size {training.global_batch_size} cannot be shared by {arrangement.dp} data-parallel ranks "
            f"({nodes} x {gpus_per_node} GPUs, tensor parallelism {arrangement.tp}); change one of them"
        )
    optimizer = str(run.deepspeed["optimizer"]["type"])
    names = list(dict.fromkeys((optimizer, MINI, "AdamW")))
    tokens = run.tokens_per_step / (arrangement.dp * arrangement.tp)  # a GPU's share
    useful = flops_per_token(shape) * tokens
    muon = _muon_costs(run, held, arrangement, useful) if optimizer == MUON else None

    def needed(name: str, micro: int, where: Arrangement = arrangement) -> Memory:
        transient = muon.transient_bytes if muon is not None and name == MUON else 0
        passes = per_rank // micro
        return memory_of(shape, held, where, name, micro, training.activation_checkpointing, passes, transient)

    def fits(micro: int) -> bool:
        return needed(optimizer, micro).on_gpu <= _USABLE * machine.memory

    divisors = _divisors(per_rank)
    micro = max(m for m in divisors if m <= training.micro_batch_size)
    possible = [m for m in divisors if fits(m)]
    accumulation = per_rank // micro
    dp_bytes, tp_bytes = traffic(shape, held, arrangement, micro, accumulation)
    part = held.parameters / (arrangement.dp if arrangement.zero_stage else 1)
    update = {
        n: part * _BYTES_PER_STEP.get(n, _ADAMW_BYTES) / (BANDWIDTH_EFFICIENCY * machine.bandwidth) for n in names
    }
    if muon is not None:
        dp_bytes, tp_bytes = dp_bytes + muon.dp_bytes, tp_bytes + muon.tp_bytes
        narrow = run.deepspeed["optimizer"].get("params", {}).get("newton_schulz_dtype") == "bf16"
        update[MUON] += muon.flops / (COMPUTE_EFFICIENCY[1] * (machine.flops if narrow else machine.fp32_flops))
    done = useful + computed_again(shape, training.activation_checkpointing) * tokens
    network = machine.between_nodes if nodes > 1 else machine.in_node
    sending = dp_bytes / network + tp_bytes / machine.in_node
    hidden = tp_bytes / machine.in_node  # the sums of activations stand between two products
    best, worst = (done / (efficiency * machine.flops) for efficiency in COMPUTE_EFFICIENCY)
    seconds = (best + hidden + update[optimizer], worst + sending + update[optimizer])
    days = tuple(s * training.steps / 86_400 for s in seconds)
    return Plan(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
        tp=arrangement.tp,
        dp=arrangement.dp,
        micro_batch=micro,
        accumulation=accumulation,
        memory={name: needed(name, micro) for name in names},
        moments_without_zero={n: needed(n, micro, replace(arrangement, zero_stage=0)).moments for n in names},
        fits=fits(micro),
        largest_micro_batch=max(possible, default=0),
        dp_bytes=dp_bytes,
        tp_bytes=tp_bytes,
        optimizer_seconds=update,
        step_seconds=seconds,
        mfu=(useful / (seconds[0] * machine.flops), useful / (seconds[1] * machine.flops)),
        days=(days[0], days[1]),
        gpu_hours=(days[0] * 24 * nodes * gpus_per_node, days[1] * 24 * nodes * gpus_per_node),
        muon=muon,
    )


def _muon_costs(run: RunConfig, held: RankCounts, arrangement: Arrangement, step_flops: float) -> MuonCosts:
    return muon_costs(
        held.matrices,
        run.deepspeed["optimizer"].get("params", {}),
        tp=arrangement.tp,
        dp=arrangement.dp,
        zero_stage=arrangement.zero_stage,
        local_parameters=held.parameters,
        step_flops=step_flops,
    )
