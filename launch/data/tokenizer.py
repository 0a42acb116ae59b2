# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a corpus: trained on a sample of it, or given as Hugging Face saves one.

In the folder of the tokens it is two files, so that the folder itself is a tokenizer that can be given:
`tokenizer.json`, byte for byte what was given, and `tokenizer_config.json`, which names the token that ends
a document.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data.corpus import Corpus, is_validation
from data.documents import NotText, Span, documents
from ds_blockwise.runs.run_file import DataConfig
from ds_blockwise.runs.strict_files import Problems

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TRAIN_TOKENIZER = "train"
# For a tokenizer.json that comes alone, and names its tokens but not what they are for.
_END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
_SAMPLE_CHARACTERS = 32 << 20
_SAMPLE_PARTS = 1024


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer that is on disk.

    Attributes:
        file: Its `tokenizer.json`.
        sha256: Of that file.
        size: One more than the largest number of a token.
        end_of_document: The token that ends every document.
        exact: Whether decoding gives back any text, byte for byte.
    """

    file: Path
    sha256: str
    size: int
    end_of_document: int
    exact: bool


def load(file: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, for whole documents.

    A file may ask to cut or to fill up what is tokenized, which is for batches of a model. And text that
    spells a special token is text: it must not end a document.

    Args:
        file: The file.
    """
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def provide(
    folder: Path,
    data: DataConfig,
    vocab_size: int,
    corpus: Corpus,
    parts: Sequence[tuple[Span, ...]],
    named_in: str | Path,
) -> Vocabulary:
    """Write the tokenizer into ``folder``: a copy of the given one, or one trained on a sample.

    Args:
        folder: Where both files go.
        data: Which tokenizer, and the split: no validation document is trained on.
        vocab_size: Largest vocabulary that the model can take; a trained tokenizer's size.
        corpus: The documents.
        parts: The corpus cut into parts.
        named_in: The run file, for messages.

    Raises:
        ValueError: No such tokenizer, or one that doesn't fit the model or ends no document.
    """
    if data.tokenizer == TRAIN_TOKENIZER:
        _train(data, vocab_size, corpus, parts, named_in).save(str(folder / TOKENIZER))
        config: dict[str, Any] = {"eos_token": _END_OF_DOCUMENT[0]}
    else:
        file = given_file(data, named_in)
        shutil.copyfile(file, folder / TOKENIZER)
        config = {"eos_token": _named_end(file.parent, data, named_in)}
    vocabulary = _read(folder / TOKENIZER, config["eos_token"], data, vocab_size, named_in)
    config = {"eos_token": load(folder / TOKENIZER).id_to_token(vocabulary.end_of_document)}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return vocabulary


def provided(folder: Path, data: DataConfig, vocab_size: int, named_in: str | Path) -> Vocabulary:
    """The tokenizer that `provide` has written into ``folder``; arguments and errors as there."""
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
    """The end token that the configuration beside a tokenizer names; None: no configuration, or it names none."""
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


def _read(file: Path, named_end: str | None, data: DataConfig, vocab_size: int, named_in: str | Path) -> Vocabulary:
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
    recipe = json.loads(file.read_text(encoding="utf-8"))
    return Vocabulary(
        file=file,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        size=size,
        end_of_document=int(numbers[0]),
        exact=_is_exact(recipe),
    )


def _is_exact(recipe: dict[str, Any]) -> bool:
    """Whether every byte of a text becomes a character of the model's, and none is added or dropped."""
    steps, decoder = recipe.get("pre_tokenizer"), recipe.get("decoder")
    if recipe.get("normalizer") is not None or steps is None or decoder is None or decoder["type"] != "ByteLevel":
        return False
    if any((token["lstrip"] or token["rstrip"]) and not token["special"] for token in recipe.get("added_tokens", ())):
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
        left += characters // count  # what a short part leaves over goes to the next
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
