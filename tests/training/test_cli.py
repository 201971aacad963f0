"""The command line: the path from text to text, and what all commands share."""

import html
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import cli_cases
import pytest
from cli_cases import assert_refused

pytest.importorskip("jsonargparse", reason="needs the packages of fastattn[train]")
pytest.importorskip("lightning_fabric", reason="needs the packages of fastattn[train]")
import torch
from training_cases import write_table

from fastattn.cli import COMMANDS, main

REPOSITORY = Path(__file__).resolve().parents[2]
folder, run = cli_cases.folder, cli_cases.run  # fixtures


def test_train_evaluate_generate(folder, capsys):
    assert main(["train", "--config", "config.yaml", "--steps", "6", "--model.d_model", "16"]) == 0
    out, bar = capsys.readouterr()
    run = folder / "runs" / "small"
    for line in (
        "text: ",
        "data: train 336 tokens, validation 112 tokens, test 112 tokens; vocabulary 8",
        "sample:\n----",
        "----\na",
    ):
        assert line in out
    assert [out.count(f"step {step}/6  validation loss") for step in (0, 2, 4, 6)] == [1, 1, 1, 1]
    assert "6/6" in bar
    assert "tokens/s" in bar
    config = (run / "config.yaml").read_text()
    assert "steps: 6\n" in config
    assert "d_model: 16\n" in config
    assert f"source: {folder.resolve() / 'text.txt'}\n" in config
    for name in ("tokenizer.json", "data.json", "metrics.csv", "loss.png", "sample.txt"):
        assert (run / name).stat().st_size > 0

    assert main(["evaluate", str(run), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["split"], report["tokens"], report["source"]) == ("test", 104, str(folder.resolve() / "text.txt"))
    assert main(["evaluate", str(run), "--split", "test"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^loss +{report['loss']:.4f}$", out, re.MULTILINE)
    assert "bits_per_character" in out
    assert f"The report with its pictures: {run / 'report.html'}" in out
    (folder / "other.txt").write_text("a rose is " * 10)
    assert main(["evaluate", str(run), "--data", "other.txt", "--checkpoint", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["split"], report["tokens"], report["step"]) == ("all", 96, 4)
    assert json.loads((run / "reports" / "4" / "report.json").read_text()) == report
    arguments = ["evaluate", str(run), "--output", "elsewhere", "--attention", "a rose"]
    assert main(arguments) == 0
    assert (folder / "elsewhere" / "attention.png").stat().st_size > 0
    assert "attention.png" in (folder / "elsewhere" / "report.md").read_text()
    page = (folder / "elsewhere" / "report.html").read_text()
    assert re.findall('<img alt="([^"]*)"', page) == ["Loss curve", "Attention map"]
    assert "steps: 6\n" in page  # the settings of the run
    assert (run / "sample.txt").read_text()[:20] in html.unescape(page)
    capsys.readouterr()

    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(run), "--prompt", "a ro", "--max_new_tokens", "12", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("a ro")
    assert len(texts[0]) == 4 + 12 + 1
    assert main(["generate", str(run), "--prompt", "a ro", "--temperature", "0", "--top_k", "3"]) == 0


def test_other_layers_read_the_same_run(run, capsys):
    losses = []
    for layers in ("torch", "fastattn"):
        assert main(["evaluate", str(run), "--layers", layers, "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_translator(folder, capsys):
    """Its report can be copied from the terminal, and options that it cannot obey are refused, not ignored."""
    pytest.importorskip("sacrebleu", reason="needs the packages of fastattn[eval]")
    write_table(folder / "table.jsonl")
    options = ["--config", "config.yaml", "--task", "translate", "--data.source", "table.jsonl"]
    options += ["--data.columns.target", "target", "--data.tokenizer", "word", "--data.validation_fraction", "0.2"]
    assert main(["train", *options, "--sample_tokens", "0"]) == 0
    assert main(["evaluate", "runs/small"]) == 0
    assert re.search(r"^bleu_signature +nrefs:1\|case:mixed\|", capsys.readouterr().out, re.MULTILINE)
    generate = ["generate", "runs/small", "--prompt", "a"]
    assert main([*generate, "--beams", "2"]) == 0
    capsys.readouterr()
    for name, value in {"max_new_tokens": "3", "temperature": "0", "top_k": "1", "stop": "b", "seed": "1"}.items():
        assert_refused(folder, capsys, [*generate, f"--{name}", value], f"{name} is for task lm only")


def test_baseline_and_a_classifier_in_one_table(folder, capsys):
    write_table(folder / "table.jsonl")
    data = ["--data.source", "table.jsonl", "--data.columns.label", "label", "--data.validation_fraction", "0.2"]
    assert main(["baseline", *data, "--output", "words", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((folder / "words" / "report.json").read_text())
    assert (report["split"], report["examples"]) == ("test", 6)
    assert main(["baseline", *data, "--split", "validation", "--tfidf", "--max_ngram", "2"]) == 0
    assert re.search("^examples +24$", capsys.readouterr().out, re.MULTILINE)
    options = [
        "--config",
        "config.yaml",
        "--task",
        "classify",
        "--data.tokenizer",
        "word",
        "--data.test_fraction",
        "0.05",
    ]
    assert main(["train", *options, *data]) == 0
    assert main(["evaluate", "runs/small", "--attention", "a b"]) == 0
    capsys.readouterr()
    assert main(["compare", "runs/small", "words"]) == 0
    out = capsys.readouterr().out
    assert "bag of words, logistic regression" in out
    assert f"| {report['accuracy']:.4f} |" in out
    assert_refused(folder, capsys, ["baseline", *data, "--split", "tests"], "split must be one of train, validation")


def test_resume_with_more_steps(run, capsys):
    assert main(["train", "--resume", "runs/small", "--steps", "6"]) == 0
    out = capsys.readouterr().out
    assert "continued after step 4" in out
    assert "step 6/6" in out
    assert "steps: 6\n" in (run / "config.yaml").read_text()
    assert main(["train", "--resume", "runs/small"]) == 0  # nothing left to do
    assert "continued after step 6" in capsys.readouterr().out


def test_overwrite_replaces_a_run_and_nothing_else(run, capsys):
    first = (run / "metrics.csv").read_text()
    assert main(["train", "--config", "config.yaml", "--overwrite", "--seed", "3"]) == 0
    assert (run / "metrics.csv").read_text() != first
    assert [path.name for path in run.parent.iterdir()] == ["small"]
    (run / "thesis.txt").write_text("years of work")
    folder = run.parents[1]
    arguments = ["train", "--config", "config.yaml", "--overwrite"]
    assert_refused(folder, capsys, arguments, "has 'thesis.txt', which is not part of a run; name a new folder")


def test_every_command_is_a_file_with_its_help(capsys):
    assert main(["--help"]) == main(["-h"]) == 0
    overview = capsys.readouterr().out
    files = {path.stem for path in (REPOSITORY / "fastattn" / "commands").glob("*.py")}
    assert {name for name in files if not name.startswith("_")} == set(COMMANDS)
    for name, summary in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", overview, re.MULTILINE)
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: fastattn {name} ")


def test_info(capsys):
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out


def test_fault_of_ours_is_a_traceback(folder, monkeypatch):
    monkeypatch.setattr("fastattn.commands.train.parser", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # Python ends with exit code 1
        main(["train"])


def test_recipes_are_valid(capsys):
    from fastattn.commands._options import read_config, train_parser

    recipes = sorted((REPOSITORY / "recipes").glob("*.yaml"))
    assert len(recipes) >= 2
    configs = {path.stem: read_config(train_parser().parse_args(["--config", str(path)])) for path in recipes}
    shakespeare = configs["shakespeare_char"]
    assert (shakespeare.optim.learning_rate, shakespeare.optim.min_learning_rate) == (1e-3, 1e-4)
    assert (shakespeare.steps, shakespeare.batch_size, shakespeare.seed, shakespeare.model.bias) == (
        2000,
        12,
        1337,
        False,
    )
    assert configs["char_lm"].data.source == "topics"
    assert {config.layers for config in configs.values()} == {"fastattn"}


def test_help_and_output_to_a_closed_pipe(run):
    """As a process: help needs no training package; `fastattn generate | head` ends without an error message."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    code = (
        "import sys; from fastattn.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as end: print(end.code, *(m in sys.modules for m in ('lightning_fabric', 'matplotlib')))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert "--optim.learning_rate" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 False False"
    command = [sys.executable, "-m", "fastattn", "generate", str(run), "--prompt", "a"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE  # as of other programs; a training run has not reached its end


def test_output_that_cannot_be_written(monkeypatch, capsys):
    """It ends the command, and nothing is left that Python would fail to write when it ends."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, open(os.devnull, "w") as errors, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", closed)
        patch.setattr("sys.stderr", errors)
        assert main(["--version"]) == 128 + signal.SIGPIPE
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", full)
        assert main(["--version"]) == 2
    assert capsys.readouterr().err == "fastattn: error: [Errno 28] No space left on device\n"


def test_a_wrong_backend_of_matplotlib_does_not_matter(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "nonsense")
    monkeypatch.setattr("sys.argv", ["fastattn", "--version"])
    assert main() == 0
    assert "MPLBACKEND" not in os.environ
