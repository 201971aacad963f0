"""Small training runs: their texts and settings, their results, and runs in separate processes."""

import csv
import json
import multiprocessing
import os
import pkgutil
import signal
import socket
import sys

import numpy as np
import torch

from fastattn.training.config import Columns, DataConfig, ModelConfig, OptimConfig, TrainConfig
from fastattn.training.runs.loop import Trainer
from fastattn.training.runs.train import train

TEXT = "".join(
    f"{i} green bottles hanging on the wall, and if one fell there were {i - 1}.\n" for i in range(90, 0, -1)
)
WORDS = ["red", "green", "blue", "black", "white", "one", "two", "three", "four", "five", "six", "seven", "eight"]
DOCUMENT_TASKS = ("masked_lm", "classify", "translate")


def tiny_model(**changes):
    return ModelConfig(**{"n_layer": 2, "n_head": 2, "d_model": 16, "block_size": 16, "dropout": 0.0, **changes})


def tiny_config(run, text_file, **changes):
    sections = {
        "data": DataConfig(source=str(text_file), validation_fraction=0.1, test_fraction=0.1),
        "model": tiny_model(dropout=0.2),
        "optim": OptimConfig(learning_rate=5e-3, min_learning_rate=5e-4, warmup_steps=5),
    }
    values = {"steps": 30, "batch_size": 4, "log_every": 1, "evaluate_every": 10, "sample_tokens": 20, "seed": 7}
    values.update(layers="torch", tensorboard=False, accelerator="cpu", sample_prompt="9")
    return TrainConfig(run=str(run), **{**sections, **values, **changes})


def write_table(path, n=120, seed=0):
    """Write documents of words; the class is the first word, the translation is the words in reverse."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        words = generator.choice(WORDS, generator.integers(2, 9)).tolist()
        rows.append({"text": f"{i} " + " ".join(words), "label": words[0], "target": " ".join(reversed(words))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def table_config(task, run, table, **changes):
    """A tiny_config of a task on documents, or of lm on packed ones, for a table of write_table."""
    columns = Columns(label="label", target="target")
    data = DataConfig(
        source=str(table), tokenizer="word", validation_fraction=0.2, test_fraction=0.0, columns=columns,
        packed=task == "lm",
    )  # fmt: skip
    values = {"task": task, "data": data, "model": tiny_model(), "batch_size": 8, "sample_tokens": 0}
    return tiny_config(run, table, **{**values, **changes})


def column(run, name):
    """The cells of a column of metrics.csv as text, so that equal means equal to the last bit."""
    with open(run / "metrics.csv", newline="") as file:
        return [(row["step"], row[name]) for row in csv.DictReader(file) if row[name]]


def numbers(run, name="train_loss"):
    return [float(cell) for _, cell in column(run, name)]


def weights(run, step):
    from safetensors.torch import load_file

    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def assert_same_run(first, second, step):
    for name in ("train_loss", "validation_loss", "learning_rate", "grad_norm"):
        assert column(first, name) == column(second, name)
        assert len(column(first, name)) > 2
    expected = weights(first, step)
    for name, value in weights(second, step).items():
        assert torch.equal(value, expected[name]), name


def interrupt_after(monkeypatch, step, number=signal.SIGTERM):
    """Send the process a signal during this step."""
    train_step = Trainer.train_step

    def interrupted(self):
        if self.step == step - 1:
            os.kill(os.getpid(), number)
        return train_step(self)

    monkeypatch.setattr(Trainer, "train_step", interrupted)


def kill_after(owner, name, times, calls):
    """Make this process kill itself a number of Python calls after the `times`-th call of a function has begun.

    This can be any moment, as with a clock, but it does not depend on the speed of the machine.

    owner, name: of the function, the owner as text, for example "fastattn.training.runs.loop:Trainer" and "train_step".
    """
    owner = pkgutil.resolve_name(owner)
    function, seen = getattr(owner, name), 0

    def counted(*arguments, **options):
        nonlocal seen
        seen += 1
        if seen == times:
            sys.setprofile(count_down)
        return function(*arguments, **options)

    def count_down(*_):  # at every call and return of a function
        nonlocal calls
        calls -= 1
        if calls < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, counted)


if can_fork := hasattr(os, "fork"):
    # its children start with the packages already imported and before any thread has started
    FORKS = multiprocessing.get_context("forkserver")
    FORKS.set_forkserver_preload(
        ["fastattn.training.runs.train", "fastattn.models", "matplotlib.figure", "safetensors.torch"]
    )


def start_training(config, *, rank=0, world_size=1, port=0, kill=None, **options):
    """Start a process that trains; with a world_size, as torchrun would start the one with this rank.

    kill: the arguments of kill_after, for a process that must die.
    """
    environment = {"OMP_NUM_THREADS": "1"}
    if world_size > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        names |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        environment |= {name: str(value) for name, value in names.items()}
    process = FORKS.Process(target=_train, args=(config, environment, kill, options), daemon=True)
    process.start()
    return process


def _train(config, environment, kill, options):
    os.environ.update(environment)
    if kill is not None:
        kill_after(*kill)
    torch.set_num_threads(1)
    sys.exit(train(config, **options))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def train_two(config, *, kill_second=None, exit_codes=(0, 0), **options):
    """Run two such processes on one run and wait for them; kill_second: like `kill`, for the second."""
    port, kills = free_port(), (None, kill_second)
    processes = [
        start_training(config, rank=rank, world_size=2, port=port, kill=kill, **options)
        for rank, kill in enumerate(kills)
    ]
    assert tuple(map(exit_code, processes)) == exit_codes


def exit_code(process):
    """The exit code of a process that ends by itself; after five minutes it counts as hanging."""
    process.join(300)
    return process.exitcode
