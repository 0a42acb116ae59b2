# SPDX-License-Identifier: Apache-2.0
"""The prepared data: a tokenizer and Megatron's `.bin`/`.idx` token files, with their description.

`metadata.json` is written last, so its presence says that everything beside it is complete.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from corpus import Corpus, choose_validation, digest, find_corpus
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ds_blockwise.config_files import Problems
from ds_blockwise.run_config import DataConfig

logger = logging.getLogger(__name__)

METADATA = "metadata.json"
TOKENIZER = "tokenizer.json"
CACHE = "cache"  # Megatron's sample indices
SPLITS = ("train", "validation")
TRAIN_TOKENIZER = "train"
_FORMAT = 1
_END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
_BATCH = 256  # documents that are tokenized at once


def prepare(data: DataConfig, vocab_size: int, named_in: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Turn the text into token files, unless they are up to date.

    Args:
        data: Source, tokenizer and split; `data.directory` is written.
        vocab_size: Largest vocabulary that the model can take; a trained tokenizer's size.
        named_in: The run file, for messages.
        force: Prepare even if the files are up to date.

    Returns:
        The metadata, as in `metadata.json`.

    Raises:
        ValueError: Nothing to read, a text key that isn't there, a tokenizer that doesn't fit.
    """
    problems = Problems()
    directory = Path(data.directory)
    corpus = find_corpus(data.source, data.text_key, named_in, problems)
    problems.raise_if_any()
    fingerprint = _fingerprint(data, vocab_size, corpus)
    if not force:
        metadata = read_metadata(directory)
        if metadata is not None and metadata["fingerprint"] == fingerprint:
            logger.info("%s is up to date", directory)
            return metadata
    validation = choose_validation(corpus, data.validation_fraction, named_in, problems)
    problems.raise_if_any()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / METADATA).unlink(missing_ok=True)
    # Megatron finds its sample indices by path and length, not by content: stale ones would be
    # used for the new tokens without a word.
    shutil.rmtree(directory / CACHE, ignore_errors=True)
    tokenizer = _tokenizer(data, vocab_size, corpus, validation, named_in)
    end_of_document = _end_of_document(tokenizer, data, named_in)
    tokenizer.save(str(directory / TOKENIZER))
    counts = _write_tokens(directory, corpus, validation, tokenizer, end_of_document)
    metadata = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "source": list(data.source),
        "files": len(corpus.files),
        "files_skipped_not_utf8": sorted(corpus.skipped),
        "tokenizer": {
            "file": TOKENIZER,
            "sha256": hashlib.sha256((directory / TOKENIZER).read_bytes()).hexdigest(),
            "vocab_size": tokenizer.get_vocab_size(),
            "end_of_document": end_of_document,
        },
        "splits": counts,
        "versions": {
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in ("tokenizers", "megatron-core")},
        },
    }
    partial = directory / f"{METADATA}.partial"
    partial.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, directory / METADATA)
    return metadata


def read_metadata(directory: Path) -> dict[str, Any] | None:
    """The description of prepared data, or None if there is none or a file is missing or cut."""
    try:
        metadata = json.loads((directory / METADATA).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    if metadata.get("format") != _FORMAT or not (directory / TOKENIZER).is_file():
        return None
    for split in SPLITS:
        expected = metadata["splits"][split]["bin_bytes"]
        prefix = token_prefix(directory, split)
        tokens = prefix.with_suffix(".bin")
        if not tokens.is_file() or tokens.stat().st_size != expected:
            return None
        if not prefix.with_suffix(".idx").is_file():
            return None
    return metadata


def token_prefix(directory: Path, split: str) -> Path:
    """Path of a split's token files without their suffixes."""
    return directory / split


def _fingerprint(data: DataConfig, vocab_size: int, corpus: Corpus) -> str:
    given = data.tokenizer != TRAIN_TOKENIZER and Path(data.tokenizer).is_file()
    recipe = [
        _FORMAT,
        data.source,
        data.text_key,
        data.validation_fraction,
        hashlib.sha256(Path(data.tokenizer).read_bytes()).hexdigest() if given else data.tokenizer,
        vocab_size,
        corpus.listing(),
    ]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


def _tokenizer(
    data: DataConfig,
    vocab_size: int,
    corpus: Corpus,
    validation: frozenset[bytes],
    named_in: str | Path,
) -> Tokenizer:
    problems = Problems()
    if data.tokenizer != TRAIN_TOKENIZER:
        if not Path(data.tokenizer).is_file():
            allowed = f"{TRAIN_TOKENIZER!r} or the path of a tokenizer.json"
            problems.add(named_in, "data.tokenizer", data.tokenizer, allowed, "correct the path")
            problems.raise_if_any()
        tokenizer = Tokenizer.from_file(data.tokenizer)
        if tokenizer.get_vocab_size() > vocab_size:
            allowed = f"a tokenizer of at most vocab_size = {vocab_size} tokens"
            value = f"{data.tokenizer} ({tokenizer.get_vocab_size()} tokens)"
            remedy = "raise the model's vocab_size or take a smaller tokenizer"
            problems.add(named_in, "data.tokenizer", value, allowed, remedy)
            problems.raise_if_any()
        return tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 1
    if vocab_size < smallest:
        allowed = f"at least {smallest}: every byte and the end of a document"
        problems.add(named_in, "vocab_size", vocab_size, allowed, "raise the model's vocab_size")
        problems.raise_if_any()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END_OF_DOCUMENT[0]],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    logger.info("training a byte-level BPE tokenizer with %d tokens", vocab_size)
    tokenizer.train_from_iterator((text for text in corpus if digest(text) not in validation), trainer)
    return tokenizer


def _end_of_document(tokenizer: Tokenizer, data: DataConfig, named_in: str | Path) -> int:
    for token in _END_OF_DOCUMENT:
        number = tokenizer.token_to_id(token)
        if number is not None:
            return int(number)
    problems = Problems()
    allowed = "a tokenizer with one of the tokens " + " ".join(_END_OF_DOCUMENT)
    problems.add(named_in, "data.tokenizer", data.tokenizer, allowed, "add such a special token")
    problems.raise_if_any()
    raise AssertionError("unreachable")


def _write_tokens(
    directory: Path,
    corpus: Corpus,
    validation: frozenset[bytes],
    tokenizer: Tokenizer,
    end_of_document: int,
) -> dict[str, dict[str, int]]:
    dtype = DType.optimal_dtype(tokenizer.get_vocab_size())
    prefixes = {split: token_prefix(directory, split) for split in SPLITS}
    builders = {split: IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype) for split, prefix in prefixes.items()}
    counts = {split: {"documents": 0, "characters": 0, "tokens": 0} for split in SPLITS}
    logger.info("writing tokens to %s", directory)
    for batch in _batches(corpus):
        encodings = tokenizer.encode_batch(batch, add_special_tokens=False)
        for text, encoding in zip(batch, encodings, strict=True):
            split = SPLITS[1] if digest(text) in validation else SPLITS[0]
            tokens = [*encoding.ids, end_of_document]
            builders[split].add_document(torch.tensor(tokens), [len(tokens)])
            counts[split]["documents"] += 1
            counts[split]["characters"] += len(text)
            counts[split]["tokens"] += len(tokens)
    for split, builder in builders.items():
        builder.finalize(f"{prefixes[split]}.idx")
        counts[split]["bin_bytes"] = Path(f"{prefixes[split]}.bin").stat().st_size
    return counts


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, _BATCH)):
        yield batch
