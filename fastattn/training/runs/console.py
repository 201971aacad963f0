"""What a person and the logs are told of a run: its beginning, every step, and its end."""

import os
import signal

import torch
from tqdm import tqdm

from ..files import write_atomic
from ..messages import warn
from .checkpoint import choose_checkpoint
from .load import load_run
from .metrics import MetricsLog, plot_losses
from .optim import learning_rate


def describe(trainer):
    """Print what is about to be trained, on what and where."""
    config, task, summary = trainer.config, trainer.task, trainer.task.summary
    model, fabric = trainer.raw_model, trainer.fabric
    sizes = ", ".join(f"{name} {size}" for name, size in task.sizes.items())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"text: {summary['source']}, {summary['characters']:,} characters, sha256 {summary['sha256']}\n"
        f"data: {sizes}; vocabulary {vocabulary(config, task)}\n"
        f"model: {model.num_parameters():,} parameters"
        + ("" if config.trained == "all" else f", {trained:,} of them trained")
        + f", layers from {config.layers}\n"
        f"device: {fabric.device}, {fabric.world_size} process(es), "
        f"{torch.get_num_threads()} CPU threads, precision {config.precision}\n"
        f"run: {trainer.run}" + (f", continued after step {trainer.step}" if trainer.step else ""),
        flush=True,
    )


def vocabulary(config, task):
    size = task.tokenizer.vocab_size
    learnt = config.start is None and config.data.tokenizer in ("word", "bpe", "wordpiece")
    fewer = learnt and size < config.data.vocab_size
    return f"{size:,}" + (f", fewer than the {config.data.vocab_size:,} asked for" if fewer else "")


class Console:
    """The log, the lines and the bar of a run while it trains; silent in all processes but the first."""

    def __init__(self, trainer):
        config, self.trainer, self.main = trainer.config, trainer, trainer.fabric.is_global_zero
        self.speed = []
        self.log = MetricsLog(trainer.run, trainer.step, config.tensorboard) if self.main else None
        interval = 0.2 if os.isatty(2) else 10.0  # seconds; a log file wants few lines
        self.bar = tqdm(
            total=config.steps, initial=trainer.step, unit="step", disable=not self.main, mininterval=interval
        )  # fmt: skip

    def close(self):
        self.bar.close()
        if self.log:
            self.log.close()

    def trained(self, loss, norm):
        """A step whose loss is known; norm: of its gradients, or None."""
        if not self.main:
            return
        trainer = self.trainer
        config, reading = trainer.config, trainer.speedometer.read()
        self.log.log(
            trainer.step, train_loss=loss, learning_rate=learning_rate(trainer.step - 1, config.steps, config.optim),
            grad_norm=None if norm is None else float(norm), **reading,
        )  # fmt: skip
        self.speed = speed_texts(reading)
        self.bar.set_postfix_str(", ".join([f"loss {loss:.4f}", *self.speed]), refresh=False)

    def stepped(self):
        self.bar.update()

    def validated(self, validation):
        if not self.main:
            return
        trainer = self.trainer
        values = {name: value for name, value in validation.items() if name != "score"}
        self.log.log(trainer.step, **values)
        told = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items()]
        told += [", ".join(self.speed)] if self.speed else []
        self.bar.write("  ".join([f"step {trainer.step}/{trainer.config.steps}", *told]))


def speed_texts(reading):
    """The speed as a person reads it: a list of texts, without what is unknown."""
    speed, mfu = reading["tokens_per_second"], reading["mfu"]
    texts = (speed is not None and f"{speed:,.0f} tokens/s", mfu is not None and f"MFU {mfu:.0%}")
    return [text for text in texts if text]


def conclude(trainer, stopped):
    """Print how a run ended and what can be done with it; draw its losses, and write what its model writes."""
    run, config, task = trainer.run, trainer.config, trainer.task
    plot = plot_losses(run)
    if stopped:
        name = signal.Signals(stopped).name
        warn(f"stopped by {name} after step {trainer.step}, saved; continue with: fastattn train --resume {run}")
        return
    if trainer.step < config.steps:
        print(f"stopped early after step {trainer.step}: no better validation in {trainer.stale} validations")
    _, meta = choose_checkpoint(run, "best")
    if meta["validation_loss"] is not None:  # None: saved by a signal, then resumed with fewer steps
        accuracy = f", accuracy {meta['validation_accuracy']:.4f}" if "validation_accuracy" in meta else ""
        print(f"best validation loss {meta['validation_loss']:.4f}{accuracy} at step {meta['step']}")
    model, _, _ = load_run(run, config, accelerator=config.accelerator)
    if text := task.sample(model):
        write_atomic(run / "sample.txt", text)
        print(f"what it writes:\n{'-' * 80}\n{text.strip()}\n{'-' * 80}")
    print(f"loss curve: {plot}\nnext: fastattn evaluate {run}; {task.next_command.format(run=run)}")
