"""The loop: exact resume, checkpoints that survive kills and damage, schedule, accumulation, several processes."""

import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric", reason="needs the packages of fastattn[train]")
import torch
from training_cases import TEXT, assert_same_run, column, interrupt_after, tiny_config, weights

from fastattn.training.config import DataConfig, ModelConfig, OptimConfig
from fastattn.training.evaluation.evaluate import evaluate_run
from fastattn.training.messages import UsageError
from fastattn.training.runs import checkpoint as ckpt
from fastattn.training.runs import loop
from fastattn.training.runs.load import load_run
from fastattn.training.runs.loop import Trainer
from fastattn.training.runs.metrics import MetricsLog, read_metrics
from fastattn.training.runs.signals import StopSignal
from fastattn.training.runs.train import train
from fastattn.training.tasks.base import evaluate_part
from fastattn.training.tasks.registry import make_task

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("layers", ["torch", "fastattn"])
def test_exact_resume_after_sigterm(tmp_path, text_file, monkeypatch, capsys, layers):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(tiny_config(whole, text_file, layers=layers)) == 0
    previous = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 16)
        assert train(tiny_config(parts, text_file, layers=layers)) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == previous
    error = capsys.readouterr().err
    assert "stopped by SIGTERM after step 16 and saved; continue with: fastattn train --resume" in error
    assert len(column(parts, "train_loss")) == 16
    torch.manual_seed(999)  # the state of generators must not matter
    assert train(tiny_config(parts, text_file, layers=layers), resume=True) == 0
    assert_same_run(whole, parts, 30)
    assert (parts / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (parts / "sample.txt").read_text().startswith("9")
    assert (parts / "sample.txt").read_text() == (whole / "sample.txt").read_text()


def test_resume_drops_what_a_kill_left_past_the_checkpoint(tmp_path, text_file, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny_config(whole, text_file))
    train_step = Trainer.train_step

    def die(self):
        if self.step == 17:
            raise SystemExit  # no handler, no saving: the same state as after a kill
        return train_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", die)
        with pytest.raises(SystemExit):
            train(tiny_config(parts, text_file))
    with open(parts / "metrics.csv", "a") as file:
        file.write("18,2.")  # an incomplete line
    (parts / "checkpoints" / ".step-00000020.tmp").mkdir()
    train(tiny_config(parts, text_file), resume=True)
    assert_same_run(whole, parts, 30)
    assert not list(parts.rglob(".*.tmp"))


def test_sigint_saves_and_a_second_one_interrupts(tmp_path, text_file, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, signal.SIGINT)
        assert train(tiny_config(tmp_path / "run", text_file)) == 130
    assert [folder.name for folder, _ in ckpt.find_checkpoints(tmp_path / "run")] == ["step-00000003"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores SIGINT
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.number == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_loss_falls_and_dropout_acts(tmp_path, text_file):
    train(tiny_config(tmp_path / "a", text_file, steps=80, evaluate_every=80, sample_tokens=0))
    losses = [float(cell) for _, cell in column(tmp_path / "a", "validation_loss")]
    assert losses[0] == pytest.approx(math.log(len(set(TEXT))), abs=0.2)
    assert losses[-1] < 0.7 * losses[0]
    no_dropout = ModelConfig(n_layer=2, n_head=2, d_model=16, block_size=16, dropout=0.0)
    train(tiny_config(tmp_path / "b", text_file, steps=2, model=no_dropout, sample_tokens=0))
    first, second = (column(tmp_path / name, "train_loss")[0] for name in "ab")
    assert first != second  # same weights, same batch, only dropout differs
    assert float(first[1]) == pytest.approx(float(second[1]), abs=0.1)


def test_both_layers_give_the_same_losses(tmp_path, text_file):
    model = ModelConfig(n_layer=2, n_head=2, d_model=16, block_size=16, dropout=0.0)
    for layers in ("torch", "fastattn"):
        changes = {"layers": layers, "steps": 40, "evaluate_every": 20, "model": model, "sample_tokens": 0}
        train(tiny_config(tmp_path / layers, text_file, **changes))
    for name in ("train_loss", "validation_loss"):
        theirs, ours = ([float(cell) for _, cell in column(tmp_path / run, name)] for run in ("torch", "fastattn"))
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert theirs[-1] < 0.9 * theirs[0]


def test_accumulation_gives_the_same_losses(tmp_path, text_file):
    model = ModelConfig(n_layer=2, n_head=2, d_model=16, block_size=16, dropout=0.0)
    for accumulate in (1, 4):
        changes = {"accumulate": accumulate, "steps": 6, "model": model, "sample_tokens": 0}
        train(tiny_config(tmp_path / str(accumulate), text_file, **changes))
    once, four = ([float(cell) for _, cell in column(tmp_path / name, "train_loss")] for name in "14")
    assert four == pytest.approx(once, abs=1e-4)


def test_two_processes_give_the_same_losses(tmp_path, text_file):
    model = ModelConfig(n_layer=2, n_head=2, d_model=16, block_size=16, dropout=0.0)
    train(tiny_config(tmp_path / "1", text_file, steps=6, model=model, sample_tokens=0))
    options = f"""--run {tmp_path}/2 --data.source {text_file} --layers torch --steps 6 --batch_size 4 --log_every 1
        --evaluate_every 10 --sample_tokens 0 --seed 7 --tensorboard false --accelerator cpu --devices 2 --strategy ddp
        --data.validation_fraction 0.1 --data.test_fraction 0.1 --optim.learning_rate 5e-3
        --optim.min_learning_rate 5e-4 --optim.warmup_steps 5 --model.n_layer 2 --model.n_head 2 --model.d_model 16
        --model.block_size 16"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "fastattn", "train", *options.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for name in ("train_loss", "validation_loss"):
        one, two = ([float(cell) for _, cell in column(tmp_path / run, name)] for run in "12")
        assert two == pytest.approx(one, abs=1e-4)
    assert len(one) == 2


def test_best_and_newest_checkpoints_stay(tmp_path):
    model = torch.nn.Linear(2, 2)
    for step, loss in enumerate([3.0, 1.0, 2.0, None, 2.5], 1):
        ckpt.save_checkpoint(tmp_path, step, model, {"step": step}, {"validation_loss": loss}, keep=2)
    assert [meta["step"] for _, meta in ckpt.find_checkpoints(tmp_path)] == [2, 4, 5]
    assert ckpt.choose_checkpoint(tmp_path, "best")[1]["step"] == 2
    assert ckpt.choose_checkpoint(tmp_path, "last")[1]["step"] == 5
    assert ckpt.choose_checkpoint(tmp_path, "4")[1]["step"] == 4
    with pytest.raises(UsageError, match=r"a saved step \(2, 4, 5\), got '3'"):
        ckpt.choose_checkpoint(tmp_path, "3")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "meta"])
def test_damaged_checkpoint_falls_back(tmp_path, text_file, capsys, damage):
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    train(tiny_config(fresh, text_file))
    shutil.copytree(fresh, run)

    def spoil(folder):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        if damage == "flip":
            path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        elif damage == "truncate":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "remove":
            path.unlink()
        else:
            (folder / "meta.json").write_text('{"step": 30')

    spoil(run / "checkpoints" / "step-00000030")
    capsys.readouterr()
    assert train(tiny_config(run, text_file), resume=True) == 0
    error = capsys.readouterr().err
    assert "step-00000030 is damaged" in error
    assert "using step-00000020 instead" in error
    assert_same_run(fresh, run, 30)
    for folder, _ in ckpt.find_checkpoints(run):
        spoil(folder)
    with pytest.raises(UsageError, match=r"has no undamaged checkpoint: .*step-00000030 is damaged"):
        train(tiny_config(run, text_file), resume=True)


SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from fastattn.training.runs.checkpoint import save_checkpoint
model = torch.nn.Linear(512, 512)
for step in range(1, 10**6):
    torch.nn.init.constant_(model.weight, step)
    save_checkpoint(Path(sys.argv[1]), step, model, {"step": step}, {"validation_loss": 1 / step}, keep=2)
    print(step, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_kill_during_saving_leaves_a_loadable_run(tmp_path):
    from safetensors.torch import load_file

    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for trial in range(3):
        run = tmp_path / str(trial)
        command = [sys.executable, "-c", SAVE_FOREVER, str(run)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            for _ in range(2 + 3 * trial):
                assert process.stdout.readline()
            process.kill()
        folder, meta = ckpt.choose_checkpoint(run, needed=("model.safetensors", "state.pt"))
        assert torch.all(load_file(folder / "model.safetensors")["weight"] == meta["step"])
        assert torch.load(folder / "state.pt", weights_only=True) == {"step": meta["step"]}
        assert all(meta for _, meta in ckpt.find_checkpoints(run))
        ckpt.remove_leftovers(run)
        assert not list(run.rglob("*.tmp"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_death_at_every_file_operation_leaves_a_loadable_run(tmp_path):
    """A child dies before its n-th fsync, rename or removal while it saves step 4 to a run that has 1 (best), 2, 3."""
    model = torch.nn.Linear(2, 2)
    for step in (1, 2, 3):
        ckpt.save_checkpoint(tmp_path / "run", step, model, {"step": step}, {"validation_loss": float(step)}, keep=2)
    seen = []
    for n in range(1, 100):
        run = tmp_path / str(n)
        shutil.copytree(tmp_path / "run", run)
        child = os.fork()
        if child == 0:
            die_before(n)
            ckpt.save_checkpoint(run, 4, model, {"step": 4}, {"validation_loss": 4.0}, keep=2)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        folder, meta = ckpt.choose_checkpoint(run, needed=("model.safetensors", "state.pt"))
        assert torch.load(folder / "state.pt", weights_only=True) == {"step": meta["step"]}
        assert ckpt.choose_checkpoint(run, "best")[1]["step"] == 1
        assert all(meta for _, meta in ckpt.find_checkpoints(run))
        seen.append(meta["step"])
        if code == 0:
            break
    assert seen == sorted(seen)
    assert set(seen) == {3, 4}
    assert n > 8


def die_before(n):
    calls = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == n:
                os._exit(9)
            return function(*arguments, **options)

        return call

    for owner, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (shutil, "rmtree")):
        setattr(owner, name, counted(getattr(owner, name)))


def test_early_stopping(tmp_path, text_file, capsys):
    optim = OptimConfig(learning_rate=1e-30, min_learning_rate=0.0, warmup_steps=0)  # nothing is learnt
    config = tiny_config(tmp_path / "run", text_file, steps=50, evaluate_every=2, patience=3, optim=optim)
    assert train(config) == 0
    assert [int(step) for step, _ in column(tmp_path / "run", "validation_loss")] == [0, 2, 4, 6, 8]
    output = capsys.readouterr().out
    assert "stopped early after step 8: no better validation in 3 validations" in output
    assert "at step 2\n" in output


def test_loss_that_is_not_finite_ends_the_run_without_saving_it(tmp_path, text_file):
    optim = OptimConfig(learning_rate=1e30, min_learning_rate=0.0, warmup_steps=0, clip=0.0)
    with pytest.raises(UsageError, match=r"loss is (nan|inf) at step \d+"):
        train(tiny_config(tmp_path / "run", text_file, optim=optim, evaluate_every=1))
    for folder, _ in ckpt.find_checkpoints(tmp_path / "run"):
        assert all(value.isfinite().all() for value in weights(tmp_path / "run", int(folder.name[5:])).values())


def test_evaluation_is_the_loss_over_consecutive_windows(tmp_path, text_file):
    config = tiny_config(tmp_path / "run", text_file)
    train(config)
    model, tokenizer, step = load_run(tmp_path / "run", config, checkpoint="last")
    assert step == 30
    assert not model.training
    test_text = TEXT[len(TEXT) - int(len(TEXT) * 0.1) :]
    numbers = tokenizer.encode(test_text)
    losses = []
    for start in range(0, len(numbers) - 16, 16):
        window = torch.tensor([numbers[start : start + 17]])
        log_p = model(window[:, :-1]).double().log_softmax(-1)
        losses += (-log_p.gather(-1, window[:, 1:, None])).flatten().tolist()
    report = evaluate_run(tmp_path / "run", config, split="test", checkpoint="last", accelerator="cpu")
    mean = sum(losses) / len(losses)
    assert report["tokens"] == report["characters"] == len(losses)
    assert report["loss"] == pytest.approx(mean, abs=1e-5)
    assert report["perplexity"] == pytest.approx(math.exp(mean), abs=1e-3)
    assert report["bits_per_character"] == pytest.approx(mean / math.log(2), abs=1e-4)
    model.train()
    total, _, count = evaluate_part(model, make_task(config, tokenizer), "test")
    assert (total, count) == (pytest.approx(sum(losses), abs=1e-2), len(losses))
    assert model.training


def test_bpe_run_and_its_bits_per_character(tmp_path, text_file):
    data = DataConfig(
        source=str(text_file), tokenizer="bpe", vocab_size=300, validation_fraction=0.2, test_fraction=0.0
    )
    config = tiny_config(tmp_path / "run", text_file, data=data, steps=3)
    train(config)
    report = evaluate_run(tmp_path / "run", config, accelerator="cpu")
    assert report["split"] == "validation"
    assert report["characters"] > 1.5 * report["tokens"]
    expected = report["loss"] * report["tokens"] / math.log(2) / report["characters"]
    assert report["bits_per_character"] == pytest.approx(expected)


def test_validation_windows_and_tensorboard(tmp_path, text_file, monkeypatch):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    counts = []
    evaluated = loop.evaluate_part

    def counted(*arguments, **options):
        sums = evaluated(*arguments, **options)
        counts.append(sums[2])
        return sums

    monkeypatch.setattr(loop, "evaluate_part", counted)
    train(tiny_config(tmp_path / "run", text_file, steps=2, validation_windows=3, tensorboard=True))
    assert counts == [48, 48]
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_metrics_survive_a_torn_line(tmp_path):
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    for step in (1, 2, 3):
        log.log(step, train_loss=step / 3)
    log.close()
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("4,0.3")
    MetricsLog(tmp_path, 2, tensorboard=False).close()
    assert read_metrics(tmp_path) == [{"step": 1.0, "train_loss": 1 / 3}, {"step": 2.0, "train_loss": 2 / 3}]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff\xfe\n1\n", "is not a table of numbers"),
        (b"step,train_loss\none,2\n", "is not a table of numbers"),
        (b"step\n1,2\n", "is not a table of numbers"),
        (b"loss\n1\n", "must have a step in each row"),
        (b"step,loss\n,1\n", "must have a step in each row"),
    ],
)
def test_damaged_metrics_are_one_line(tmp_path, content, problem):
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(UsageError, match=problem):
        read_metrics(tmp_path)
