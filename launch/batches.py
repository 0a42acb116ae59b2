# SPDX-License-Identifier: Apache-2.0
"""Batches from Megatron-core's `GPTDataset`, as a function of the step alone.

Step s takes samples s * global_batch ... (s + 1) * global_batch of the shuffled data set; a
data-parallel rank takes its share of each micro batch. There is no loader state to save: a resumed
run asks for the next step. All tensor-parallel ranks of one copy ask for the same samples.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from token_files import CACHE, SPLITS, read_metadata, token_prefix

from ds_blockwise.config_files import Problems
from ds_blockwise.run_config import RunConfig


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass: int64 [sequences, sequence length]."""

    tokens: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor


class _TokenizerFacts:
    """What `GPTDataset` reads of a tokenizer; the tokens are on disk already."""

    pad = -1  # never in the data: sequences are cut from a stream, none is padded

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.vocab_size: int = metadata["vocab_size"]
        self.eod: int = metadata["end_of_document"]
        self.unique_identifiers = OrderedDict(sha256=metadata["sha256"])


class Batches:
    """Training and validation batches of one data-parallel rank.

    Args:
        run: The run.
        metadata: Description of the prepared data, checked by `check_data`.
        dp_rank: This rank's place in the data-parallel group.
        dp_size: Size of the group.
        device: Where batches go.
    """

    def __init__(
        self,
        run: RunConfig,
        metadata: dict[str, Any],
        *,
        dp_rank: int,
        dp_size: int,
        device: torch.device,
    ) -> None:
        self._training = run.training
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._device = device
        self._positions = torch.arange(run.shape.sequence_length, device=device)
        train, validation = (([str(token_prefix(run.data_directory, split))], None) for split in SPLITS)
        config = GPTDatasetConfig(
            random_seed=run.training.seed,
            sequence_length=run.shape.sequence_length,
            blend_per_split=[train, validation, None],
            path_to_cache=str(run.data_directory / CACHE),
            tokenizer=_TokenizerFacts(metadata["tokenizer"]),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,  # the model makes the causal mask
        )
        samples = run.training.steps * run.training.global_batch_size
        sizes = [samples, None, 0]  # None: one pass over the validation documents
        builder = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config)
        self._train, self._validation, _ = builder.build()

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """This rank's share of one optimizer step.

        Args:
            step: Optimizer steps before this one.
        """
        size = self._training.micro_batch_size
        start = step * self._training.global_batch_size + self._dp_rank * size
        for first in range(start, (step + 1) * self._training.global_batch_size, self._stride):
            yield self._batch(self._train, range(first, first + size))

    def validation(self) -> Iterator[Batch]:
        """This rank's share of the validation set; the same at each call, the last may be short."""
        mine = range(self._dp_rank, self._training.validation_sequences, self._dp_size)
        size = self._training.micro_batch_size
        for first in range(0, len(mine), size):
            yield self._batch(self._validation, mine[first : first + size])

    @property
    def _stride(self) -> int:
        return self._dp_size * self._training.micro_batch_size

    def _batch(self, dataset: GPTDataset, indices: range) -> Batch:
        samples = [dataset[index] for index in indices]
        tokens, labels = (
            torch.stack([sample[key] for sample in samples]).to(self._device, non_blocking=True)
            for key in ("tokens", "labels")
        )
        return Batch(tokens, self._positions.expand_as(tokens), labels)


def check_data(run: RunConfig, problems: Problems) -> dict[str, Any]:
    """Check that the prepared data is there and fits the model.

    Args:
        run: The run.
        problems: Notes missing or incomplete data, a vocabulary that is too large and too few
            validation sequences.

    Returns:
        The metadata; empty if there is none.
    """
    file = run.file
    metadata = read_metadata(run.data_directory)
    if metadata is None:
        allowed = "a folder that prepare_data.py has completed"
        remedy = f"run: python launch/prepare_data.py --run {file}"
        problems.add(file, "data.directory", str(run.data_directory), allowed, remedy)
        return {}
    vocab_size = metadata["tokenizer"]["vocab_size"]
    if vocab_size > run.shape.vocab_size:
        allowed = f"at least {vocab_size}, the tokens of {run.data_directory}"
        remedy = "raise it or prepare the data with a smaller tokenizer"
        problems.add(run.model_file, "vocab_size", run.shape.vocab_size, allowed, remedy)
    length = run.shape.sequence_length
    held = {name: (metadata["splits"][name]["tokens"] - 1) // length for name in SPLITS}
    if held["validation"] < run.training.validation_sequences:
        allowed = f"at most {held['validation']}, what {run.data_directory} holds"
        remedy = "lower it or raise data.validation_fraction and prepare the data again"
        problems.add(
            file,
            "training.validation_sequences",
            run.training.validation_sequences,
            allowed,
            remedy,
        )
    if held["train"] < 1:
        allowed = f"data of more than {length} training tokens (one sequence)"
        problems.add(file, "data.directory", str(run.data_directory), allowed, "name more text")
    return metadata
