"""A folder in which the command line trains a tiny run, and the check for a refused command."""

import pytest

from fastattn.cli import main

CONFIG = """
run: runs/small
layers: torch
steps: 4
batch_size: 2
evaluate_every: 2
sample_prompt: a
sample_tokens: 5
tensorboard: false
accelerator: cpu
data: {source: text.txt, validation_fraction: 0.2, test_fraction: 0.2}
model: {n_layer: 1, n_head: 2, d_model: 8, block_size: 8, dropout: 0.1}
optim: {learning_rate: 1e-2, min_learning_rate: 1e-3, warmup_steps: 1}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a text and a config."""
    (tmp_path / "text.txt").write_text("a rose is a rose is a rose. " * 20)
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    """The same with a trained run in runs/small."""
    assert main(["train", "--config", "config.yaml"]) == 0
    capsys.readouterr()
    return folder / "runs" / "small"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(folder, capsys, arguments, *expected):
    """Check for exit code 2, one line on stderr that contains all expected texts, and no changed file."""
    before = contents(folder)
    capsys.readouterr()
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    lines = error.splitlines()
    assert out == ""
    assert len(lines) == 1, error
    assert lines[0].startswith("fastattn: error: ")
    for part in expected:
        assert part in lines[0]
    assert contents(folder) == before
