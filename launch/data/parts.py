# SPDX-License-Identifier: Apache-2.0
"""One part of a corpus becomes Megatron's `.bin`/`.idx` files, one pair for each split.

A part is finished when its record exists: the record is written last and holds sizes and SHA-256 of the files. Its
name is a digest of everything that decides what is in them, so a part that was made from other text or with other
settings is never taken for this one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import numpy
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer

from data.corpus import is_validation, text_digest
from data.documents import NotText, Span, documents
from data.index_file import Integers, TokenType, token_type
from data.metadata import SPLITS, token_files_of
from data.tokenizer import TokenizerFile, load
from ds_blockwise.atomic_files import replace_file, replace_text, sha256_of

CountDone = Callable[[int, int, int], None]  # told documents, bytes of text and tokens as they are done


class _FirstText(TypedDict, total=False):
    first: str  # digest of the first document's text; there is none without a document


class PartSplit(_FirstText):
    """Counts and checksums of the token files of one split of a part."""

    documents: int
    characters: int
    tokens: int
    bin_bytes: int
    bin_sha256: str
    idx_sha256: str


class PartRecord(TypedDict):
    """What a finished part's record holds: its splits, and the names of its files and of those that are not text."""

    splits: dict[str, PartSplit]
    skipped: list[str]
    files: list[str]


@dataclass(frozen=True)
class PartSettings:
    """What all parts of one preparation share.

    Attributes:
        folder: Where finished parts go.
        text_key: Entry of a JSON object, or column of a parquet file, that holds the text.
        validation_fraction: See `corpus.is_validation`.
        tokenizer: The tokenizer.
    """

    folder: Path
    text_key: str
    validation_fraction: float
    tokenizer: TokenizerFile

    @property
    def dtype(self) -> TokenType:
        """Of the tokens on disk."""
        return token_type(self.tokenizer.vocab_size)

    def key(self, part: tuple[Span, ...], versions: Mapping[str, str]) -> str:
        """Name of a part: changes with its text, the settings, the tokenizer and the versions."""
        spans = [{**asdict(span), "path": str(span.path)} for span in part]
        settings = [self.text_key, self.validation_fraction, self.tokenizer.sha256, self.tokenizer.end_of_document]
        return hashlib.sha256(json.dumps([spans, settings, versions]).encode()).hexdigest()[:24]

    def prefix(self, key: str, split: str) -> Path:
        """Path of a part's token files of one split, without their suffixes."""
        return self.folder / f"{key}.{split}"

    def record(self, key: str) -> Path:
        """Path of a part's record."""
        return self.folder / f"{key}.json"


def read_record(settings: PartSettings, key: str) -> PartRecord:
    """The record of a finished part."""
    record: PartRecord = json.loads(settings.record(key).read_text(encoding="utf-8"))
    return record


def read_if_intact(settings: PartSettings, key: str) -> PartRecord | None:
    """The record of a part whose files have the recorded sizes and checksums; None: the part has to be made."""
    try:
        record = read_record(settings, key)
        for split in SPLITS:
            expected = record["splits"][split]
            tokens, index = token_files_of(settings.prefix(key, split))
            if tokens.stat().st_size != expected["bin_bytes"]:
                return None
            if (sha256_of(tokens), sha256_of(index)) != (expected["bin_sha256"], expected["idx_sha256"]):
                return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # damaged: to be made again
        return None
    return record


class _SplitWriter:
    """Writes and counts the documents of one split of a part, under names of this process.

    Two processes that make the same part (one of them about to end with its killed parent) then share no file.
    """

    def __init__(self, prefix: Path, dtype: TokenType) -> None:
        self._prefix = prefix
        self._partial = prefix.with_name(f"{prefix.name}.{os.getpid()}.partial")
        self._builder = IndexedDatasetBuilder(f"{self._partial}.bin", dtype=dtype)
        self._first: str | None = None
        self._documents = self._characters = self._tokens = 0

    def add(self, text: str, tokens: Integers) -> None:
        self._builder.add_document(tokens, [len(tokens)])
        if self._first is None:
            self._first = text_digest(text).hex()
        self._documents += 1
        self._characters += len(text)
        self._tokens += len(tokens)

    def finish(self) -> PartSplit:
        self._builder.finalize(f"{self._partial}.idx")
        tokens, index = token_files_of(self._partial)
        entry = PartSplit(
            documents=self._documents,
            characters=self._characters,
            tokens=self._tokens,
            bin_bytes=tokens.stat().st_size,
            bin_sha256=sha256_of(tokens),
            idx_sha256=sha256_of(index),
        )
        if self._first is not None:
            entry["first"] = self._first
        for path, final in zip((tokens, index), token_files_of(self._prefix), strict=True):
            replace_file(path, final)
        return entry


def write_part(settings: PartSettings, part: tuple[Span, ...], key: str, count: CountDone) -> PartRecord:
    """Tokenize one part.

    Args:
        settings: What all parts share.
        part: The part.
        key: Its name.
        count: Called after every document.

    Returns:
        The record, as it is on disk now.

    Raises:
        ValueError: See `documents.documents`.
    """
    tokenizer, vocab_size = _loaded(settings.tokenizer), settings.tokenizer.vocab_size
    writers = {split: _SplitWriter(settings.prefix(key, split), settings.dtype) for split in SPLITS}
    skipped: list[str] = []
    for text in _texts(part, settings.text_key, skipped):
        encoding = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
        tokens = numpy.array([*encoding.ids, settings.tokenizer.end_of_document], dtype=numpy.int64)
        # uint16 would wrap around without an error
        assert 0 <= tokens.min() and tokens.max() < vocab_size, f"token {tokens.max()} of a vocabulary of {vocab_size}"
        split = SPLITS[1] if is_validation(text, settings.validation_fraction) else SPLITS[0]
        writers[split].add(text, tokens)
        count(1, len(text.encode()), len(tokens))
    record = PartRecord(
        splits={split: writer.finish() for split, writer in writers.items()},
        skipped=skipped,
        files=[span.name for span in part],
    )
    replace_text(settings.record(key), json.dumps(record, indent=2) + "\n")
    return record


def _texts(part: tuple[Span, ...], text_key: str, skipped: list[str]) -> Iterator[str]:
    for span in part:
        try:
            yield from documents(span, text_key)
        except NotText:
            skipped.append(span.name)


_TOKENIZERS: dict[str, Tokenizer] = {}  # by SHA-256: a process works on many parts


def _loaded(tokenizer: TokenizerFile) -> Tokenizer:
    if tokenizer.sha256 not in _TOKENIZERS:
        _TOKENIZERS[tokenizer.sha256] = load(tokenizer.file)
    return _TOKENIZERS[tokenizer.sha256]
