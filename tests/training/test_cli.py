"""The command line: the path from text to text, and the message for every mistake."""

import html
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse", reason="needs the packages of fastattn[train]")
pytest.importorskip("lightning_fabric", reason="needs the packages of fastattn[train]")
import torch
from training_cases import write_table

from fastattn.cli import COMMANDS, command_for, main

REPOSITORY = Path(__file__).resolve().parents[2]
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


def test_an_abbreviated_option_is_refused(folder, capsys):
    assert_refused(
        folder, capsys, ["train", "--config", "config.yaml", "--step", "3"], "no option --step; did you mean --steps?"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("trian", "there is no command 'trian'; did you mean train?"),
        ("--verison", "there is no command '--verison'; did you mean --version?"),
        ("xyz", "there is no command 'xyz'; the commands are train, finetune, "),
        ("train --model.d_modle 3", "there is no option --model.d_modle; did you mean --model.d_model?"),
        ("train --d_model=3", "there is no option --d_model; did you mean --model.d_model?"),
        ("train --lr 3", "there is no option --lr; did you mean --optim.learning_rate?"),
        ("train --optimizer adam", "there is no option --optimizer; did you mean --optim.name?"),
        ("train --zzz 3", "there is no option --zzz; --help lists the options"),
        ("train --config modle.yaml", "config: there is no key modle.d_model; did you mean model.d_model?"),
        ("train --config key.yaml", "config: there is no key data.columns.txt; did you mean data.columns.text?"),
        ("train --config top.yaml", "config: there is no key stepz; did you mean steps?"),
        ("train --task clasify", "preference, got 'clasify'; did you mean classify?"),
        ("train --optim.name lion", "optim.name must be one of sgd, momentum, nesterov, adam, adamw, muon, got 'lion'"),
        ("train --steps x", "steps must be an integer, got 'x'"),
        ("train --steps", "--steps must have a value, got none"),
        ("train --compile maybe", "compile must be true or false, got 'maybe'"),
        ("train --model.window maybe", "model.window must be an integer or null, got 'maybe'"),
        ("train --data.mixture maybe", "data.mixture must be names with a number each or null, got 'maybe'"),
        ("train stray", "there is no place for the argument 'stray'; --help shows the usage"),
        ("evaluate", "RUN is missing; --help explains the arguments"),
        ("data", "WHAT is missing: one of stats, clean, split, tokenize, shard, vectorize"),
        ("data splitt", "WHAT must be one of stats, clean, split, tokenize, shard, vectorize, got 'splitt'; did you "),
        ("data split", "SOURCE and --output are missing; --help explains the arguments"),
        ("data split text.txt --columns.txt a", "there is no option --columns.txt; did you mean --columns.text?"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_nearest(folder, capsys, arguments, expected):
    (folder / "modle.yaml").write_text("modle: {d_model: 3}")
    (folder / "key.yaml").write_text("data: {columns: {txt: a}}")
    (folder / "top.yaml").write_text("stepz: 3")
    assert_refused(folder, capsys, arguments.split(), expected)


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


def yaml_with(folder, line):
    key = line.partition(":")[0]
    kept = re.sub(rf"^{key}:.*\n", "", CONFIG, flags=re.MULTILINE)  # a repeated key would be refused
    (folder / "config.yaml").write_text(kept + line + "\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("n_layr: 3", ["n_layr"]),
        ("steps: many", ["steps", "int", "many"]),
        ("steps: 0", ["steps must be at least 1, got 0"]),
        ("steps: [", ["config"]),
        ("layers: jax", ["layers", "fastattn", "torch", "jax"]),
        ("batch_size: 3\naccumulate: 2", ["batch_size must be a multiple of", "= 2, got 3"]),
        ("model: {n_layr: 3}", ["no key model.n_layr; did you mean model.n_layer?"]),
        ("model: {n_head: 3, d_model: 8}", ["model.d_model must be a multiple of n_head = 3, got 8"]),
        ("model: {dropout: 1.5}", ["model.dropout must be at least 0 and below 1, got 1.5"]),
        (
            "data: {validation_fraction: 0.6, test_fraction: 0.5}",
            ["data.test_fraction must be below 1, got 1.1"],
        ),
        (
            "data: {tokenizer: bpe, vocab_size: 100}",
            ["data.vocab_size must be above 256 (the bytes), got 100"],
        ),
        ("optim: {min_learning_rate: 1}", ["optim.min_learning_rate must be from 0 to learning_rate = 0.001, got 1"]),
        ("seed: -1", ["seed must be at least 0 and below 2**63, got -1"]),
        ("precision: 16-mixed", ["precision must be 32-true, bf16-mixed or bf16-true on a CPU, got '16-mixed'"]),
        ("devices: 2", ["strategy must be 'ddp' or 'fsdp' for 2 x 1 devices, got 'auto'"]),
        ("sample_prompt: Q", ["of the vocabulary: 'Q'"]),
        ("model: {block_size: 200}", ["the validation split must have more than block_size = 200 tokens"]),
    ],
)
def test_config_mistakes(folder, capsys, line, expected):
    yaml_with(folder, line)
    assert_refused(folder, capsys, ["train", "--config", "config.yaml"], *expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["a command is missing; the commands are train, finetune, evaluate"]),
        (["--steps", "3"], ["there is no command '--steps'; the commands are train, "]),
        (["info", "now"], ["now"]),
        (["train", "--config", "nothing.yaml"], ["nothing.yaml"]),
        (["train", "--config", "text.txt"], ["text.txt must have options with values, such as steps: 100"]),
        (["train", "--config", "binary"], ["binary is not UTF-8 text: "]),
        (["train", "--config", "list.yaml"], ["list.yaml must have options with values, such as steps: 100"]),
        (["train", "--config", "config.yaml", "--steps", "1.5"], ["steps", "1.5"]),
        (["train", "--config", "config.yaml", "--data.source", "nothing.txt"], ["nothing.txt' is neither 'topics'"]),
        (["train", "--config", "config.yaml", "--data.source", "empty"], ["empty' is empty"]),
        (["train", "--config", "config.yaml", "--data.source", "binary"], ["is a binary file"]),
        (
            ["train", "--config", "config.yaml", "--data.source", "no_text"],
            ["the folder has no files ending in .txt"],
        ),
        (
            ["train", "--config", "config.yaml", "--data.train_limit", "3"],
            ["data.train_limit must be null for the task lm without data.packed, got 3"],
        ),
        (["train", "--config", "config.yaml", "--run", "text.txt"], ["text.txt' is a file; name a new folder"]),
        (["train", "--config", "config.yaml", "--run", "."], ["which is not part of a run"]),
        (
            ["train", "--config", "config.yaml", "--run", "text.txt/run"],
            ["cannot be created", "is a file, not a folder"],
        ),
        (["train", "--resume", "nothing"], ["nothing' does not exist"]),
        (["train", "--resume", "no_text"], ["is not the folder of a run: it has no config.yaml"]),
        (["train", "--resume", "no_text", "--overwrite"], ["train takes either --resume or --overwrite, not both"]),
        (["evaluate", "nothing"], ["nothing' does not exist"]),
        (["evaluate", "text.txt"], ["text.txt' is a file, not a folder"]),
        (["generate", "nothing", "--prompt", "a"], ["nothing' does not exist"]),
        (["generate", "nothing"], ["prompt"]),
    ],
)
def test_mistakes_before_there_is_a_run(folder, capsys, arguments, expected):
    (folder / "empty").write_bytes(b"")
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "list.yaml").write_text("- 1\n- 2\n")
    (folder / "no_text").mkdir()
    (folder / "no_text" / "picture.png").write_bytes(b"\x89PNG")
    assert_refused(folder, capsys, arguments, *expected)


def test_mistakes_with_a_run(run, capsys):
    folder = run.parents[1]
    (folder / "binary").write_bytes(b"\0\1")
    (folder / "other.txt").write_text("quite another text" * 40)
    for arguments, expected in [
        (["train", "--config", "config.yaml"], ["already exists; continue it with --resume", "--overwrite"]),
        (
            ["train", "--resume", "runs/small", "--model.n_layer", "2"],
            ["model.n_layer must be 1 as in the resumed run", "got 2"],
        ),
        (
            ["train", "--resume", "runs/small", "--data.source", "other.txt"],
            ["this run was trained on", "this one 720"],
        ),
        (
            ["evaluate", "runs/small", "--split", "nightly"],
            ["split must be one of train, validation, test", "'nightly'"],
        ),
        (["evaluate", "runs/small", "--data", "binary"], ["is a binary file"]),
        (["evaluate", "runs/small", "--data", "other.txt"], ["not among the 8 of the vocabulary: 'h' 'n'"]),
        (
            ["evaluate", "runs/small", "--data", "text.txt", "--split", "test"],
            ["--split cannot be used with --data"],
        ),
        (["evaluate", "runs/small", "--checkpoint", "3"], ["a saved step (2, 4), got '3'"]),
        (["evaluate", "runs/small", "--accelerator", "tpu"], ["accelerator must be one of auto, cpu, cuda, got 'tpu'"]),
        (["evaluate", "runs/small", "--layers", "jax"], ["layers must be one of fastattn, torch, got 'jax'"]),
        (["generate", "runs/small", "--prompt", "rosé"], ["not among the 8 of the vocabulary: 'é'"]),
        (["generate", "runs/small", "--prompt", ""], ["prompt must have at least one token, got an empty text"]),
        (
            ["generate", "runs/small", "--prompt", "a", "--temperature", "-1"],
            ["temperature must be at least 0 and finite, got -1"],
        ),
        (
            ["generate", "runs/small", "--prompt", "a", "--max_new_tokens", "x"],
            ["max_new_tokens must be an integer, got 'x'"],
        ),
        (["generate", "runs/small", "--prompt", "a", "--top_k", "0"], ["top_k must be at least 1, got 0"]),
    ]:
        assert_refused(folder, capsys, arguments, *expected)


@pytest.mark.parametrize(
    ("task", "name", "arguments", "expected"),
    [
        ("classify", "empty.jsonl", "", ["empty.jsonl' is empty"]),
        ("classify", "one_class.jsonl", "", ["must have at least two classes, got only 'x'"]),
        ("classify", "good.jsonl", "--data.columns.label kind", ["line 1: no column 'kind' among text, label"]),
        ("translate", "good.jsonl", "", ["line 1: no column 'target' among text, label"]),
        ("masked_lm", "latin.jsonl", "", ["latin.jsonl' is not UTF-8: byte 0xe9 at 13"]),
        ("classify", "missing.jsonl", "", ["line 21: column 'label' is empty"]),
        ("classify", "no_labels.jsonl", "", ["line 1: no column 'label' among text"]),
        ("classify", "good.jsonl", "--data.columns.label null", ["has no labels; name their column"]),
        ("classify", "good.jsonl", "--data.train_limit 2 --batch_size 4", ["must be at most 2, the training docu"]),
        ("classify", "few.jsonl", "", ["3 documents are too few, the validation part would be empty"]),
        ("masked_lm", "good.jsonl", "--data.vocab_size 5", ["must be above 5, the number of special tokens, got 5"]),
        ("masked_lm", "good.jsonl", "--model.block_size 2", ["model.block_size must be at least 3 for documents"]),
        ("lm", "good.jsonl", "--data.packed true --model.block_size 90", ["must have more than block_size = 90 "]),
        ("lm", "good.jsonl", "--model.body lstm", ["model.body must be 'transformer' for the task lm, got 'lstm'"]),
        ("classify", "good.jsonl", "--model.body gru --model.pooling first", ["model.pooling must be 'mean' for the "]),
        ("lm", "good.jsonl", "--model.positions rotary --model.d_model 6", ["must be even for rotary positions"]),
    ],
)  # fmt: skip
def test_mistakes_in_documents(folder, capsys, task, name, arguments, expected):
    def write(name, rows):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="latin-1")

    good = [{"text": f"a {i}", "label": "xy"[i % 2]} for i in range(40)]
    write("good", good)
    write("few", good[:3])
    write("empty", [])
    write("one_class", good[::2])
    write("missing", [*good[:20], {"text": "b", "label": " "}])
    write("no_labels", [{"text": row["text"]} for row in good])
    (folder / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    columns = {"classify": "--data.columns.label label", "translate": "--data.columns.target target"}
    options = f"--task {task} --data.source {name} --data.tokenizer word {columns.get(task, '')} {arguments}"
    assert_refused(folder, capsys, ["train", "--config", "config.yaml", *options.split()], *expected)


def test_a_vocabulary_that_the_text_does_not_fill_is_told(folder, capsys):
    text = "\n".join(f"{i} roses and {i} thorns" for i in range(30))
    (folder / "text.txt").write_text(text)
    options = ["--task", "masked_lm", "--data.tokenizer", "wordpiece", "--data.vocab_size", "5000"]
    assert main(["train", "--config", "config.yaml", *options]) == 0
    assert re.search(r"; vocabulary \d\d, fewer than the 5,000 allowed\n", capsys.readouterr().out)


def test_what_makes_another_run_is_not_resumed(run, capsys):
    for options, expected in [
        ("--task masked_lm", "task must be 'lm' as in the resumed run, got 'masked_lm'"),
        ("--trained head --start runs/small", "trained must be 'all' as in the resumed run, got 'head'"),
        ("--data.tokenizer byte", "data.tokenizer must be 'char' as in the resumed run, got 'byte'"),
        ("--data.packed true", "data.packed must be False as in the resumed run, got True"),
        ("--optim.ema 0.9", "optim.ema must be 0.0 as in the resumed run, got 0.9"),
        ("--optim.name sgd", "optim.name must be 'adamw' as in the resumed run, got 'sgd'"),
    ]:
        assert_refused(run.parents[1], capsys, ["train", "--resume", "runs/small", *options.split()], expected)


def test_damaged_run(run, capsys):
    folder = run.parents[1]
    newest = run / "checkpoints" / "step-00000004" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert main(["evaluate", "runs/small", "--checkpoint", "last", "--json"]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["step"] == 2
    assert error.count("\n") == 1
    assert "step-00000004 is damaged (model.safetensors differs from its sha256); using step-00000002" in error
    (run / "checkpoints" / "step-00000002" / "meta.json").unlink()
    for arguments in (["evaluate", "runs/small"], ["train", "--resume", "runs/small"]):
        assert_refused(folder, capsys, arguments, "has no undamaged checkpoint", "step-00000004", "step-00000002")
    (run / "tokenizer.json").write_text("{")
    assert_refused(folder, capsys, ["evaluate", "runs/small"], "tokenizer.json is not a readable tokenizer")
    (run / "config.yaml").write_text("nonsense: 1")
    assert_refused(folder, capsys, ["evaluate", "runs/small"], "config.yaml", "nonsense")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that must be missing here")
def test_cuda_without_a_gpu(run, capsys):
    folder = run.parents[1]
    expected = "accelerator 'cuda' needs a CUDA GPU, but PyTorch finds none"
    arguments = ["train", "--config", "config.yaml", "--run", "runs/other", "--accelerator", "cuda"]
    assert_refused(folder, capsys, arguments, expected)
    assert_refused(folder, capsys, ["evaluate", "runs/small", "--accelerator", "cuda"], expected)


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


def test_missing_package_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    for name in ("loop", "train"):
        monkeypatch.delitem(sys.modules, f"fastattn.training.runs.{name}", raising=False)
    expected = f"missing package lightning_fabric: run {command_for('train')}"
    assert_refused(folder, capsys, ["train", "--config", "config.yaml"], expected)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (MemoryError(), ""),
        (RuntimeError("layer: out of memory"), ""),
        (RuntimeError("can't allocate memory: you tried to allocate 7440 bytes."), " (7,440 bytes at once were asked"),
    ],
)
def test_a_lack_of_memory_is_one_line(folder, capsys, monkeypatch, error, asked):
    def fail(*_arguments):
        raise error

    monkeypatch.setattr("fastattn.commands.train.read_train_config", fail)
    assert main(["train", "--run", "runs/none"]) == 2
    expected = f"fastattn: error: not enough memory; a smaller model, batch_size or block_size needs less{asked}"
    assert expected in capsys.readouterr().err


def test_a_missing_compiler_is_one_line(folder, capsys, monkeypatch):
    def fail(*_arguments):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx")

    monkeypatch.setattr("fastattn.commands.train.read_train_config", fail)
    assert_refused(folder, capsys, ["train", "--run", "runs/none"], "there is no C++ compiler, which compile: true")


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
