# SPDX-License-Identifier: Apache-2.0
"""`metadata.json`: the description of the token files beside it.

It is written last, so its presence says that the token files are complete.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

SPLITS = ("train", "validation")
METADATA = "metadata.json"
TOKENIZER = "tokenizer.json"
CACHE = "cache"  # Megatron's sample indices
FORMAT = 2
_READABLE_FORMATS = (1, 2)  # 1 has no checksums, no samples and no `exact`


class _TokenizerExactness(TypedDict, total=False):
    exact: bool  # decoding gives back every text, byte for byte


class TokenizerEntry(_TokenizerExactness):
    """The tokenizer that made the tokens."""

    file: str
    sha256: str
    vocab_size: int
    end_of_document: int  # the token that ends every document


class _Checksums(TypedDict, total=False):
    bin_sha256: str
    idx_sha256: str


class SplitEntry(_Checksums):
    """Counts and checksums of the two token files of one split."""

    documents: int
    characters: int
    tokens: int
    bin_bytes: int


class Sample(TypedDict):
    """A document that every check decodes: its number in the split and the digest of its text."""

    document: int
    text: str


class _Samples(TypedDict, total=False):
    samples: dict[str, list[Sample]]  # by split


class Metadata(_Samples):
    """The content of `metadata.json`."""

    format: int
    fingerprint: str
    source: list[str]
    files: int
    files_skipped_not_utf8: list[str]
    tokenizer: TokenizerEntry
    splits: dict[str, SplitEntry]
    versions: dict[str, str]


def read_metadata(directory: Path) -> Metadata | None:
    """The description of prepared data, or None if there is none or a file is missing or cut short."""
    try:
        metadata: Metadata = json.loads((directory / METADATA).read_text(encoding="utf-8"))
        if metadata["format"] not in _READABLE_FORMATS or not (directory / TOKENIZER).is_file():
            return None
        for split in SPLITS:
            tokens, index = token_files_of(token_prefix(directory, split))
            if not tokens.is_file() or tokens.stat().st_size != metadata["splits"][split]["bin_bytes"]:
                return None
            if not index.is_file():
                return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # damaged: as if it were not there
        return None
    return metadata


def token_prefix(directory: Path, split: str) -> Path:
    """Path of a split's token files without their suffixes."""
    return directory / split


def token_files_of(prefix: Path) -> tuple[Path, Path]:
    """The `.bin` and `.idx` file of a prefix."""
    return prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")
