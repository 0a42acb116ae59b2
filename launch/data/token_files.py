# SPDX-License-Identifier: Apache-2.0
"""The prepared data: a tokenizer and Megatron's `.bin`/`.idx` token files, with their description.

Until `metadata.json` is written, finished parts are in the folder `parts` and are not made again.
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
from typing import TypeAlias

from data.check import find_damage
from data.corpus import PART_BYTES, Corpus, find_corpus
from data.documents import Span
from data.index_file import join_indices
from data.metadata import (
    CACHE,
    FORMAT,
    METADATA,
    SPLITS,
    TOKENIZER,
    Metadata,
    Sample,
    SplitEntry,
    read_metadata,
    token_files_of,
    token_prefix,
)
from data.parts import PartRecord, PartSettings, read_if_intact, read_record
from data.pool import write_parts
from data.tokenizer import (
    TOKENIZER_CONFIG,
    TRAIN_TOKENIZER,
    TokenizerFile,
    given_file,
    read_tokenizer,
    write_tokenizer,
)
from ds_blockwise.atomic_files import replace_file, replace_text, sha256_of
from ds_blockwise.runs.reading.problems import Problems
from ds_blockwise.runs.run_file import DataConfig

logger = logging.getLogger(__name__)

PARTS = "parts"
_RECIPE = "recipe.json"
_TRAINED_FOR = "trained_for.json"
_SAMPLES = 64
_BLOCK = 1 << 20
_VERSIONED = ("tokenizers", "megatron-core")

_Recipe: TypeAlias = dict[str, str | int | float | list[str]]


def prepare(
    data: DataConfig,
    vocab_size: int,
    named_in: str | Path,
    *,
    force: bool = False,
    workers: int = 1,
    part_bytes: int = PART_BYTES,
) -> Metadata:
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
            without documents, or another process at work in the folder.
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
        folder = _parts_folder(directory, recipe, force)
        parts = corpus.parts(part_bytes)
        tokenizer = _tokenizer(folder, data, vocab_size, corpus, parts, named_in, fingerprint)
        settings = PartSettings(folder, data.text_key, data.validation_fraction, tokenizer)
        versions = {package: importlib.metadata.version(package) for package in _VERSIONED}
        keys = [settings.key(part, versions) for part in parts]
        records = _make_parts(settings, parts, keys, workers)
        skipped = {name for record in records.values() for name in record["skipped"]}
        kept = [key for key in keys if not skipped.issuperset(records[key]["files"])]
        _check_split(data, [records[key] for key in kept], named_in, problems)
        problems.raise_if_any()
        _remove_old(directory)
        metadata = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "source": list(data.source),
            "files": len(corpus.files),
            "files_skipped_not_utf8": sorted(skipped),
            "tokenizer": {
                "file": TOKENIZER,
                "sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
                "end_of_document": tokenizer.end_of_document,
                "exact": tokenizer.exact,
            },
            "splits": {split: _join(directory, settings, kept, records, split) for split in SPLITS},
            "samples": {split: list(_samples(kept, records, split)) for split in SPLITS},
            "versions": {"python": platform.python_version(), **versions},
        }
        for name in (TOKENIZER, TOKENIZER_CONFIG):
            shutil.copyfile(folder / name, directory / f"{name}.partial")
            replace_file(directory / f"{name}.partial", directory / name)
        _raise_if_damaged(find_damage(directory, metadata, every_token=False))
        if not tokenizer.exact:
            logger.info("%s changes text (normalizer, spaces): the decoded text is not compared", data.tokenizer)
        replace_text(directory / METADATA, json.dumps(metadata, indent=2) + "\n")
        shutil.rmtree(folder)
    return metadata


def _parts_folder(directory: Path, recipe: _Recipe, force: bool) -> Path:
    """The folder of finished parts, with a note of what they are made for; unfinished files are removed."""
    for path in (*directory.glob("*.partial"), *directory.glob(f"{METADATA}.new")):  # a killed process left them
        path.unlink()
    folder = directory / PARTS
    if force:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    _explain(folder, recipe)
    return folder


def _make_parts(
    settings: PartSettings, parts: Sequence[tuple[Span, ...]], keys: Sequence[str], workers: int
) -> dict[str, PartRecord]:
    """The records of all parts; those that are not finished are tokenized."""
    records = _finished_parts(settings, keys)
    missing = [(part, key) for part, key in zip(parts, keys, strict=True) if key not in records]
    if missing:
        logger.info("writing tokens to %s, %d of %d parts to do", settings.folder.parent, len(missing), len(parts))
        write_parts(settings, missing, workers)
    return records | {key: read_record(settings, key) for _, key in missing}


def _remove_old(directory: Path) -> None:
    """Remove what does not belong to the new token files: their old description first."""
    (directory / METADATA).unlink(missing_ok=True)
    # Megatron finds its sample indices by path and length, not by content: it would use the old ones for the new
    # tokens without an error.
    shutil.rmtree(directory / CACHE, ignore_errors=True)


def check_directory(directory: Path) -> Metadata:
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
        raise ValueError(f"{directory}: no prepared data, or files are missing or cut short; run prepare_data.py")
    _raise_if_damaged(find_damage(directory, metadata, every_token=True))
    return metadata


def _raise_if_damaged(found: list[str]) -> None:
    if found:
        raise ValueError("\n- ".join(["the token files are damaged; prepare them again with --force:", *found]))


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Lock the folder: two preparations at once would use each other's parts."""
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"data.directory = '{directory}': another prepare_data.py is at work there; "
                "wait until it has finished, or end it"
            ) from error
        except OSError as error:
            logger.warning(
                "%s can't be locked (%s): make sure that no other process prepares data there", directory, error
            )
        yield


def _recipe(data: DataConfig, vocab_size: int, part_bytes: int, corpus: Corpus, named_in: str | Path) -> _Recipe:
    """Everything that decides the token files, under the names that a user knows."""
    tokenizer = data.tokenizer
    if tokenizer != TRAIN_TOKENIZER:
        tokenizer = sha256_of(given_file(data, named_in))
    return {
        "format": FORMAT,
        "data.source": list(data.source),
        "data.text_key": data.text_key,
        "data.validation_fraction": data.validation_fraction,
        "data.tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "part size": part_bytes,
        "the files": hashlib.sha256(corpus.listing().encode()).hexdigest(),
    }


def _sweep(folder: Path, recipe: _Recipe) -> None:
    """Remove parts that were joined already; an unfinished preparation with another recipe stays."""
    file = folder / _RECIPE
    if folder.is_dir() and (not file.is_file() or json.loads(file.read_text(encoding="utf-8")) == recipe):
        with _alone_in(folder.parent):
            shutil.rmtree(folder)


def _explain(folder: Path, recipe: _Recipe) -> None:
    """Log what has changed since an unfinished preparation, and save the recipe."""
    file = folder / _RECIPE
    if file.is_file():
        old = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name, value in recipe.items() if old.get(name) != value]
        if changed:
            logger.info("an unfinished preparation was found, but %s changed since", ", ".join(changed))
    replace_text(file, json.dumps(recipe, indent=2) + "\n")


def _tokenizer(
    folder: Path,
    data: DataConfig,
    vocab_size: int,
    corpus: Corpus,
    parts: Sequence[tuple[Span, ...]],
    named_in: str | Path,
    fingerprint: str,
) -> TokenizerFile:
    """The tokenizer, trained once for all attempts at the same preparation."""
    note = folder / _TRAINED_FOR
    if data.tokenizer == TRAIN_TOKENIZER and note.is_file():
        trained = json.loads(note.read_text(encoding="utf-8"))
        if trained["fingerprint"] == fingerprint:
            tokenizer = read_tokenizer(folder, data, vocab_size, named_in)
            if tokenizer.sha256 == trained["sha256"]:
                return tokenizer
    note.unlink(missing_ok=True)
    tokenizer = write_tokenizer(folder, data, vocab_size, corpus, parts, named_in)
    replace_text(note, json.dumps({"fingerprint": fingerprint, "sha256": tokenizer.sha256}) + "\n")
    return tokenizer


def _finished_parts(settings: PartSettings, keys: Sequence[str]) -> dict[str, PartRecord]:
    """Records of the parts that need not be made; files that belong to no such part are removed."""
    records = {key: record for key in keys if (record := read_if_intact(settings, key)) is not None}
    names = {path.name for key in records for path in _files_of_part(settings, key)}
    files = [p for p in settings.folder.iterdir() if p.suffix in (".bin", ".idx", ".json", ".partial", ".new")]
    keep = {TOKENIZER, TOKENIZER_CONFIG, _RECIPE, _TRAINED_FOR, *names}
    dropped = [path for path in files if path.name not in keep]
    for path in dropped:
        path.unlink()
    if records:
        logger.info("going on: %d of %d parts are finished", len(records), len(keys))
    stale = sum(path.suffix == ".json" for path in dropped)
    if stale:
        logger.info("%d finished parts can't be used: their text, settings or files changed", stale)
    return records


def _files_of_part(settings: PartSettings, key: str) -> list[Path]:
    prefixes = (settings.prefix(key, split) for split in SPLITS)
    return [settings.record(key), *(path for prefix in prefixes for path in token_files_of(prefix))]


def _check_split(data: DataConfig, records: Sequence[PartRecord], named_in: str | Path, problems: Problems) -> None:
    train, validation = (sum(record["splits"][split]["documents"] for record in records) for split in SPLITS)
    if train == 0 or validation == 0:
        allowed = "at least one document for training and another one for validation"
        value = f"{data.validation_fraction} ({validation} of {train + validation} documents)"
        remedy = "name more text, cut it into more documents, or raise the fraction"
        problems.add(named_in, "data.validation_fraction", value, allowed, remedy)


def _join(
    directory: Path, settings: PartSettings, keys: Sequence[str], records: dict[str, PartRecord], split: str
) -> SplitEntry:
    """Join the parts' files of one split: the same bytes as Megatron's `add_index`, in constant memory."""
    parts = [(token_files_of(settings.prefix(key, split)), records[key]["splits"][split]) for key in keys]
    tokens, index = token_files_of(token_prefix(directory, split))
    partial_tokens, partial_index = (path.with_name(f"{path.name}.partial") for path in (tokens, index))
    whole = hashlib.sha256()
    with partial_tokens.open("wb") as file:
        for (path, _), entry in parts:
            own = hashlib.sha256()
            with path.open("rb") as part:
                while block := part.read(_BLOCK):
                    whole.update(block)
                    own.update(block)
                    file.write(block)
            if own.hexdigest() != entry["bin_sha256"]:
                raise ValueError(f"{path} has changed since it was written; start the same command again")
    join_indices(partial_index, [path for (_, path), _ in parts], settings.dtype)
    replace_file(partial_tokens, tokens)
    replace_file(partial_index, index)
    return {
        "documents": sum(entry["documents"] for _, entry in parts),
        "characters": sum(entry["characters"] for _, entry in parts),
        "tokens": sum(entry["tokens"] for _, entry in parts),
        "bin_bytes": sum(entry["bin_bytes"] for _, entry in parts),
        "bin_sha256": whole.hexdigest(),
        "idx_sha256": sha256_of(index),
    }


def _samples(keys: Sequence[str], records: dict[str, PartRecord], split: str) -> Iterator[Sample]:
    """First documents of evenly spaced parts, with the digests of their texts as they were read."""
    step = max(1, -(-len(keys) // _SAMPLES))
    document = 0
    for number, key in enumerate(keys):
        entry = records[key]["splits"][split]
        if number % step == 0 and entry["documents"]:
            yield {"document": document, "text": entry["first"]}
        document += entry["documents"]
