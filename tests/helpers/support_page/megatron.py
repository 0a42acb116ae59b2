# SPDX-License-Identifier: Apache-2.0
"""What `docs/support.md` claims of Megatron-core's own optimizers; see `rows`."""

from tests.helpers.support_page.claims import NOT_RUN, SAME, Row, Untested, Works, mixed, refused, untested, works

MEGATRON = "Megatron-core's own optimizers (`megatron_patch.convert_`)"
_VALUES = "hosts/megatron/test_optimizer.py::test_values"
_ELEMENTWISE = Untested("no case of its own; its update is element-wise")


MEGATRON_ROWS: tuple[Row, ...] = (
    works(
        MEGATRON,
        "`FP32Optimizer`, `Float16Optimizer`, dp 2 (Muon: the first)",
        f"{_VALUES}[values-plain-*-{{o}}-tp1-pp1-dp2]",
        muon=SAME,
    ),
    works(
        MEGATRON,
        "`DistributedOptimizer`, dp 2",
        f"{_VALUES}[values-distributed-*-{{o}}-*]",
        lion=SAME,
        muon=(f"{_VALUES}[values-distributed-*-{{o}}-*]", f"{_VALUES}[own-distributed-*-{{o}}-*]"),
    ),
    mixed(
        MEGATRON,
        "one query group, tensor parallelism 1, 2 and 4 (Muon: 2 and 4)",
        _ELEMENTWISE,
        Works(("hosts/megatron/test_experts.py::test_one_query_group[*-mini-*",)),
        lion=_ELEMENTWISE,
        muon=Works(("hosts/megatron/test_experts.py::test_one_query_group[*-muon-*", f"{_VALUES}[*-mqa-muon-*")),
    ),
    works(
        MEGATRON,
        "pipeline parallelism 2, tied embeddings",
        "hosts/megatron/test_optimizer.py::test_tied_embeddings_on_two_stages[pipeline-*-{o}-*]",
    ),
    works(
        MEGATRON,
        "pipeline parallelism 2, multi-token prediction",
        "hosts/megatron/test_experts.py::test_copies_of_the_embedding[mtp-*-{o}-*]",
    ),
    works(
        MEGATRON,
        "virtual pipeline stages",
        "hosts/megatron/test_experts.py::test_copies_of_the_embedding[virtual-*-{o}-*]",
    ),
    works(
        MEGATRON,
        "expert parallelism 2",
        "hosts/megatron/test_experts.py::test_experts[experts-*-{o}-ep2-*]",
        muon=("hosts/megatron/test_experts.py::test_experts[experts-*-{o}-*ep2-*]",),
    ),
    mixed(
        MEGATRON,
        "expert tensor parallelism 2",
        _ELEMENTWISE,
        Works(("hosts/megatron/test_experts.py::*-mini-*etp2*",)),
        lion=_ELEMENTWISE,
        muon=Works(("hosts/megatron/test_experts.py::*-muon-*etp2*",)),
    ),
    works(
        MEGATRON,
        "context parallelism 2 (gradients fed: Megatron-core's CPU attention has none)",
        "hosts/megatron/test_experts.py::test_context_parallel_ranks_share_shards[context-*-{o}-*]",
    ),
    works(
        MEGATRON,
        "checkpoints: dp_reshardable, fully_reshardable, torch",
        "hosts/megatron/test_checkpoint.py::test_a_resumed_run_goes_on_exactly[resume-*-{o}-*]",
        muon=SAME,
    ),
    mixed(
        MEGATRON,
        "from Megatron-core's AdamW",
        NOT_RUN,
        Works(("hosts/megatron/test_checkpoint.py::*[warm_start-*-{o}-*",)),
        muon=Works(("hosts/megatron/test_checkpoint.py::*[warm_start-*-{o}-*",)),
    ),
    untested(MEGATRON, "alltoall dispatcher, grouped experts", "need CUDA streams, Transformer Engine or grouped_gemm"),
    untested(MEGATRON, "Transformer Engine layers", "need a GPU; tags and shards are tested on stand-ins"),
    refused(
        MEGATRON,
        "precision-aware optimizer",
        "use_precision_aware_optimizer",
        "hosts/megatron/test_refusals.py::test_refused_on_every_rank[precision_aware]",
    ),
    refused(
        MEGATRON,
        "CPU offload",
        "optimizer_cpu_offload",
        "hosts/megatron/test_refusals.py::test_refused_on_every_rank[cpu_offload]",
    ),
    refused(MEGATRON, "Megatron-FSDP", "FSDP", "hosts/megatron/test_refusals.py::test_refused_on_every_rank[fsdp]"),
)
