# SPDX-License-Identifier: Apache-2.0
"""Batches from Megatron-core's `GPTDataset`, or a blend of several, as a function of the step alone.

Step s takes samples s * global_batch ... (s + 1) * global_batch - 1 of the shuffled data set; each data-parallel
rank takes every dp_size-th micro batch of them. There is no loader state to save: a resumed run asks for the next
step. All tensor-parallel ranks of one copy of the model take the same samples.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from data.metadata import CACHE, SPLITS, Metadata, SplitEntry, TokenizerEntry, read_metadata, token_prefix
from ds_blockwise.runs.reading.problems import Problems
from ds_blockwise.runs.run_file import RunConfig

_SURPLUS = 0.005  # Megatron's default: it builds so many more samples of each folder of a blend than its share


class BlendEntry(TypedDict):
    """One folder of a blend."""

    share: float
    train: SplitEntry
    validation: SplitEntry


class RunData(TypedDict):
    """The data of a run: what makes it this data and no other. `splits` has the key `blend` for a blend."""

    tokenizer: TokenizerEntry
    splits: dict[str, SplitEntry] | dict[str, list[BlendEntry]]


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of one forward pass: int64 [sequences, sequence length]."""

    tokens: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor


class _TokenizerFacts:
    """The part of a tokenizer that `GPTDataset` reads; the text is tokenized already."""

    pad = -1  # never in the data: sequences are cut from one stream of tokens, without padding

    def __init__(self, data: RunData) -> None:
        self.vocab_size = data["tokenizer"]["vocab_size"]
        self.eod = data["tokenizer"]["end_of_document"]
        # Megatron finds its cached sample indices by this, by path and by length: without the checksums it would
        # take the old indices of a folder that was prepared again.
        self.unique_identifiers = OrderedDict(sha256=data["tokenizer"]["sha256"], splits=data["splits"])


class BatchLoader:
    """Training and validation batches of one data-parallel rank.

    Args:
        run: The run.
        data: The prepared data, from `check_data`.
        dp_rank: Rank in the data-parallel group.
        dp_size: Size of the group.
        device: Of the tensors.
    """

    def __init__(
        self,
        run: RunConfig,
        data: RunData,
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
        shares = run.data.read_blend(run.file, Problems())
        weights = [share for _, share in shares] if len(shares) > 1 else None
        train, validation = (
            ([str(token_prefix(Path(folder), split)) for folder, _ in shares], weights) for split in SPLITS
        )
        config = GPTDatasetConfig(
            random_seed=run.training.seed,
            sequence_length=run.shape.sequence_length,
            blend_per_split=[train, validation, None],
            path_to_cache=str(run.data_directory / CACHE),
            tokenizer=_TokenizerFacts(data),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,  # the model makes the causal mask
            mid_level_dataset_surplus=_SURPLUS,
        )
        samples = run.training.steps * run.training.global_batch_size
        # None: one pass over the validation documents. A blend draws a given number of samples by the shares.
        sizes = [samples, None if weights is None else run.training.validation_sequences, 0]
        builder = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config)
        self._train, self._validation, _ = builder.build()
        if weights is not None:
            _check_shares(self._train, samples, shares)
            _check_shares(self._validation, run.training.validation_sequences, shares)

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """This rank's share of one optimizer step.

        Args:
            step: Optimizer steps before this one.
        """
        size = self._training.micro_batch_size
        start = step * self._training.global_batch_size + self._dp_rank * size
        for first in range(start, (step + 1) * self._training.global_batch_size, self._stride):
            yield self._batch(self._train, range(first, first + size))

    def validation(self) -> Iterator[MicroBatch]:
        """This rank's share of the validation set; the same at each call, the last may be short."""
        mine = range(self._dp_rank, self._training.validation_sequences, self._dp_size)
        size = self._training.micro_batch_size
        for first in range(0, len(mine), size):
            yield self._batch(self._validation, mine[first : first + size])

    @property
    def _stride(self) -> int:
        return self._dp_size * self._training.micro_batch_size

    def _batch(self, dataset: GPTDataset, indices: range) -> MicroBatch:
        samples = [dataset[index] for index in indices]
        tokens, labels = (
            torch.stack([sample[key] for sample in samples]).to(self._device, non_blocking=True)
            for key in ("tokens", "labels")
        )
        return MicroBatch(tokens, self._positions.expand_as(tokens), labels)


def _check_shares(dataset: BlendedDataset, samples: int, shares: Sequence[tuple[str, float]]) -> None:
    """Each folder's count may differ from its share of the samples by at most the number of folders."""
    drawn = numpy.bincount(dataset.dataset_index[:samples], minlength=len(shares))
    for (folder, share), count in zip(shares, drawn, strict=True):
        if abs(int(count) - share * samples) > len(shares):
            raise RuntimeError(f"{folder} gives {count} of {samples} samples, but its share is {share:.4f}")


def check_data(run: RunConfig, problems: Problems) -> RunData | None:
    """Check that the prepared data is there and fits the model.

    Args:
        run: The run.
        problems: Notes missing or incomplete data, folders of one blend with different tokenizers, a
            vocabulary that is too large and too few validation sequences.

    Returns:
        The tokenizer and the splits of the prepared data; None without data, or for a blend with problems.
    """
    found = len(problems.lines)
    shares = run.data.read_blend(run.file, problems)
    held = {folder: _check_folder(run, Path(folder), share, problems) for folder, share in shares}
    if not run.data.blend:
        data = held[run.data.directory]
        return None if data is None else {"tokenizer": data["tokenizer"], "splits": data["splits"]}
    complete = {folder: data for folder, data in held.items() if data is not None}
    if len(problems.lines) > found:
        return None
    first, *others = complete
    for folder in others:
        one, other = complete[first]["tokenizer"], complete[folder]["tokenizer"]
        if (one["sha256"], one["end_of_document"]) != (other["sha256"], other["end_of_document"]):
            allowed = f"folders that were prepared with one tokenizer; it differs from that of {first}"
            remedy = f"run: python launch/prepare_data.py --run {run.file} --directory {folder} --tokenizer {first}"
            problems.add(run.file, "data.blend", folder, allowed, f"{remedy} --source (its text)")
    if len(problems.lines) > found:
        return None
    blend: list[BlendEntry] = [
        {
            "share": share,
            "train": complete[folder]["splits"]["train"],
            "validation": complete[folder]["splits"]["validation"],
        }
        for folder, share in shares
    ]
    return {"tokenizer": complete[first]["tokenizer"], "splits": {"blend": blend}}


def _check_folder(run: RunConfig, folder: Path, share: float, problems: Problems) -> Metadata | None:
    file, training = run.file, run.training
    key = "data.blend" if run.data.blend else "data.directory"
    metadata = read_metadata(folder)
    if metadata is None:
        allowed = "a folder that prepare_data.py has completed"
        options = f" --directory {folder} --source (its text)" if run.data.blend else ""
        problems.add(file, key, str(folder), allowed, f"run: python launch/prepare_data.py --run {file}{options}")
        return None
    vocab_size = metadata["tokenizer"]["vocab_size"]
    if vocab_size > run.shape.vocab_size:
        allowed = f"at least {vocab_size}, the tokens of {folder}"
        remedy = "raise it or prepare the data with a smaller tokenizer"
        problems.add(run.model_file, "vocab_size", run.shape.vocab_size, allowed, remedy)
    length = run.shape.sequence_length
    held = {name: (metadata["splits"][name]["tokens"] - 1) // length for name in SPLITS}
    # Megatron asks each folder of a blend for so many sequences; it would repeat some if the folder has fewer.
    surplus = _SURPLUS if len(run.data.blend) > 1 else 0.0
    needed = math.ceil(math.ceil(training.validation_sequences * share) * (1 + surplus))
    if held["validation"] < needed:
        most = held["validation"] if share == 1.0 else math.floor(held["validation"] / (1 + surplus) / share)
        allowed = f"at most {most}, what {folder} holds" + (f" for its share of {share:.3g}" if share < 1.0 else "")
        remedy = "lower it or raise data.validation_fraction and prepare the data again"
        problems.add(file, "training.validation_sequences", training.validation_sequences, allowed, remedy)
    if held["train"] < 1:
        allowed = f"data of more than {length} training tokens (one sequence)"
        problems.add(file, key, str(folder), allowed, "name more text")
    return metadata
