# SPDX-License-Identifier: Apache-2.0
"""Megatron's `.idx` file, read and joined in pieces of constant size.

After a header of 34 bytes the file holds three columns: the length of each sequence in tokens (int32), where the
sequence begins in the `.bin` file in bytes (int64), and the first sequence of each document (int64, one entry more
than there are documents). Source: `megatron/core/datasets/indexed_dataset.py`. Megatron's own writer keeps all
columns in memory.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TypeAlias

import numpy
import numpy.typing
from megatron.core.datasets.indexed_dataset import DType

_MAGIC = b"MMIDIDX\0\0"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the tokens' type, sequences, document entries
ENTRIES_AT_ONCE = 1 << 18

TokenType: TypeAlias = type[numpy.uint16] | type[numpy.int32]
Integers: TypeAlias = numpy.typing.NDArray[numpy.integer]


class Column(IntEnum):
    """The columns of an index, in the order of the file."""

    LENGTHS = 0  # tokens of each sequence
    POINTERS = 1  # first byte of each sequence in the `.bin` file
    DOCUMENTS = 2  # first sequence of each document, and the number of sequences


_COLUMN_TYPES = (numpy.dtype(numpy.int32), numpy.dtype(numpy.int64), numpy.dtype(numpy.int64))


def token_type(vocab_size: int) -> TokenType:
    """The type of the tokens on disk that Megatron chooses: uint16 where the vocabulary fits, else int32."""
    dtype: TokenType = DType.optimal_dtype(vocab_size)
    return dtype


@dataclass(frozen=True)
class IndexFile:
    """The header of an `.idx` file.

    Attributes:
        path: The file.
        dtype: Of the tokens.
        num_sequences: Entries of the columns LENGTHS and POINTERS.
        num_document_entries: Entries of the column DOCUMENTS.
    """

    path: Path
    dtype: type[numpy.integer]
    num_sequences: int
    num_document_entries: int

    @classmethod
    def read(cls, path: Path) -> IndexFile:
        """Read the header.

        Raises:
            ValueError: It is not an index file, or not as long as its header says.
        """
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or header[: len(_MAGIC)] != _MAGIC:
            raise ValueError(f"{path}: not a Megatron index file: it does not begin with {_MAGIC[:7].decode()}")
        _, version, code, sequences, documents = _HEADER.unpack(header)
        codes = sorted(member.value for member in DType)
        if version != _VERSION or code not in codes:
            raise ValueError(f"{path}: version {version} and dtype code {code}; allowed: version 1 and codes {codes}")
        sizes = [dtype.itemsize for dtype in _COLUMN_TYPES]
        expected = _HEADER.size + sequences * (sizes[0] + sizes[1]) + documents * sizes[2]
        if size != expected:
            raise ValueError(
                f"{path}: {size} bytes, but {sequences} sequences and {documents} document entries take {expected}"
            )
        return cls(path, DType.dtype_from_code(code), sequences, documents)

    def entries(self, column: Column, start: int = 0, end: int | None = None) -> Iterator[Integers]:
        """Arrays of at most 262144 entries of a column, from ``start`` to before ``end``."""
        counts = (self.num_sequences, self.num_sequences, self.num_document_entries)
        begin = _HEADER.size + sum(counts[i] * _COLUMN_TYPES[i].itemsize for i in range(column))
        end = counts[column] if end is None else end
        dtype = _COLUMN_TYPES[column]
        with self.path.open("rb") as file:
            file.seek(begin + start * dtype.itemsize)
            for first in range(start, end, ENTRIES_AT_ONCE):
                yield numpy.fromfile(file, dtype, min(ENTRIES_AT_ONCE, end - first))


def join_indices(path: Path, parts: Sequence[Path], dtype: TokenType) -> None:
    """Write one index for `.bin` files that were joined in the same order; one sequence is one document.

    Args:
        path: The index to write.
        parts: The `.idx` file of each `.bin` file.
        dtype: Of the tokens in all of them.
    """
    indices = [IndexFile.read(part) for part in parts]
    sequences = sum(index.num_sequences for index in indices)
    itemsize = numpy.dtype(dtype).itemsize
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, _VERSION, DType.code_from_dtype(dtype), sequences, sequences + 1))
        for index in indices:
            for lengths in index.entries(Column.LENGTHS):
                file.write(lengths.tobytes())
        tokens = 0
        for index in indices:
            for pointers in index.entries(Column.POINTERS):
                file.write((pointers + tokens * itemsize).astype(_COLUMN_TYPES[Column.POINTERS]).tobytes())
            tokens += sum(int(lengths.sum(dtype=numpy.int64)) for lengths in index.entries(Column.LENGTHS))
        file.write(numpy.zeros(1, _COLUMN_TYPES[Column.DOCUMENTS]).tobytes())
        before = 0
        for index in indices:
            for documents in index.entries(Column.DOCUMENTS, start=1):  # the 0 of each index is written once
                file.write((documents + before).astype(_COLUMN_TYPES[Column.DOCUMENTS]).tobytes())
            before += index.num_sequences
