# SPDX-License-Identifier: Apache-2.0
"""What `docs/support.md` claims, row by row; see `support`."""

from tests.helpers.support_page.claims import (
    SAME,
    Refused,
    Row,
    Untested,
    Works,
    mixed,
    refused,
    untested,
    works,
)
from tests.helpers.support_page.families import FAMILY_ROWS
from tests.helpers.support_page.megatron import MEGATRON_ROWS

_NO_GPU = "needs a GPU; the tests are there (`make test-gpu`)"
_AUTOTP = "hosts/deepspeed/test_autotp.py::test_autotp_trains_like_whole_tensors"
_LION, _MUON = "unit/optimizers/test_lion.py::", "unit/optimizers/test_muon.py::"
_LION_BITS = "unit/kernels/test_cpp_lion.py::*"
_PARITY = "hosts/deepspeed/test_parity.py::"
_RESUME = "hosts/deepspeed/test_resume.py::"
_TP_MUON = "hosts/deepspeed/test_tensor_parallel.py::test_muon_under_tensor_parallelism[muon"
_EXPERTS = "hosts/deepspeed/test_experts.py::test_experts_train_like_whole_tensors"
_REFUSED = "hosts/deepspeed/test_bad_input.py::test_every_rank_gets_the_error_within_seconds"
PLAIN = "PyTorch alone"
DEEPSPEED = "DeepSpeed"
MEGATRON_DEEPSPEED = "DeepSpeed with a Megatron-core model"
AUTOTP = "DeepSpeed's AutoTP (Hugging Face models)"
MOE = "DeepSpeed's MoE layers"
ULYSSES = "Ulysses sequence parallelism (DeepSpeed)"
PIPELINE = "DeepSpeed's PipelineModule"
TRAINER = "Hugging Face Trainer and Accelerate (with DeepSpeed)"
KERNELS = "Kernels"

_NVME = Untested("state has the parameters' shape, as the swapper needs, but nobody has run it")
_SWAPPER = "the swapper needs state in the shape of the parameters"


ROWS: tuple[Row, ...] = (
    works(
        PLAIN,
        "one process",
        "unit/optimizers/test_oracle.py::*",
        "unit/optimizers/test_base.py::*",
        lion=(f"{_LION}test_its_update_is*", f"{_LION}test_betas*", f"{_LION}test_weights*", f"{_LION}*Lion]"),
        muon=(f"{_MUON}*", f"{_LION}*Muon]"),
    ),
    works(
        PLAIN,
        "resume, AdamW's and Adam-mini's checkpoints",
        "unit/optimizers/test_state_dict.py::*",
        lion=(f"{_LION}test_it_goes_on*",),
        muon=(f"{_MUON}test_it_goes_on_with*", f"{_MUON}test_it_keeps_four_bytes*"),
    ),
    refused(
        PLAIN,
        "a model that was not tagged",
        "call ds_blockwise.tag_parameters(model) before the first step",
        "hosts/deepspeed/test_bad_input.py::test_an_untagged_model_is_refused_at_the_first_step",
    ),
    *(
        works(
            DEEPSPEED,
            f"ZeRO-{stage}, fp32 and bf16, dp 1, 2 and 3 (Lion and Muon: one dtype for each stage, dp 2 or 3)",
            f"{_PARITY}test_zero_stages[grid-z{stage}-*-{{o}}-*]",
            lion=(f"{_PARITY}test_lion[*-z{stage}-*",),
            muon=(f"{_PARITY}test_muon[*-z{stage}-*",),
        )
        for stage in range(4)
    ),
    works(
        DEEPSPEED,
        "ZeRO-1 with fp32 accumulation (`BF16_Optimizer`)",
        f"{_PARITY}test_partition_options[bf16_optimizer-*-{{o}}-*]",
        muon=(f"{_PARITY}test_muon[muon_bf16_optimizer-*",),
    ),
    works(
        DEEPSPEED,
        "ZeRO-3 with sub-groups",
        f"{_PARITY}test_partition_options[sub_groups-*-{{o}}-*]",
        muon=(f"{_PARITY}test_muon[muon_sub_groups-*",),
    ),
    works(
        DEEPSPEED,
        "CPU offload, ZeRO-1, 2 and 3 (Muon: 2 and 3)",
        f"{_PARITY}*[*offload*-{{o}}-*]",
        muon=(f"{_PARITY}test_muon[muon_offload-*",),
    ),
    mixed(
        DEEPSPEED,
        "NVMe offload",
        _NVME,
        Refused(_SWAPPER, (f"{_REFUSED}[nvme offload]",)),
        lion=_NVME,
        muon=Refused(_SWAPPER, (f"{_REFUSED}[nvme offload of BlockwiseMuon]",)),
    ),
    *(
        refused(
            DEEPSPEED,
            layout,
            says,
            f"{_REFUSED}[{case}]",
            lion=(f"{_REFUSED}[{case} of BlockwiseLion]",),
            muon=(f"{_REFUSED}[{case} of BlockwiseMuon]",),
        )
        for layout, says, case in (
            ("offload ratio below 1", "partial offload works with DeepSpeedCPUAdam only", "offload ratio"),
            ("SuperOffload", "it steps the offloaded parameters with DeepSpeedCPUAdam", "super offload"),
            ("ZenFlow", "it updates selected columns with an AdamW of its own", "zenflow"),
            ("16-bit master weights", "the master weights are updated in fp32", "bf16 master weights"),
            ("elastic checkpoints", "it cuts state tensors by the padding", "elastic checkpoint"),
        )
    ),
    untested(DEEPSPEED, "fp16", _NO_GPU),
    works(
        DEEPSPEED,
        "resume at the same topology, bitwise",
        f"{_RESUME}*",
        lion=(f"{_RESUME}*[resume*-{{o}}-*",),
        muon=(f"{_RESUME}*[resume*-{{o}}-*",),
    ),
    mixed(
        DEEPSPEED,
        "from DeepSpeed's AdamW (Muon: also from BlockwiseAdamMini, converted or universal)",
        Works((f"{_RESUME}*[from_adamw-{{o}}-*",)),
        Works((f"{_RESUME}*[from_adamw-{{o}}-*",)),
        muon=Works((f"{_RESUME}*[from_*-{{o}}-*",)),
    ),
    works(
        DEEPSPEED,
        "checkpoints at another topology (Lion and Muon: another ZeRO stage)",
        "hosts/deepspeed/test_reshard.py::*",
        lion=(f"{_RESUME}*[portable-{{o}}-*",),
        muon=(f"{_RESUME}*[portable-{{o}}-*",),
    ),
    works(
        MEGATRON_DEEPSPEED,
        "tensor parallelism 2, ZeRO-0 to 3",
        "hosts/deepspeed/test_tensor_parallel.py::*[fed-gqa-*-{o}-tp2-*]",
        muon=(f"{_TP_MUON}-gqa-*", f"{_TP_MUON}_roles-*"),
    ),
    works(
        MEGATRON_DEEPSPEED,
        "experts, each rank holding all",
        "hosts/deepspeed/test_pipeline.py::test_experts_of_megatron[experts-z1-{o}-dp2]",
    ),
    refused(
        MEGATRON_DEEPSPEED,
        "expert parallelism",
        "expert parallelism of Megatron-core",
        "hosts/deepspeed/test_pipeline.py::test_experts_of_megatron[experts-z1-{o}-dp2]",
    ),
    works(
        TRAINER,
        "Trainer, `auto` values, against a plain loop",
        "hosts/huggingface/test_trainer.py::*plain_loop-{O}-whole*",
    ),
    works(TRAINER, "Trainer, resume, bitwise", "hosts/huggingface/test_trainer.py::*resumes_bitwise-{O}-whole*"),
    mixed(
        TRAINER,
        "Trainer with AutoTP, resume",
        Untested("BlockwiseAdamMini's case stands for both"),
        Works(("hosts/huggingface/test_trainer.py::*resumes_bitwise-{O}-autotp*",)),
    ),
    works(TRAINER, "PEFT (LoRA), frozen base", "hosts/huggingface/test_trainer.py::*plain_loop-{O}-lora*"),
    works(
        TRAINER,
        "`torch.compile`, before and after `initialize`",
        "hosts/huggingface/test_trainer.py::*compiled_engines-{O}*",
    ),
    refused(
        TRAINER,
        "a client optimizer under offload",
        "was replaced by",
        "hosts/huggingface/test_trainer.py::*accelerate_replaces*",
    ),
    works(
        TRAINER,
        'the same with `"zero_force_ds_cpu_optimizer": false`, or named in the JSON',
        "hosts/huggingface/test_trainer.py::*accelerate_keeps*",
    ),
    *(
        works(
            AUTOTP,
            f"ZeRO-{stage}, tensor parallelism 2, fp32 and bf16 (Muon: fp32)",
            f"{_AUTOTP}[values-qwen3-z{stage}-*-{{o}}-*]",
            muon=(f"{_AUTOTP}[values-*-z{stage}-*-muon-tp2-*",),
        )
        for stage in range(4)
    ),
    works(
        AUTOTP,
        "real batches, against one rank",
        "hosts/deepspeed/test_autotp_use.py::test_autotp_trains_like_one_rank[end_to_end-*-{o}]",
    ),
    works(AUTOTP, "resume, bitwise", "hosts/deepspeed/test_autotp_use.py::test_resume_is_bitwise[resume-*-{o}]"),
    works(
        AUTOTP,
        "checkpoints at another tensor-parallel size",
        "hosts/deepspeed/test_autotp_use.py::test_checkpoints_move_between_sizes[move-*-{o}-*]",
    ),
    mixed(
        AUTOTP,
        "fused weights, uneven heads, biases, fewer KV heads than ranks",
        Works(tuple(f"{_AUTOTP}[values-{m}-*-adamw-*]" for m in ("neox", "glm", "mqa"))),
        Works(tuple(f"{_AUTOTP}[values-{m}-*-mini-*]" for m in ("neox", "glm", "mqa", "thirds", "qwen2"))),
        muon=Works(tuple(f"{_AUTOTP}[values-{m}-*-muon-*]" for m in ("neox", "glm", "mqa"))),
    ),
    refused(
        AUTOTP,
        "norms of heads whose gradients AutoTP would not sum",
        "norms of attention heads, which every tensor-parallel rank holds whole",
        "hosts/deepspeed/test_autotp_use.py::test_what_autotp_gets_wrong_is_refused[refused-head_norms]",
    ),
    *(
        works(
            MOE,
            f"ZeRO-{stage}, expert parallelism 2",
            f"{_EXPERTS}[values-split-z{stage}-*-{{o}}-ep2-*]",
            muon=None if stage == 1 else SAME,
        )
        for stage in range(3)
    ),
    works(
        MOE,
        "resume, bitwise",
        "hosts/deepspeed/test_experts.py::test_resume_is_bitwise_and_convert_is_refused[resume-*-{o}-*]",
    ),
    refused(
        MOE,
        "ZeRO-3",
        "DeepSpeed's MoE layers cannot be trained at ZeRO stage 3",
        "hosts/deepspeed/test_experts.py::test_what_cannot_train_is_refused[refused-split-z3-*]",
    ),
    refused(
        MOE,
        "`ds-blockwise convert`",
        "run with experts (DeepSpeed's MoE)",
        "hosts/deepspeed/test_experts.py::test_resume_is_bitwise_and_convert_is_refused*",
    ),
    *(
        works(
            ULYSSES,
            f"ZeRO-{stage}, sequence parallelism 2",
            f"hosts/deepspeed/test_ulysses.py::test_sequence_parallel_values[fed-z{stage}-*-{{o}}-sp2-*]",
        )
        for stage in range(4)
    ),
    works(
        ULYSSES,
        "half a sequence per rank, against whole ones",
        "hosts/deepspeed/test_ulysses.py::test_half_a_sequence_per_rank_trains_like_whole_ones[end_to_end-*-{o}-*]",
    ),
    refused(
        ULYSSES,
        "sequence ranks that do not share gradients",
        "DeepSpeed then averages gradients over ranks",
        "hosts/deepspeed/test_ulysses.py::test_what_does_not_share_gradients_is_refused*",
    ),
    works(
        PIPELINE,
        "2 stages: ZeRO-0 fp32 and bf16, ZeRO-1, `BF16_Optimizer`",
        "hosts/deepspeed/test_pipeline.py::test_values_of_a_pipeline[values-*-{o}-pp2-dp1]",
    ),
    works(
        PIPELINE,
        "2 stages x dp 2",
        "hosts/deepspeed/test_pipeline.py::test_values_of_a_pipeline[values-*-{o}-pp2-dp2]",
        muon=SAME,
    ),
    works(
        PIPELINE,
        "tied embeddings, copies bit-identical after 24 steps",
        "hosts/deepspeed/test_pipeline.py::test_training_keeps_tied_copies_alike[training-*-{o}-*]",
    ),
    works(
        PIPELINE,
        "2 stages x tensor parallelism 2",
        "hosts/deepspeed/test_pipeline.py::test_tensor_parallel_layers_in_a_pipeline[grid-{o}-tp2-pp2]",
    ),
    works(
        PIPELINE,
        "save, resume bitwise",
        "hosts/deepspeed/test_pipeline.py::test_checkpoints_of_a_pipeline[checkpoint-*-{o}-*]",
    ),
    refused(
        PIPELINE,
        "ZeRO-2, ZeRO-3",
        "DeepSpeed's pipeline engine works with ZeRO stage 0 and 1 only",
        "hosts/deepspeed/test_pipeline.py::test_what_stages_must_agree_on[stages-pp2-dp1]",
    ),
    refused(
        PIPELINE,
        "tied weights that stages would step differently",
        "would be stepped differently and drift apart",
        "hosts/deepspeed/test_pipeline.py::test_what_stages_must_agree_on[tied-pp2-dp1]",
    ),
    refused(
        PIPELINE,
        "`ds-blockwise convert`",
        "pipeline-parallel run (PipelineModule)",
        "hosts/deepspeed/test_pipeline.py::test_checkpoints_of_a_pipeline*",
    ),
    untested(PIPELINE, "CPU offload, fp16, more than 2 stages", "no case"),
    *MEGATRON_ROWS,
    *(
        mixed(
            KERNELS,
            f"{what} (Muon: its part of Adam-mini)",
            Works((f"unit/kernels/test_base.py::*[{name}-*", f"unit/kernels/test_{name}.py::*")),
            Works((f"unit/kernels/test_base.py::*[{name}-*", f"unit/kernels/test_{name}.py::*")),
            lion=lion,
            muon=Works((f"{_MUON}test_kernels_step_the_rest*[{name}]",)),
        )
        for name, what, lion in (
            ("cpp", "C++ (CPU)", Works((_LION_BITS, f"{_LION}test_its_update_is*cpp*"))),
            (
                "triton",
                "Triton, in its interpreter",
                Works(("unit/kernels/test_triton_lion.py::*", f"{_LION}test_its_update_is*triton*")),
            ),
        )
    ),
    untested(KERNELS, "Triton, on a GPU", _NO_GPU),
    *FAMILY_ROWS,
)
