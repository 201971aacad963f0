"""A trained run on data of another file: evaluate for every task, without the data it was trained on."""

import io
import json

import pytest

pytest.importorskip("lightning_fabric", reason="needs the packages of fastattn[train]")
from training_cases import DOCUMENT_TASKS, table_config, tiny_config, write_table

from fastattn.cli import main
from fastattn.training.runs.train import train


@pytest.fixture(scope="module", params=DOCUMENT_TASKS)
def trained(request, tmp_path_factory):
    """(task, run, file with the documents of its validation part)."""
    folder, task = tmp_path_factory.mktemp(request.param), request.param
    write_table(folder / "table.jsonl")
    assert main(["data", "split", str(folder / "table.jsonl"), "--columns.label", "label", "--columns.target", "target",
                 "--output", str(folder / "parts")]) == 0  # fmt: skip
    train(table_config(task, folder / "run", folder / "parts", steps=3, evaluate_every=3))
    return task, folder / "run", folder / "parts" / "validation.jsonl"


def report(capsys, *arguments):
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments), "--accelerator", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_another_file_has_the_scores_of_the_same_documents(trained, tmp_path, capsys):
    _, run, file = trained
    expected = report(capsys, run, "--split", "validation")
    other = tmp_path / "other.jsonl"
    other.write_text(file.read_text())
    found = report(capsys, run, "--data", other, "--output", tmp_path / "out")
    assert (found.pop("source"), found.pop("split")) == (str(other), "all")
    assert expected.keys() - found.keys() == {"source", "split"}
    assert {name: value for name, value in expected.items() if name in found} == found
    renamed = other.read_text().replace('"text"', '"body"')
    other.write_text(renamed)
    again = report(capsys, run, "--data", other, "--columns.text", "body", "--output", tmp_path / "out")
    assert again["documents"] == found["documents"]


def test_the_training_data_may_be_gone(trained, tmp_path, capsys):
    _, run, file = trained
    kept = file.read_text()
    (tmp_path / "kept.jsonl").write_text(kept)
    file.write_text('{"text": "changed", "label": "x", "target": "y"}\n')
    try:
        assert main(["evaluate", str(run)]) == 2
        assert report(capsys, run, "--data", tmp_path / "kept.jsonl", "--output", tmp_path / "out")
    finally:
        file.write_text(kept)


def test_what_another_file_cannot_be(trained, tmp_path, capsys):
    task, run, _ = trained
    (tmp_path / "other.jsonl").write_text('{"text": "one two", "label": "unheard", "target": "x"}\n')
    wrong = [
        (["--columns.text", "body"], "text is for --data only, got 'body'"),
        (["--data", str(tmp_path / "other.jsonl"), "--split", "test"], "--split cannot be used with --data"),
        (["--data", str(tmp_path / "none.jsonl")], "is neither a file"),
    ]
    if task == "classify":
        wrong.append((["--data", str(tmp_path / "other.jsonl")], "class 'unheard' is not in the training part"))
    if task != "translate":
        wrong.append((["--beams", "2"], "beams is for task translate only"))
    for options, message in wrong:
        assert main(["evaluate", str(run), "--accelerator", "cpu", *options]) == 2
        assert message in capsys.readouterr().err


TEXTS = ["one two", "", "three\u2028four", "five"]


@pytest.fixture(params=["a.txt", "a.jsonl", "a.csv", "-"])
def texts_file(request, tmp_path, monkeypatch):
    """TEXTS as a file of each kind: its options."""
    lines = "".join(f"{text}\n" for text in TEXTS)
    if request.param == "-":
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        return ["--input", "-"]
    path = tmp_path / request.param
    if path.suffix == ".txt":
        path.write_text(lines)
        return ["--input", str(path)]
    if path.suffix == ".csv":
        lines = "body,id\n" + "".join(f'"{text}",{i}\n' for i, text in enumerate(TEXTS))
    else:
        lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
    path.write_text(lines)
    return ["--input", str(path), "--column", "body"]


def test_a_file_has_one_result_a_line(trained, texts_file, capsys):
    task, run, _ = trained
    capsys.readouterr()
    if task == "masked_lm":
        assert main(["predict", str(run), *texts_file]) == 2
        assert "must have a [MASK], the place of a token to predict" in capsys.readouterr().err
        return
    command = ["predict", str(run), "--json"] if task == "classify" else ["generate", str(run)]
    assert main([*command, "--accelerator", "cpu", *texts_file]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
    assert [row["text"] for row in rows] == TEXTS
    if task == "classify":
        assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5) for row in rows)
        assert all(row["probabilities"][row["class"]] == max(row["probabilities"].values()) for row in rows)
        assert main(["predict", str(run), "--accelerator", "cpu", *TEXTS]) == 0
        assert [line.split("\t")[0] for line in capsys.readouterr().out.split("\n") if line] == [
            r["class"] for r in rows
        ]


def test_a_call_without_a_text_is_refused(trained, capsys):
    run = str(trained[1])
    for command in (["predict", run], ["generate", run], ["generate", run, "--prompt", "a", "--input", "b"]):
        assert main(command) == 2
        assert "needs" in capsys.readouterr().err


def test_a_language_model_continues_each_line(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("abc " * 200)
    train(tiny_config(tmp_path / "run", tmp_path / "text.txt", steps=1, evaluate_every=1, sample_prompt=None))
    (tmp_path / "prompts.txt").write_text("a\nbc\n")
    capsys.readouterr()
    options = ["--max_new_tokens", "3", "--accelerator", "cpu"]
    assert main(["generate", str(tmp_path / "run"), "--input", str(tmp_path / "prompts.txt"), *options]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["a", "bc"]
    assert main(["generate", str(tmp_path / "run"), "--prompt", "bc", *options]) == 0
    assert capsys.readouterr().out == rows[1]["text"] + "\n"
    (tmp_path / "prompts.txt").write_text("a\n\nbc\n")
    assert main(["generate", str(tmp_path / "run"), "--input", str(tmp_path / "prompts.txt"), *options]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert "input: text 2 must have at least one token" in written.err


def test_a_masked_language_model_fills_in_each_mask(trained, capsys, tmp_path):
    task, run, _ = trained
    if task != "masked_lm":
        return
    (tmp_path / "lines.txt").write_text("one [MASK] two\n[MASK] red [MASK]\n")
    capsys.readouterr()
    assert main(["predict", str(run), "--json", "--accelerator", "cpu", "--input", str(tmp_path / "lines.txt")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(row["masks"]) for row in rows] == [1, 2]
    for row in rows:
        likeliest = [max(mask, key=mask.get) for mask in row["masks"]]
        words = iter(likeliest)
        assert row["filled"].split() == [next(words) if w == "[MASK]" else w for w in row["text"].split()]
        assert all(0 < sum(mask.values()) <= 1 and not any(t.startswith("[") for t in mask) for mask in row["masks"])
    assert main(["predict", str(run), "--accelerator", "cpu", "one [MASK] two"]) == 0
    assert capsys.readouterr().out == rows[0]["filled"] + "\n"
    assert main(["predict", str(run), "[MASK] " * 40]) == 2
    assert "must have at most 14 tokens, got 40" in capsys.readouterr().err


def test_several_samples_are_those_of_one_seed_after_the_other(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("abcd " * 200)
    train(tiny_config(tmp_path / "run", tmp_path / "text.txt", steps=1, evaluate_every=1, sample_prompt=None))
    command = ["generate", str(tmp_path / "run"), "--prompt", "a", "--max_new_tokens", "9", "--accelerator", "cpu"]
    capsys.readouterr()
    assert main([*command, "--seed", "4", "--samples", "3"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["sample"] for row in rows] == [0, 1, 2]
    for number, row in enumerate(rows):
        assert main([*command, "--seed", str(4 + number)]) == 0
        assert capsys.readouterr().out == row["text"] + "\n"
    assert len({row["text"] for row in rows}) > 1
    for wrong in (["--samples", "0"], ["--samples", "2", "--temperature", "0"], ["--samples", "2", "--beams", "2"]):
        assert main([*command, *wrong]) == 2
        assert "samples must be" in capsys.readouterr().err
