"""The training loop: batches from (seed, step), AdamW, validation, checkpoints, exact resume."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import time

import numpy as np
import torch
import yaml
from lightning_fabric import Fabric
from tqdm import tqdm

from .checkpoint import (
    check_new_run,
    check_run,
    choose_checkpoint,
    create_run,
    read_summary,
    remove_leftovers,
    run_path,
    save_checkpoint,
    warn,
    write_atomic,
)
from .config import UsageError
from .data import TextData, random_batch
from .evaluate import build_model, load_weights, pick_device, summed_loss
from .generate import generate_tokens
from .metrics import MetricsLog, plot_losses
from .optim import build_optimizer, learning_rate
from .text import resolve_source
from .tokenizer import load_tokenizer


def train(config, *, resume=False, overwrite=False):
    """Train a model as `config` says, from the start or from the newest checkpoint of config.run.

    Args:
        config: TrainConfig.
        resume: continue the run in config.run; losses are then the same bits as without the interruption.
        overwrite: replace a run that is already there.

    Returns:
        0 when finished, 128 + the signal's number when SIGINT or SIGTERM ended it early (after a checkpoint).

    Raises:
        UsageError: a user's mistake; nothing was written.
    """
    run = run_path(config.run)
    config.data.source = resolve_source(config.data.source)
    check_devices(config)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    fabric = Fabric(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=config.strategy,
        precision=config.precision,
    )
    data = prepare_run(run, config, resume, overwrite) if fabric.global_rank == 0 else None
    fabric.launch()
    if fabric.global_rank == 0:
        open_run(run, config, data, resume, overwrite)
    fabric.barrier()
    if data is None:
        data = TextData(config.data, load_tokenizer(run / "tokenizer.json"), read_summary(run))
    return Trainer(run, config, data, fabric).fit()


def check_devices(config):
    """Raises UsageError for devices or number formats that this machine has not."""
    device = pick_device(config.accelerator)
    if device.type == "cuda" and config.devices > torch.cuda.device_count():
        raise UsageError(f"devices: expected at most {torch.cuda.device_count()} on this machine, got {config.devices}")
    if device.type == "cpu" and config.precision == "16-mixed":
        raise UsageError("precision: expected 32-true, bf16-mixed or bf16-true on a CPU, got '16-mixed'")
    if config.devices * config.num_nodes > 1 and config.strategy != "ddp":
        raise UsageError(f"strategy: expected 'ddp' for {config.devices} x {config.num_nodes} devices, got 'auto'")


def prepare_run(run, config, resume, overwrite):
    """Everything a user can get wrong, checked before anything is written; returns the TextData."""
    tokenizer, expected = None, None
    if resume:
        check_run(run)
        tokenizer, expected = load_tokenizer(run / "tokenizer.json"), read_summary(run)
        choose_checkpoint(run, needed=("model.safetensors", "state.pt"))
    else:
        check_new_run(run, overwrite)
    data = TextData(config.data, tokenizer, expected)
    data.check_lengths(config.model.block_size)
    if config.sample_tokens:
        data.tokenizer.encode(config.sample_prompt)
    return data


def open_run(run, config, data, resume, overwrite):
    files = {"config.yaml": yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)}
    if resume:
        remove_leftovers(run)
        write_atomic(run / "config.yaml", files["config.yaml"])
    else:
        files["tokenizer.json"] = data.tokenizer.to_json()
        files["data.json"] = json.dumps(data.summary)
        create_run(run, files, overwrite)


def dropout_seed(seed, step, rank):
    """Dropout of a step depends on (seed, step, rank) alone, so resuming needs no generator state."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


class StopSignal:
    """Remembers SIGINT or SIGTERM while it is entered; a second signal acts as if it was not."""

    def __enter__(self):
        self.number, self.previous = 0, {}
        with contextlib.suppress(ValueError):  # not the main thread: signals stay with whoever has them
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number, _frame):
        self.number = number
        self._restore()

    def _restore(self):
        while self.previous:
            signal.signal(*self.previous.popitem())

    def __exit__(self, *_):
        self._restore()


class Trainer:
    """One run in one process: the state that decides the next step, and the loop over steps."""

    def __init__(self, run, config, data, fabric):
        self.run, self.config, self.data, self.fabric = run, config, data, fabric
        torch.manual_seed(config.seed)
        self.raw_model = build_model(config, data.tokenizer)
        # a gradient scaler and fused optimizers exclude each other in Fabric's clipping
        optimizer = build_optimizer(self.raw_model, config.optim, fused=config.precision != "16-mixed")
        model = torch.compile(self.raw_model) if config.compile else self.raw_model
        self.model, self.optimizer = fabric.setup(model, optimizer)
        self.step, self.best_loss, self.stale = 0, math.inf, 0
        if chosen := choose_checkpoint(run, needed=("model.safetensors", "state.pt")):
            self.load(chosen[0])

    def load(self, folder):
        load_weights(self.raw_model, folder)
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.step, self.best_loss, self.stale = state["step"], state["best_loss"], state["stale"]

    def save(self, validation_loss):
        if self.fabric.is_global_zero:
            state = {
                "optimizer": self.optimizer.state_dict(),
                "precision": self.fabric.strategy.precision.state_dict(),
                "step": self.step,
                "best_loss": self.best_loss,
                "stale": self.stale,
            }
            save_checkpoint(self.run, self.step, self.raw_model, state, validation_loss, self.config.keep)
        self.fabric.barrier()

    def train_step(self):
        """One optimizer step; returns the loss of its whole batch and the norm of the gradients."""
        config, fabric = self.config, self.fabric
        rate = learning_rate(self.step, config.steps, config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = random_batch(
            self.data.splits["train"], config.seed, self.step, config.batch_size, config.model.block_size
        )
        torch.manual_seed(dropout_seed(config.seed, self.step, fabric.global_rank))
        part = config.batch_size // (config.accumulate * fabric.world_size)
        total = torch.zeros((), device=fabric.device)
        for number in range(config.accumulate):
            start = (number * fabric.world_size + fabric.global_rank) * part
            mine = fabric.to_device((inputs[start : start + part], targets[start : start + part]))
            with fabric.no_backward_sync(self.model, enabled=number < config.accumulate - 1):
                loss = self.model(*mine) / config.accumulate
                fabric.backward(loss)
            total += loss.detach()
        norm = None
        if config.optim.clip:
            norm = fabric.clip_gradients(
                self.model, self.optimizer, max_norm=config.optim.clip, error_if_nonfinite=False
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return total, norm

    def validate(self):
        total, count = summed_loss(
            self.raw_model, self.data.splits["validation"], self.config.model.block_size,
            limit=self.config.validation_windows, rank=self.fabric.global_rank, world_size=self.fabric.world_size,
            autocast=self.fabric.autocast,
        )  # fmt: skip
        sums = torch.tensor([total, count], dtype=torch.float64, device=self.fabric.device)
        total, count = self.fabric.all_reduce(sums, reduce_op="sum").tolist()
        return total / count

    def check_finite(self, loss, name):
        if not math.isfinite(loss):
            raise UsageError(
                f"{name}: expected a finite number at step {self.step}, got {loss}; the last checkpoint is kept, "
                f"try a learning rate below {self.config.optim.learning_rate}"
            )

    def must_stop(self, stop):
        if self.fabric.world_size == 1:
            return stop.number
        if self.step % self.config.log_every:  # asking the others waits for the device
            return 0
        return int(self.fabric.all_reduce(torch.tensor(stop.number, device=self.fabric.device), reduce_op="max"))

    def fit(self):
        config, fabric = self.config, self.fabric
        main = fabric.is_global_zero
        if main:
            self.describe()
        log = MetricsLog(self.run, self.step, config.tensorboard) if main else None
        interval = 0.2 if os.isatty(2) else 10.0  # seconds; a log file wants few lines
        bar = tqdm(total=config.steps, initial=self.step, unit="step", disable=not main, mininterval=interval)
        tokens_a_step = config.batch_size * config.model.block_size
        seconds, timed_steps, stopped, speed = 0.0, 0, 0, 0.0
        with (
            StopSignal() as stop,
            contextlib.closing(bar),
            contextlib.closing(log) if main else contextlib.nullcontext(),
        ):
            if self.step == 0:
                self.report(self.validate(), None, log, bar)
            while self.step < config.steps and not stopped and not (config.patience and self.stale >= config.patience):
                start = time.perf_counter()
                loss, norm = self.train_step()
                stopped = self.must_stop(stop)
                if log_now := self.step % config.log_every == 0 or self.step == config.steps:
                    loss = fabric.all_reduce(loss, reduce_op="mean").item()  # waits for the device
                    self.check_finite(loss, "training loss")
                seconds, timed_steps = seconds + time.perf_counter() - start, timed_steps + 1
                if log_now and main:
                    speed = tokens_a_step * timed_steps / seconds
                    seconds, timed_steps = 0.0, 0
                    rate = learning_rate(self.step - 1, config.steps, config.optim)
                    norm = None if norm is None else float(norm)
                    log.log(self.step, train_loss=loss, learning_rate=rate, grad_norm=norm, tokens_per_second=speed)
                    bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
                bar.update()
                if self.step % config.evaluate_every == 0 or self.step == config.steps:
                    validation_loss = self.validate()
                    self.check_finite(validation_loss, "validation loss")
                    improved = validation_loss < self.best_loss
                    self.best_loss = min(validation_loss, self.best_loss)
                    self.stale = 0 if improved else self.stale + 1
                    self.report(validation_loss, speed, log, bar)
                    self.save(validation_loss)
                elif stopped:
                    self.check_finite(float(loss), "training loss")
                    self.save(None)
        if main:
            self.finish(stopped)
        return 128 + stopped if stopped else 0

    def report(self, validation_loss, speed, log, bar):
        if log:
            log.log(self.step, validation_loss=validation_loss)
            speed = f"  {speed:,.0f} tokens/s" if speed else ""
            bar.write(f"step {self.step}/{self.config.steps}  validation loss {validation_loss:.4f}{speed}")

    def describe(self):
        config, summary = self.config, self.data.summary
        sizes = ", ".join(f"{name} {len(tokens):,}" for name, tokens in self.data.splits.items())
        print(
            f"text: {summary['source']}, {summary['characters']:,} characters, sha256 {summary['sha256']}\n"
            f"tokens: {sizes}; vocabulary {self.data.tokenizer.vocab_size:,} ({config.data.tokenizer})\n"
            f"model: {self.raw_model.num_parameters():,} parameters, layers from {config.layers}\n"
            f"device: {self.fabric.device}, {self.fabric.world_size} process(es), "
            f"{torch.get_num_threads()} CPU threads, precision {config.precision}\n"
            f"run: {self.run}" + (f", continued after step {self.step}" if self.step else ""),
            flush=True,
        )

    def finish(self, stopped):
        plot = plot_losses(self.run)
        if stopped:
            name = signal.Signals(stopped).name
            warn(f"stopped by {name} after step {self.step}, saved; continue with: fastattn train --resume {self.run}")
            return
        if self.step < self.config.steps:
            print(f"stopped early after step {self.step}: no better validation loss in {self.stale} validations")
        folder, meta = choose_checkpoint(self.run, "best")
        load_weights(self.raw_model, folder)
        if meta["validation_loss"] is not None:  # None: saved by a signal, then resumed with fewer steps
            print(f"best validation loss {meta['validation_loss']:.4f} at step {meta['step']}")
        if self.config.sample_tokens:
            prompt = self.data.tokenizer.encode(self.config.sample_prompt)
            new = generate_tokens(self.raw_model, prompt, self.config.sample_tokens, seed=self.config.seed)
            text = self.config.sample_prompt + self.data.tokenizer.decode(new)
            write_atomic(self.run / "sample.txt", text)
            print(f"what it writes:\n{'-' * 80}\n{text.strip()}\n{'-' * 80}")
        print(f"loss curve: {plot}\nnext: fastattn evaluate {self.run}; fastattn generate {self.run} --prompt TEXT")
