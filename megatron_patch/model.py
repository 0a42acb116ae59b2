# SPDX-License-Identifier: Apache-2.0
"""GPT models from a YAML file: LLaMA's (RMSNorm, SwiGLU, RoPE, grouped queries, no biases) or GPT-2's.

`GPTShape` is pure arithmetic (no process group, no torch module), so a plan for 2B parameters costs
nothing; `build_gpt` turns it into a Megatron-core `GPTModel` on the current process groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from torch.nn.functional import gelu, silu

from megatron_patch.config import LOW, Problems, nearest, read_section, read_yaml

_POSITIVE = {LOW: 1}
LLAMA, GPT2 = "llama", "gpt2"
ARCHITECTURES = (LLAMA, GPT2)


@dataclass(frozen=True, slots=True)
class GPTShape:
    """Sizes of one model.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: Width of the residual stream.
        ffn_hidden_size: Width of each of the FFN's gate and up projections (GPT-2: of its one up projection).
        num_heads: Query heads.
        num_kv_heads: Key and value heads (grouped queries); equal to `num_heads` for MHA.
        head_dim: Width of one head; `num_heads * head_dim` need not be `hidden_size`.
        vocab_size: Rows of the embedding and of the output layer.
        sequence_length: Tokens in one training sequence.
        num_parameters: Stated size of the model, if any; sizes that amount to another are refused.
        architecture: ``llama``, or ``gpt2``: LayerNorm, GELU, learned positions (``sequence_length`` of them), biases.
        tied_embeddings: The output layer uses the embedding's weight.
        rope_theta: Base of the rotary embedding.
        norm_eps: Epsilon of the RMSNorms.
        init_std: Standard deviation of the initial weights; projections into the residual stream
            get `init_std / sqrt(2 * num_layers)`, Megatron's rule.
    """

    num_layers: int = field(metadata=_POSITIVE)
    hidden_size: int = field(metadata=_POSITIVE)
    ffn_hidden_size: int = field(metadata=_POSITIVE)
    num_heads: int = field(metadata=_POSITIVE)
    num_kv_heads: int = field(metadata=_POSITIVE)
    head_dim: int = field(metadata={LOW: 2})
    vocab_size: int = field(metadata={LOW: 2})
    sequence_length: int = field(metadata=_POSITIVE)
    num_parameters: int | None = field(default=None, metadata=_POSITIVE)
    architecture: str = LLAMA
    tied_embeddings: bool = False
    rope_theta: float = field(default=10000.0, metadata=_POSITIVE)
    norm_eps: float = field(default=1e-5, metadata={LOW: 0.0})
    init_std: float = field(default=0.02, metadata={LOW: 0.0})

    @classmethod
    def load(cls, path: str | Path) -> GPTShape:
        """Read a shape from a YAML file whose keys are the attributes above.

        Args:
            path: For example ``configs/model/tiny.yaml``.

        Raises:
            ValueError: Lists every unknown key, wrong value and contradiction in the file.
        """
        problems = Problems()
        shape = cls.read(Path(path), problems)
        problems.raise_if_any()
        assert shape is not None
        return shape

    @classmethod
    def read(cls, path: Path, problems: Problems) -> GPTShape | None:
        """As `load`, but notes the mistakes in ``problems``.

        Returns:
            The shape, contradictions included; None if its sizes can't be read.
        """
        values = read_yaml(path, problems)
        shape = read_section(cls, values, file=path, problems=problems) if values else None
        if shape is not None:
            shape.check(path, problems)
        return shape

    def check(self, file: str | Path, problems: Problems) -> None:
        """Note contradictions between the sizes; ``file`` is named in the messages."""
        if self.num_heads % self.num_kv_heads:
            allowed = f"a divisor of num_heads = {self.num_heads}"
            problems.add(file, "num_kv_heads", self.num_kv_heads, allowed, "change one of the two")
        if self.architecture not in ARCHITECTURES:
            allowed = " or ".join(ARCHITECTURES)
            problems.add(file, "architecture", self.architecture, allowed, nearest(self.architecture, [*ARCHITECTURES]))
            return
        if self.architecture == LLAMA and self.head_dim % 2:
            problems.add(file, "head_dim", self.head_dim, "an even number", "RoPE rotates pairs")
        if self.num_parameters not in (None, self.count_parameters()):
            allowed = f"{self.count_parameters()}, what the sizes amount to"
            remedy = "state that number or correct the sizes"
            problems.add(file, "num_parameters", self.num_parameters, allowed, remedy)

    def check_tensor_parallel(self, size: int, file: str | Path, problems: Problems) -> None:
        """Note every size that ``size`` tensor-parallel ranks can't share equally."""
        for key, value in (
            ("num_heads", self.num_heads),
            ("ffn_hidden_size", self.ffn_hidden_size),
            ("vocab_size", self.vocab_size),
        ):
            if value % size:
                allowed = f"a multiple of the tensor-parallel size {size}"
                problems.add(file, key, value, allowed, f"change {key} or the parallel size")
        if self.num_kv_heads % size and size % self.num_kv_heads:
            allowed = f"a multiple or a divisor of the tensor-parallel size {size}"
            remedy = "change num_kv_heads or the parallel size"
            problems.add(file, "num_kv_heads", self.num_kv_heads, allowed, remedy)

    def count_parameters(self) -> int:
        """Number of parameters that these sizes amount to, on all ranks together."""
        hidden, gpt2 = self.hidden_size, self.architecture == GPT2
        qkv_rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        up_rows = self.ffn_hidden_size * (1 if gpt2 else 2)  # gate and up
        attention = (qkv_rows + self.num_heads * self.head_dim) * hidden
        ffn = (up_rows + self.ffn_hidden_size) * hidden
        biases = qkv_rows + up_rows + 2 * hidden if gpt2 else 0
        norm = 2 * hidden if gpt2 else hidden
        positions = self.sequence_length * hidden if gpt2 else 0
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab_size * hidden + positions
        return embeddings + self.num_layers * (attention + ffn + biases + 2 * norm) + norm


def build_gpt(
    shape: GPTShape, *, dtype: torch.dtype = torch.float32, cpu_initialization: bool | None = None
) -> GPTModel:
    """A Megatron-core `GPTModel` in the given shape, on the current process groups.

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

    Raises:
        ValueError: `parallel_state` isn't initialised, or the sizes don't divide.
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
    problems.raise_if_any()
    if cpu_initialization is None:
        cpu_initialization = not torch.cuda.is_available()
    return GPTModel(
        config=_transformer_config(shape, dtype, cpu_initialization),
        transformer_layer_spec=get_gpt_layer_local_spec(normalization=_normalization(shape)),
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope" if shape.architecture == LLAMA else "learned_absolute",
        rotary_base=shape.rope_theta,
    )


def _normalization(shape: GPTShape) -> str:
    return "RMSNorm" if shape.architecture == LLAMA else "LayerNorm"


def _transformer_config(shape: GPTShape, dtype: torch.dtype, cpu_initialization: bool) -> TransformerConfig:
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
