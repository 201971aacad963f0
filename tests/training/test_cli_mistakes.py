"""Mistakes on the command line: each gives one line that says what was expected, exit code 2, and changes no file."""

import json
import re
import sys

import cli_cases
import pytest
from cli_cases import CONFIG, assert_refused

pytest.importorskip("jsonargparse", reason="needs the packages of fastattn[train]")
pytest.importorskip("lightning_fabric", reason="needs the packages of fastattn[train]")
import torch

from fastattn.cli import command_for, main

folder, run = cli_cases.folder, cli_cases.run  # fixtures


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
        ("train stray", "unexpected argument 'stray'; --help shows the usage"),
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
        ("classify", "few.jsonl", "", ["3 documents are too few: the validation part would be empty"]),
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
        (
            RuntimeError("can't allocate memory: you tried to allocate 7440 bytes."),
            " (7,440 bytes were requested at once",
        ),
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
    assert_refused(folder, capsys, ["train", "--run", "runs/none"], "no C++ compiler was found, but compile: true")
