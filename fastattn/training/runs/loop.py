"""The training loop: batches from (seed, step), an optimizer, validation, checkpoints, exact resume."""

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

from ..data.sources import resolve_source
from ..data.tokenizer import load_tokenizer
from ..files import run_path, write_atomic
from ..messages import UsageError, warn
from ..tasks.base import evaluate_part
from ..tasks.registry import make_task
from .checkpoint import (
    check_new_run,
    check_run,
    choose_checkpoint,
    create_run,
    load_state,
    read_summary,
    remove_leftovers,
    save_checkpoint,
)
from .devices import check_devices
from .load import load_run, load_weights
from .lora import train_only
from .metrics import MetricsLog, plot_losses
from .optim import average_of, build_optimizer, learning_rate
from .sharding import divide, gather, sharded_strategy
from .start import load_start, start_tokenizer
from .throughput import flops_per_token, peak_flops


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
    fabric.barrier()
    if task is None:
        task = make_task(config, load_tokenizer(run / "tokenizer.json"), read_summary(run))
    return Trainer(run, config, task, fabric).fit()


def prepare_run(run, config, resume, overwrite):
    """Everything a user can get wrong, checked before anything is written; returns the Task."""
    tokenizer, expected = None, None
    if config.tensorboard:
        import torch.utils.tensorboard  # noqa: F401, a missing package shows before the run has a folder
    if resume:
        check_run(run)
        tokenizer, expected = load_tokenizer(run / "tokenizer.json"), read_summary(run)
        choose_checkpoint(run, needed=("model.safetensors", "state.pt"))
    else:
        check_new_run(run, overwrite)
        if config.start == str(run):
            raise UsageError(f"run {config.run!r}: expected another folder than that of start, got the same")
        if config.start is not None:
            tokenizer = start_tokenizer(config)
    task = make_task(config, tokenizer, expected)
    if config.epochs is not None:
        config.steps = max(1, round(config.epochs * task.steps_an_epoch))
    task.check_sample()
    if config.start is not None and not resume:
        model = task.build_model(config, task.tokenizer, task.summary)  # tells what does not fit
        new = load_start(model, config, task.summary.get("labels"))
        train_only(model, config.trained, config.lora_rank)
        if new:
            warn(f"start {config.start}: all weights taken over but {', '.join(new[:6])}{' ...' if new[6:] else ''}")
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


def dropout_seed(seed, step, rank):
    """Dropout of a step depends on (seed, step, rank) alone, so resuming needs no generator state."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def shown(speed, mfu):
    """What a person sees of the speed: a list of texts, without what is unknown."""
    texts = (speed is not None and f"{speed:,.0f} tokens/s", mfu is not None and f"MFU {mfu:.0%}")
    return [text for text in texts if text]


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

    def __init__(self, run, config, task, fabric):
        self.run, self.config, self.task, self.fabric = run, config, task, fabric
        torch.manual_seed(config.seed)
        chosen = choose_checkpoint(run, needed=("model.safetensors", "state.pt"))
        self.raw_model = task.build_model(config, task.tokenizer, task.summary)
        if chosen is None and config.start is not None:
            load_start(self.raw_model, config, task.summary.get("labels"))
        elif chosen is None:
            task.initialize(self.raw_model)
        train_only(self.raw_model, config.trained, config.lora_rank)
        if chosen is not None:
            load_weights(self.raw_model, chosen[0])
        self.flops_per_token = flops_per_token(self.raw_model, config.model)
        model = torch.compile(self.raw_model) if config.compile else self.raw_model
        self.model = fabric.setup_module(model)
        # a gradient scaler and fused optimizers exclude each other in Fabric's clipping; shards have no fused SGD
        fused = config.precision != "16-mixed" and (not self.sharded or config.optim.name in ("adam", "adamw"))
        optimizer = build_optimizer(self.raw_model, config.optim, fused)
        self.optimizer = fabric.setup_optimizers(optimizer)
        self.average = average_of(self.raw_model, config.optim.ema)
        self.step, self.best_score, self.stale = 0, math.inf, 0
        self.peak = peak_flops(fabric.device, config.precision) if fabric.is_global_zero else None
        if chosen:
            self.load_state(chosen[0])

    @property
    def judged_model(self):
        """The model that is validated and saved: the average of weights where there is one."""
        return self.average.module if self.average else self.raw_model

    @property
    def sharded(self):
        return self.config.strategy == "fsdp"

    def load_state(self, folder):
        state = load_state(folder)
        if self.average:
            self.raw_model.load_state_dict(state["weights"])
            self.average.n_averaged.copy_(state["n_averaged"])
        optimizer = state["optimizer"]
        self.optimizer.load_state_dict(divide(optimizer, self.optimizer) if self.sharded else optimizer)
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.step, self.best_score, self.stale = state["step"], state["best_score"], state["stale"]

    def save(self, validation):
        model, optimizer = self.judged_model, self.optimizer.optimizer.state_dict()
        if self.sharded:
            weights, optimizer = gather(model.state_dict()), gather(optimizer)
        if self.fabric.is_global_zero:
            if self.sharded:
                model = self.task.build_model(self.config, self.task.tokenizer, self.task.summary)
                model.load_state_dict(weights)
            state = {
                "optimizer": optimizer,
                "precision": self.fabric.strategy.precision.state_dict(),
                "step": self.step,
                "best_score": self.best_score,
                "stale": self.stale,
            }
            if self.average:
                state |= {"weights": self.raw_model.state_dict(), "n_averaged": self.average.n_averaged}
            save_checkpoint(self.run, self.step, model, state, validation, self.config.keep)
        self.fabric.barrier()

    def train_step(self):
        """One optimizer step; returns the loss of its whole batch and the norm of the gradients."""
        config, fabric, task = self.config, self.fabric, self.task
        rate = learning_rate(self.step, config.steps, config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = task.train_rows(self.step)
        torch.manual_seed(dropout_seed(config.seed, self.step, fabric.global_rank))
        part = config.batch_size // (config.accumulate * fabric.world_size)
        total, count = torch.zeros((), device=fabric.device), task.count(batch)
        for number in range(config.accumulate):
            start = (number * fabric.world_size + fabric.global_rank) * part
            rows = tuple(tensor[start : start + part] for tensor in batch)
            # the mean over the whole batch, however its predictions are spread; processes are averaged
            weight = task.count(rows) * fabric.world_size / max(1, count)
            with fabric.no_backward_sync(self.model, enabled=number < config.accumulate - 1):
                loss = self.model(*fabric.to_device(task.inputs(rows))) * weight
                fabric.backward(loss)
            total += loss.detach()
        norm = None
        if config.optim.clip:
            norm = fabric.clip_gradients(
                self.model, self.optimizer, max_norm=config.optim.clip, error_if_nonfinite=False
            )
            norm = gather(norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update_parameters(self.raw_model)
        self.step += 1
        return total, norm

    def validate(self):
        """{"validation_loss", "validation_accuracy" if the task has one, "score", of which the best is the lowest}."""
        fabric = self.fabric
        sums = evaluate_part(
            self.judged_model, self.task, "validation", limit=self.config.validation_windows,
            rank=fabric.global_rank, world_size=fabric.world_size, autocast=fabric.autocast,
            anywhere=self.maximum if self.sharded else None,
        )  # fmt: skip
        sums = torch.tensor(sums, dtype=torch.float64, device=fabric.device)
        total, right, count = fabric.all_reduce(sums, reduce_op="sum").tolist()
        if not count:  # a loss of 0 would be the best of all
            raise UsageError("validation: expected at least one token to predict in the validation part, got none")
        values = {"validation_loss": total / count}
        if self.task.has_accuracy:
            values["validation_accuracy"] = right / count
        self.check_finite(values["validation_loss"], "validation loss")
        values["score"] = 1 - values["validation_accuracy"] if self.config.select == "accuracy" else total / count
        return values

    def check_finite(self, loss, name):
        if not math.isfinite(loss):
            raise UsageError(
                f"{name}: expected a finite number at step {self.step}, got {loss}; the last checkpoint is kept, "
                f"try a learning rate below {self.config.optim.learning_rate}"
            )

    def maximum(self, number):
        """The greatest int or bool of all processes."""
        return int(self.fabric.all_reduce(torch.tensor(int(number), device=self.fabric.device), reduce_op="max"))

    def must_stop(self, stop):
        if self.fabric.world_size == 1:
            return stop.number
        if self.step % self.config.log_every:  # asking the others waits for the device
            return 0
        return self.maximum(stop.number)

    def fit(self):
        config, fabric = self.config, self.fabric
        main = fabric.is_global_zero
        if main:
            self.describe()
        log = MetricsLog(self.run, self.step, config.tensorboard) if main else None
        interval = 0.2 if os.isatty(2) else 10.0  # seconds; a log file wants few lines
        bar = tqdm(total=config.steps, initial=self.step, unit="step", disable=not main, mininterval=interval)
        seconds, timed_steps, stopped, speed, mfu = 0.0, 0, 0, None, None
        with (
            StopSignal() as stop,
            contextlib.closing(bar),
            contextlib.closing(log) if main else contextlib.nullcontext(),
        ):
            if self.step == 0:
                self.report(self.validate(), [], log, bar)
            while self.step < config.steps and not stopped and not (config.patience and self.stale >= config.patience):
                start = time.perf_counter()
                loss, norm = self.train_step()
                stopped = self.must_stop(stop)
                if log_now := self.step % config.log_every == 0 or self.step == config.steps:
                    loss = fabric.all_reduce(loss, reduce_op="mean").item()  # waits for the device
                    self.check_finite(loss, "training loss")
                seconds, timed_steps = seconds + time.perf_counter() - start, timed_steps + 1
                if log_now and main:
                    speed = self.task.tokens_a_step * timed_steps / seconds if seconds else None
                    mfu = self.utilization(speed)
                    rate = learning_rate(self.step - 1, config.steps, config.optim)
                    norm = None if norm is None else float(norm)
                    log.log(
                        self.step, train_loss=loss, learning_rate=rate, grad_norm=norm, tokens_per_second=speed,
                        mfu=mfu, seconds=seconds,
                    )  # fmt: skip
                    seconds, timed_steps = 0.0, 0
                    told = ", ".join([f"loss {loss:.4f}", *shown(speed, mfu)])
                    bar.set_postfix_str(told, refresh=False)
                bar.update()
                if self.step % config.evaluate_every == 0 or self.step == config.steps:
                    validation = self.validate()
                    self.stale = 0 if validation["score"] < self.best_score else self.stale + 1
                    self.best_score = min(validation["score"], self.best_score)
                    self.report(validation, shown(speed, mfu), log, bar)
                    self.save(validation)
                elif stopped:
                    self.check_finite(float(loss), "training loss")
                    self.save(None)
        if main:
            self.finish(stopped)
        return 128 + stopped if stopped else 0

    def utilization(self, tokens_per_second):
        """The model's arithmetic a second over that of the devices' matrix products (MFU); None where unknown."""
        if self.peak is None or tokens_per_second is None:
            return None
        rate = tokens_per_second * self.flops_per_token / self.fabric.world_size
        if rate > self.peak:  # a CPU's peak was measured while others used it
            self.peak = max(self.peak, peak_flops(self.fabric.device, self.config.precision) or 0.0)
        return rate / self.peak if rate <= self.peak else None

    def report(self, validation, speed, log, bar):
        if log:
            values = {name: value for name, value in validation.items() if name != "score"}
            log.log(self.step, **values)
            told = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items()]
            bar.write("  ".join([f"step {self.step}/{self.config.steps}", *told, *filter(None, [", ".join(speed)])]))

    def describe(self):
        config, summary, task = self.config, self.task.summary, self.task
        sizes = ", ".join(f"{name} {size}" for name, size in task.sizes.items())
        vocabulary = f"{task.tokenizer.vocab_size:,}"
        learnt = config.start is None and config.data.tokenizer in ("word", "bpe", "wordpiece")
        if learnt and task.tokenizer.vocab_size < config.data.vocab_size:
            vocabulary += f", fewer than the {config.data.vocab_size:,} asked for"
        trained = sum(p.numel() for p in self.raw_model.parameters() if p.requires_grad)
        print(
            f"text: {summary['source']}, {summary['characters']:,} characters, sha256 {summary['sha256']}\n"
            f"data: {sizes}; vocabulary {vocabulary}\n"
            f"model: {self.raw_model.num_parameters():,} parameters"
            + ("" if config.trained == "all" else f", {trained:,} of them trained")
            + f", layers from {config.layers}\n"
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
            print(f"stopped early after step {self.step}: no better validation in {self.stale} validations")
        _, meta = choose_checkpoint(self.run, "best")
        if meta["validation_loss"] is not None:  # None: saved by a signal, then resumed with fewer steps
            accuracy = f", accuracy {meta['validation_accuracy']:.4f}" if "validation_accuracy" in meta else ""
            print(f"best validation loss {meta['validation_loss']:.4f}{accuracy} at step {meta['step']}")
        model, _, _ = load_run(self.run, self.config, accelerator=self.config.accelerator)
        if text := self.task.sample(model):
            write_atomic(self.run / "sample.txt", text)
            print(f"what it writes:\n{'-' * 80}\n{text.strip()}\n{'-' * 80}")
        following = self.task.next_command.format(run=self.run)
        print(f"loss curve: {plot}\nnext: fastattn evaluate {self.run}; {following}")
