# SPDX-License-Identifier: Apache-2.0
"""One training run as a file: model, data, parallelism, training, and which DeepSpeed JSON.

Every number stands in one file only. What follows from several of them (batch sizes, the length of
the schedule, where monitors write) is composed in `engine_json`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.runs.model_shape import LLAMA, GPTShape, note_model_file
from ds_blockwise.runs.reading.problems import Problems, correction
from ds_blockwise.runs.reading.whole_files import JsonObject, read_json
from ds_blockwise.runs.reading.yaml_file import apply_override, read_yaml
from ds_blockwise.runs.strict_files import NotNegative, Positive, StrictSection, Texts, read_section

_DEEPEST = 8  # bases of bases
ACTIVATION_CHECKPOINTING = ("none", "selective", "full")
GPT, HYBRID = "gpt", "hybrid"
MODEL_CLASSES = (GPT, HYBRID)


@dataclass(frozen=True, slots=True)
class DataConfig(StrictSection):
    """Where the text comes from and where its tokens are kept.

    Attributes:
        directory: Holds the tokens, the tokenizer and `metadata.json`; relative to the working
            directory. With `blend` only Megatron's sample indices go there.
        source: ``stdlib`` (the source files of Python's standard library), or folders, glob
            patterns and files: text, JSON lines (one object in each line), parquet, the first two
            also compressed.
        text_key: Entry of a JSON object, or column of a parquet file, that holds the text.
        tokenizer: ``train`` (byte-level BPE with the model's vocabulary size), the path of a
            `tokenizer.json`, or a folder with one, as Hugging Face saves it.
        validation_fraction: Chance of a document to be kept for validation only; its text alone decides.
        blend: Prepared folders to train on instead of `directory`, each with its share of the
            samples before it: ``0.7 data/web``. The shares are relative to their sum.
    """

    directory: str
    source: Annotated[Texts, Field(min_length=1)] = ("stdlib",)
    text_key: str = "text"
    tokenizer: str = "train"
    validation_fraction: Annotated[float, Field(strict=True, ge=0.001, le=0.5)] = 0.05
    blend: Texts = ()

    def read_blend(self, file: str | Path, problems: Problems) -> tuple[tuple[str, float], ...]:
        """Folders and their shares of the samples, which sum to 1; `directory` alone without a blend.

        Args:
            file: The run file, for messages.
            problems: Notes entries that are no share and folder, and folders that come twice.
        """
        if not self.blend:
            return ((self.directory, 1.0),)
        shares: dict[str, float] = {}
        for entry in self.blend:
            number, _, folder = entry.strip().partition(" ")
            folder = folder.strip()
            try:
                share = float(number)
            except ValueError:
                share = 0.0
            if not (0.0 < share < float("inf")) or not folder:
                allowed = "a share above 0 and a prepared folder, such as '0.7 data/web'"
                problems.add(file, "data.blend", entry, allowed, "write both, with a space between")
            elif Path(folder) in map(Path, shares):
                problems.add(file, "data.blend", entry, "each folder once", "add its shares up in one entry")
            else:
                shares[folder] = share
        total = sum(shares.values())
        return tuple((folder, share / total) for folder, share in shares.items())


@dataclass(frozen=True, slots=True)
class ParallelConfig(StrictSection):
    """How the processes are arranged; what is left over is data parallelism.

    Attributes:
        tensor: Processes that share each layer's tensors.
        pipeline: Pipeline stages; this launcher takes 1 only.
    """

    tensor: Positive = 1
    pipeline: Positive = 1


@dataclass(frozen=True, slots=True)
class ClusterConfig(StrictSection):
    """The machines that a run is meant for; the launcher's own count of processes wins at the start.

    Attributes:
        nodes: Machines.
        gpus_per_node: Processes on each of them.
        gpu: Kind of GPU, a name that ``ds-blockwise plan`` knows; empty for CPUs.
    """

    nodes: Positive = 1
    gpus_per_node: Positive = 1
    gpu: str = ""

    @property
    def processes(self) -> int:
        """Processes on all machines together."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, slots=True)
class TrainingConfig(StrictSection):
    """Length, batch and intervals of the training; all intervals are in optimizer steps.

    Attributes:
        steps: Optimizer steps; also the length of the learning-rate schedule.
        warmup_steps: Steps of linear warm-up.
        global_batch_size: Sequences in one optimizer step, on all ranks together.
        micro_batch_size: Sequences in one forward pass of one rank.
        validation_sequences: Size of the fixed validation set.
        validation_interval: Steps between validations; also before the first and after the last.
        log_interval: Steps that one point of the training curve averages over.
        checkpoint_interval: Steps between checkpoints; 0 writes only the last.
        keep_checkpoints: How many of them stay, the newest ones; 0 keeps all.
        seed: Of the initial weights and of the data order.
        sequence_length: Tokens in one training sequence, if not the model file's.
        sharpness_interval: Steps between measurements of the blocks' sharpness; also after the last. 0 measures none.
        sharpness_batches: Micro batches of each rank, of the validation set, that each of them takes.
        activation_checkpointing: ``none``; ``selective``: attention is computed again in the backward pass; ``full``:
            whole layers are.
    """

    steps: Positive
    warmup_steps: NotNegative
    global_batch_size: Positive
    micro_batch_size: Positive
    validation_sequences: Positive
    validation_interval: Positive
    log_interval: Positive = 10
    checkpoint_interval: NotNegative = 0
    keep_checkpoints: NotNegative = 0
    seed: NotNegative = 1234
    sequence_length: Positive | None = None
    activation_checkpointing: str = "none"
    sharpness_interval: NotNegative = 0
    sharpness_batches: Positive = 4


@dataclass(frozen=True, slots=True)
class RunFile(StrictSection):
    """The keys of a run file, `base` apart.

    Attributes:
        name: Short name, for titles.
        model: Model file, such as ``../model/tiny.yaml``.
        deepspeed: DeepSpeed's JSON; it decides optimizer, ZeRO stage and precision.
        output: Folder of everything that this run writes; the JSON's name is appended.
        data: The text and its tokens.
        parallel: How the processes are arranged.
        training: Length, batch and intervals.
        cluster: The machines that the run is meant for.
        model_class: Megatron-core's class that computes the model: ``gpt`` (`GPTModel`), or ``hybrid`` (`HybridModel`,
            of Megatron-core 0.18 and later), whose attention and FFN are layers of their own. The same seed gives both
            the same weights; names in checkpoints differ.
    """

    name: str
    model: str
    deepspeed: str
    output: str
    data: DataConfig
    parallel: ParallelConfig
    training: TrainingConfig
    cluster: ClusterConfig
    model_class: str = GPT


@dataclass(frozen=True, slots=True)
class RunConfig:
    """A whole run, read and checked.

    Attributes:
        file: The run file.
        name: Short name, for titles.
        model_file: Where `shape` comes from.
        shape: The model.
        deepspeed_file: The DeepSpeed JSON; it decides optimizer, ZeRO stage and precision.
        deepspeed: What stands in it.
        output: Folder of everything this run writes.
        data: See `DataConfig`.
        parallel: See `ParallelConfig`.
        training: See `TrainingConfig`.
        cluster: See `ClusterConfig`.
        model_class: See `RunFile`.
    """

    file: Path
    name: str
    model_file: Path
    shape: GPTShape
    deepspeed_file: Path
    deepspeed: JsonObject
    output: Path
    data: DataConfig
    parallel: ParallelConfig
    training: TrainingConfig
    cluster: ClusterConfig
    model_class: str

    @property
    def data_directory(self) -> Path:
        """Folder of the prepared data."""
        return Path(self.data.directory)

    @property
    def wants_metrics_csv(self) -> bool:
        """Whether the JSON asks for its ``csv_monitor``, in whose place the main job writes one file."""
        return isinstance(found := self.deepspeed.get("csv_monitor"), dict) and found.get("enabled") is True

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees, on all ranks together."""
        return self.training.global_batch_size * self.shape.sequence_length


_SECTIONS = ("data", "parallel", "training", "cluster")
_RELATIVE = ("model", "deepspeed")  # entries that are paths relative to the file they stand in


def load_run(
    file: str | Path,
    *,
    overrides: Sequence[str] = (),
    deepspeed_file: str | Path | None = None,
) -> tuple[RunConfig | None, Problems]:
    """Read a run file, its model file and its DeepSpeed JSON.

    A run file may name another as its `base` and then states only what differs. `model`, `deepspeed`
    and `base` are relative to the file that they stand in, so that a run can be started from anywhere;
    `output` and `data.directory` are relative to the working directory. The output folder gets the name
    of the JSON appended: swapping the optimizer never mixes two runs.

    Args:
        file: The run file.
        overrides: ``section.key=value`` (the value in YAML), applied before anything is checked.
        deepspeed_file: Used instead of the run file's `deepspeed`, relative to the working
            directory.

    Returns:
        The run, or None if the files don't describe one, and the problems found.
    """
    file = Path(file)
    problems = Problems()
    values = _read_with_bases(file, problems)
    if not values and problems:
        return None, problems
    if note_model_file(file, values, problems):
        return None, problems
    for override in overrides:
        apply_override(values, override, problems)
    for name in _SECTIONS:
        values.setdefault(name, {})  # so that each of its required keys is named
    paths = {key: Path(values[key]) for key in _RELATIVE if isinstance(values.get(key), str)}
    if deepspeed_file:
        paths["deepspeed"] = Path(deepspeed_file)
    overridden = [override.partition("=")[0] for override in overrides]
    top = read_section(RunFile, values, file=file, problems=problems, overridden=overridden)
    shape = GPTShape.read(paths["model"], problems) if "model" in paths else None
    deepspeed = read_json(paths["deepspeed"], problems) if "deepspeed" in paths else {}
    if top is None or shape is None:
        return None, problems
    training = top.training
    if training.sequence_length is not None:
        shape = _with_sequence_length(shape, training.sequence_length, file, problems)
    run = RunConfig(
        file=file,
        name=top.name,
        model_file=paths["model"],
        shape=shape,
        deepspeed_file=paths["deepspeed"],
        deepspeed=deepspeed,
        output=Path(top.output) / paths["deepspeed"].stem,
        data=top.data,
        parallel=top.parallel,
        training=training,
        cluster=top.cluster,
        model_class=top.model_class,
    )
    return run, problems


def _read_with_bases(file: Path, problems: Problems, seen: tuple[Path, ...] = ()) -> JsonObject:
    """A run file's entries over those of its base, section by section; paths as seen from the working directory."""
    values = read_yaml(file, problems)
    for key in _RELATIVE:
        if isinstance(values.get(key), str):
            values[key] = os.path.normpath(file.parent / values[key])
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or file.parent / base in seen or len(seen) > _DEEPEST:
        allowed = "the path of another run file, which does not lead back here"
        problems.add(file, "base", base, allowed, "correct the path")
        return {}
    merged = _read_with_bases(file.parent / base, problems, (*seen, file))
    for key, value in values.items():
        section = merged.get(key)
        merged[key] = section | value if isinstance(section, dict) and isinstance(value, dict) else value
    return merged


def _with_sequence_length(shape: GPTShape, length: int, file: Path, problems: Problems) -> GPTShape:
    if shape.architecture != LLAMA and length != shape.sequence_length:
        allowed = f"{shape.sequence_length}: the model has that many learned positions"
        problems.add(file, "training.sequence_length", length, allowed, "leave it out or choose another model")
        return shape
    return replace(shape, sequence_length=length)


def check_run(run: RunConfig, world_size: int, problems: Problems) -> None:
    """Note every contradiction between the run and the number of processes.

    Args:
        run: The run.
        world_size: Processes that the launcher starts.
        problems: Every mistake is noted here.
    """
    file, training, parallel = run.file, run.training, run.parallel
    if parallel.pipeline > 1:
        allowed = "1 (pipeline parallelism is not supported by this launcher yet)"
        remedy = "set it to 1 and raise parallel.tensor instead"
        problems.add(file, "parallel.pipeline", parallel.pipeline, allowed, remedy)
        return
    if world_size % parallel.tensor:
        allowed = f"a divisor of the number of processes, {world_size}"
        remedy = "change it or deepspeed's --num_gpus"
        problems.add(file, "parallel.tensor", parallel.tensor, allowed, remedy)
    else:
        copies = world_size // parallel.tensor
        multiple = copies * training.micro_batch_size
        if training.global_batch_size % multiple:
            allowed = (
                f"a multiple of {multiple} = micro_batch_size {training.micro_batch_size} x "
                f"{copies} data-parallel ranks"
            )
            remedy = "change one of the batch sizes or the number of processes"
            problems.add(file, "training.global_batch_size", training.global_batch_size, allowed, remedy)
        if training.sharpness_interval:
            check_sharpness(run, copies, training.sharpness_batches, "training.sharpness_batches", problems)
    for key, value, known in (
        ("training.activation_checkpointing", training.activation_checkpointing, ACTIVATION_CHECKPOINTING),
        ("model_class", run.model_class, MODEL_CLASSES),
    ):
        if value not in known:
            problems.add(file, key, value, ", ".join(known), correction(value, known))
    run.data.read_blend(file, problems)
    run.shape.check_tensor_parallel(parallel.tensor, run.model_file, problems)
    if training.warmup_steps >= training.steps:
        allowed = f"fewer than training.steps = {training.steps}"
        problems.add(file, "training.warmup_steps", training.warmup_steps, allowed, "lower it")


def check_sharpness(run: RunConfig, copies: int, batches: int, key: str, problems: Problems) -> None:
    """Note what keeps this run's model from being measured by `ds_blockwise.hosts.deepspeed.sharpness`.

    Args:
        run: The run.
        copies: Data-parallel ranks.
        batches: Micro batches of each of them in one measurement.
        key: Where the number stands.
        problems: Every mistake is noted here.
    """
    training = run.training
    most = training.validation_sequences // (training.micro_batch_size * copies)
    if not 1 <= batches <= most:
        allowed = (
            f"1 to {most}: the validation set has {training.validation_sequences} sequences, and {copies} "
            f"data-parallel ranks take {training.micro_batch_size} each"
        )
        problems.add(run.file, key, batches, allowed, "change it or training.validation_sequences")
    section = run.deepspeed.get("optimizer")
    name = section.get("type") if isinstance(section, dict) else None
    if not isinstance(name, str) or name not in OPTIMIZERS:
        allowed = f"{' or '.join(OPTIMIZERS)} where sharpness is measured: others do not know the blocks"
        remedy = 'BlockwiseAdamW with "lr_multipliers": "uniform" is AdamW; or set training.sharpness_interval to 0'
        problems.add(run.deepspeed_file, "optimizer.type", name, allowed, remedy)
