# SPDX-License-Identifier: Apache-2.0
"""The prepared data: a tokenizer and Megatron's `.bin`/`.idx` token files, with their description.

`metadata.json` is written last, so its presence says that everything beside it is complete. Until then the
work is in the folder `parts`, and what is finished there is not done again.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy

from data.check import INDEX_TYPES, Index, check, write_header
from data.corpus import PART_BYTES, Corpus, find_corpus
from data.documents import Span
from data.parts import SPLITS, Job, files_of, finished, replace, write_json
from data.pool import write_parts
from data.tokenizer import TOKENIZER, TOKENIZER_CONFIG, TRAIN_TOKENIZER, Vocabulary, given_file, provide, provided
from ds_blockwise.atomic_files import sha256_of
from ds_blockwise.runs.run_file import DataConfig
from ds_blockwise.runs.strict_files import Problems

logger = logging.getLogger(__name__)

METADATA = "metadata.json"
CACHE = "cache"  # Megatron's sample indices
PARTS = "parts"
_PLAN = "plan.json"
_FORMAT = 2
_READABLE = (1, 2)  # 1 has no sums
_SAMPLES = 64
_BLOCK = 1 << 20
_VERSIONED = ("tokenizers", "megatron-core")


def prepare(
    data: DataConfig,
    vocab_size: int,
    named_in: str | Path,
    *,
    force: bool = False,
    workers: int = 1,
    part_bytes: int = PART_BYTES,
) -> dict[str, Any]:
    """Turn the text into token files, unless they are up to date.

    Args:
        data: Source, tokenizer and split; `data.directory` is written.
        vocab_size: Largest vocabulary that the model can take; a trained tokenizer's size.
        named_in: The run file, for messages.
        force: Prepare even if the files are up to date, and make finished parts again.
        workers: Processes that tokenize; the files are the same for any number.
        part_bytes: About how much of the source is one part; long text files are cut there.

    Returns:
        The metadata, as in `metadata.json`.

    Raises:
        ValueError: Nothing to read, a text key that isn't there, a tokenizer that doesn't fit, a split
            without documents, or somebody else at work in the folder.
    """
    problems = Problems()
    directory = Path(data.directory)
    corpus = find_corpus(data.source, data.text_key, named_in, problems)
    problems.raise_if_any()
    recipe = _recipe(data, vocab_size, part_bytes, corpus, named_in)
    fingerprint = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    metadata = read_metadata(directory)
    if metadata is not None and metadata["fingerprint"] == fingerprint and not force:
        logger.info("%s is up to date", directory)
        _sweep(directory / PARTS, recipe)
        return metadata
    directory.mkdir(parents=True, exist_ok=True)
    with _alone_in(directory):
        for path in directory.glob("*.partial"):  # of somebody who was killed
            path.unlink()
        folder = directory / PARTS
        if force:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        _explain(folder, recipe)
        parts = corpus.parts(part_bytes)
        vocabulary = _vocabulary(folder, data, vocab_size, corpus, parts, named_in, fingerprint)
        job = Job(folder, data.text_key, data.validation_fraction, vocabulary)
        versions = {package: importlib.metadata.version(package) for package in _VERSIONED}
        keys = [job.key(part, versions) for part in parts]
        records = _finished_parts(job, keys)
        missing = [(part, key) for part, key in zip(parts, keys, strict=True) if key not in records]
        if missing:
            logger.info("writing tokens to %s: %d parts, %d to do", directory, len(parts), len(missing))
            write_parts(job, missing, workers)
            records |= {key: json.loads(job.record(key).read_text(encoding="utf-8")) for _, key in missing}
        skipped = {name for record in records.values() for name in record["skipped"]}
        kept = [key for key in keys if not skipped.issuperset(records[key]["files"])]
        _check_split(data, [records[key] for key in kept], named_in, problems)
        problems.raise_if_any()
        # From here on the old files go.
        (directory / METADATA).unlink(missing_ok=True)
        # Megatron finds its sample indices by path and length, not by content: stale ones would be
        # used for the new tokens without a word.
        shutil.rmtree(directory / CACHE, ignore_errors=True)
        metadata = {
            "format": _FORMAT,
            "fingerprint": fingerprint,
            "source": list(data.source),
            "files": len(corpus.files),
            "files_skipped_not_utf8": sorted(skipped),
            "tokenizer": {
                "file": TOKENIZER,
                "sha256": vocabulary.sha256,
                "vocab_size": vocabulary.size,
                "end_of_document": vocabulary.end_of_document,
                "exact": vocabulary.exact,
            },
            "splits": {split: _merge(directory, job, kept, records, split) for split in SPLITS},
            "samples": {split: list(_samples(kept, records, split)) for split in SPLITS},
            "versions": {"python": platform.python_version(), **versions},
        }
        for name in (TOKENIZER, TOKENIZER_CONFIG):
            shutil.copyfile(folder / name, directory / f"{name}.partial")
            replace(directory / f"{name}.partial", directory / name)
        _raise_if_wrong(check(directory, metadata, every_token=False))
        if not vocabulary.exact:
            logger.info("%s changes text (normalizer, spaces): what it decodes to is not compared", data.tokenizer)
        write_json(directory / METADATA, metadata)
        shutil.rmtree(folder)
    return metadata


def read_metadata(directory: Path) -> dict[str, Any] | None:
    """The description of prepared data, or None if there is none or a file is missing or cut."""
    try:
        metadata: dict[str, Any] = json.loads((directory / METADATA).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    if metadata.get("format") not in _READABLE or not (directory / TOKENIZER).is_file():
        return None
    for split in SPLITS:
        tokens, index = files_of(token_prefix(directory, split))
        if not tokens.is_file() or tokens.stat().st_size != metadata["splits"][split]["bin_bytes"]:
            return None
        if not index.is_file():
            return None
    return metadata


def token_prefix(directory: Path, split: str) -> Path:
    """Path of a split's token files without their suffixes."""
    return directory / split


def check_directory(directory: Path) -> dict[str, Any]:
    """Read prepared data token by token and compare it with its description.

    Args:
        directory: Holds them.

    Returns:
        The metadata.

    Raises:
        ValueError: Lists what is wrong.
    """
    metadata = read_metadata(directory)
    if metadata is None:
        raise ValueError(f"{directory}: no prepared data, or files that are missing or cut; run prepare_data.py")
    _raise_if_wrong(check(directory, metadata, every_token=True))
    return metadata


def _raise_if_wrong(found: list[str]) -> None:
    if found:
        raise ValueError("\n- ".join(["the token files are damaged; prepare them again with --force:", *found]))


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Hold the folder: two preparations at once would take each other's parts for their own."""
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"data.directory = '{directory}': another prepare_data.py is at work there; wait for it or end it"
            ) from error
        except OSError as error:
            logger.warning("%s can't be locked (%s): see to it that nobody else prepares data there", directory, error)
        yield


def _recipe(data: DataConfig, vocab_size: int, part_bytes: int, corpus: Corpus, named_in: str | Path) -> dict[str, Any]:
    """All that decides the token files, by the names that a user knows."""
    tokenizer = data.tokenizer
    if tokenizer != TRAIN_TOKENIZER:
        tokenizer = hashlib.sha256(given_file(data, named_in).read_bytes()).hexdigest()
    return {
        "format": _FORMAT,
        "data.source": list(data.source),
        "data.text_key": data.text_key,
        "data.validation_fraction": data.validation_fraction,
        "data.tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "part size": part_bytes,
        "the files": hashlib.sha256(corpus.listing().encode()).hexdigest(),
    }


def _sweep(folder: Path, recipe: dict[str, Any]) -> None:
    """Remove what is left of parts that were joined already; others' unfinished work stays."""
    plan = folder / _PLAN
    if folder.is_dir() and (not plan.is_file() or json.loads(plan.read_text(encoding="utf-8")) == recipe):
        with _alone_in(folder.parent):
            shutil.rmtree(folder)


def _explain(folder: Path, recipe: dict[str, Any]) -> None:
    """Say what has changed since an unfinished preparation, and remember the recipe."""
    plan = folder / _PLAN
    if plan.is_file():
        old = json.loads(plan.read_text(encoding="utf-8"))
        changed = [name for name in recipe if old.get(name) != recipe[name]]
        if changed:
            logger.info("an unfinished preparation was found, but %s changed since", ", ".join(changed))
    write_json(plan, recipe)


def _vocabulary(
    folder: Path,
    data: DataConfig,
    vocab_size: int,
    corpus: Corpus,
    parts: Sequence[tuple[Span, ...]],
    named_in: str | Path,
    fingerprint: str,
) -> Vocabulary:
    """The tokenizer, trained once for all attempts at the same preparation."""
    note = folder / "trained_for.json"
    if data.tokenizer == TRAIN_TOKENIZER and note.is_file():
        trained = json.loads(note.read_text(encoding="utf-8"))
        if trained["fingerprint"] == fingerprint:
            vocabulary = provided(folder, data, vocab_size, named_in)
            if vocabulary.sha256 == trained["sha256"]:
                return vocabulary
    note.unlink(missing_ok=True)
    vocabulary = provide(folder, data, vocab_size, corpus, parts, named_in)
    write_json(note, {"fingerprint": fingerprint, "sha256": vocabulary.sha256})
    return vocabulary


def _finished_parts(job: Job, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Records of the parts that need not be made; what belongs to no part goes."""
    records = {key: record for key in keys if (record := finished(job, key)) is not None}
    names = {path.name for key in records for path in _files_of_part(job, key)}
    others = [path for path in job.folder.iterdir() if path.suffix in (".bin", ".idx", ".json", ".partial")]
    keep = {TOKENIZER, TOKENIZER_CONFIG, _PLAN, "trained_for.json", *names}
    dropped = [path for path in others if path.name not in keep]
    for path in dropped:
        path.unlink()
    if records:
        logger.info("going on: %d of %d parts are finished", len(records), len(keys))
    stale = sum(path.suffix == ".json" for path in dropped)
    if stale:
        logger.info("%d finished parts are of no use: their text, settings or files changed", stale)
    return records


def _files_of_part(job: Job, key: str) -> list[Path]:
    return [job.record(key), *(path for split in SPLITS for path in files_of(job.prefix(key, split)))]


def _check_split(data: DataConfig, records: Sequence[dict[str, Any]], named_in: str | Path, problems: Problems) -> None:
    train, validation = (sum(record["splits"][split]["documents"] for record in records) for split in SPLITS)
    if train == 0 or validation == 0:
        allowed = "at least one document for training and another one for validation"
        value = f"{data.validation_fraction} ({validation} of {train + validation} documents)"
        remedy = "name more text, cut it into more documents, or raise the fraction"
        problems.add(named_in, "data.validation_fraction", value, allowed, remedy)


def _merge(
    directory: Path, job: Job, keys: Sequence[str], records: dict[str, dict[str, Any]], split: str
) -> dict[str, Any]:
    """Join the parts' files of one split: what Megatron's `add_index` does, without lists of all documents."""
    parts = [(job.prefix(key, split), records[key]["splits"][split]) for key in keys]
    counts: dict[str, Any] = {
        name: sum(part[name] for _, part in parts) for name in ("documents", "characters", "tokens", "bin_bytes")
    }
    final = files_of(token_prefix(directory, split))
    partial = [path.with_name(f"{path.name}.partial") for path in final]
    total = hashlib.sha256()
    with partial[0].open("wb") as file:
        for prefix, part in parts:
            own = hashlib.sha256()
            with files_of(prefix)[0].open("rb") as tokens:
                while block := tokens.read(_BLOCK):
                    total.update(block)
                    own.update(block)
                    file.write(block)
            if own.hexdigest() != part["bin_sha256"]:
                raise ValueError(f"{files_of(prefix)[0]} was changed since it was written; start again")
    counts["bin_sha256"] = total.hexdigest()
    counts["idx_sha256"] = _merge_indices(partial[1], [files_of(prefix)[1] for prefix, _ in parts], job, counts)
    for path, name in zip(partial, final, strict=True):
        replace(path, name)
    return counts


def _merge_indices(path: Path, parts: Sequence[Path], job: Job, counts: dict[str, Any]) -> str:
    indices = [Index.read(part) for part in parts]
    with path.open("wb") as file:
        write_header(file, job.dtype, counts["documents"], counts["documents"] + 1)
        for column, dtype in enumerate(INDEX_TYPES):
            offset = 0
            if column == 2:
                file.write(numpy.zeros(1, dtype).tobytes())
            for index in indices:
                # Every index has its own bound 0; of them only the first is kept.
                for entries in index.entries(column, start=1 if column == 2 else 0):
                    file.write((entries + offset if column else entries).astype(dtype).tobytes())
                if column == 1:
                    offset += files_of(index.path.with_name(index.path.stem))[0].stat().st_size
                elif column == 2:
                    offset += index.sequences
    return sha256_of(path)


def _samples(keys: Sequence[str], records: dict[str, dict[str, Any]], split: str) -> Iterator[dict[str, Any]]:
    """First documents of evenly spaced parts, with the sums of their texts as they were read."""
    step = max(1, -(-len(keys) // _SAMPLES))
    document = 0
    for number, key in enumerate(keys):
        counts = records[key]["splits"][split]
        if number % step == 0 and counts["documents"]:
            yield {"document": document, "text": counts["first"]}
        document += counts["documents"]
