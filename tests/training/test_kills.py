"""Training that is killed: at random moments, one process of two, on a full disk; each time it can continue."""

import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import signal

import pytest

pytest.importorskip("lightning_fabric", reason="needs the packages of fastattn[train]")
import torch
from training_cases import (
    TEXT,
    assert_same_run,
    can_fork,
    column,
    exit_code,
    interrupt_after,
    numbers,
    start_training,
    tiny_config,
    tiny_model,
    train_two,
)

from fastattn.cli import main
from fastattn.training.runs import checkpoint as ckpt
from fastattn.training.runs.train import train

needs_fork = pytest.mark.skipif(not can_fork, reason="this system cannot fork")


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def last_step(run):
    """The step of the newest complete checkpoint."""
    chosen = ckpt.choose_checkpoint(run, needed=("model.safetensors", "state.pt")) if run.exists() else None
    return chosen[1]["step"] if chosen else 0


@needs_fork
def test_twenty_kills_lose_nothing_but_the_steps_since_the_last_checkpoint(tmp_path, text_file):
    """The kills come in the middle of a step, of saving, and of deleting old checkpoints."""
    steps, every, run, chance = 45, 3, tmp_path / "run", random.Random(3)

    def config(run):
        model = tiny_model(dropout=0.2)
        return tiny_config(run, text_file, steps=steps, evaluate_every=every, sample_tokens=0, model=model)

    assert train(config(tmp_path / "whole")) == 0
    reached = []
    for trial in range(20):
        kill = (
            ("fastattn.training.runs.loop:Trainer", "train_step", chance.randint(1, 6), chance.randint(0, 6_000)),
            ("fastattn.training.runs.loop", "save_checkpoint", 1, chance.randint(0, 30_000)),
            ("fastattn.training.runs.checkpoint", "_rotate", 1, chance.randint(0, 300)),
        )[trial % 3]
        assert exit_code(start_training(config(run), resume=run.exists(), kill=kill)) == -signal.SIGKILL
        reached.append(last_step(run))
        seen = [int(step) for step, _ in column(run, "train_loss")] if (run / "metrics.csv").exists() else []
        assert not seen or seen[-1] - reached[-1] <= every
    assert reached == sorted(reached)
    assert 5 * every <= reached[-1] < steps, reached
    assert train(config(run), resume=True) == 0
    assert_same_run(tmp_path / "whole", run, steps)
    assert not list(run.rglob("*.tmp"))


@needs_fork
def test_a_killed_worker_leaves_a_checkpoint_that_resumes(tmp_path, text_file):
    def config(name, devices=2):
        changes = {"strategy": "ddp" if devices == 2 else "auto", "devices": devices, "sample_tokens": 0}
        model = tiny_model(dropout=0.0)
        return tiny_config(tmp_path / name, text_file, steps=40, evaluate_every=4, model=model, **changes)

    train_two(config("whole"))
    # the other process is gone, so this one can only end
    train_two(
        config("run"),
        kill_second=("fastattn.training.runs.loop:Trainer", "train_step", 11, 3_000),
        exit_codes=(1, -signal.SIGKILL),
    )
    assert last_step(tmp_path / "run") == 8
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    train_two(config("run"), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run", 40)
    train(config("alone", devices=1), resume=True)
    for name in ("train_loss", "validation_loss"):
        assert numbers(tmp_path / "alone", name) == pytest.approx(numbers(tmp_path / "whole", name), abs=1e-5)


@pytest.mark.parametrize("limit", [20_000, 50_000], ids=["weights", "state"])
def test_a_full_disk_is_told_in_one_line_and_breaks_no_checkpoint(tmp_path, text_file, monkeypatch, capsys, limit):
    """No file may grow beyond `limit` bytes; the weights have 29 kB, the state has 70."""
    resource = pytest.importorskip("resource", reason="this system has no limit on the size of files")
    run = tmp_path / "run"

    def config(name):
        return tiny_config(tmp_path / name, text_file, steps=12, evaluate_every=4, sample_tokens=0)

    train(config("whole"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        train(config("run"))
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        assert main(["train", "--resume", str(run)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    folder = run / "checkpoints" / "step-00000008"
    assert error.splitlines()[-1].startswith(f"fastattn: error: checkpoint '{folder}' could not be written")
    assert "Traceback" not in error
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == before
    assert main(["train", "--resume", str(run)]) == 0
    assert_same_run(tmp_path / "whole", run, 12)


def test_a_full_disk_at_the_start_leaves_nothing(tmp_path, text_file, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(tiny_config(tmp_path / "run", text_file))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, text_file, capsys):
    """It is refused even if its author has written the matching sha256."""
    run, trace = tmp_path / "run", tmp_path / "trace"
    train(tiny_config(run, text_file, steps=2, sample_tokens=0))
    folder, meta = ckpt.choose_checkpoint(run)
    (folder / "state.pt").write_bytes(pickle.dumps(Malicious(trace), protocol=2))
    for write in (
        lambda path: path.write_bytes(pickle.dumps(Malicious(trace), protocol=2)),
        lambda path: torch.save(Malicious(trace), path),
    ):
        write(folder / "state.pt")
        meta["sha256"]["state.pt"] = hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
        (folder / "meta.json").write_text(json.dumps(meta))
        capsys.readouterr()
        assert main(["train", "--resume", str(run), "--steps", "4"]) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1
        assert error[0].startswith(f"fastattn: error: {folder}: state.pt must hold only plain numbers and tensors: ")
        assert not trace.exists()
    (folder / "model.safetensors").write_bytes(pickle.dumps(Malicious(trace), protocol=2))
    meta["sha256"]["model.safetensors"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))
    capsys.readouterr()
    for command in (
        ["train", "--resume", str(run), "--steps", "4"],
        ["evaluate", str(run)],
        ["generate", str(run), "--prompt", "9"],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1
        assert "the weights do not fit the model in config.yaml: " in error[0]
    assert not trace.exists()
