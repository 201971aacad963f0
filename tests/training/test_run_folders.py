"""The folder of a run and its options: folders that exist, options next to --resume, messages that can be pasted."""

import os
import re
import shutil
import subprocess

import pytest

pytest.importorskip("lightning_fabric", reason="needs the packages of fastattn[train]")
import torch
import yaml
from training_cases import TEXT, column, tiny_config, write_table

from fastattn.cli import main
from fastattn.training.config import OptimConfig
from fastattn.training.messages import UsageError
from fastattn.training.runs.checkpoint import check_new_run, create_run
from fastattn.training.runs.train import train

FILES = {"config.yaml": "a: 1\n", "tokenizer.json": "{}", "data.json": "{}"}


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def mounted(folder):
    """An empty mount point, or a skip."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this user cannot mount: {done.stderr.strip()}")
    return folder


@pytest.fixture(params=["new", "empty", "link", "link to nothing", "mount point", "."])
def place(request, tmp_path, monkeypatch):
    """A place for a run: (its path, the inode that must stay or None)."""
    path, kind = tmp_path / "run", request.param
    if kind == "mount point":
        mounted(path)
    elif kind == "empty":
        path.mkdir()
    elif kind.startswith("link"):
        path.symlink_to(tmp_path / "target")
        if kind == "link":
            (tmp_path / "target").mkdir()
    elif kind == ".":
        path.mkdir()
        monkeypatch.chdir(path)
    yield path
    if kind == "mount point":
        subprocess.run(["umount", str(path)], check=True)


def test_any_empty_place_takes_a_run_and_lets_it_be_replaced(place):
    was = place.stat().st_ino if place.exists() else None
    for content in ("a: 1\n", "b: 2\n"):
        create_run(place, {**FILES, "config.yaml": content}, overwrite=content.startswith("b"))
        assert sorted(os.listdir(place)) == ["checkpoints", "config.yaml", "data.json", "tokenizer.json"]
        assert (place / "config.yaml").read_text() == content
        assert was in (None, place.stat().st_ino)  # the folder itself stayed
        (place / "checkpoints" / "step-00000001").mkdir()
        (place / "report.md").write_text("old")
        with pytest.raises(UsageError, match=r"already exists; continue it with --resume .* or replace it with"):
            check_new_run(place, False)


def test_a_mount_point_trains(tmp_path, text_file):
    run = mounted(tmp_path / "run")
    try:
        assert train(tiny_config(run, text_file, steps=2, evaluate_every=2)) == 0
        assert (run / "loss.png").exists()
    finally:
        subprocess.run(["umount", str(run)], check=True)


def test_a_replaced_run_is_whole_if_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    create_run(tmp_path / "run", FILES, False)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastattn.training.runs.checkpoint.write_atomic", refuse)
    with pytest.raises(OSError, match="No space"):
        create_run(tmp_path / "run", FILES, True)
    assert (tmp_path / "run" / "config.yaml").read_text() == FILES["config.yaml"]
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoints", *sorted(FILES)]


def test_places_that_take_no_run(tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("x")
    for name in ("loop", "file", "file/run"):
        with pytest.raises(UsageError, match=f"run '.*{name}' (cannot be created|is a file)"):
            check_new_run(tmp_path / name, False)
    monkeypatch.setattr(os, "access", lambda *_: False)  # the mode of a folder does not stop root
    with pytest.raises(UsageError, match=r"run '.*new/run' cannot be created: the folder '.*' is not writable"):
        check_new_run(tmp_path / "new" / "run", False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT)
    train(tiny_config(folder / "run", folder / "text.txt", steps=6, evaluate_every=3, epochs=None))
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def config_of(run):
    return yaml.safe_load((run / "config.yaml").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 5", "steps must be at least 6, the steps that the run has done, got 5"),
        ("--run other", "with --resume, run must be left out or '.*run', got 'other'"),
        ("--start other", "start must be None as in the resumed run, got '.*other'"),
        ("--epochs 0.01", "steps must be at least 6, the steps that the run has done, got"),
    ],
)
def test_options_beside_resume_that_cannot_win_are_refused(run, capsys, options, message):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["train", "--resume", str(run), *options.split()]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_options_beside_resume_win(run):
    """This includes settings in the optimizer's state; a number of steps overrides the epochs of the run."""
    stored = config_of(run)
    (run / "config.yaml").write_text(yaml.safe_dump({**stored, "epochs": 0.5}))
    options = "--steps 8 --optim.weight_decay 0.5 --optim.beta1 0.5 --optim.schedule constant --keep 1"
    assert main(["train", "--resume", str(run), "--run", str(run), *options.split()]) == 0
    state = torch.load(run / "checkpoints" / "step-00000008" / "state.pt", weights_only=True)
    matrices, vectors = state["optimizer"]["param_groups"]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.5, 0.0)
    assert matrices["betas"][0] == 0.5
    assert column(run, "learning_rate")[-1] == ("8", "0.005")
    assert config_of(run)["epochs"] is None


def test_a_finished_run_says_that_nothing_is_left_to_train(run, capsys):
    assert main(["train", "--resume", str(run)]) == 0
    assert "continued after step 6, which was the last of its 6" in capsys.readouterr().out


def test_steps_on_the_command_line_win_over_epochs_in_a_file(tmp_path, text_file):
    (tmp_path / "config.yaml").write_text("epochs: 8\nsteps: 50\ntensorboard: false\n")
    tiny = "--model.n_layer 1 --model.n_head 2 --model.d_model 16 --model.block_size 16 --sample_tokens 0"
    command = ["train", "--config", str(tmp_path / "config.yaml"), "--data.source", str(text_file), *tiny.split()]
    command += ["--accelerator", "cpu"]
    assert main([*command, "--steps", "2", "--run", str(tmp_path / "a")]) == 0
    assert (config_of(tmp_path / "a")["steps"], config_of(tmp_path / "a")["epochs"]) == (2, None)
    assert main([*command, "--epochs", "0.1", "--run", str(tmp_path / "b")]) == 0
    assert config_of(tmp_path / "b")["epochs"] == 0.1


def test_a_loss_that_is_no_number_says_whether_a_checkpoint_is_left(tmp_path, text_file):
    optim = OptimConfig(learning_rate=1e30, min_learning_rate=0.0, warmup_steps=0, clip=0.0)
    with pytest.raises(UsageError, match="there is no checkpoint yet: start again with --overwrite and a learning"):
        train(tiny_config(tmp_path / "run", text_file, steps=20, evaluate_every=20, optim=optim))


def test_predictions_are_one_line_each(tmp_path, capsys):
    write_table(tmp_path / "table.jsonl", 60)
    tiny = "--model.n_layer 1 --model.n_head 2 --model.d_model 16 --steps 1 --tensorboard false --accelerator cpu"
    source = ["--task", "classify", "--data.source", str(tmp_path / "table.jsonl"), "--data.columns.label", "label"]
    assert main(["train", *source, *tiny.split(), "--run", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), "one\ttwo\nthree\\n", "four"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[2] for line in lines] == [r"one\ttwo\nthree\\n", "four"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("vectorize --kind word2vec --seed -1", "seed must be at least 0 and below 2**32, got -1"),
        ("vectorize --kind word2vec --seed 99999999999999", "seed must be at least 0 and below 2**32"),
        ("vectorize --kind word2vec --dimension 0", "dimension must be at least 1, got 0"),
        ("tokenize --vocab_size 3", "vocab_size must be above 256 (the bytes), got 3"),
        ("tokenize --tokenizer word --vocab_size 0", "vocab_size must be above 0, got 0"),
        (
            "tokenize --strip_accents true",
            "strip_accents must be false unless a word or wordpiece tokenizer",
        ),
        ("split --seed 99999999999999999999999", "seed must be at least 0 and below 2**63"),
    ],
)
def test_numbers_out_of_range_are_refused(text_file, tmp_path, capsys, options, message):
    step, *rest = options.split()
    assert main(["data", step, str(text_file), "--output", str(tmp_path / "out"), *rest]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
