"""A whole training run: checks the user's settings, creates the folder, and runs the loop."""

import dataclasses
import json
import os

import torch
import yaml
from lightning_fabric import Fabric

from ..data.chat import TEMPLATES
from ..data.sources import resolve_source
from ..data.tokenizer import load_tokenizer, read_tokenizer
from ..files import run_path, write_atomic
from ..messages import UsageError, expect, warn
from ..tasks.registry import make_task
from .checkpoint import check_new_run, check_run, choose_checkpoint, create_run, read_summary, remove_leftovers
from .console import conclude, describe
from .devices import check_devices
from .loop import Trainer
from .lora import train_only
from .metrics import read_metrics
from .sharding import sharded_strategy
from .start import load_start, start_tokenizer


def train(config, *, resume=False, overwrite=False):
    """Train a model from the beginning, or from the newest checkpoint of config.run.

    Args:
        config: TrainConfig.
        resume: continue the run in config.run; its losses are bitwise the same as without the interruption.
        overwrite: replace an existing run.

    Returns:
        0 if finished; 128 + the signal's number if SIGINT or SIGTERM stopped the run, after a checkpoint.

    Raises:
        UsageError: a user's mistake; nothing was written.
    """
    run = run_path(config.run)
    config.data.source = resolve_source(config.data.source)
    if config.data.mixture is not None:
        config.data.mixture = {resolve_source(folder): weight for folder, weight in config.data.mixture.items()}
    if config.data.chat_template not in ("auto", *TEMPLATES):
        config.data.chat_template = str(run_path(config.data.chat_template))
    if config.data.target_source is not None:
        config.data.target_source = resolve_source(config.data.target_source)
    if config.start is not None:
        config.start = str(run_path(config.start))
    check_devices(config)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    fabric = Fabric(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=sharded_strategy(config.devices * config.num_nodes) if config.strategy == "fsdp" else config.strategy,
        precision=config.precision,
    )
    task = prepare_run(run, config, resume, overwrite) if fabric.global_rank == 0 else None
    fabric.launch()
    if fabric.global_rank == 0:
        open_run(run, config, task, resume, overwrite)
    config, tokenizer, summary = fabric.broadcast(task and (config, task.tokenizer.to_json(), task.summary))
    if task is None:  # all that decides a step comes from the first process; the data must be the same
        task = make_task(config, read_tokenizer(tokenizer), summary)
    trainer = Trainer(run, config, task, fabric)
    if fabric.is_global_zero:
        describe(trainer)
    stopped = trainer.fit()
    if fabric.is_global_zero:
        conclude(trainer, stopped)
    return 128 + stopped if stopped else 0


def prepare_run(run, config, resume, overwrite):
    """Check all user settings before anything is written; returns the Task."""
    tokenizer, expected = None, None
    if config.tensorboard:
        import torch.utils.tensorboard  # noqa: F401, raises if the package is missing, before the run has a folder
    if resume:
        check_run(run)
        tokenizer, expected = load_tokenizer(run / "tokenizer.json"), read_summary(run)
        read_metrics(run)  # which the log continues
        chosen = choose_checkpoint(run, needed=("model.safetensors", "state.pt"))
    else:
        check_new_run(run, overwrite)
        if config.start == str(run):
            raise UsageError(f"run {config.run!r} must not be the folder of start")
        if config.start is not None:
            tokenizer = start_tokenizer(config)
    task = make_task(config, tokenizer, expected)
    if config.epochs is not None:
        steps = config.epochs * task.steps_an_epoch
        expect(
            steps < 2**53,
            "epochs",
            f"lower: a run has fewer than 2**53 steps, and an epoch has {task.steps_an_epoch}",
            steps,
        )
        config.steps = max(1, round(steps))
    if resume and chosen and config.steps < (done := chosen[1]["step"]):
        raise UsageError(f"steps must be at least {done}, the steps that the run has done, got {config.steps}")
    task.check_sample()
    if config.start is not None and not resume:
        model = task.build_model(config, task.tokenizer, task.summary)  # raises if something does not fit
        new = load_start(model, config, task.summary.get("labels"))
        train_only(model, config.trained, config.lora_rank)
        if new:
            warn(f"start {config.start}: loaded all weights except {', '.join(new[:6])}{' ...' if new[6:] else ''}")
    return task


def open_run(run, config, task, resume, overwrite):
    files = {"config.yaml": yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)}
    if resume:
        remove_leftovers(run)
        write_atomic(run / "config.yaml", files["config.yaml"])
    else:
        files["tokenizer.json"] = task.tokenizer.to_json()
        files["data.json"] = json.dumps(task.summary)
        create_run(run, files, overwrite)
