# SPDX-License-Identifier: Apache-2.0
"""Which documents a run learns from, and which of them it never sees before validation.

A document is one text file, a section of a very long one, one line of JSON lines or one row of parquet.
The order is that of the sorted file names, so every machine with the same files gets the same documents.
A corpus is cut into parts by the sizes of its files alone, so the parts do not depend on how many processes
tokenize them.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.documents import (
    COMPRESSIONS,
    JSON_LINES,
    PARQUET,
    PYDOC_TOPICS,
    TEXT,
    NotText,
    Span,
    documents,
    kind_of,
    row_group_bytes,
)
from ds_blockwise.runs.reading.problems import Problems

STDLIB = "stdlib"
PYDOC = "pydoc"  # the chapters of the language reference that every Python brings for help()
# What a folder is searched for; text and JSON lines also compressed.
_TEXTS = (".txt", ".md", ".rst", ".py")
_JSONS = (".jsonl", ".ndjson")
FOLDER_SUFFIXES = (
    *_TEXTS,
    *_JSONS,
    ".parquet",
    *(f"{suffix}{packed}" for packed in COMPRESSIONS for suffix in (".txt", *_JSONS, ".json")),
)
PART_BYTES = 32 << 20
# Tests and generated tables: two thirds of the standard library's bytes, little of its language.
_STDLIB_SKIPPED = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
_STDLIB_FOLDER = Path(sysconfig.get_path("stdlib"))


@dataclass
class Corpus:
    """The documents of some files; iterating reads them anew each time.

    Attributes:
        files: (name in messages and in the fingerprint, path), in order.
        text_key: Entry of a JSON object, or column of a parquet file, that holds the text.
        skipped: Names of files that are not UTF-8 text, known after an iteration.
    """

    files: list[tuple[str, Path]]
    text_key: str
    skipped: set[str] = field(default_factory=set)

    def __iter__(self) -> Iterator[str]:
        """Yield the text of each document that isn't blank.

        Raises:
            ValueError: A line of JSON or a row has no text under `text_key`.
        """
        for part in self.parts():
            for span in part:
                try:
                    yield from documents(span, self.text_key)
                except NotText:
                    self.skipped.add(span.name)

    def parts(self, part_bytes: int = PART_BYTES) -> list[tuple[Span, ...]]:
        """Cut the files into parts of about ``part_bytes``: spans of large files, groups of small ones.

        Where a file is cut depends on its own size only. A compressed file is never cut.

        Raises:
            ValueError: A parquet file has no column `text_key`.
        """
        parts: list[tuple[Span, ...]] = []
        group: list[Span] = []
        for name, path in self.files:
            spans = list(_cut(name, path, self.text_key, part_bytes))
            if len(spans) > 1 or sum(span.bytes for span in group) + sum(s.bytes for s in spans) > part_bytes:
                parts += [tuple(group)] if group else []
                group = []
            if len(spans) > 1:
                parts += [(span,) for span in spans]
            else:
                group += spans
        return [*parts, tuple(group)] if group else parts

    def listing(self) -> str:
        """Names, sizes and times of the files: changes when the text may have changed."""
        entries = []
        for name, path in self.files:
            stat = path.stat()
            entries.append(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}")
        return "\n".join(entries)


def _cut(name: str, path: Path, text_key: str, part_bytes: int) -> Iterator[Span]:
    stat = path.stat()
    kind = PYDOC_TOPICS if name == PYDOC else kind_of(path)
    size = stat.st_size
    if kind == PARQUET:
        first, held = 0, 0
        groups = row_group_bytes(name, path, text_key)
        for index, group_bytes in enumerate(groups):
            held += group_bytes
            if held >= part_bytes or index + 1 == len(groups):
                yield Span(name, path, kind, first, index + 1, held, size, stat.st_mtime_ns)
                first, held = index + 1, 0
        return
    whole = kind not in (TEXT, JSON_LINES) or path.suffix in COMPRESSIONS
    count = 1 if whole else max(1, -(-size // part_bytes))
    for number in range(count):
        start, end = size * number // count, size * (number + 1) // count
        yield Span(name, path, kind, start, end, end - start, size, stat.st_mtime_ns)


def find_corpus(source: tuple[str, ...], text_key: str, named_in: str | Path, problems: Problems) -> Corpus:
    """Find the files that ``source`` names.

    Args:
        source: ``stdlib``, ``pydoc``, folders, glob patterns and files.
        text_key: Entry of a JSON object, or column of a parquet file, that holds the text.
        named_in: File that named the source, for messages.
        problems: Notes each entry that matches no file.
    """
    files: dict[Path, str] = {}
    for entry in source:
        found = list(_find(entry))
        if not found:
            allowed = f"{STDLIB!r}, {PYDOC!r}, or a folder, glob pattern or file of text that exists"
            remedy = f"in a folder only {', '.join(FOLDER_SUFFIXES)} are read; name others by pattern"
            problems.add(named_in, "data.source", entry, allowed, remedy)
        for name, path in found:
            files.setdefault(path.resolve(), name)
    return Corpus([(name, path) for path, name in files.items()], text_key)


def _find(entry: str) -> Iterator[tuple[str, Path]]:
    if entry == STDLIB:
        yield from _python_files(_STDLIB_FOLDER)
        return
    if entry == PYDOC:
        yield PYDOC, _STDLIB_FOLDER / "pydoc_data" / "topics.py"
        return
    if Path(entry).is_dir():
        paths = [path for path in Path(entry).rglob("*") if path.name.endswith(FOLDER_SUFFIXES)]
    else:
        paths = [Path(name) for name in glob.glob(entry, recursive=True)]
    for path in sorted(paths):
        if path.is_file():
            yield str(path), path


def _python_files(root: Path) -> Iterator[tuple[str, Path]]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _STDLIB_SKIPPED)
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(folder) / name
                yield f"{STDLIB}/{path.relative_to(root).as_posix()}", path


def text_digest(text: str) -> bytes:
    """Identity of a document, 8 bytes: equal texts are one document for the split."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def is_validation(text: str, fraction: float) -> bool:
    """Whether a document is kept for validation.

    Its text alone decides, so that equal documents fall on the same side, no validation text is trained
    on, and nothing has to be remembered between documents, files, or processes.

    Args:
        text: The document.
        fraction: Share of the distinct documents that is kept.
    """
    return int.from_bytes(text_digest(text), "big") < fraction * 2.0**64
