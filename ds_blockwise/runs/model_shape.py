# SPDX-License-Identifier: Apache-2.0
"""Sizes of a GPT model as a YAML file states them: LLaMA's kind (RMSNorm, SwiGLU, RoPE, no biases) or GPT-2's.

Pure arithmetic, without a process group or a torch module: `megatron_patch.build_gpt` turns it into one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ds_blockwise.runs.reading.problems import Problems, correction
from ds_blockwise.runs.reading.whole_files import JsonObject
from ds_blockwise.runs.reading.yaml_file import read_yaml
from ds_blockwise.runs.strict_files import AtLeastTwo, Flag, Positive, StrictSection, read_section

_MOST_LAYERS = 10_000
_MOST_PARAMETERS = 10**15
_NotNegativeNumber = Annotated[float, Field(strict=True, ge=0.0)]
_OF_RUN_FILES = {"base", "cluster", "data", "deepspeed", "model", "output", "parallel", "training"}
LLAMA, GPT2 = "llama", "gpt2"
ARCHITECTURES = (LLAMA, GPT2)


@dataclass(frozen=True, slots=True)
class GPTShape(StrictSection):
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

    num_layers: Annotated[int, Field(strict=True, ge=1, le=_MOST_LAYERS)]
    hidden_size: Positive
    ffn_hidden_size: Positive
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: AtLeastTwo
    vocab_size: AtLeastTwo
    sequence_length: Positive
    num_parameters: Annotated[int, Field(strict=True, ge=1)] | None = None
    architecture: str = LLAMA
    tied_embeddings: Flag = False
    rope_theta: Annotated[float, Field(strict=True, ge=1)] = 10000.0
    norm_eps: _NotNegativeNumber = 1e-5
    init_std: _NotNegativeNumber = 0.02

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
        known = len(problems.lines)
        values = read_yaml(path, problems)
        if not values and len(problems.lines) > known:
            return None
        if not values.keys() & cls.__dataclass_fields__.keys() and values.keys() & _OF_RUN_FILES:
            allowed = "a model file, such as configs/model/tiny.yaml; this is a run file"
            named = values.get("model")
            model = f", {os.path.normpath(path.parent / named)}" if isinstance(named, str) else ""
            remedy = f"give its model file{model}"
            problems.add(path, "(file)", ", ".join(map(str, values)), allowed, remedy)
            return None
        shape = read_section(cls, values, file=path, problems=problems)
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
            problems.add(file, "architecture", self.architecture, allowed, correction(self.architecture, ARCHITECTURES))
            return
        if self.architecture == LLAMA and self.head_dim % 2:
            problems.add(file, "head_dim", self.head_dim, "an even number", "RoPE rotates pairs")
        if self.count_parameters() > _MOST_PARAMETERS:
            allowed = f"sizes that amount to at most {_MOST_PARAMETERS} parameters"
            problems.add(file, "(sizes)", self.count_parameters(), allowed, "lower them")
        elif self.num_parameters not in (None, self.count_parameters()):
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


def is_model_file(file: Path) -> bool:
    """Whether a YAML file has keys of a model file and none of a run file; what is in them is not checked."""
    return _describes_model(read_yaml(file, Problems()))


def _describes_model(values: JsonObject) -> bool:
    return bool(values.keys() & GPTShape.__dataclass_fields__.keys()) and not values.keys() & _OF_RUN_FILES


def note_model_file(file: Path, values: JsonObject, problems: Problems) -> bool:
    """Note that a model file stands where a run file should; False if ``values`` are not those of one."""
    if not _describes_model(values):
        return False
    allowed = "a run file, such as configs/run/tiny.yaml; this is a model file"
    remedy = f"`ds-blockwise blocks {file}` shows its blocks; a run file names it: model: {file.name}"
    problems.add(file, "(file)", ", ".join(map(str, values)), allowed, remedy)
    return True
