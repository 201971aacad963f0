"""Invalid input gives one line that says so and exit code 2. Nothing is written, and there is never a traceback."""

import hashlib
import io
import json
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from training_cases import tiny_config, tiny_model, write_table

pytest.importorskip("lightning_fabric", reason="needs the packages of fastattn[train]")
from fastattn.cli import main
from fastattn.training.config import Columns, DataConfig
from fastattn.training.data.sources import read_documents
from fastattn.training.data.tables import columns_read
from fastattn.training.data.text import find_data
from fastattn.training.messages import UsageError
from fastattn.training.runs.train import train

FILES = {
    "plain.jsonl": [{"text": f"w{i % 9} a {i}", "label": "xy"[i % 2], "other": f"o{i}"} for i in range(60)],
    "number.jsonl": [{"text": f"w{i % 9} a {i}", "label": i / 7} for i in range(60)],
    "huge.jsonl": [{"text": f"w{i}", "label": 1e308 * (-1) ** i} for i in range(60)],
    "close.jsonl": [{"text": f"w{i}", "label": 5e-324 * i} for i in range(60)],
    "far.jsonl": [{"text": f"w{i}", "label": 10**400} for i in range(60)],
    "classes.jsonl": [{"text": f"w{i % 9} a {i}", "label": [f"c{i % 3}"] * (i % 4)} for i in range(60)],
    "unknown.jsonl": [{"text": "a", "label": ["new"]}],
    "marked.jsonl": [{"text": f"<|im_start|> {i}", "target": "x"} for i in range(60)],
    "pairs.jsonl": [{"text": f"q{i}", "target": f"a{i}", "rejected": f"b{i}"} for i in range(60)],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the FILES, and runs of one step: number, pair, classes, masked, lm, chat."""
    folder = tmp_path_factory.mktemp("bad")
    for name, rows in FILES.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in CONFIGS.items():
        (folder / name).write_bytes(content)
    (folder / "lines.txt").write_text("".join(f"line number {i} of it\n" for i in range(200)))
    write_table(folder / "table.jsonl")

    def make(run, source, task="classify", tokenizer="word", **columns):
        data = DataConfig(source=str(folder / source), tokenizer=tokenizer, columns=Columns(**columns))
        options = {"steps": 1, "evaluate_every": 1, "sample_tokens": 0, "sample_prompt": None, "task": task}
        model = tiny_model(n_layer=1, block_size=64 if task in ("chat", "translate") else 8)
        assert train(tiny_config(folder / run, "", data=data, model=model, **options)) == 0

    make("number", "number.jsonl", label="label", label_kind="number")
    make("pair", "plain.jsonl", label="label", pair="other")
    make("classes", "classes.jsonl", label="label", label_kind="classes")
    make("masked", "table.jsonl", "masked_lm")
    make("lm", "lines.txt", "lm")
    make("chat", "pairs.jsonl", "chat", "byte", target="target")
    make("translator", "pairs.jsonl", "translate", target="target")
    make("damaged", "lines.txt", "lm")
    (folder / "damaged" / "metrics.csv").write_text("step,train_loss\n1,abc\n")
    shard = ["data", "shard", str(folder / "lines.txt"), "--tokenizer", "word", "--validation_fraction", "0.2"]
    for name in ("tokens", "ends", "numbers"):
        assert main([*shard, "--output", str(folder / name)]) == 0
    (folder / "tokens" / "train-00000.tokens").write_bytes(b"12345")
    (folder / "ends" / "train-00000.ends").write_bytes(b"123")
    (folder / "numbers" / "validation-00000.tokens").write_bytes(b"\xff\xff\xff\x7f" * 99)
    return folder


CONFIGS = {
    "twice.yaml": b"data:\n  source: lines.txt\n  source: plain.jsonl\n",
    "null.yaml": b"steps: null\n",
    "section.yaml": b"model: 5\n",
    "tab.yaml": b"data:\n\tsource: lines.txt\n",
    "zero.yaml": b"steps: 5\0\n",
    "blank.yaml": b"# nothing\n",
    "deep.yaml": b"data: " + b"[" * 3000,
    "latin.yaml": "run: caf\xe9\n".encode("latin-1"),
    "rotary.yaml": b"model: {rotary: 5}\n",
    "rates.yaml": b"optim: {rates: null}\n",
    "columns.yaml": b"data: {columns: [a]}\n",
    "key.yaml": b"true: 4\n",
    "path.yaml": b'data: {source: "a\\0b"}\n',
}
LABELLED = "train --task classify --data.columns.label label --data.columns.label_kind"
ANSWERS = "--data.source pairs.jsonl --data.columns.target target"
PREFER = f"train --task preference --start chat --model.block_size 64 {ANSWERS}"
CASES = [
    # labels
    (f"{LABELLED} number --data.source plain.jsonl", "column 'label' must be a finite number, got 'x'"),
    (f"{LABELLED} number --data.source huge.jsonl", "numbers must be at most 1e+30 in size"),
    (f"{LABELLED} number --data.source close.jsonl", "the numbers are too close together"),
    (f"{LABELLED} number --data.source far.jsonl", "must be a finite number"),
    (f"{LABELLED} class --data.source classes.jsonl", "must be a text or a number, got a list"),
    (f"{LABELLED} sum --data.source plain.jsonl", "label_kind must be one of class, classes, number"),
    (f"{LABELLED} classes --data.source plain.jsonl --data.columns.label_separator ab", "must be one character"),
    (f"{LABELLED} class --data.source plain.jsonl --data.columns.pair none", "no column 'none' among text, label"),
    ("evaluate number --data plain.jsonl", "must be a finite number, got 'x'"),
    ("evaluate classes --data unknown.jsonl", "source 'unknown.jsonl': class 'new' is not in the training part"),
    ("evaluate pair --data number.jsonl", "no column 'other' among text, label"),
    ("export number out", "a BERT of Hugging Face does not scale its number"),
    ("baseline --data.source number.jsonl --data.columns.label label --data.columns.label_kind number",
     "the baseline is for documents with one text and one class"),
    ("predict pair one", "TEXT must be given twice for each, got 1"),
    ("predict pair --input -", "line 1 must have two texts with a tab between them"),
    ("predict number --input plain.jsonl --pair_column other", "pair_column is for --input and a run on pairs"),
    ("predict lm one", "predict needs a run of task classify or masked_lm, got lm"),
    ("predict masked one", "must have a [MASK], the place of a token to predict"),
    # shards
    ("data shard lines.txt --output tokens", "already exists; choose a new name"),
    ("data shard lines.txt --output out --processes 0", "processes must be at least 1, got 0"),
    ("data shard lines.txt --output out --validation_fraction 1e-9 --tokenizer byte", "the validation part has no doc"),
    ("data shard lines.txt --output out --tokenizer_file none.json", "is not a readable tokenizer"),
    ("data shard lines.txt --output out --columns.text x", "named columns need a table"),
    ("data shard lines.txt --output lines.txt/x --tokenizer byte", "lines.txt' is a file, not a folder"),
    ("data stats plain.jsonl --columns.messages text", "must be a list of at least one message, got a str"),
    ("export lm lines.txt/x", "export '"),
    ("evaluate lm --output lines.txt", "lines.txt' is a file; name a new folder"),
    ("evaluate lm --data plain.jsonl", "is a table, which a run without data.packed does not read"),
    ("baseline --data.source plain.jsonl --output lines.txt", "lines.txt' is a file; name a new folder"),
    ("generate lm --prompt line --beams 100000", "beams must be from 1 to 1,000, got 100000"),
    ("train --data.source tokens", "must be a multiple of 4 bytes, got 5"),
    ("train --data.source ends --data.packed true", "train-00000.ends does not belong to train-00000.tokens"),
    ("train --data.mixture [1]", "data.mixture"),
    ("train --data.mixture {\"none\":1}", "there is no train.tokens or train-00000.tokens"),
    ("train --data.mixture {\"tokens\":.nan}", "must be a finite number above 0, got nan"),
    ("train --data.mixture {\"tokens\":1e308,\"ends\":1e308}", "weights with a finite sum"),
    ("data clean plain.jsonl --output clean.csv", "output must be a name that ends in .jsonl"),
    ("train --data.source lines.txt --data.order sorted", "data.order must be one of random, shuffle"),
    # settings
    ("train --config null.yaml", "steps must have a value, got null"),
    ("data shard lines.txt --output out --shard_tokens null", "shard_tokens must be an integer, got 'None'"),
    ("generate lm --prompt line --samples null", "samples must be an integer, got 'None'"),
    ("train --config section.yaml", "model must be a section of settings, got 5"),
    ("train --data.source=", "data.source must not be empty"),
    ("data stats ", "the source must be the name of a file, a folder or a known set, got ''"),
    ("data clean plain.jsonl --output=", "the name of a folder must not be empty"),
    ("evaluate ", "the name of a folder must not be empty"),
    ("evaluate translator --beams 0", "beams must be from 1 to 1,000, got 0"),
    ("evaluate translator --beams -3", "beams must be from 1 to 1,000, got -3"),
    ("predict number --input plain.jsonl --column=", "columns.text must be the name of a column, got ''"),
    ("baseline --data.source plain.jsonl --data.columns.label=", "columns.label must be the name of a column, got ''"),
    ("train --resume damaged --steps 9", "metrics.csv is not a table of numbers: could not convert string to float"),
    ("compare damaged", "metrics.csv is not a table of numbers: could not convert string to float"),
    ("data tokenize lines.txt --output out --tokenizer sentence", "tokenizer must be one of char, byte"),
    ("train --config twice.yaml", "twice.yaml, line 3: the key 'source' is repeated"),
    ("train --data.mixture {\"a\":1,\"a\":2}", "data.mixture, line 1: the key 'a' is repeated"),
    ("train --config tab.yaml", "tab.yaml, line 2, column 1 is not valid YAML: found character that cannot start any"),
    ("train --config zero.yaml", "zero.yaml is not valid YAML: control characters are not allowed at character"),
    ("train --config blank.yaml", "blank.yaml must have options with values, such as steps: 100"),
    ("train --config deep.yaml", "deep.yaml, line 1, column "),
    ("finetune --config latin.yaml", "latin.yaml is not UTF-8 text"),
    ("train --config rotary.yaml", "model.rotary must be a section of settings, got 5"),
    ("train --config rates.yaml", "optim.rates must be a section of settings, got None"),
    ("train --config columns.yaml", "data.columns must be a section of settings, got ['a']"),
    ("train --optim.rates 3", "optim.rates must be a section of settings, such as {name: value}"),
    ("train --config key.yaml", "config: a key must be a text, got True"),
    ("train --config lm", "lm is not a file"),
    ("train --config=", "the file must have options with values, such as steps: 100"),
    ("train --config path.yaml", "a path must not have a zero character, got 'a\\x00b'"),
    ("train --data.source ~nobody_at_all/x", "path '~nobody_at_all/x': there is no such user"),
    ("predict number --input ~nobody_at_all/x", "path '~nobody_at_all/x': there is no such user"),
    # numbers without a meaning
    ("train --data.source lines.txt --epochs .inf", "epochs must be a finite number, got inf"),
    ("train --data.source lines.txt --epochs 1e300", "epochs must be lower: a run has fewer than 2**53 steps"),
    ("train --data.source lines.txt --steps 1000000000000000000000", "steps must be below 2**53, got 1000000000"),
    ("train --data.source lines.txt --data.vocab_size 99999999999999999999", "data.vocab_size must be below 2**53"),
    ("data split lines.txt --output out --validation_fraction .nan", "validation_fraction must be a finite number"),
    ("generate lm --prompt line --top_p .inf", "top_p must be a finite number, got inf"),
    # settings of other formats
    ("data stats plain.jsonl --columns.quoting csv", "columns.quoting is for .csv and .tsv files"),
    # generation, conversations, preferences, optimizers
    ("generate lm --prompt line --samples 2 --seed 9223372036854775807", "seed + samples must be at most 2**63"),
    ("generate lm --prompt line --samples 0", "samples must be at least 1, got 0"),
    ("generate lm --prompt line --stop=", "stop must be at least one character long, got ''"),
    ("generate translator --prompt=", "prompt must be at least one character long, got ''"),
    ("generate lm --input none.txt", "is neither a file, a folder"),
    ("generate chat --prompt <|im_end|>", "prompt"),
    ("train --task chat --data.source marked.jsonl --data.columns.target target --data.tokenizer byte",
     "a message holds '<|im_start|>', a mark of the chat template"),
    (f"train --task chat {ANSWERS} --data.chat_template none",
     "needs --start, a model whose vocabulary has its marks"),
    (f"train --start chat --task chat {ANSWERS} --data.chat_template none",
     "must be auto, chatml, llama3, gemma or a folder with tokenizer_config.json"),
    (PREFER, "has no pairs of answers"),
    (f"{PREFER} --data.columns.rejected rejected --preference_beta 0", "preference_beta must be above 0"),
    ("train --data.source lines.txt --optim.cautious_decay maybe", "optim.cautious_decay must be true or false"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "problem"), CASES, ids=[command[:60] for command, _ in CASES])
def test_one_line_says_what_is_wrong(place, monkeypatch, capsys, command, problem):
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one text without a tab\n")))
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    trains = command.startswith(("train", "finetune")) and "--resume" not in command
    argv = [*command.split(" "), *(["--run", "new", "--accelerator", "cpu"] if trains else [])]
    if command.startswith("generate chat"):
        argv[-1] = "an <|im_end|> inside a prompt"
        problem = "a message holds '<|im_end|>'"
    assert main(argv) == 2
    written = capsys.readouterr()
    errors = [line for line in written.err.splitlines() if line.startswith("fastattn: error: ")]
    assert len(errors) == 1
    assert problem in errors[0]
    assert written.out == ""
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


def test_numbers_outside_the_vocabulary_end_the_training_with_one_line(place, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(place)
    options = ["--model.block_size", "8", "--steps", "1", "--tensorboard", "false", "--run", str(tmp_path / "run")]
    assert main(["train", "--data.source", "numbers", *options, "--sample_tokens", "0"]) == 2
    assert "a number is not in the vocabulary: a file is damaged" in capsys.readouterr().err


def test_standard_input_without_a_line_is_refused(place, monkeypatch, capsys):
    for command in (["predict", "number"], ["generate", "lm"]):
        monkeypatch.chdir(place)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
        assert main([*command, "--input", "-"]) == 2
        assert "must have at least one line, got none from standard input" in capsys.readouterr().err


def test_any_value_in_a_file_of_a_run_is_read_or_refused_in_one_line(place, capsys, tmp_path):
    """Each value of data.json and meta.json, also if it is missing, and of the kinds that JSON has, in turn."""
    missing = object()
    kinds = {"number": (missing, None, "x"), "classes": (5, [5]), "lm": (missing, {"a": "b"})}
    for run, command in (("number", "predict"), ("classes", "predict"), ("lm", "generate")):
        folder = shutil.copytree(place / run, tmp_path / run)
        ask = [command, str(folder), "w1"] if command == "predict" else [command, str(folder), "--prompt", "line"]
        ask += ["--accelerator", "cpu"]
        for file in (folder / "data.json", *folder.glob("checkpoints/*/meta.json")):
            right = json.loads(file.read_text())
            for name in right:
                for value in kinds[run]:
                    wrong = {**right, name: value}
                    file.write_text(json.dumps({key: item for key, item in wrong.items() if item is not missing}))
                    assert main(ask) in (0, 2), (file, name, value)
                    errors = capsys.readouterr().err
                    assert errors.count("fastattn: error: ") == len(errors.splitlines()) <= 1
            file.write_text(json.dumps(right))


def test_a_state_without_its_parts_is_refused(place, capsys, tmp_path):
    folder = shutil.copytree(place / "lm", tmp_path / "lm")
    for checkpoint in folder.glob("checkpoints/*"):
        torch.save({"step": 1}, checkpoint / "state.pt")
        meta = json.loads((checkpoint / "meta.json").read_text())
        meta["sha256"]["state.pt"] = hashlib.sha256((checkpoint / "state.pt").read_bytes()).hexdigest()
        (checkpoint / "meta.json").write_text(json.dumps(meta))
    (folder / "checkpoints" / "step-none").mkdir()  # is no checkpoint
    assert main(["train", "--resume", str(folder), "--steps", "9"]) == 2
    assert "state.pt must hold best_score, optimizer, precision, stale, step" in capsys.readouterr().err
    assert main(["generate", str(folder), "--prompt", "line", "--checkpoint", "9"]) == 2
    assert "'last' or a saved step (1), got '9'" in capsys.readouterr().err


# --- properties -------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    rows=st.lists(st.fixed_dictionaries({"text": VALUES, "label": VALUES, "other": VALUES}), min_size=1, max_size=3),
    kind=st.sampled_from(["class", "classes", "number"]),
    columns=st.sampled_from([{}, {"pair": "other"}, {"target": "other"}, {"messages": "other"}]),
)
def test_any_table_is_read_or_refused_in_one_line(tmp_path_factory, rows, kind, columns):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = Columns(label="label", label_kind=kind, **columns)
    documents, reason = None, ""
    try:
        documents = read_documents(str(path), columns)["all"]
    except UsageError as error:
        reason = str(error)
    assert documents or "any.jsonl, line " in reason
    if not documents:
        return
    assert len(documents) == len(rows)
    for field, column in columns_read(columns).items():
        for got, row in zip(getattr(documents, field), rows, strict=True):
            value = row[column]
            if field == "labels" and kind == "number":
                assert got == float(value)
            elif field == "labels" and kind == "classes":
                names = value if isinstance(value, list) else str(value).split(",")
                assert got == tuple(sorted({str(name).strip() for name in names} - {""}))
            elif field == "labels":
                assert got == str(value).strip()
            elif columns.messages is None:
                assert got == str(value)


def test_an_export_to_a_full_disk_is_one_line_and_leaves_nothing(place, monkeypatch, capsys, tmp_path):
    def fail(*_arguments, **_options):  # safetensors has an error of its own for it
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    assert main(["export", str(place / "lm"), str(tmp_path / "out"), "--accelerator", "cpu"]) == 2
    assert "model.safetensors could not be written: I/O error: No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_user_without_a_name_or_home_is_told_where_data_were_looked_for(monkeypatch):
    """This happens in a container whose user id is not in its list of users."""

    def unknown(number):
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(UsageError, match="set FASTATTN_DATA, name the file itself, or use 'topics'"):
        find_data("no_such_set", "file")


def test_a_pipe_is_read_line_by_line_and_a_missing_standard_input_is_said(place, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.write(writer, b"one\n\ntwo\n")
    os.close(writer)
    run = str(place / "number")
    assert main(["predict", run, "--input", f"/dev/fd/{reader}", "--accelerator", "cpu"]) == 0
    os.close(reader)
    assert [line.split("\t")[-1] for line in capsys.readouterr().out.splitlines()] == ["one", "", "two"]
    monkeypatch.setattr("sys.stdin", None)
    assert main(["predict", run, "--input", "-"]) == 2
    assert "--input - reads standard input, which this process does not have" in capsys.readouterr().err
