# SPDX-License-Identifier: Apache-2.0
"""Whether token files are what their description says: from their structure alone, or token by token.

Megatron reads the files as they are: a cut file, an index of another file or a token beyond the vocabulary
would be found in the middle of a training, or never.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy
from megatron.core.datasets.indexed_dataset import DType

from data.corpus import digest
from data.parts import SPLITS, files_of
from data.tokenizer import load
from ds_blockwise.atomic_files import sha256_of

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the tokens' type, sequences, documents + 1
_AT_ONCE = 1 << 18  # entries or tokens
INDEX_TYPES = (numpy.int32, numpy.int64, numpy.int64)  # lengths, places in the .bin, document bounds


@dataclass(frozen=True)
class Index:
    """What stands in front of an `.idx` file.

    Attributes:
        path: The file.
        dtype: Of the tokens.
        sequences: Entries of lengths and places.
        bounds: Entries of document bounds.
    """

    path: Path
    dtype: type[numpy.number[Any]]
    sequences: int
    bounds: int

    @classmethod
    def read(cls, path: Path) -> Index:
        """Read the header.

        Raises:
            ValueError: It is no index, or not as long as its header says.
        """
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or header[:9] != _MAGIC:
            raise ValueError(f"{path}: no index of Megatron's")
        _, version, code, sequences, bounds = _HEADER.unpack(header)
        if version != 1 or code not in {member.value for member in DType}:
            raise ValueError(f"{path}: version {version}, type {code}: not known")
        if size != _HEADER.size + 12 * sequences + 8 * bounds:
            raise ValueError(f"{path}: {size} bytes for {sequences} sequences and {bounds} bounds")
        return cls(path, DType.dtype_from_code(code), sequences, bounds)

    def entries(self, column: int, start: int = 0, end: int | None = None) -> Iterator[Any]:
        """Arrays of at most 262144 entries of a column: 0 lengths (int32), 1 places, 2 document bounds (int64)."""
        counts = (self.sequences, self.sequences, self.bounds)
        sizes = [numpy.dtype(dtype).itemsize for dtype in INDEX_TYPES]
        at = _HEADER.size + sum(counts[i] * sizes[i] for i in range(column))
        end = counts[column] if end is None else end
        with self.path.open("rb") as file:
            file.seek(at + start * sizes[column])
            for first in range(start, end, _AT_ONCE):
                yield numpy.fromfile(file, INDEX_TYPES[column], min(_AT_ONCE, end - first))


def write_header(file: IO[bytes], dtype: type[numpy.number[Any]], sequences: int, bounds: int) -> None:
    """Begin an `.idx` file."""
    file.write(_HEADER.pack(_MAGIC, 1, DType.code_from_dtype(dtype), sequences, bounds))


def check(directory: Path, metadata: dict[str, Any], *, every_token: bool) -> list[str]:
    """What is wrong with token files; nothing if the list is empty.

    Args:
        directory: Holds them.
        metadata: Their description.
        every_token: Read everything: all tokens, the ends of all documents, the sums. Else the
            structure of the index and the documents that the description has a sum of.
    """
    tokenizer = directory / metadata["tokenizer"]["file"]
    if sha256_of(tokenizer) != metadata["tokenizer"]["sha256"]:
        return [f"{tokenizer}: another file than the one that the tokens were made with"]
    found: list[str] = []
    for split in SPLITS:
        try:
            found += _check_split(directory, split, metadata, every_token)
        except (OSError, ValueError) as error:
            found.append(str(error))
    return found


def _check_split(directory: Path, split: str, metadata: dict[str, Any], every_token: bool) -> list[str]:
    counts = metadata["splits"][split]
    tokens_file, index_file = files_of(directory / split)
    index = Index.read(index_file)
    itemsize = numpy.dtype(index.dtype).itemsize
    size = tokens_file.stat().st_size
    facts = [
        (f"{tokens_file}: {size} bytes", size, counts["bin_bytes"]),
        (f"{tokens_file}: {size} bytes", size, counts["tokens"] * itemsize),
        (f"{index_file}: {index.sequences} documents", index.sequences, counts["documents"]),
        (f"{index_file}: {index.bounds} bounds", index.bounds, counts["documents"] + 1),
        (f"{index_file}: tokens of {index.dtype.__name__}", index.dtype, _dtype(metadata)),
    ]
    found = [f"{what}, but metadata.json says {expected}" for what, value, expected in facts if value != expected]
    found = found or _check_index(index, counts["tokens"], itemsize)
    if not found:
        found = _check_samples(tokens_file, index, directory, split, metadata)
    if not found and every_token:
        found = _check_tokens(tokens_file, index, metadata["tokenizer"])
        for path, name in ((tokens_file, "bin_sha256"), (index_file, "idx_sha256")):
            if name in counts and sha256_of(path) != counts[name]:
                found.append(f"{path}: its sum is not the one in metadata.json")
    return found


def _dtype(metadata: dict[str, Any]) -> Any:
    return DType.optimal_dtype(metadata["tokenizer"]["vocab_size"])


def _check_index(index: Index, tokens: int, itemsize: int) -> list[str]:
    at = 0
    for lengths, places in zip(index.entries(0), index.entries(1), strict=True):
        expected = at + numpy.cumsum(lengths, dtype=numpy.int64) - lengths
        if lengths.min() < 1 or not numpy.array_equal(places, expected * itemsize):
            return [f"{index.path}: the places of the documents are not the sums of their lengths"]
        at += int(lengths.sum(dtype=numpy.int64))
    if at != tokens:
        return [f"{index.path}: the lengths sum to {at} tokens, but metadata.json says {tokens}"]
    first = 0
    for bounds in index.entries(2):
        if not numpy.array_equal(bounds, numpy.arange(first, first + len(bounds))):
            return [f"{index.path}: documents of more or less than one sequence"]
        first += len(bounds)
    return []


def _check_samples(tokens_file: Path, index: Index, directory: Path, split: str, metadata: dict[str, Any]) -> list[str]:
    facts = metadata["tokenizer"]
    tokenizer = load(directory / facts["file"])
    found = []
    with tokens_file.open("rb") as file:
        for sample in metadata.get("samples", {}).get(split, ()):
            number = sample["document"]
            (length,), (place,) = (next(index.entries(column, number, number + 1)) for column in (0, 1))
            file.seek(int(place))
            tokens = numpy.fromfile(file, index.dtype, int(length))
            if len(tokens) != length or tokens.max() >= facts["vocab_size"] or tokens[-1] != facts["end_of_document"]:
                found.append(f"{tokens_file}: document {number} is cut, or has tokens that the tokenizer has not")
            elif facts.get("exact"):
                text = tokenizer.decode(tokens[:-1].tolist(), skip_special_tokens=False)
                if digest(text).hex() != sample["text"]:
                    found.append(f"{tokens_file}: document {number} does not decode to the text that was read")
    return found


def _check_tokens(tokens_file: Path, index: Index, facts: dict[str, Any]) -> list[str]:
    with tokens_file.open("rb") as file:
        for number, lengths in enumerate(index.entries(0)):
            ends = numpy.cumsum(lengths, dtype=numpy.int64) - 1
            at, total = 0, int(ends[-1]) + 1
            while at < total:
                tokens = numpy.fromfile(file, index.dtype, min(_AT_ONCE, total - at))
                if tokens.max() >= facts["vocab_size"] or tokens.min() < 0:
                    return [f"{tokens_file}: token {tokens.max()}, but the tokenizer has {facts['vocab_size']}"]
                here = ends[numpy.searchsorted(ends, at) : numpy.searchsorted(ends, at + len(tokens))] - at
                wrong = numpy.flatnonzero(tokens[here] != facts["end_of_document"])
                if len(wrong):
                    document = number * _AT_ONCE + int(numpy.searchsorted(ends, at)) + int(wrong[0])
                    return [f"{tokens_file}: document {document} does not end with {facts['end_of_document']}"]
                inside = int((tokens == facts["end_of_document"]).sum()) - len(here)
                if inside and facts.get("exact"):
                    return [f"{tokens_file}: {inside} documents' ends inside documents"]
                at += len(tokens)
    return []
