# SPDX-License-Identifier: Apache-2.0
"""Whether token files are what their description says: from their structure alone, or token by token.

Megatron reads the files without a check: a file that was cut short, the index of another file or a token outside the
vocabulary would fail in the middle of a training, or never.
"""

from __future__ import annotations

from pathlib import Path

import numpy

from data.corpus import text_digest
from data.index_file import ENTRIES_AT_ONCE, Column, IndexFile, token_type
from data.metadata import SPLITS, Metadata, TokenizerEntry, token_files_of, token_prefix
from data.tokenizer import load
from ds_blockwise.atomic_files import sha256_of


def find_damage(directory: Path, metadata: Metadata, *, every_token: bool) -> list[str]:
    """What is wrong with token files, one line each; an empty list if nothing is.

    Args:
        directory: Holds them.
        metadata: Their description.
        every_token: Read everything: all tokens, the end of every document, the checksums. Else the
            structure of the index and the documents that the description has a digest of.
    """
    tokenizer = directory / metadata["tokenizer"]["file"]
    if sha256_of(tokenizer) != metadata["tokenizer"]["sha256"]:
        return [f"{tokenizer}: not the file that the tokens were made with (its SHA-256 differs from metadata.json)"]
    found: list[str] = []
    for split in SPLITS:
        try:
            found += _check_split(directory, split, metadata, every_token)
        except (OSError, ValueError) as error:
            found.append(str(error))
    return found


def _check_split(directory: Path, split: str, metadata: Metadata, every_token: bool) -> list[str]:
    entry = metadata["splits"][split]
    tokens_file, index_path = token_files_of(token_prefix(directory, split))
    index = IndexFile.read(index_path)
    itemsize = numpy.dtype(index.dtype).itemsize
    size = tokens_file.stat().st_size
    dtype = token_type(metadata["tokenizer"]["vocab_size"])
    comparisons: list[tuple[str, object, object]] = [
        (f"{tokens_file}: {size} bytes", size, entry["bin_bytes"]),
        (f"{tokens_file}: {size} bytes", size, entry["tokens"] * itemsize),
        (f"{index_path}: {index.num_sequences} documents", index.num_sequences, entry["documents"]),
        (
            f"{index_path}: {index.num_document_entries} document entries",
            index.num_document_entries,
            entry["documents"] + 1,
        ),
        (f"{index_path}: tokens of {index.dtype.__name__}", index.dtype.__name__, dtype.__name__),
    ]
    found = [f"{what}, but metadata.json says {said}" for what, value, said in comparisons if value != said]
    found = found or _check_index(index, entry["tokens"], itemsize)
    found = found or _check_samples(tokens_file, index, directory, split, metadata)
    if not found and every_token:
        found = _check_tokens(tokens_file, index, metadata["tokenizer"])
        checksums = ((tokens_file, entry.get("bin_sha256")), (index_path, entry.get("idx_sha256")))
        for path, checksum in checksums:
            if checksum is not None and sha256_of(path) != checksum:
                found.append(f"{path}: its SHA-256 is not the one in metadata.json")
    return found


def _check_index(index: IndexFile, tokens: int, itemsize: int) -> list[str]:
    before = 0  # tokens
    for lengths, pointers in zip(index.entries(Column.LENGTHS), index.entries(Column.POINTERS), strict=True):
        expected = before + numpy.cumsum(lengths, dtype=numpy.int64) - lengths
        if lengths.min() < 1 or not numpy.array_equal(pointers, expected * itemsize):
            return [f"{index.path}: the sequence pointers do not follow from the sequence lengths"]
        before += int(lengths.sum(dtype=numpy.int64))
    if before != tokens:
        return [f"{index.path}: the lengths add up to {before} tokens, but metadata.json says {tokens}"]
    first = 0
    for documents in index.entries(Column.DOCUMENTS):
        if not numpy.array_equal(documents, numpy.arange(first, first + len(documents))):
            return [f"{index.path}: a document is not exactly one sequence"]
        first += len(documents)
    return []


def _check_samples(tokens_file: Path, index: IndexFile, directory: Path, split: str, metadata: Metadata) -> list[str]:
    entry = metadata["tokenizer"]
    tokenizer = load(directory / entry["file"])
    found = []
    with tokens_file.open("rb") as file:
        for sample in metadata.get("samples", {}).get(split, []):
            number = sample["document"]
            (length,) = next(index.entries(Column.LENGTHS, number, number + 1))
            (pointer,) = next(index.entries(Column.POINTERS, number, number + 1))
            file.seek(int(pointer))
            tokens = numpy.fromfile(file, index.dtype, int(length))
            if len(tokens) != length:
                found.append(f"{tokens_file}: document {number} is cut short")
            elif tokens.max() >= entry["vocab_size"]:
                found.append(f"{tokens_file}: document {number} has a token outside the tokenizer's vocabulary")
            elif tokens[-1] != entry["end_of_document"]:
                found.append(f"{tokens_file}: document {number} does not end with token {entry['end_of_document']}")
            elif entry.get("exact"):
                text = tokenizer.decode(tokens[:-1].tolist(), skip_special_tokens=False)
                if text_digest(text).hex() != sample["text"]:
                    found.append(f"{tokens_file}: document {number} does not decode to the text that was read")
    return found


def _check_tokens(tokens_file: Path, index: IndexFile, entry: TokenizerEntry) -> list[str]:
    vocab_size, end_of_document = entry["vocab_size"], entry["end_of_document"]
    with tokens_file.open("rb") as file:
        for block, lengths in enumerate(index.entries(Column.LENGTHS)):
            ends = numpy.cumsum(lengths, dtype=numpy.int64) - 1
            offset, total = 0, int(ends[-1]) + 1
            while offset < total:
                tokens = numpy.fromfile(file, index.dtype, min(ENTRIES_AT_ONCE, total - offset))
                if tokens.max() >= vocab_size or tokens.min() < 0:
                    return [f"{tokens_file}: token {tokens.max()}, but the tokenizer has {vocab_size} tokens"]
                first = int(numpy.searchsorted(ends, offset))
                here = ends[first : numpy.searchsorted(ends, offset + len(tokens))] - offset
                wrong = numpy.flatnonzero(tokens[here] != end_of_document)
                if len(wrong):
                    document = block * ENTRIES_AT_ONCE + first + int(wrong[0])
                    return [f"{tokens_file}: document {document} does not end with token {end_of_document}"]
                inside = int((tokens == end_of_document).sum()) - len(here)
                if inside and entry.get("exact"):
                    return [f"{tokens_file}: {inside} end-of-document tokens inside documents"]
                offset += len(tokens)
    return []
