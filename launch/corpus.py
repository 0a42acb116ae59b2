# SPDX-License-Identifier: Apache-2.0
"""Which documents a run learns from, and which of them it never sees before validation.

A document is one text file, a piece of a very long one, or one line of a JSONL file. The order is
that of the sorted file names, so that every machine with the same files gets the same documents.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ds_blockwise.config_files import Problems

STDLIB = "stdlib"
PYDOC = "pydoc"  # the chapters of the language reference that every Python brings for help()
JSONL = ".jsonl"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", JSONL)  # what a folder is searched for
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
# A longer text file becomes several documents: one book must not be all of the validation set.
_LONGEST_DOCUMENT = 1 << 18  # characters


@dataclass
class Corpus:
    """The documents of some files; iterating reads them anew each time.

    Attributes:
        files: (name in messages and in the fingerprint, path), in order.
        text_key: Entry of a JSON object that holds the text.
        skipped: Names of files that are not UTF-8 text, known after an iteration.
    """

    files: list[tuple[str, Path]]
    text_key: str
    skipped: set[str] = field(default_factory=set)

    def __iter__(self) -> Iterator[str]:
        """Yield the text of each document that isn't blank.

        Raises:
            ValueError: A line of a JSONL file is not an object with a text under `text_key`.
        """
        for name, path in self.files:
            if name == PYDOC:
                documents = _topics(path)
            else:
                documents = self._json_lines(name, path) if path.suffix == JSONL else self._text(name, path)
            for text in documents:
                if text.strip():
                    yield text

    def listing(self) -> str:
        """Names, sizes and times of the files: changes when the text may have changed."""
        entries = []
        for name, path in self.files:
            stat = path.stat()
            entries.append(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}")
        return "\n".join(entries)

    def _text(self, name: str, path: Path) -> Iterator[str]:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            self.skipped.add(name)
            return
        while len(text) > _LONGEST_DOCUMENT:
            end = text.rfind("\n", 0, _LONGEST_DOCUMENT) + 1 or _LONGEST_DOCUMENT
            yield text[:end]
            text = text[end:]
        yield text

    def _json_lines(self, name: str, path: Path) -> Iterator[str]:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{name}, line {number}: {error}; allowed: one JSON object in each line; "
                        f"correct the line or give the file another suffix than {JSONL}"
                    ) from error
                text = entry.get(self.text_key) if isinstance(entry, dict) else None
                if not isinstance(text, str):
                    keys = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
                    raise ValueError(
                        f"{name}, line {number}: no text under the key {self.text_key!r} (found: "
                        f"{keys}); set data.text_key or --text-key to the right key"
                    )
                yield text


def find_corpus(source: tuple[str, ...], text_key: str, named_in: str | Path, problems: Problems) -> Corpus:
    """Find the files that ``source`` names.

    Args:
        source: ``stdlib``, ``pydoc``, folders, glob patterns and files.
        text_key: Entry of a JSON object that holds the text.
        named_in: File that named the source, for messages.
        problems: Notes each entry that matches no file.
    """
    files: dict[Path, str] = {}
    for entry in source:
        found = list(_find(entry))
        if not found:
            allowed = f"{STDLIB!r}, {PYDOC!r}, or a folder, glob pattern or file of text that exists"
            remedy = f"in a folder only {', '.join(TEXT_SUFFIXES)} are read; name others by pattern"
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
        paths = [path for path in Path(entry).rglob("*") if path.suffix in TEXT_SUFFIXES]
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


def _topics(path: Path) -> Iterator[str]:
    (mapping,) = (
        node.value for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Assign)
    )
    yield from ast.literal_eval(mapping).values()


def digest(text: str) -> bytes:
    """Identity of a document: equal texts are one document for the split."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def choose_validation(corpus: Corpus, fraction: float, named_in: str | Path, problems: Problems) -> frozenset[bytes]:
    """Choose whole documents for validation, by the hash of their text.

    Identical documents fall on the same side, so no validation text is trained on; the choice
    does not depend on file names or order.

    Args:
        corpus: The documents.
        fraction: Share of the distinct documents, at least one of them.
        named_in: File that named the source, for messages.
        problems: Notes a corpus of fewer than two distinct documents.

    Returns:
        Digests of the validation documents.
    """
    digests = sorted({digest(text) for text in corpus})
    if len(digests) < 2:
        allowed = "at least 2 different documents (one is kept for validation)"
        remedy = "name more files, or cut the text into several"
        problems.add(named_in, "data.source", f"{len(digests)} documents", allowed, remedy)
        return frozenset()
    return frozenset(digests[: max(1, round(len(digests) * fraction))])
