# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a Hugging Face causal language model with HF Trainer, DeepSpeed and our optimizers.

deepspeed --num_gpus 2 launch/finetune_hf.py --model FOLDER --source texts/ --output_dir runs/tuned \
    --deepspeed configs/hf/finetune.json --learning_rate 1e-4 --max_steps 100

`import ds_blockwise` and the JSON's "optimizer" are all that is ours; every other option is one of HF's
TrainingArguments. `--resume_from_checkpoint true` goes on from the newest checkpoint in the output folder,
`--lora_rank 8` trains PEFT's adapters instead of the weights, and `--model configs/model/tiny.yaml` starts
from random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import torch
import transformers
from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import ds_blockwise  # noqa: F401 - makes both optimizers known to DeepSpeed
import quiet  # noqa: F401
from data.corpus import Corpus, find_corpus, is_validation
from ds_blockwise.hosts.deepspeed.config.check import json_mistakes
from ds_blockwise.runs.reading.problems import Problems
from ds_blockwise.runs.reading.whole_files import read_json
from job.process_groups import prepare_process
from job.rendezvous import RankInfo
from job.report import boxed, loss_axes, write_summary
from megatron_patch import GPTShape

_END = "<|endoftext|>"
SUMMARY = "summary.json"


@dataclass
class FineTuning:
    """What is tuned on what."""

    model: str = field(metadata={"help": "a Hugging Face folder, or a shape such as configs/model/tiny.yaml"})
    source: list[str] = field(metadata={"help": "'stdlib', 'pydoc', folders, glob patterns, .jsonl files"})
    tokenizer: str | None = field(default=None, metadata={"help": "a tokenizer.json; default: the model folder's"})
    text_key: str = field(default="text", metadata={"help": "entry of a JSON object that holds the text"})
    sequence_length: int = field(default=128, metadata={"help": "tokens in one training sequence"})
    validation_fraction: float = field(default=0.1, metadata={"help": "share of the documents kept for validation"})
    validation_sequences: int = field(default=128, metadata={"help": "at most so many of them are looked at"})
    lora_rank: int = field(default=0, metadata={"help": "train adapters of this rank; 0: all weights"})


@dataclass
class Arguments(TrainingArguments):
    """HF's TrainingArguments with defaults that suit Adam-mini and a small machine."""

    adam_beta2: float = field(default=0.95, metadata={"help": "HF's 0.999 is known to ruin Adam-mini"})
    eval_on_start: bool = field(default=True, metadata={"help": "the loss that tuning begins with"})
    disable_tqdm: bool | None = field(default=True, metadata={"help": "no progress bars"})
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available, metadata={"help": "for a GPU"})
    logging_steps: float = field(default=10, metadata={"help": "optimizer steps between two points of the curve"})
    report_to: str = field(default="none", metadata={"help": "loggers, such as tensorboard"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints that are kept"})


class Sequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Texts joined by an end token and cut into sequences: int64 [sequence_length], inputs and labels alike."""

    def __init__(
        self, texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int, limit: int | None = None
    ) -> None:
        tokens: list[int] = []
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ():
            tokens += [*ids, tokenizer.eos_token_id]
        count = min(len(tokens) // length, limit or len(tokens))
        self._rows = torch.tensor(tokens[: count * length], dtype=torch.int64).view(count, length)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


def main(arguments: list[str] | None = None) -> None:
    """Fine-tune one model.

    Args:
        arguments: Command line without the program's name; default `sys.argv`.

    Raises:
        ValueError: Lists what is wrong with the options or the text, before the model is built.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    RankInfo.from_environment()  # sets a launcher's variables if there is no launcher
    prepare_process()
    if not torch.cuda.is_available():
        arguments += ["--accelerator_config", json.dumps(_join_without_gpu())]
    check_engine_file(arguments)
    options, training = parse(arguments)
    transformers.set_seed(training.seed)
    tokenizer, shape, corpus = inputs_of(options)
    train, held_out = (
        Sequences(texts, tokenizer, options.sequence_length, limit)
        for texts, limit in zip(
            _split(corpus, options.validation_fraction), (None, options.validation_sequences), strict=True
        )
    )
    _check_sizes(options, train, held_out)
    trainer = Trainer(
        model=_model(options, shape, tokenizer),
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=transformers.default_data_collator,  # nothing to pad: every row is full
    )
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=_resume(training))
    seconds = time.perf_counter() - started
    trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        summary = _summary(options, trainer, seconds)
        folder = Path(training.output_dir)
        write_summary(summary, folder / SUMMARY)
        _plot_losses(trainer.state.log_history, summary, folder / "loss.png")
        print(_table(summary), flush=True)
    trainer.accelerator.wait_for_everyone()  # every rank returns after all files are written


def parse(arguments: list[str]) -> tuple[FineTuning, Arguments]:
    """Read the command line."""
    options, training = HfArgumentParser((FineTuning, Arguments)).parse_args_into_dataclasses(arguments)
    return options, training


def check_engine_file(arguments: list[str]) -> None:
    """Look at the JSON of ``--deepspeed`` before anything else does.

    Raises:
        ValueError: Lists every mistake in it.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--deepspeed", type=Path)
    file = parser.parse_known_args(arguments)[0].deepspeed
    if file is None or file.suffix != ".json":  # HF takes JSON itself, too
        return
    problems = Problems()
    for mistake in json_mistakes(read_json(file, problems), may_be_auto=True):
        problems.add(file, *mistake)
    problems.raise_if_any()


def _join_without_gpu() -> dict[str, bool]:
    # Without a GPU Accelerate counts one process, whatever the launcher started, unless it is told the backend;
    # every rank would then learn from the same samples.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    return {"use_configured_state": True}


def inputs_of(options: FineTuning) -> tuple[PreTrainedTokenizerFast, GPTShape | None, Corpus]:
    """Tokenizer, shape (None: the model's folder has the weights) and text.

    Raises:
        ValueError: Lists every path that is not there or does not fit.
    """
    problems = Problems()
    here = "command line"
    corpus = find_corpus(tuple(options.source), options.text_key, here, problems)
    for name, least in (("sequence_length", 1), ("validation_sequences", 1), ("lora_rank", 0)):
        number = getattr(options, name)
        if number < least:
            problems.add(here, f"--{name}", number, f"a whole number, at least {least}", "correct it")
    if not 0.0 < options.validation_fraction < 1.0:
        fraction = options.validation_fraction
        problems.add(here, "--validation_fraction", fraction, "a number between 0 and 1", "correct it")
    path = Path(options.model)
    shape = GPTShape.read(path, problems) if path.suffix in (".yaml", ".yml") else None
    tokenizer_file = Path(options.tokenizer) if options.tokenizer else path / "tokenizer.json"
    if shape is None and path.suffix not in (".yaml", ".yml") and not (path / "config.json").is_file():
        problems.add(here, "--model", options.model, "a folder with config.json, or a shape file", "correct the path")
    if not tokenizer_file.is_file():
        remedy = "give --tokenizer (launch/prepare_data.py writes one into its data folder)"
        problems.add(here, "--tokenizer", str(tokenizer_file), "the path of a tokenizer.json", remedy)
    problems.raise_if_any()
    if options.tokenizer is None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token=_END)
    return tokenizer, shape, corpus


def _split(corpus: Corpus, fraction: float) -> Iterator[list[str]]:
    texts = list(corpus)
    yield [text for text in texts if not is_validation(text, fraction)]
    yield [text for text in texts if is_validation(text, fraction)]


def _check_sizes(options: FineTuning, train: Sequences, held_out: Sequences) -> None:
    for name, held in (("training", train), ("validation", held_out)):
        if len(held) == 0:
            raise ValueError(
                f"--source {' '.join(options.source)} holds less than one {name} sequence of "
                f"{options.sequence_length} tokens: name more text, lower --sequence_length, or change "
                "--validation_fraction"
            )


def _model(options: FineTuning, shape: GPTShape | None, tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    model: torch.nn.Module
    if shape is None:
        model = AutoModelForCausalLM.from_pretrained(options.model)
    else:
        model = LlamaForCausalLM(llama_config(shape, tokenizer.eos_token_id))
    if options.lora_rank:
        import peft  # needed with --lora_rank only

        model = peft.get_peft_model(
            model,
            peft.LoraConfig(r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules="all-linear"),
        )
    return model


def llama_config(shape: GPTShape, eos_token_id: int) -> LlamaConfig:
    """The Hugging Face configuration of a model file's shape."""
    return LlamaConfig(
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.sequence_length,
        tie_word_embeddings=shape.tied_embeddings,
        rope_theta=shape.rope_theta,
        rms_norm_eps=shape.norm_eps,
        initializer_range=shape.init_std,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
    )


class _Summary(TypedDict):
    """The content of `summary.json`: the options and the results; losses in nats per token."""

    model: str
    source: list[str]
    tokenizer: str | None
    text_key: str
    sequence_length: int
    validation_fraction: float
    validation_sequences: int
    lora_rank: int
    optimizer: str
    parameters: int
    trained_parameters: int
    steps: int
    base_lr: float
    loss_before: float
    loss_after: float
    seconds: float
    output: str


def _resume(training: TrainingArguments) -> str | bool | None:
    given = training.resume_from_checkpoint
    words = {"true": True, "false": None}
    return words.get(given.lower(), given) if isinstance(given, str) else given


def _summary(options: FineTuning, trainer: Trainer, seconds: float) -> _Summary:
    model, optimizer = trainer.model_wrapped.module, trainer.model_wrapped.basic_optimizer
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "model": options.model,
        "source": options.source,
        "tokenizer": options.tokenizer,
        "text_key": options.text_key,
        "sequence_length": options.sequence_length,
        "validation_fraction": options.validation_fraction,
        "validation_sequences": options.validation_sequences,
        "lora_rank": options.lora_rank,
        "optimizer": type(optimizer).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": trained,
        "steps": trainer.state.global_step,
        "base_lr": trainer.args.learning_rate,
        "loss_before": losses[0],
        "loss_after": losses[-1],
        "seconds": seconds,
        "output": trainer.args.output_dir,
    }


def _table(summary: _Summary) -> str:
    """The short table that ends a fine-tuning."""
    fell = summary["loss_before"] - summary["loss_after"]
    return boxed(
        [
            ("model", summary["model"]),
            ("optimizer", f"{summary['optimizer']}, base lr {summary['base_lr']:g}"),
            ("parameters", f"{summary['parameters']:,}, of which {summary['trained_parameters']:,} are trained"),
            ("text", f"{' '.join(summary['source'])}, {summary['steps']:,} steps"),
            (
                "validation loss",
                f"{summary['loss_before']:.4f} -> {summary['loss_after']:.4f} (fell by {fell:.4f} nats)",
            ),
            ("training time", f"{summary['seconds']:.0f} s"),
            ("written to", summary["output"]),
        ]
    )


def _plot_losses(history: list[dict[str, float]], summary: _Summary, path: Path) -> None:
    """Draw training and validation loss over optimizer steps.

    Args:
        history: Trainer's log, entries with ``step`` and ``loss`` or ``eval_loss``.
        summary: For the title.
        path: PNG file to write.
    """
    curves = (
        [(entry["step"], float(entry[key])) for entry in history if key in entry] for key in ("loss", "eval_loss")
    )
    with loss_axes(path, *curves) as axes:
        axes.set_title(f"{summary['model']} on {' '.join(summary['source'])}, {summary['optimizer']}")


if __name__ == "__main__":
    main()
