# SPDX-License-Identifier: Apache-2.0
"""Documents of a span of one file, read one at a time: text, JSON lines and parquet.

Only the current document and a buffer are in memory. A span holds the lines that begin within its bounds, so
adjacent spans share no line and lose none.
"""

from __future__ import annotations

import ast
import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO

TEXT = "text"
JSON_LINES = "JSON lines"
PARQUET = "parquet"
PYDOC_TOPICS = "pydoc topics"
COMPRESSIONS = (".gz", ".zst")
# A longer text file becomes several documents: one book must not be all of the validation set.
_LONGEST_TEXT = 1 << 18  # characters
_LONGEST_NAMES = 200  # characters of an object's keys in a message
_LONGEST_LINE = 1 << 28  # bytes; a longer line means that the file does not hold JSON lines
_BLOCK = 1 << 20
_ROWS = 64  # of parquet at a time


class NotText(Exception):
    """A text file that isn't UTF-8."""


@dataclass(frozen=True)
class Span:
    """A consecutive range of one file.

    Attributes:
        name: The file's name in messages.
        path: The file.
        kind: How it is read.
        start: First byte (of parquet: row group).
        end: Byte or row group after the last.
        bytes: On disk, for the line of progress.
        size: Of the whole file when it was found, in bytes.
        mtime_ns: Of the file when it was found.
    """

    name: str
    path: Path
    kind: str
    start: int
    end: int
    bytes: int
    size: int
    mtime_ns: int

    def check_unchanged(self) -> None:
        """Raise if the file is not the one that was found.

        Raises:
            ValueError: Its size or modification time has changed.
        """
        stat = self.path.stat()
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
            raise ValueError(
                f"{self.name} was changed while it was read ({self.size} bytes before, {stat.st_size} now); "
                "wait until it is complete and start again"
            )


def kind_of(path: Path) -> str:
    """How a file is read, by its name; an unknown suffix means text."""
    suffixes = path.suffixes
    packed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    last = suffixes[-2:-1] if packed else suffixes[-1:]
    if last in ([".jsonl"], [".ndjson"]) or (packed and last == [".json"]):
        return JSON_LINES
    return PARQUET if last == [".parquet"] and not packed else TEXT


def documents(span: Span, text_key: str) -> Iterator[str]:
    """Yield the text of each document of a span that isn't blank.

    Args:
        span: What to read.
        text_key: Entry of a JSON object, or column of a parquet file, that holds the text.

    Raises:
        NotText: A text file is not UTF-8; nothing was yielded before.
        ValueError: A line of JSON or a row has no text under ``text_key``, a package is missing, or
            the file was changed in the meantime.
    """
    span.check_unchanged()
    read = {TEXT: _texts, JSON_LINES: _json_lines, PARQUET: _rows, PYDOC_TOPICS: _topics}[span.kind]
    try:
        for text in read(span, text_key):
            if text.strip():
                yield text
    except (EOFError, OSError, zlib.error) as error:  # what gzip and pyarrow raise for a file that was cut
        if span.path.suffix not in COMPRESSIONS:
            raise
        raise ValueError(f"{span.name}: {error}; allowed: a complete compressed file; copy it again") from error
    span.check_unchanged()


# ------------------------------------------------------------------------------------ text, JSON


def _open(span: Span) -> IO[bytes]:
    suffix = span.path.suffix
    if suffix == ".gz":
        return gzip.open(span.path, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        pyarrow = import_pyarrow(span.name)
        return io.BufferedReader(pyarrow.input_stream(str(span.path), compression="zstd"), _BLOCK)
    return span.path.open("rb")


def _bounds(span: Span, stream: IO[bytes]) -> tuple[int, int | None]:
    """Seek to the first line that begins within a span; its offset and that of the first line after (None: the end)."""
    end = None if span.end >= span.size else _line_start(stream, span.end)
    start = _line_start(stream, span.start)
    if span.size > 0 and (span.start, end) != (0, None):
        stream.seek(start)
    return start, end


def _line_start(stream: IO[bytes], offset: int) -> int:
    """Offset of the first line that begins at ``offset`` or later."""
    if offset == 0:
        return 0
    position = offset - 1
    stream.seek(position)
    while block := stream.read(_BLOCK):
        found = block.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(block)
    return position


def _blocks(span: Span) -> Iterator[bytes]:
    with _open(span) as stream:
        start, end = _bounds(span, stream)
        left = None if end is None else end - start
        while block := stream.read(_BLOCK if left is None else min(_BLOCK, left)):
            yield block
            left = None if left is None else left - len(block)


def _texts(span: Span, text_key: str) -> Iterator[str]:
    try:
        for _ in _decoded(span):
            pass
    except UnicodeDecodeError as error:
        raise NotText(span.name) from error
    text = ""
    for more in _decoded(span):
        text += more
        while len(text) > _LONGEST_TEXT:
            end = text.rfind("\n", 0, _LONGEST_TEXT) + 1 or _LONGEST_TEXT
            yield text[:end]
            text = text[end:]
    yield text


def _decoded(span: Span) -> Iterator[str]:
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    for block in _blocks(span):
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def _json_lines(span: Span, text_key: str) -> Iterator[str]:
    with _open(span) as stream:
        start, end = _bounds(span, stream)
        at = start
        while (end is None or at < end) and (line := stream.readline(_LONGEST_LINE)):
            if len(line) == _LONGEST_LINE:
                remedy = "allowed: one JSON object in each line; break the line up"
                raise ValueError(f"{_where(span, at)}: longer than {_LONGEST_LINE >> 20} MiB; {remedy}")
            if line.strip():
                yield _json_text(span, at, line, text_key)
            at += len(line)


def _names(entry: Iterable[str]) -> str:
    text = ", ".join(key if key.isprintable() else repr(key) for key in entry)
    return text if len(text) <= _LONGEST_NAMES else text[:_LONGEST_NAMES] + "..."


def _is_twice(line: bytes, key: str) -> bool:
    """Whether the object of a line has a key twice: which of the two is the text?"""
    outermost: list[tuple[str, object]] = []

    def note(pairs: list[tuple[str, object]]) -> dict[str, object]:
        outermost[:] = pairs  # the last call is for the line's own object
        return {}

    json.loads(line.decode("utf-8-sig"), object_pairs_hook=note)
    return sum(name == key for name, _ in outermost) > 1


def _json_text(span: Span, at: int, line: bytes, text_key: str) -> str:
    try:
        entry = json.loads(line.decode("utf-8-sig"))
        if line.count(json.dumps(text_key).encode()) > 1 and _is_twice(line, text_key):
            raise ValueError(f"the key {text_key!r} twice")
    except (ValueError, RecursionError) as error:
        reason = "lists or objects nested too deep" if isinstance(error, RecursionError) else error
        raise ValueError(
            f"{_where(span, at)}: {reason}; allowed: one JSON object in each line; "
            "correct the line or give the file another suffix than .jsonl"
        ) from error
    text = entry.get(text_key) if isinstance(entry, dict) else None
    if not isinstance(text, str):
        keys = _names(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(
            f"{_where(span, at)}: no text under the key {text_key!r} (found: "
            f"{keys}); set data.text_key or --text-key to the right key"
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            remedy = "allowed: whole characters; correct the line"
            raise ValueError(f"{_where(span, at)}: half of a surrogate pair: {error}; {remedy}") from error
    return text


def _where(span: Span, at: int) -> str:
    """File and line of a byte, for an error message."""
    line, left = 1, at
    with _open(span) as stream:
        while left and (block := stream.read(min(_BLOCK, left))):
            line += block.count(b"\n")
            left -= len(block)
    return f"{span.name}, line {line}"


def _topics(span: Span, text_key: str) -> Iterator[str]:
    (mapping,) = (
        node.value for node in ast.parse(span.path.read_text(encoding="utf-8")).body if isinstance(node, ast.Assign)
    )
    yield from ast.literal_eval(mapping).values()


# --------------------------------------------------------------------------------------- parquet


def import_pyarrow(name: str) -> ModuleType:
    """The package that reads parquet and zstd.

    Args:
        name: The file that needs it.

    Raises:
        ValueError: It isn't installed.
    """
    try:
        import pyarrow  # needed for such files only
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name}: .parquet and .zst files need the package pyarrow, which is not installed; "
            "run: pip install pyarrow (the extra 'data' of ds_blockwise)"
        ) from error
    found: ModuleType = pyarrow
    return found


def row_group_bytes(name: str, path: Path, text_key: str) -> list[int]:
    """Compressed bytes of the text column in each row group of a parquet file.

    Raises:
        ValueError: The file is damaged, has no such column, or it holds no text.
    """
    pyarrow = import_pyarrow(name)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            if text_key not in schema.names:
                raise ValueError(
                    f"{name}: no column {text_key!r} (found: {', '.join(schema.names)}); "
                    "set data.text_key or --text-key to the right column"
                )
            types = pyarrow.types
            found = schema.field(text_key).type
            held = found.value_type if types.is_dictionary(found) else found
            if not (types.is_string(held) or types.is_large_string(held) or types.is_string_view(held)):
                raise ValueError(
                    f"{name}: the column {text_key!r} holds {found}; allowed: text; "
                    "set data.text_key or --text-key to the right column"
                )
            groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            return [
                sum(
                    column.total_compressed_size
                    for column in map(group.column, range(group.num_columns))
                    if column.path_in_schema == text_key
                )
                for group in groups
            ]
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{name}: {error}; allowed: a complete parquet file; copy it again") from error


def _rows(span: Span, text_key: str) -> Iterator[str]:
    pyarrow = import_pyarrow(span.name)
    # A buffer makes the reader go page by page; without it a whole column chunk is read at once.
    with pyarrow.parquet.ParquetFile(span.path, buffer_size=_BLOCK, pre_buffer=False) as file:
        row = sum(file.metadata.row_group(index).num_rows for index in range(span.start))
        groups = range(span.start, span.end)
        for batch in file.iter_batches(_ROWS, row_groups=groups, columns=[text_key], use_threads=False):
            for value in batch.column(0):
                text = value.as_py()
                if text is None:
                    raise ValueError(
                        f"{span.name}, row {row}: no text in the column {text_key!r} (null); "
                        "drop such rows, or set data.text_key or --text-key to another column"
                    )
                yield text
                row += 1
