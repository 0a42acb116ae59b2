# SPDX-License-Identifier: Apache-2.0
"""What `docs/support.md` claims of Megatron-core's own optimizers; see `rows`."""

from tests.helpers.support_page.claims import SAME, Refused, Row, Works, mixed, refused, untested, works

MEGATRON = "Megatron-core's own optimizers (`megatron_patch.convert_`)"
_VALUES = "hosts/megatron/test_optimizer.py::test_values"
_REFUSED = "hosts/megatron/test_refusals.py::test_refused_on_every_rank"
_NO_MOMENTS = Refused(
    "Load weights only",
    ("hosts/megatron/test_checkpoint.py::test_other_second_moments_are_refused[refused-*-{o}-*",),
)

MEGATRON_ROWS: tuple[Row, ...] = (
    works(
        MEGATRON,
        "`FP32Optimizer`, `Float16Optimizer`, dp 2",
        f"{_VALUES}[values-plain-*-{{o}}-tp1-pp1-dp2]",
        lion=SAME,
        muon=SAME,
    ),
    works(
        MEGATRON,
        "`DistributedOptimizer`, dp 2",
        f"{_VALUES}[values-distributed-*-{{o}}-*]",
        lion=SAME,
        muon=(f"{_VALUES}[values-distributed-*-{{o}}-*]", f"{_VALUES}[own-distributed-*-{{o}}-*]"),
    ),
    works(
        MEGATRON,
        "one query group, tensor parallelism 1, 2 and 4 (AdamW and Lion: 2; Muon: 2 and 4)",
        "hosts/megatron/test_experts.py::test_one_query_group[*-{o}-*",
        lion=SAME,
        muon=("hosts/megatron/test_experts.py::test_one_query_group[*-muon-*", f"{_VALUES}[*-mqa-muon-*"),
    ),
    works(
        MEGATRON,
        "pipeline parallelism 2, tied embeddings",
        "hosts/megatron/test_optimizer.py::test_tied_embeddings_on_two_stages[pipeline-*-{o}-*]",
        lion=SAME,
        muon=SAME,
    ),
    works(
        MEGATRON,
        "pipeline parallelism 2, multi-token prediction",
        "hosts/megatron/test_experts.py::test_copies_of_the_embedding[mtp-*-{o}-*]",
        lion=SAME,
        muon=SAME,
    ),
    works(
        MEGATRON,
        "virtual pipeline stages",
        "hosts/megatron/test_experts.py::test_copies_of_the_embedding[virtual-*-{o}-*]",
        lion=SAME,
        muon=SAME,
    ),
    works(
        MEGATRON,
        "expert parallelism 2",
        "hosts/megatron/test_experts.py::test_experts[experts-*-{o}-ep2-*]",
        lion=SAME,
        muon=("hosts/megatron/test_experts.py::test_experts[experts-*-{o}-*ep2-*]",),
    ),
    works(
        MEGATRON,
        "expert tensor parallelism 2",
        "hosts/megatron/test_experts.py::test_experts[experts-*-{o}-*etp2*",
        lion=SAME,
        muon=SAME,
    ),
    mixed(
        MEGATRON,
        "from checkpoints of Lion and Muon (Lion: of Muon; Muon: of Lion)",
        _NO_MOMENTS,
        _NO_MOMENTS,
        lion=Works(("hosts/megatron/test_checkpoint.py::*[warm_start-torch-plain-fp32-lion-*",)),
        muon=_NO_MOMENTS,
    ),
    works(
        MEGATRON,
        "context parallelism 2 (gradients fed: Megatron-core's CPU attention has none)",
        "hosts/megatron/test_experts.py::test_context_parallel_ranks_share_shards[context-*-{o}-*]",
        lion=SAME,
        muon=SAME,
    ),
    works(
        MEGATRON,
        "checkpoints: dp_reshardable, fully_reshardable, torch",
        "hosts/megatron/test_checkpoint.py::test_a_resumed_run_goes_on_exactly[resume-*-{o}-*]",
        lion=SAME,
        muon=SAME,
    ),
    works(
        MEGATRON,
        "from Megatron-core's AdamW",
        "hosts/megatron/test_checkpoint.py::*[warm_start-*-{o}-*",
        lion=("hosts/megatron/test_checkpoint.py::*[warm_start-*_reshardable-*-{o}-*",),
        muon=SAME,
    ),
    untested(MEGATRON, "alltoall dispatcher, grouped experts", "need CUDA streams, Transformer Engine or grouped_gemm"),
    untested(MEGATRON, "Transformer Engine layers", "need a GPU; tags and shards are tested on stand-ins"),
    *(
        refused(MEGATRON, layout, says, f"{_REFUSED}[{case}-{{o}}]", lion=SAME, muon=SAME)
        for layout, says, case in (
            ("precision-aware optimizer", "use_precision_aware_optimizer", "precision_aware"),
            ("CPU offload", "optimizer_cpu_offload", "cpu_offload"),
            ("Megatron-FSDP", "FSDP", "fsdp"),
        )
    ),
)
