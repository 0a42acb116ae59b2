# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's `GPTModel` or `HybridModel` in a `GPTShape`: to train, or alone for ``ds-blockwise blocks``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn
from torch.nn.functional import gelu, silu

from ds_blockwise.runs.model_shape import GPT2, LLAMA, GPTShape
from ds_blockwise.runs.reading.problems import Problems, correction
from ds_blockwise.runs.run_file import GPT, HYBRID, MODEL_CLASSES
from megatron_patch.guard import MEGATRON_VERSION, TOO_NEW, release_of
from megatron_patch.without_cuda import cpu_shims

# Megatron-core's names for what a run file's `activation_checkpointing` asks for
RECOMPUTED: dict[str, dict[str, object]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
HYBRID_SINCE = (0, 18)
_ATTENTION_AND_FFN = "*-"  # a transformer layer in the pattern of a `HybridModel`


def check_model_class(name: str, file: str | Path, problems: Problems) -> None:
    """Note a class of models that is not known, or that the installed Megatron-core does not have.

    Args:
        name: Should be one of `ds_blockwise.runs.run_file.MODEL_CLASSES`.
        file: Named in the message.
        problems: The mistake is noted here.
    """
    if name not in MODEL_CLASSES:
        problems.add(file, "model_class", name, ", ".join(MODEL_CLASSES), correction(name, MODEL_CLASSES))
    elif name == HYBRID and release_of(MEGATRON_VERSION) < HYBRID_SINCE:
        first, last = (".".join(map(str, release)) for release in (HYBRID_SINCE, TOO_NEW))
        allowed = f"{GPT} with megatron-core {MEGATRON_VERSION}: HybridModel came with {first}"
        remedy = f"leave it out, or pip install 'megatron-core>={first},<{last}' (see docs/install.md)"
        problems.add(file, "model_class", name, allowed, remedy)


def build_gpt(
    shape: GPTShape,
    *,
    dtype: torch.dtype = torch.float32,
    cpu_initialization: bool | None = None,
    activation_checkpointing: str = "none",
    model_class: str = GPT,
) -> nn.Module:
    """A Megatron-core `GPTModel` or `HybridModel` in the given shape, on the current process groups.

    ``model(tokens, position_ids, None, labels=labels)`` returns the loss of each token,
    [batch, sequence], fp32. Each tensor-parallel rank holds its shard, each pipeline stage its
    layers. Under ``torch.device("meta")`` no memory is allocated.

    Args:
        shape: Sizes of the whole model.
        dtype: Of the parameters: fp32, bf16 or fp16; that of the DeepSpeed configuration.
        cpu_initialization: Draw each whole weight on the CPU and cut the shard out of it, so that
            the same seed gives the same model at every tensor-parallel size. Default: only
            without CUDA, where it is the only way. Otherwise seed with Megatron-core's
            ``model_parallel_cuda_manual_seed`` first.
        activation_checkpointing: What is computed again in the backward pass instead of being kept: ``none``,
            ``selective`` (attention) or ``full`` (every layer).
        model_class: ``gpt``, or ``hybrid``: attention ``2 i`` and FFN ``2 i + 1`` of ``decoder.layers`` are the halves
            of transformer layer ``i``. The same seed gives the same weights, and weights the same losses.

    Raises:
        ValueError: `parallel_state` isn't initialised, the sizes don't divide, the class is not known, or the installed
            Megatron-core has no `HybridModel`.
    """
    if not parallel_state.model_parallel_is_initialized():
        raise ValueError(
            "megatron.core.parallel_state is not initialised: call "
            "parallel_state.initialize_model_parallel(...) before build_gpt()"
        )
    problems = Problems()
    shape.check("GPTShape", problems)
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    shape.check_tensor_parallel(tp_size, "GPTShape", problems)
    check_model_class(model_class, "build_gpt", problems)
    problems.raise_if_any()
    if cpu_initialization is None:
        cpu_initialization = not torch.cuda.is_available()
    build = {GPT: _gpt_model, HYBRID: _hybrid_model}[model_class]
    return build(
        _transformer_config(shape, dtype, cpu_initialization, RECOMPUTED[activation_checkpointing]),
        get_gpt_layer_local_spec(normalization=_normalization(shape)),
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope" if shape.architecture == LLAMA else "learned_absolute",
        rotary_base=shape.rope_theta,
    )


def _gpt_model(config: TransformerConfig, layer: ModuleSpec, **ends: object) -> nn.Module:
    model: nn.Module = GPTModel(config=config, transformer_layer_spec=layer, **ends)
    return model


def _hybrid_model(config: TransformerConfig, layer: ModuleSpec, **ends: object) -> nn.Module:
    """The `HybridModel` of the same parts.

    Args:
        config: Of a `GPTModel`.
        layer: A transformer layer, whose halves become layers.
        **ends: As those of a `GPTModel`.
    """
    # Not in every supported release
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.ssm.mlp_layer import MLPLayer

    parts = layer.submodules

    class Stack(HybridStack):  # type: ignore[misc]  # a class without types
        """A stack whose final norm is that of its layers: Megatron-core's own needs Transformer Engine."""

        def __init__(self, config: TransformerConfig, submodules: HybridStackSubmodules, **more: object) -> None:
            super().__init__(config, submodules, post_layer_norm=False, **more)
            self.post_layer_norm = True
            if self.post_process:
                self.final_norm = parts.input_layernorm(
                    config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
                )

    attention = replace(parts, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp)
    ffn = replace(parts, input_layernorm=IdentityOp, self_attention=IdentityOp, self_attn_bda=IdentityFuncOp)
    halves = HybridStackSubmodules(
        attention_layer=ModuleSpec(module=layer.module, submodules=attention),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=ffn),
    )
    model: nn.Module = HybridModel(
        config=_of_halves(config),
        hybrid_stack_spec=ModuleSpec(module=Stack, submodules=halves),
        hybrid_layer_pattern=_ATTENTION_AND_FFN * config.num_layers,
        **ends,
    )
    return model


def _of_halves(config: TransformerConfig) -> TransformerConfig:
    """The config with layers counted as a `HybridModel` does: initial weights and what is recomputed stay the same."""
    recomputed = config.recompute_num_layers
    derived = {"init_method": None, "output_layer_init_method": None, "embedding_init_method": None}
    return replace(
        config,
        num_layers=2 * config.num_layers,
        is_hybrid_model=True,
        recompute_num_layers=recomputed and 2 * recomputed,
        **derived,
    )


def build_meta_gpt(path: str | Path) -> nn.Module:
    """Build the model of a file such as ``configs/model/tiny.yaml`` on the meta device.

    Initialises ``torch.distributed`` (gloo, one rank, in memory) and ``parallel_state`` if nobody has.

    Args:
        path: a model file; see `GPTShape`.

    Raises:
        ValueError: every mistake in the file.
    """
    shape = GPTShape.load(path)
    _start_alone()
    with torch.device("meta"):
        return build_gpt(shape)


def build_small_gpt(path: str | Path) -> nn.Module:
    """Build a small model with the attention of a file's model and real fp32 weights on the CPU.

    One layer, a small vocabulary and a narrow FFN; hidden size and heads as in the file. Initialises what
    `build_meta_gpt` does.

    Args:
        path: a model file; see `GPTShape`.

    Raises:
        ValueError: every mistake in the file.
    """
    shape = GPTShape.load(path)
    _start_alone()
    small = replace(
        shape,
        num_layers=1,
        ffn_hidden_size=min(shape.ffn_hidden_size, 64),
        vocab_size=min(shape.vocab_size, 256),
        num_parameters=None,
    )
    return build_gpt(small, cpu_initialization=True)


def _normalization(shape: GPTShape) -> str:
    return "RMSNorm" if shape.architecture == LLAMA else "LayerNorm"


def _transformer_config(
    shape: GPTShape, dtype: torch.dtype, cpu_initialization: bool, recomputed: dict[str, object]
) -> TransformerConfig:
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization=_normalization(shape),
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=shape.architecture == LLAMA,
        activation_func=silu if shape.architecture == LLAMA else partial(gelu, approximate="tanh"),
        add_bias_linear=shape.architecture == GPT2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=shape.init_std,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        use_cpu_initialization=cpu_initialization,
        **recomputed,
        # Writes into `main_grad`, which DeepSpeed doesn't have.
        gradient_accumulation_fusion=False,
        # torch's RMSNorm (local spec) has no persistent kernel.
        persist_layer_norm=False,
        # CUDA-only kernels; the local spec works without them everywhere.
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
    )


def _start_alone() -> None:
    """Make the process groups that a model asks for, with this process as their only rank."""
    cpu_shims()
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but missing from its module's exports
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
