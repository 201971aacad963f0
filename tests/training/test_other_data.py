"""A trained run on data of another file: evaluate for every task, without the data it was trained on."""

import json

import pytest

pytest.importorskip("lightning_fabric", reason="needs the packages of fastattn[train]")
from training_cases import DOCUMENT_TASKS, table_config, write_table

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
