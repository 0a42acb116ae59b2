# SPDX-License-Identifier: Apache-2.0
"""What a tool is given: a tiny LLaMA with its tokenizer, a reward model and text, made here; nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path

SIZES = {"layers": 2, "hidden": 24, "heads": 4, "kv_heads": 2, "head_dim": 6, "ffn": 40, "vocab": 300}
_CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_LINES = tuple(
    f"the {colour} {thing} is {where}"
    for colour in ("red", "blue", "green", "old")
    for thing in ("box", "cup", "hat", "key")
    for where in ("here", "there", "lost", "mine")
)


def write_material(folder: Path) -> None:
    """Write ``model``, ``reward_model`` and the data files into a folder.

    Args:
        folder: an existing one.
    """
    import torch
    import transformers

    tokenizer = _tokenizer()
    torch.manual_seed(0)
    for name, cls, more in (
        ("model", transformers.LlamaForCausalLM, {}),
        ("reward_model", transformers.LlamaForSequenceClassification, {"num_labels": 1}),
    ):
        config = transformers.LlamaConfig(
            vocab_size=SIZES["vocab"],
            hidden_size=SIZES["hidden"],
            intermediate_size=SIZES["ffn"],
            num_hidden_layers=SIZES["layers"],
            num_attention_heads=SIZES["heads"],
            num_key_value_heads=SIZES["kv_heads"],
            head_dim=SIZES["head_dim"],
            max_position_embeddings=128,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **more,
        )
        cls(config).float().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [
        {
            "prompt": [{"role": "user", "content": line.rsplit(" ", 2)[0]}],
            "completion": [{"role": "assistant", "content": line}],
        }
        for line in _LINES
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    alpaca = [{"instruction": line.rsplit(" ", 2)[0], "input": "", "output": line} for line in _LINES]
    (folder / "alpaca.json").write_text(json.dumps(alpaca), encoding="utf-8")
    chats = [{"messages": [*row["prompt"], *row["completion"]]} for row in rows]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")


def _tokenizer() -> object:
    import tokenizers
    import transformers

    special = ["<pad>", "<s>", "</s>"]
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=SIZES["vocab"],
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(_LINES, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=_CHAT
    )
