# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a corpus: trained on a sample of it, or given as Hugging Face saves one.

In the folder of the token files it is two files: `tokenizer.json`, byte for byte what was given, and
`tokenizer_config.json`, which names the token that ends a document. So the folder itself can be given as a tokenizer.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data.corpus import Corpus, is_validation
from data.documents import NotText, Span, documents
from data.metadata import TOKENIZER
from ds_blockwise.atomic_files import replace_text, sha256_of
from ds_blockwise.runs.reading.problems import Problems
from ds_blockwise.runs.run_file import DataConfig

logger = logging.getLogger(__name__)

TOKENIZER_CONFIG = "tokenizer_config.json"
TRAIN_TOKENIZER = "train"
# For a tokenizer.json without a configuration: it lists its tokens, but does not say which one ends a document.
_END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
_SAMPLE_CHARACTERS = 32 << 20
_SAMPLE_PARTS = 1024


class _Step(TypedDict, total=False):
    type: str
    behavior: str
    add_prefix_space: bool
    pretokenizers: list[_Step]


class _AddedToken(TypedDict):
    lstrip: bool
    rstrip: bool
    special: bool


class _TokenizerJson(TypedDict, total=False):
    normalizer: object
    pre_tokenizer: _Step | None
    decoder: _Step | None
    added_tokens: list[_AddedToken]


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer on disk.

    Attributes:
        file: Its `tokenizer.json`.
        sha256: Of that file.
        vocab_size: One more than the largest token.
        end_of_document: The token that ends every document.
        exact: Whether decoding gives back any text, byte for byte.
    """

    file: Path
    sha256: str
    vocab_size: int
    end_of_document: int
    exact: bool


def load(file: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, for whole documents.

    Truncation and padding that the file asks for are switched off. Text that spells a special token is
    tokenized as text: it must not end a document.

    Args:
        file: The file.
    """
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def write_tokenizer(
    folder: Path,
    data: DataConfig,
    vocab_size: int,
    corpus: Corpus,
    parts: Sequence[tuple[Span, ...]],
    named_in: str | Path,
) -> TokenizerFile:
    """Write the tokenizer into ``folder``: a copy of the given one, or one trained on a sample.

    Args:
        folder: Where both files go.
        data: Which tokenizer, and the split: no validation document is trained on.
        vocab_size: Largest vocabulary that the model can take; a trained tokenizer's size.
        corpus: The documents.
        parts: The corpus cut into parts.
        named_in: The run file, for messages.

    Raises:
        ValueError: No such tokenizer, one that doesn't fit the model, or one without a token that ends a document.
    """
    if data.tokenizer == TRAIN_TOKENIZER:
        _train(data, vocab_size, corpus, parts, named_in).save(str(folder / TOKENIZER))
        eos_token: str | None = _END_OF_DOCUMENT[0]
    else:
        file = given_file(data, named_in)
        shutil.copyfile(file, folder / TOKENIZER)
        eos_token = _named_end(file.parent, data, named_in)
    found = _read(folder / TOKENIZER, eos_token, data, vocab_size, named_in)
    config = {
        "eos_token": load(folder / TOKENIZER).id_to_token(found.end_of_document),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    replace_text(folder / TOKENIZER_CONFIG, json.dumps(config, indent=2) + "\n")
    return found


def read_tokenizer(folder: Path, data: DataConfig, vocab_size: int, named_in: str | Path) -> TokenizerFile:
    """The tokenizer that `write_tokenizer` has written into ``folder``; arguments and errors as there."""
    return _read(folder / TOKENIZER, _named_end(folder, data, named_in), data, vocab_size, named_in)


def given_file(data: DataConfig, named_in: str | Path) -> Path:
    """The `tokenizer.json` that is given as a file or by its folder.

    Raises:
        ValueError: There is none.
    """
    path = Path(data.tokenizer)
    file = path / TOKENIZER if path.is_dir() else path
    if not file.is_file():
        problems = Problems()
        allowed = f"{TRAIN_TOKENIZER!r}, the path of a {TOKENIZER}, or a folder with one"
        remedy = "correct the path"
        if path.is_dir():
            found = ", ".join(sorted(entry.name for entry in path.glob("*token*"))) or "no tokenizer at all"
            remedy = f"the folder holds {found}; save it with transformers' AutoTokenizer(use_fast=True) first"
        problems.add(named_in, "data.tokenizer", data.tokenizer, allowed, remedy)
        problems.raise_if_any()
    return file


def _named_end(folder: Path, data: DataConfig, named_in: str | Path) -> str | None:
    """The `eos_token` of the configuration beside a tokenizer; None without a configuration or without that entry."""
    for name in (TOKENIZER_CONFIG, "special_tokens_map.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            entry = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
        except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
            problems = Problems()
            problems.add(named_in, "data.tokenizer", data.tokenizer, f"a readable {name}", f"correct it: {error}")
            problems.raise_if_any()
        token = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(token, str):
            return token
    return None


def _read(file: Path, named_end: str | None, data: DataConfig, vocab_size: int, named_in: str | Path) -> TokenizerFile:
    problems = Problems()
    try:
        tokenizer = load(file)
    except Exception as error:  # the library raises nothing narrower; reported as ours
        problems.add(named_in, "data.tokenizer", data.tokenizer, f"a {TOKENIZER} of the tokenizers library", str(error))
        problems.raise_if_any()
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if size > vocab_size:
        allowed = f"a tokenizer of at most vocab_size = {vocab_size} tokens"
        remedy = "raise the model's vocab_size or take a smaller tokenizer"
        problems.add(named_in, "data.tokenizer", f"{data.tokenizer} ({size} tokens)", allowed, remedy)
    candidates = _END_OF_DOCUMENT if named_end is None else (named_end,)
    numbers = [number for number in map(tokenizer.token_to_id, candidates) if number is not None]
    if not numbers:
        allowed = "a tokenizer with one of the tokens " + " ".join(candidates)
        remedy = f"add such a special token, or name the right one as eos_token in {TOKENIZER_CONFIG}"
        problems.add(named_in, "data.tokenizer", data.tokenizer, allowed, remedy)
    problems.raise_if_any()
    return TokenizerFile(
        file=file,
        sha256=sha256_of(file),
        vocab_size=size,
        end_of_document=int(numbers[0]),
        exact=_is_exact(json.loads(file.read_text(encoding="utf-8"))),
    )


def _is_exact(content: _TokenizerJson) -> bool:
    """Whether decoding gives back any text: every byte becomes one character, and none is added or dropped."""
    steps, decoder = content.get("pre_tokenizer"), content.get("decoder")
    if content.get("normalizer") is not None or steps is None or decoder is None or decoder["type"] != "ByteLevel":
        return False
    if any((token["lstrip"] or token["rstrip"]) and not token["special"] for token in content.get("added_tokens", [])):
        return False
    *before, last = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    kept = all(step["type"] in ("Split", "Digits") and step.get("behavior") != "Removed" for step in before)
    return kept and last["type"] == "ByteLevel" and not last["add_prefix_space"]


def _train(
    data: DataConfig, vocab_size: int, corpus: Corpus, parts: Sequence[tuple[Span, ...]], named_in: str | Path
) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 1
    if vocab_size < smallest:
        problems = Problems()
        allowed = f"at least {smallest}: every byte and the end of a document"
        problems.add(named_in, "vocab_size", vocab_size, allowed, "raise the model's vocab_size")
        problems.raise_if_any()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END_OF_DOCUMENT[0]],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    logger.info("training a byte-level BPE tokenizer with %d tokens", vocab_size)
    tokenizer.train_from_iterator(sample(data, corpus, parts), trainer)
    return tokenizer


def sample(
    data: DataConfig,
    corpus: Corpus,
    parts: Sequence[tuple[Span, ...]],
    characters: int = _SAMPLE_CHARACTERS,
) -> Iterator[str]:
    """Training text from the beginning of many parts, as much of each; everything if that is little.

    Args:
        data: The split.
        corpus: The documents.
        parts: The corpus cut into parts; at most 1024 of them, evenly spaced, are looked at.
        characters: About so many are yielded at most.
    """
    count = min(len(parts), _SAMPLE_PARTS)
    left = 0
    for index in range(count):
        left += characters // count  # a short part leaves the rest of its share to the next one
        for text in _training_texts(parts[index * len(parts) // count], data, corpus):
            yield text[:left]
            left -= len(text[:left])
            if left == 0:
                break


def _training_texts(part: tuple[Span, ...], data: DataConfig, corpus: Corpus) -> Iterator[str]:
    for span in part:
        try:
            for text in documents(span, corpus.text_key):
                if not is_validation(text, data.validation_fraction):
                    yield text
        except NotText:
            logger.debug("%s is not UTF-8", span.name)  # reported with the tokens
