"""Labels that are several classes or numbers, and documents of two texts: reading, training, scores and predictions."""

import io
import json
import math

import numpy as np
import pytest
from training_cases import WORDS, numbers, tiny_config, tiny_model

from fastattn.cli import main
from fastattn.training.config import Columns, DataConfig
from fastattn.training.data.sources import read_documents
from fastattn.training.data.split import split_documents
from fastattn.training.inspect.scores import regression_scores, several_classes_scores
from fastattn.training.messages import UsageError
from fastattn.training.runs.train import train

COLOURS = WORDS[:5]


def rows_of(kind, n=240):
    """Documents of words: the classes are the colours in them, the number is how many, the pair decides the class."""
    generator = np.random.default_rng(0)
    for _ in range(n):
        words = generator.choice(WORDS, generator.integers(1, 9)).tolist()
        row = {"text": " ".join(words)}
        if kind == "pair":
            other = generator.choice(WORDS[:2]).item()
            row |= {"other": f"{other} {generator.integers(10)}", "label": other}
        else:
            colours = sorted({*words} & {*COLOURS})
            row["label"] = colours if kind == "classes" else float(sum(word in COLOURS for word in words))
        yield row


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(table, run, **columns):
    data = DataConfig(source=str(table), tokenizer="word", vocab_size=60, columns=Columns(label="label", **columns))
    data.validation_fraction = data.test_fraction = 0.15
    options = {"steps": 100, "batch_size": 16, "evaluate_every": 50, "sample_tokens": 0, "task": "classify"}
    return tiny_config(run, "", data=data, model=tiny_model(n_layer=1, block_size=24), **options)


def output_of(capsys, *arguments):
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{kind: (table, run)} of trained models."""
    folder, found = tmp_path_factory.mktemp("kinds"), {}
    for kind in ("classes", "number", "pair"):
        table = write_rows(folder / f"{kind}.jsonl", rows_of(kind))
        how = {"pair": "other"} if kind == "pair" else {"label_kind": kind}
        config = config_of(table, folder / kind, **how)
        config.optim.learning_rate = 2e-2
        if kind != "pair":  # a sum over the words suits both
            config.model.body, config.optim.learning_rate = "bag_of_words", 0.3
        assert train(config) == 0
        found[kind] = table, folder / kind
    return found


@pytest.mark.parametrize("kind", ["classes", "number", "pair"])
def test_what_decides_the_label_is_learnt(runs, kind, capsys):
    table, run = runs[kind]
    losses = numbers(run, "validation_loss")
    assert losses[-1] < losses[0] / 2
    report = json.loads(output_of(capsys, "evaluate", run, "--json"))
    assert report["verdict"].startswith("better than the ")
    score = {"classes": "exact_match", "number": "pearson", "pair": "accuracy"}[kind]
    assert report[score] > 0.8
    whole = json.loads(output_of(capsys, "evaluate", run, "--json", "--data", table, "--output", run.parent / "out"))
    assert whole["examples"] == 240
    assert whole[score] > 0.8
    assert (run / "report.md").read_text()


def test_predictions_of_several_classes(runs, capsys, tmp_path):
    _, run = runs["classes"]
    (tmp_path / "lines.txt").write_text("red one\none two\n")
    first, second = map(json.loads, output_of(capsys, "predict", run, "--json", "--input", tmp_path / "lines.txt")
                        .splitlines())  # fmt: skip
    assert (first["classes"], second["classes"]) == (["red"], [])
    assert first["probabilities"].keys() == {*COLOURS}
    assert output_of(capsys, "predict", run, "red green one").startswith("green,red\t")


def test_predictions_of_numbers(runs, capsys):
    _, run = runs["number"]
    many, none = (json.loads(line)["number"] for line in output_of(
        capsys, "predict", run, "--json", "red green blue black", "one two one two").splitlines())  # fmt: skip
    assert many > none + 2
    assert float(output_of(capsys, "predict", run, "one two").split("\t")[0]) == pytest.approx(none, abs=1)


def test_predictions_of_pairs(runs, capsys, monkeypatch, tmp_path):
    table, run = runs["pair"]
    assert output_of(capsys, "predict", run, "one two", "red 3").startswith("red\t")
    assert output_of(capsys, "predict", run, "one two", "green 3").startswith("green\t")
    rows = [json.loads(line) for line in output_of(capsys, "predict", run, "--json", "--input", table).splitlines()]
    assert [row["pair"] for row in rows] == [json.loads(line)["other"] for line in table.read_text().splitlines()]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\tred 1\none\tgreen 1\n")))
    assert [line[0] for line in output_of(capsys, "predict", run, "--input", "-").splitlines()] == ["r", "g"]
    (tmp_path / "half.txt").write_text("one\tred\nonly one text\n")
    for arguments, problem in (
        (["one two"], "this run reads pairs of texts: TEXT must be given twice for each, got 1"),
        (["--input", tmp_path / "half.txt"], "line 2 must have two texts with a tab between them"),
        (["--input", table, "--pair_column", "none"], "no column 'none' among text, other, label"),
    ):
        assert main(["predict", str(run), *map(str, arguments)]) == 2
        assert problem in capsys.readouterr().err
    _, plain = runs["number"]
    assert main(["predict", str(plain), "--input", str(table), "--pair_column", "other"]) == 2


def test_two_texts_share_the_room_and_the_longer_one_is_cut(runs):
    import fastattn

    task = fastattn.load_run(runs["pair"][1]).task
    task.config.model.block_size = 9  # six tokens besides the three marks
    begin, end = task.specials["[CLS]"], task.specials["[SEP]"]
    first, second = list(range(100, 110)), list(range(200, 210))
    assert task.frame_pair(first, second) == [begin, 100, 101, 102, end, 200, 201, 202, end]
    assert task.frame_pair(first, second[:1]) == [begin, *first[:5], end, 200, end]
    assert task.frame_pair(first[:2], second) == [begin, 100, 101, end, *second[:4], end]
    with pytest.raises(UsageError, match="reads two texts at a time"):
        task.predict(None, ["one"])


@pytest.mark.parametrize(("value", "expected"), [
    (["b", "a", "b"], ("a", "b")), ([], ()), ("b, a,", ("a", "b")), ("", ()), ([1, True], ("1", "True")),
    ([["a"]], "must be a text or a number"), ([None], "is empty"), ([" "], "has an empty class"), (None, "is empty"),
    ({"a": 1}, "must be a text or a number, got an object"), ("\ud800", "half of a surrogate pair"),
])  # fmt: skip
def test_several_classes_are_read_as_they_are_meant(tmp_path, value, expected):
    table = write_rows(tmp_path / "t.jsonl", [{"text": "x", "label": value}])
    columns = Columns(label="label", label_kind="classes")
    if isinstance(expected, tuple):
        assert read_documents(str(table), columns)["all"].labels == [expected]
        return
    with pytest.raises(UsageError, match=rf"t\.jsonl, line 1: column 'label'.* ?{expected}"):
        read_documents(str(table), columns)


@pytest.mark.parametrize("value", ["3.5", 3.5, 2, "-1e3", " 7 ", "x", "nan", math.inf, True, "", "1_000", None, [1.0]])
def test_numbers_are_those_of_float_or_refused(tmp_path, value):
    table = write_rows(tmp_path / "t.jsonl", [{"text": "x", "label": value}])
    columns = Columns(label="label", label_kind="number")
    if value in ("3.5", 3.5, 2, "-1e3", " 7 ") and value is not True:
        assert read_documents(str(table), columns)["all"].labels == [float(value)]
        return
    with pytest.raises(UsageError, match=r"t\.jsonl, line 1: column 'label'"):
        read_documents(str(table), columns)


def test_split_and_clean_keep_labels_and_pairs(tmp_path, capsys):
    rows = [{**row, "other": f"pair {i}"} for i, row in enumerate(rows_of("classes", 60))]
    rows[7]["label"] = ["only here"]
    table = write_rows(tmp_path / "t.jsonl", rows)
    how = ["--columns.label", "label", "--columns.label_kind", "classes", "--columns.pair"]
    assert main(["data", "clean", str(table), *how, "other", "--output", str(tmp_path / "clean.jsonl")]) == 0
    output_of(capsys, "data", "split", tmp_path / "clean.jsonl", *how, "pair", "--output", tmp_path / "parts")
    columns = Columns(label="label", label_kind="classes", pair="pair")
    parts = read_documents(str(tmp_path / "parts"), columns)
    known = {name for label in parts["train"].labels for name in label}
    assert all(known.issuperset(label) for part in parts.values() for label in part.labels)
    kept = {pair: (text, label) for p in parts.values() for pair, text, label in zip(p.pairs, p.texts, p.labels,
                                                                                    strict=True)}  # fmt: skip
    assert kept == {row["other"]: (row["text"], tuple(sorted(row["label"]))) for row in rows}
    counted = json.loads(output_of(capsys, "data", "stats", tmp_path / "clean.jsonl", *how, "pair"))
    assert counted["all"]["classes"]["only here"] == 1


def test_each_class_of_several_is_in_training_for_any_seed(tmp_path):
    table = write_rows(tmp_path / "t.jsonl", [{"text": f"t{i}", "label": [f"c{i % 20}"]} for i in range(40)])
    documents = read_documents(str(table), Columns(label="label", label_kind="classes"))["all"]
    for seed in range(20):
        parts = split_documents(documents, 0.3, 0.3, seed)
        assert {name for label in parts["train"].labels for name in label} == {f"c{i}" for i in range(20)}


def test_scores_are_those_of_scikit_learn_and_scipy():
    stats = pytest.importorskip("scipy.stats")
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    truth, guess = generator.integers(0, 4, 50).astype(float), generator.normal(size=50).round(1)
    scores = regression_scores(truth, guess)
    assert scores["spearman"] == pytest.approx(stats.spearmanr(truth, guess).statistic)
    assert scores["pearson"] == pytest.approx(stats.pearsonr(truth, guess).statistic)
    assert scores["r2"] == pytest.approx(metrics.r2_score(truth, guess))
    assert scores["mean_absolute_error"] == pytest.approx(metrics.mean_absolute_error(truth, guess))
    assert regression_scores([1, 1], [0, 3])["pearson"] is None
    for classes in (1, 3):
        truth, guess = generator.random((2, 40, classes)) > 0.6
        scores = several_classes_scores(truth, guess, list("abc")[:classes])
        expected = [metrics.f1_score(truth[:, i], guess[:, i]) for i in range(classes)]
        assert [row["f1"] for row in scores["classes"]] == pytest.approx(expected)
        assert scores["averages"]["macro"]["f1"] == pytest.approx(np.mean(expected))


@pytest.mark.parametrize(("changes", "message"), [
    ({"label_kind": "number", "select": "accuracy"}, "select must be 'loss' for the task classify with label_kind num"),
    ({"label_kind": "classes", "class_weights": "balanced"}, "class_weights must be 'none' for the task classify with"),
    ({"label_kind": "number", "task": "masked_lm"}, "data.columns.label_kind must be left out for the task masked_lm"),
    ({"pair": "other", "task": "translate"}, "data.columns.pair must be left out for the task translate"),
    ({"label_separator": ";"}, "columns.label_separator must be left out unless label_kind is classes"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, capsys, changes, message):
    table = write_rows(tmp_path / "t.jsonl", rows_of("number", 30))
    options = ["--task", "classify"] if "task" not in changes else []
    for name, value in changes.items():
        options += [f"--data.columns.{name}" if name in vars(Columns()) else f"--{name}", value]
    assert main(["train", "--data.source", str(table), *options, "--run", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_labels_without_a_difference_are_refused(tmp_path):
    table = write_rows(tmp_path / "t.jsonl", [{"text": f"t {i}", "label": 1} for i in range(40)])
    with pytest.raises(UsageError, match=r"all numbers of the training part are 1\.0"):
        train(config_of(table, tmp_path / "run", label_kind="number"))
    table = write_rows(tmp_path / "t.jsonl", [{"text": f"t {i}", "label": []} for i in range(40)])
    with pytest.raises(UsageError, match="no document of the training part has a class"):
        train(config_of(table, tmp_path / "run", label_kind="classes"))
