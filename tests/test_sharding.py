"""FSDP2: the losses of one process, whole checkpoints that resume on any number of processes, and torchrun."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric", reason="needs the packages of fastattn[train]")
import torch
from training_cases import (
    DOCUMENT_TASKS,
    can_fork,
    numbers,
    table_config,
    tiny_model,
    train_two,
    weights,
    write_table,
)

from fastattn.training.config import OptimConfig, UsageError
from fastattn.training.loop import train

REPOSITORY = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not can_fork, reason="this system cannot fork")


@pytest.fixture
def table(tmp_path):
    write_table(tmp_path / "table.jsonl")
    return tmp_path / "table.jsonl"


def config(name, tmp_path, table, task="lm", **changes):
    optim = OptimConfig(learning_rate=5e-3, min_learning_rate=5e-4, warmup_steps=2, clip=0.5)
    changes = {"layers": "fastattn", "steps": 8, "evaluate_every": 4, "optim": optim, **changes}
    return table_config(task, tmp_path / name, table, **changes)


def sharded(*arguments, **changes):
    return config(*arguments, devices=2, strategy="fsdp", **changes)


def assert_same_losses(first, second):
    for name in ("train_loss", "grad_norm", "validation_loss"):
        assert numbers(second, name) == pytest.approx(numbers(first, name), abs=2e-5)
    assert max(numbers(first, "grad_norm")) > 0.5  # clipping acts


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        *((task, {}) for task in ("lm", *DOCUMENT_TASKS)),
        ("lm", {"layers": "torch"}),
        ("lm", {"model": tiny_model(n_kv_head=1, positions="rotary", feed_forward="swiglu", tied=False)}),
        ("lm", {"model": tiny_model(checkpointing=True), "accumulate": 2}),
        ("classify", {"trained": "head"}),
    ],
)
def test_two_sharded_processes_give_the_losses_of_one(tmp_path, table, task, changes):
    train(config("one", tmp_path, table, task, **changes))
    train_two(sharded("two", tmp_path, table, task, **changes))
    assert_same_losses(tmp_path / "one", tmp_path / "two")
    one, two = (weights(tmp_path / name, 8) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in two.items():
        assert value.shape == one[name].shape
        torch.testing.assert_close(value, one[name], rtol=0, atol=1e-3)
