# SPDX-License-Identifier: Apache-2.0
"""One part of a corpus becomes Megatron's `.bin`/`.idx` files, one pair for each split.

A part is finished when its record is there: the record is written last and holds sizes and sums of the
files. Its name is a sum of everything that decides what is in them, so a part that was made from other text
or with other settings is never taken for this one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tokenizers import Tokenizer

from data.corpus import digest, is_validation
from data.documents import NotText, Span, documents
from data.tokenizer import Vocabulary, load
from ds_blockwise.atomic_files import sha256_of

SPLITS = ("train", "validation")
Count = Callable[[int, int, int], None]  # told documents, bytes of text and tokens as they are done


@dataclass(frozen=True)
class Job:
    """What all parts of one preparation share.

    Attributes:
        folder: Where finished parts go.
        text_key: Entry of a JSON object, or column of a parquet file, that holds the text.
        validation_fraction: See `corpus.is_validation`.
        vocabulary: The tokenizer.
    """

    folder: Path
    text_key: str
    validation_fraction: float
    vocabulary: Vocabulary

    @property
    def dtype(self) -> type[numpy.number[Any]]:
        """Of the tokens on disk: uint16 where the vocabulary fits, else int32."""
        dtype: type[numpy.number[Any]] = DType.optimal_dtype(self.vocabulary.size)
        return dtype

    def key(self, part: tuple[Span, ...], versions: dict[str, str]) -> str:
        """Name of a part: changes with its text, the settings, the tokenizer and the versions."""
        spans = [{**asdict(span), "path": str(span.path)} for span in part]
        settings = [self.text_key, self.validation_fraction, self.vocabulary.sha256, self.vocabulary.end_of_document]
        return hashlib.sha256(json.dumps([spans, settings, versions]).encode()).hexdigest()[:24]

    def prefix(self, key: str, split: str) -> Path:
        """Path of a part's token files of one split, without their suffixes."""
        return self.folder / f"{key}.{split}"

    def record(self, key: str) -> Path:
        """Path of a part's record."""
        return self.folder / f"{key}.json"


def files_of(prefix: Path) -> tuple[Path, Path]:
    """The two token files of a prefix."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def finished(job: Job, key: str) -> dict[str, Any] | None:
    """The record of a part whose files have the recorded sizes and sums; None: to be made, or made again."""
    try:
        record: dict[str, Any] = json.loads(job.record(key).read_text(encoding="utf-8"))
        for split in SPLITS:
            expected = record["splits"][split]
            tokens, index = files_of(job.prefix(key, split))
            if tokens.stat().st_size != expected["bin_bytes"]:
                return None
            if (sha256_of(tokens), sha256_of(index)) != (expected["bin_sha256"], expected["idx_sha256"]):
                return None
    except (OSError, json.JSONDecodeError):
        return None
    return record


def write_part(job: Job, part: tuple[Span, ...], key: str, count: Count) -> dict[str, Any]:
    """Tokenize one part.

    Args:
        job: What all parts share.
        part: The part.
        key: Its name.
        count: Told what is done, for whoever watches.

    Returns:
        The record, as it is on disk now.

    Raises:
        ValueError: See `data_readers.documents`.
    """
    tokenizer, vocabulary = _loaded(job.vocabulary), job.vocabulary
    # The names are this process's own: two that make the same part, one of them about to end, meet in no file.
    partial = {split: job.folder / f"{key}.{split}.{os.getpid()}.partial" for split in SPLITS}
    builders = {split: IndexedDatasetBuilder(f"{partial[split]}.bin", dtype=job.dtype) for split in SPLITS}
    counts: dict[str, dict[str, Any]] = {split: {"documents": 0, "characters": 0, "tokens": 0} for split in SPLITS}
    skipped: list[str] = []
    for text in _texts(part, job.text_key, skipped):
        encoding = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
        tokens = numpy.array([*encoding.ids, vocabulary.end_of_document], dtype=numpy.int64)
        # A wrong file would wrap around in 16 bits and be trained on without a word.
        assert 0 <= tokens.min() and tokens.max() < vocabulary.size, "the tokenizer gave a token that it has not"
        split = SPLITS[1] if is_validation(text, job.validation_fraction) else SPLITS[0]
        builders[split].add_document(tokens, [len(tokens)])
        so_far = counts[split]
        if so_far["documents"] == 0:
            so_far["first"] = digest(text).hex()
        so_far["documents"] += 1
        so_far["characters"] += len(text)
        so_far["tokens"] += len(tokens)
        count(1, len(text.encode()), len(tokens))
    for split, builder in builders.items():
        builder.finalize(f"{partial[split]}.idx")
        tokens_file, index_file = files_of(partial[split])
        counts[split]["bin_bytes"] = tokens_file.stat().st_size
        counts[split]["bin_sha256"], counts[split]["idx_sha256"] = sha256_of(tokens_file), sha256_of(index_file)
        for path, final in zip((tokens_file, index_file), files_of(job.prefix(key, split)), strict=True):
            replace(path, final)
    record = {"splits": counts, "skipped": skipped, "files": [span.name for span in part]}
    write_json(job.record(key), record)
    return record


def _texts(part: tuple[Span, ...], text_key: str, skipped: list[str]) -> Iterator[str]:
    for span in part:
        try:
            yield from documents(span, text_key)
        except NotText:
            skipped.append(span.name)


_TOKENIZERS: dict[str, Tokenizer] = {}  # a process works on many parts


def _loaded(vocabulary: Vocabulary) -> Tokenizer:
    if vocabulary.sha256 not in _TOKENIZERS:
        _TOKENIZERS[vocabulary.sha256] = load(vocabulary.file)
    return _TOKENIZERS[vocabulary.sha256]


def replace(partial: Path, final: Path) -> None:
    """Give a file its name once its bytes are on the disk: a name means a whole file, also after a power cut."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, final)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that is whole or not there."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    replace(partial, path)
