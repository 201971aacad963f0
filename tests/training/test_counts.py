"""What is reported is what happened: unknown, cut, empty and padded tokens, baselines, units, the chosen checkpoint."""

import json

import pytest

pytest.importorskip("lightning_fabric", reason="needs the packages of fastattn[train]")
import torch
from training_cases import DOCUMENT_TASKS, TEXT, table_config, tiny_config, tiny_model, write_table

from fastattn.cli import main
from fastattn.training.config import DataConfig, OptimConfig
from fastattn.training.data.batches import IGNORED
from fastattn.training.data.tokenizer import END, KINDS, PAD, UNKNOWN
from fastattn.training.evaluation.compare import compare_runs
from fastattn.training.evaluation.evaluate import evaluate_run
from fastattn.training.inspect import figures
from fastattn.training.messages import UsageError
from fastattn.training.runs import metrics
from fastattn.training.runs.train import train
from fastattn.training.tasks.registry import make_task


@pytest.fixture
def table(tmp_path):
    rows = write_table(tmp_path / "table.jsonl")
    with open(tmp_path / "table.jsonl", "a") as file:
        file.write(
            "".join(json.dumps({**row, "text": "!! " + row["text"] + " and more" * 9}) + "\n" for row in rows[:9])
        )
    return tmp_path / "table.jsonl"


def data(table, kind, **changes):
    columns = table_config("classify", "run", table).data.columns
    return DataConfig(source=str(table), tokenizer=kind, vocab_size=300, columns=columns, test_fraction=0.2, **changes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", DOCUMENT_TASKS)
def test_counts_are_those_of_the_texts_and_batches(tmp_path, table, task, kind):
    config = table_config(task, tmp_path / "run", table, data=data(table, kind), model=tiny_model(block_size=12))
    made = make_task(config)
    for name, counts in made.counts.items():
        part = made.parts[name]
        texts = [part.texts, part.targets] if task == "translate" else [part.texts]
        encoded = [[made.tokenizer.encode(text) for text in side] for side in texts]
        documents = list(zip(*encoded, strict=True))
        unknown = made.tokenizer.number_of(UNKNOWN)
        assert counts.documents == len(part)
        assert counts.tokens == sum(len(numbers) for sides in documents for numbers in sides)
        assert counts.unknown == sum(n == unknown for sides in documents for numbers in sides for n in numbers)
        lost = [sum(max(0, len(numbers) - 10) for numbers in sides) for sides in documents]
        if task == "masked_lm":  # cut into pieces, and no piece is lost
            lost = [0] * len(lost)
        assert (counts.cut, counts.tokens_cut) == (sum(n > 0 for n in lost), sum(lost))
        if task != "masked_lm":
            pad = made.specials[PAD]
            batches = map(made.train_rows, range(made.steps_an_epoch)) if name == "train" else made.rows(name)
            tensors = [t for rows in batches for t in ((rows[0], rows[2]) if task == "translate" else rows[:1])]
            held = sum(int((tensor != pad).sum()) for tensor in tensors)
            assert counts.padding == pytest.approx(1 - held / sum(tensor.numel() for tensor in tensors), abs=0.02)
    assert made.counts["train"].cut > 0 or task == "masked_lm"


@pytest.mark.parametrize("kind", ["word", "char"])
def test_a_cut_target_has_no_end_to_learn(tmp_path, table, kind):
    config = table_config("translate", tmp_path / "run", table, data=data(table, kind), model=tiny_model(block_size=6))
    task = make_task(config)
    rows = next(task.rows("train"))
    assert int((rows[3] != IGNORED).sum(1).max()) == 5
    whole = cut = 0
    for (_, framed), text in zip(task.examples["train"], task.parts["train"].targets, strict=True):
        numbers = task.tokenizer.encode(text)
        fits = len(numbers) <= 4
        assert framed[1:] == ([*numbers, task.specials[END]] if fits else numbers[:5])
        whole, cut = whole + fits, cut + (not fits)
    assert cut
    assert whole or kind == "char"


def test_texts_of_another_language_are_refused_or_told(tmp_path, capsys):
    (tmp_path / "english.txt").write_text(TEXT)
    (tmp_path / "russian.txt").write_text("Слова другого языка\n" * 200)
    (tmp_path / "mixed.txt").write_text(TEXT + "Слова другого языка\n" * 40)
    word = DataConfig(source=str(tmp_path / "english.txt"), tokenizer="word")
    train(tiny_config(tmp_path / "start", tmp_path / "english.txt", data=word, steps=1, sample_prompt=None))
    options = ["finetune", "--start", str(tmp_path / "start"), "--data.tokenizer", "word", "--steps", "1"]
    options += ["--tensorboard", "false", "--accelerator", "cpu"]
    assert main([*options, "--data.source", str(tmp_path / "russian.txt"), "--run", str(tmp_path / "a")]) == 2
    assert "the vocabulary does not know 100.0% of the training tokens" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert main([*options, "--data.source", str(tmp_path / "mixed.txt"), "--run", str(tmp_path / "b")]) == 0
    written = capsys.readouterr()
    assert "of the tokens unknown" in written.out
    assert "the vocabulary does not know 100.0% of the tokens of the test part" in written.err


@pytest.mark.parametrize("kind", KINDS)
def test_bits_per_character_need_every_character(tmp_path, kind):
    """Tokens that lose case, spaces or unknown words would make a text shorter or easier than it is."""
    (tmp_path / "a.txt").write_text(TEXT)
    data = DataConfig(source=str(tmp_path / "a.txt"), tokenizer=kind, vocab_size=300)
    config = tiny_config(tmp_path / "run", tmp_path / "a.txt", data=data, steps=1, sample_tokens=0)
    train(config)
    report = evaluate_run(tmp_path / "run", config, accelerator="cpu")
    known = kind in ("char", "byte", "bpe")
    assert ("bits_per_character" in report) == ("characters" in report) == known
    assert report["unknown_tokens"] == make_task(config).counts["test"].unknown


@pytest.mark.parametrize("task", DOCUMENT_TASKS)
def test_counts_and_checkpoint_are_in_the_report(tmp_path, table, task, capsys):
    config = table_config(task, tmp_path / "run", table, data=data(table, "word"), steps=2, evaluate_every=1)
    train(config)
    out = capsys.readouterr().out
    counts = make_task(config).counts
    for name, part in counts.items():
        assert f"  {name}: {part.text()}\n" in out
    for split in counts:
        report = evaluate_run(tmp_path / "run", config, split=split, accelerator="cpu")
        assert counts[split].facts().items() <= report.items()
        assert report["checkpoint"] == "the best, with the lowest validation loss"
    steps = {evaluate_run(tmp_path / "run", config, checkpoint=n, accelerator="cpu")["checkpoint"] for n in "12"}
    assert len(steps) == 2
    assert any(text.startswith("not the best, which is step") for text in steps)


def test_a_classifier_is_compared_with_the_most_frequent_class(tmp_path, capsys):
    rows = [{"text": f"{i % 7} {i}", "label": "ham" if i % 5 else "spam", "target": "x"} for i in range(200)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = table_config("classify", tmp_path / "run", tmp_path / "t.jsonl", steps=1, evaluate_every=1)
    train(config)
    assert "no better than always 'ham', which reaches the validation accuracy 0.8" in capsys.readouterr().err
    report = evaluate_run(tmp_path / "run", config, accelerator="cpu")
    truth = make_task(config).parts["validation"].labels
    assert report["baseline"] == "always 'ham'"
    assert report["baseline_accuracy"] == truth.count("ham") / len(truth)
    assert report["verdict"].startswith("NO BETTER than") == (report["accuracy"] <= report["baseline_accuracy"])
    assert main(["evaluate", str(tmp_path / "run"), "--accelerator", "cpu"]) == 0
    written = capsys.readouterr().out
    for name in ("baseline_accuracy", "verdict", "macro_f1", "documents_cut"):
        assert name in written
        assert name == "macro_f1" or name in (tmp_path / "run" / "report.md").read_text()


def drawn(monkeypatch, module):
    """Collects the figures that are saved during the test."""
    kept = []
    monkeypatch.setattr(module, "save_png", lambda figure, path: kept.append(figure))
    return kept


@pytest.mark.parametrize(
    ("task", "unit"),
    [("lm", "token"), ("masked_lm", "masked token"), ("classify", "document"), ("translate", "target token")],
)
def test_the_loss_curve_has_the_unit_of_the_task_and_the_chosen_checkpoint(tmp_path, table, monkeypatch, task, unit):
    kept = drawn(monkeypatch, metrics)
    optim = OptimConfig(warmup_steps=1, label_smoothing=0.1)
    train(table_config(task, tmp_path / "run", table, steps=4, evaluate_every=2, optim=optim))
    axes, *right = kept[0].axes
    assert axes.get_ylabel() == f"loss (nats a {unit})"
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    texts = " ".join(text.get_text() for text in kept[0].legends[0].get_texts())
    assert "train loss, with label smoothing 0.1" in texts
    assert "chosen checkpoint, step" in texts
    assert [a.get_ylabel() for a in right] == (["validation accuracy"] if task in ("masked_lm", "classify") else [])


def test_the_attention_map_says_who_looks_at_whom(tmp_path, monkeypatch):
    kept = drawn(monkeypatch, figures)
    figures.plot_attention(tmp_path / "a.png", torch.rand(3, 2, 4), list("ab"), keys=list("wxyz"))
    panels = kept[0].axes[:3]
    assert [a.get_ylabel() for a in panels] == ["query", "", "query"]
    assert [a.get_xlabel() for a in panels] == ["", "key, to which it attends", "key, to which it attends"]


def test_the_reliability_diagram_says_what_its_marks_are(tmp_path, monkeypatch):
    kept = drawn(monkeypatch, figures)
    empty, filled = {"low": 0.0, "examples": 0, "confidence": None, "accuracy": None}, {"low": 0.5, "examples": 3}
    figures.plot_calibration(tmp_path / "a.png", [empty, {**filled, "confidence": 0.7, "accuracy": 0.6}])
    names = [text.get_text() for text in kept[0].legends[0].get_texts()]
    assert names == ["means of a bin", "as accurate as confident"]
    top, bottom = kept[0].axes
    assert [line.get_xydata().tolist() for line in top.lines] == [[[0.7, 0.6]], [[0, 0], [1, 1]]]
    assert (top.get_ylabel(), bottom.get_ylabel()) == ("accuracy", "examples")
    assert bottom.get_xlabel() == "probability of the predicted class"


def test_documents_without_a_token_are_counted(tmp_path):
    rows = [{"text": " " * i if i % 3 else f"a b {i}", "label": "x" if i % 2 else "y"} for i in range(60)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = table_config("classify", tmp_path / "run", tmp_path / "t.jsonl")
    config.data.columns.target = None
    for name, counts in (task := make_task(config)).counts.items():
        assert counts.empty == sum(not text.strip() for text in task.parts[name].texts)


def test_nearly_all_unknown_training_tokens_are_refused(tmp_path):
    start = tmp_path / "start"
    write_table(tmp_path / "table.jsonl")
    train(table_config("classify", start, tmp_path / "table.jsonl", steps=1, evaluate_every=1))
    rows = [{"text": f"совсем другие слова{i}", "label": "x" if i % 2 else "y"} for i in range(60)]
    (tmp_path / "ru.jsonl").write_text("".join(json.dumps({**row, "target": "x"}) + "\n" for row in rows))
    with pytest.raises(UsageError, match="the vocabulary does not know"):
        train(table_config("classify", tmp_path / "run", tmp_path / "ru.jsonl", start=str(start), steps=1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("task", "model", "trained"),
    [
        ("lm", {}, "all"),
        ("lm", {"tied": False}, "lora"),
        ("classify", {"body": "cnn"}, "all"),
        ("translate", {}, "all"),
    ],
)
def test_evaluate_and_compare_count_the_same_parameters(tmp_path, capsys, task, model, trained):
    write_table(tmp_path / "table.jsonl")
    run = tmp_path / "run"
    options = {"steps": 1, "evaluate_every": 1, "model": tiny_model(n_layer=1, **model)}
    assert train(table_config(task, run, tmp_path / "table.jsonl", **options)) == 0
    if trained == "lora":
        options |= {"trained": "lora", "start": str(run)}
        run = tmp_path / "lora"
        assert train(table_config(task, run, tmp_path / "table.jsonl", **options)) == 0

    def counted():
        header, _, row = compare_runs([str(run)]).splitlines()
        return int(row.split(" | ")[header.split(" | ").index("parameters")].replace(",", ""))

    before = counted()  # in the checkpoint
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json", "--split", "validation"]) == 0
    assert before == counted() == json.loads(capsys.readouterr().out)["parameters"]
