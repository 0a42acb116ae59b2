# SPDX-License-Identifier: Apache-2.0
"""Pre-train a LLaMA-shaped Megatron-core model with DeepSpeed.

deepspeed --num_gpus 2 launch/pretrain_llama.py --run configs/run/tiny.yaml

The run file says everything; the DeepSpeed JSON that it names decides the optimizer, and
`--deepspeed-config` swaps it. `--resume` continues from the newest checkpoint, bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import shutil
import sys
import time
from typing import Any

import deepspeed
import quiet  # noqa: F401
import torch
from batches import Batches, check_data
from engine_config import compose, optimizer_type, parameter_dtype, zero_stage
from processes import Processes, agree, start, world_size
from report import plot_loss, state_bytes_per_parameter, summarize, table, write_summary
from run_config import RunConfig, check_run, load_run
from training import CHECKPOINTS, Trainer, latest_checkpoint

import megatron_patch
from ds_blockwise import block_report
from megatron_patch.config import Problems

logger = logging.getLogger(__name__)

RUN_RECORD = "run.json"  # what a run was started with
# A resumed run with another value of these would not be the same run: other data, other weights.
_FIXED = ("model", "parallel", "processes", "data", "steps", "global_batch_size", "seed")


def main(arguments: list[str] | None = None) -> None:
    """Train one run file.

    Args:
        arguments: Command line without the program's name; default `sys.argv`.

    Raises:
        ValueError: Lists what is wrong with the configuration, before the first step.
    """
    started = time.perf_counter()
    options = _options(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO)
    run, problems = load_run(options.run, overrides=options.set, deepspeed_file=options.deepspeed_config)
    if run is None:
        problems.raise_if_any()
    assert run is not None
    check_run(run, world_size(), problems)
    config = compose(run, problems)
    problems.raise_if_any()

    processes = start(run.parallel, run.training.seed)
    metadata = check_data(run, problems)
    record = _record(run, config, metadata, processes)
    _check_output(run, record, options, problems)
    agree(problems)
    _prepare_output(run, record, processes, resume=options.resume)

    batches = Batches(
        run,
        metadata,
        dp_rank=processes.dp_rank,
        dp_size=processes.dp_size,
        device=processes.device,
    )
    model = megatron_patch.build_gpt(run.shape, dtype=parameter_dtype(config))
    engine, _, _, _ = deepspeed.initialize(model=model, config=config, mpu=megatron_patch.mpu_adapter())
    name = optimizer_type(config)
    if processes.rank == 0 and name.startswith("Blockwise"):
        print(block_report(engine.module), flush=True)
    trainer = Trainer(engine, run, batches, processes, started=started)
    if options.resume:
        trainer.resume()
    trainer.train(options.stop_at_step)

    stage = zero_stage(config)
    state_bytes = state_bytes_per_parameter(engine.basic_optimizer, engine.module, processes, zero_stage=stage)
    progress = trainer.finish()
    if processes.rank == 0:
        summary = summarize(
            run,
            progress,
            processes,
            optimizer=name,
            zero_stage=stage,
            state_bytes=state_bytes,
            config_sha256=_digest(record),
        )
        write_summary(summary, run.output / "summary.json")
        plot_loss(run, progress, name, run.output / "loss.png")
        print(table(summary, run.output), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # torchrun takes a script's --run for its own --run-path; --run-file gets past it.
    parser.add_argument("--run", "--run-file", required=True, help="run file, such as configs/run/tiny.yaml")
    parser.add_argument("--deepspeed-config", help="another DeepSpeed JSON than the run file's")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--stop-at-step", type=int, help="stop early, with a checkpoint")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    existing.add_argument("--overwrite", action="store_true", help="delete an earlier run's files")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    return parser.parse_args(arguments)


def _record(run: RunConfig, config: dict[str, Any], metadata: dict[str, Any], processes: Processes) -> dict[str, Any]:
    """What decides the result of a run, without the folders that it happens to use."""
    training = dataclasses.asdict(run.training)
    engine = {
        f"deepspeed.{key}": value
        for key, value in config.items()
        if key not in ("csv_monitor", "tensorboard", "wandb", "steps_per_print")
    }
    return {
        "model": dataclasses.asdict(run.shape),
        "parallel": dataclasses.asdict(run.parallel),
        "processes": processes.world_size,
        # Not the fingerprint: it holds file times, and the same text elsewhere is the same run.
        "data": {"tokenizer": metadata.get("tokenizer"), "splits": metadata.get("splits")},
        **training,
        **engine,
    }


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _check_output(run: RunConfig, record: dict[str, Any], options: argparse.Namespace, problems: Problems) -> None:
    checkpoint = latest_checkpoint(run.output)
    if not options.resume:
        if checkpoint is not None and not options.overwrite:
            allowed = "a folder without checkpoints"
            remedy = "pass --resume to go on from them, or --overwrite to delete them"
            problems.add(run.file, "output", str(run.output), allowed, remedy)
        return
    if checkpoint is None:
        allowed = f"a folder with a checkpoint in {CHECKPOINTS}/"
        remedy = "leave out --resume to start from the beginning"
        problems.add(run.file, "output", str(run.output), allowed, remedy)
        return
    before = json.loads((run.output / RUN_RECORD).read_text(encoding="utf-8"))
    after = json.loads(json.dumps(record))
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        if key in _FIXED:
            allowed = f"{old!r}, with which {checkpoint} was written"
            remedy = "set it back, or start a new run in another output folder"
            problems.add(run.file, key, new, allowed, remedy)
        elif world_size() == 1 or torch.distributed.get_rank() == 0:
            logger.info("resuming with another %s: %s was %s", key, new, old)


def _prepare_output(run: RunConfig, record: dict[str, Any], processes: Processes, *, resume: bool) -> None:
    """Start a new run with empty curves: monitors append to what they find."""
    if processes.rank == 0:
        if not resume:
            for name in (CHECKPOINTS, "csv", "tensorboard"):
                shutil.rmtree(run.output / name, ignore_errors=True)
            for name in ("loss.png", "summary.json"):
                (run.output / name).unlink(missing_ok=True)
        run.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=2) + "\n"
        (run.output / RUN_RECORD).write_text(text, encoding="utf-8")
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
