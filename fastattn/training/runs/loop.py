"""The training loop: batches from (seed, step), an optimizer, validation, checkpoints and exact resume."""

import contextlib
import math

import numpy as np
import torch

from ..messages import UsageError
from ..tasks.base import evaluate_part
from .checkpoint import choose_checkpoint, find_checkpoints, load_state, save_checkpoint
from .console import Console
from .load import load_weights
from .lora import train_only
from .optim import average_of, build_optimizer, learning_rate
from .sharding import divide, gather
from .signals import StopSignal
from .start import load_start
from .throughput import Speedometer, flops_per_token


def dropout_seed(seed, step, rank):
    """The dropout seed of a step, from (seed, step, rank) only, so that resuming needs no generator state."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


class Trainer:
    """One run in one process: the state that decides the next step, and the loop over steps."""

    def __init__(self, run, config, task, fabric):
        self.run, self.config, self.task, self.fabric = run, config, task, fabric
        torch.manual_seed(config.seed)
        needed = ("model.safetensors", "state.pt")
        chosen = fabric.broadcast(choose_checkpoint(run, needed=needed) if fabric.is_global_zero else None)
        self.raw_model = self.build_model(chosen)
        flops = flops_per_token(self.raw_model, config.model)
        self.speedometer = Speedometer(task.tokens_a_step, flops / fabric.world_size, fabric.device, config.precision)
        model = torch.compile(self.raw_model) if config.compile else self.raw_model
        self.model = fabric.setup_module(model)
        # Fabric cannot clip with both a gradient scaler and a fused optimizer; there is no fused SGD for shards
        fused = config.precision != "16-mixed" and (not self.sharded or config.optim.name in ("adam", "adamw", "muon"))
        self.optimizer = fabric.setup_optimizers(build_optimizer(self.raw_model, config.optim, fused))
        self.average = average_of(self.raw_model, config.optim.ema)
        self.step, self.best_score, self.stale = 0, math.inf, 0
        if chosen:
            self.load_state(chosen[0])

    def build_model(self, chosen):
        """The model on the CPU, with the weights of a checkpoint or of config.start, or newly initialized."""
        config, task = self.config, self.task
        model = task.build_model(config, task.tokenizer, task.summary)
        if config.start is not None and (chosen is None or task.needs_reference):
            load_start(model, config, task.summary.get("labels"))
            task.compare_with(model)
        elif chosen is None:
            task.initialize(model)
        model.train()
        train_only(model, config.trained, config.lora_rank)
        if chosen is not None:
            load_weights(model, chosen[0])
        return model

    @property
    def judged_model(self):
        """The model that is validated and saved: the average of the weights if there is one."""
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
        fresh = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(divide(optimizer, self.optimizer) if self.sharded else optimizer)
        for group, settings in zip(self.optimizer.param_groups, fresh, strict=True):
            group.update(settings)  # those of the config win: it may have changed
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

    def fit(self):
        """Train to the last step, until patience runs out, or until a signal; returns the signal's number or 0."""
        stopped = 0
        with StopSignal() as stop, contextlib.closing(Console(self)) as console:
            if self.step == 0:
                console.validated(self.validate())
            while not (stopped or self.finished):
                with self.speedometer:
                    loss, norm = self.train_step()
                    stopped = self.must_stop(stop)
                    if log_now := self.is_due(self.config.log_every):
                        loss = self.mean_loss(loss)  # waits for the device
                if log_now:
                    console.trained(loss, norm)
                console.stepped()
                if self.is_due(self.config.evaluate_every):
                    validation = self.validate()
                    self.compare_with_best(validation["score"])
                    console.validated(validation)
                    self.save(validation)
                elif stopped:
                    self.check_finite(float(loss), "training loss")
                    self.save(None)
        return stopped

    @property
    def finished(self):
        return self.step >= self.config.steps or bool(self.config.patience and self.stale >= self.config.patience)

    def is_due(self, every):
        return self.step % every == 0 or self.step == self.config.steps

    def train_step(self):
        """One optimizer step; returns the loss of its batch, and the norm of the gradients or None."""
        rate = learning_rate(self.step, self.config.steps, self.config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        batch = self.task.train_rows(self.step)
        torch.manual_seed(dropout_seed(self.config.seed, self.step, self.fabric.global_rank))
        loss = self.backward(batch)
        norm = self.clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update_parameters(self.raw_model)
        self.step += 1
        return loss, norm

    def backward(self, batch):
        """Accumulate gradients of the mean loss over a batch; returns this process's share of that loss."""
        config, fabric, task = self.config, self.fabric, self.task
        part = config.batch_size // (config.accumulate * fabric.world_size)
        total, count = torch.zeros((), device=fabric.device), task.count(batch)
        for number in range(config.accumulate):
            start = (number * fabric.world_size + fabric.global_rank) * part
            rows = tuple(tensor[start : start + part] for tensor in batch)
            # the mean over the whole batch, even if parts differ in predictions; DDP averages the processes
            weight = task.count(rows) * fabric.world_size / max(1, count)
            with fabric.no_backward_sync(self.model, enabled=number < config.accumulate - 1):
                loss = self.model(*fabric.to_device(task.inputs(rows))) * weight
                fabric.backward(loss)
            total += loss.detach()
        return total

    def clip_gradients(self):
        """Clip the gradients and return their norm; None without clipping, which does not compute it."""
        largest = self.config.optim.clip
        if not largest:
            return None
        norm = self.fabric.clip_gradients(self.model, self.optimizer, max_norm=largest, error_if_nonfinite=False)
        return gather(norm)

    def mean_loss(self, loss):
        loss = self.fabric.all_reduce(loss, reduce_op="mean").item()
        self.check_finite(loss, "training loss")
        return loss

    def validate(self):
        """{"validation_loss", "validation_accuracy" if the task has one, "score": lower is better}."""
        fabric = self.fabric
        sums = evaluate_part(
            self.judged_model, self.task, "validation", limit=self.config.validation_windows,
            rank=fabric.global_rank, world_size=fabric.world_size, autocast=fabric.autocast,
            any_rank=self.maximum if self.sharded else None,
        )  # fmt: skip
        sums = torch.tensor(sums, dtype=torch.float64, device=fabric.device)
        total, right, count, *others = fabric.all_reduce(sums, reduce_op="sum").tolist()
        if not count:  # a loss of 0 would be the best possible
            raise UsageError("the validation part must have at least one token to predict")
        values = {"validation_loss": total / count}
        if self.task.has_accuracy:
            values["validation_accuracy"] = right / count
        values |= {f"validation_{name}": score for name, score in self.task.further_scores(others).items()}
        self.check_finite(values["validation_loss"], "validation loss")
        select = self.config.select
        values["score"] = total / count if select == "loss" else 1 - values[f"validation_{select}"]
        return values

    def compare_with_best(self, score):
        self.stale = 0 if score < self.best_score else self.stale + 1
        self.best_score = min(score, self.best_score)

    def check_finite(self, loss, name):
        if not math.isfinite(loss):
            advice = "the last checkpoint is kept; try"
            if not find_checkpoints(self.run):
                advice = "there is no checkpoint yet: start again with --overwrite and"
            rate = self.config.optim.learning_rate
            raise UsageError(f"{name} is {loss} at step {self.step}; {advice} a learning rate below {rate}")

    def maximum(self, number):
        """The largest int or bool of all processes."""
        return int(self.fabric.all_reduce(torch.tensor(int(number), device=self.fabric.device), reduce_op="max"))

    def must_stop(self, stop):
        if self.fabric.world_size == 1:
            return stop.number
        if self.fabric.device.type == "cuda" and self.step % self.config.log_every:  # an all-reduce waits for the GPU
            return 0
        return self.maximum(stop.number)
