"""The output of a run on the terminal and in the logs: at the start, at every step, and at the end."""

import os
import shlex
import signal

import torch
from tqdm import tqdm

from ..files import write_atomic
from ..messages import warn
from .checkpoint import best_checkpoint, choose_checkpoint
from .load import load_run
from .metrics import MetricsLog, plot_losses
from .optim import learning_rate


def describe(trainer):
    """Print the data, the model and the device of a run before it trains."""
    config, task, summary = trainer.config, trainer.task, trainer.task.summary
    model, fabric = trainer.raw_model, trainer.fabric
    sizes = ", ".join(f"{name} {size}" for name, size in task.sizes.items())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"text: {summary['source']}, {summary['characters']:,} characters, sha256 {summary['sha256']}\n"
        f"data: {sizes}; vocabulary {vocabulary(config, task)}\n"
        + "".join(f"  {name}: {counts.text()}\n" for name, counts in task.counts.items() if counts.text())
        + f"model: {model.num_parameters():,} parameters"
        + ("" if config.trained == "all" else f", {trained:,} of them trained")
        + f", layers from {config.layers}\n"
        f"device: {fabric.device}, processes: {fabric.world_size}, "
        f"CPU threads: {torch.get_num_threads()}, precision {config.precision}\n"
        f"run: {trainer.run}"
        + (f", continued after step {trainer.step}" if trainer.step else "")
        + (f", which was the last of its {config.steps}" if trainer.step == config.steps else ""),
        flush=True,
    )


def vocabulary(config, task):
    size = task.tokenizer.vocab_size
    learnt = config.start is None and config.data.tokenizer in ("word", "bpe", "wordpiece")
    fewer = learnt and size < config.data.vocab_size
    return f"{size:,}" + (f", fewer than the {config.data.vocab_size:,} allowed" if fewer else "")


class Console:
    """The log, the output lines and the progress bar of a run; silent in all processes except the first."""

    def __init__(self, trainer):
        config, self.trainer, self.main = trainer.config, trainer, trainer.fabric.is_global_zero
        self.speed = []
        more = trainer.task.log_columns
        self.log = MetricsLog(trainer.run, trainer.step, config.tensorboard, more) if self.main else None
        interval = 0.2 if os.isatty(2) else 10.0  # seconds; a log file needs few lines
        self.bar = tqdm(
            total=config.steps, initial=trainer.step, unit="step", disable=not self.main, mininterval=interval
        )  # fmt: skip

    def close(self):
        self.bar.close()
        if self.log:
            self.log.close()

    def trained(self, loss, norm):
        """Log a step; norm: the norm of its gradients, or None."""
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
    """The speed as a list of texts, without unknown values."""
    speed, mfu = reading["tokens_per_second"], reading["mfu"]
    texts = (speed is not None and f"{speed:,.0f} tokens/s", mfu is not None and f"MFU {mfu:.0%}")
    return [text for text in texts if text]


def conclude(trainer, stopped):
    """Print how a run ended and the next commands; draw its losses, and write a sample of the model."""
    run, config, task = trainer.run, trainer.config, trainer.task
    best = best_checkpoint(run)
    plot = plot_losses(
        run,
        unit=f"{task.loss_in} a {task.unit}",
        smoothing=config.optim.label_smoothing,
        chosen=best[1]["step"] if best else None,
    )
    if stopped:
        name = signal.Signals(stopped).name
        warn(
            f"stopped by {name} after step {trainer.step} and saved; continue with: fastattn train --resume "
            f"{shlex.quote(str(run))}"
        )
        return
    if trainer.step < config.steps:
        print(f"stopped early after step {trainer.step}: no better validation in {trainer.stale} validations")
    _, meta = choose_checkpoint(run, "best")
    if meta["validation_loss"] is not None:  # None: saved by a signal, then resumed with fewer steps
        accuracy = f", accuracy {meta['validation_accuracy']:.4f}" if "validation_accuracy" in meta else ""
        print(f"best validation loss {meta['validation_loss']:.4f}{accuracy} at step {meta['step']}")
        baseline = task.baseline("validation")
        if baseline and meta.get("validation_accuracy", 1.0) <= baseline[1]:
            warn(f"no better than {baseline[0]}, which reaches the validation accuracy {baseline[1]:.4f}")
    if text := sample(trainer):
        write_atomic(run / "sample.txt", text)
        print(f"sample:\n{'-' * 80}\n{text.strip()}\n{'-' * 80}")
    named = shlex.quote(str(run))
    print(f"loss curve: {plot}\nnext: fastattn evaluate {named}; {task.next_command.format(run=named)}")


def sample(trainer):
    """A text of the best model, or "": a sample that fails does not change the exit code of a run."""
    try:
        model, _, _ = load_run(trainer.run, trainer.config, accelerator=trainer.config.accelerator)
        return trainer.task.sample(model)
    except Exception as error:
        warn(f"no sample was written: {type(error).__name__}: {error}")
        return ""
