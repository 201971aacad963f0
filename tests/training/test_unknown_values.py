"""An unknown or non-finite number never ends a run or counts as 0 in a logger, line or report."""

import itertools
import json
import math
import sys

import pytest

pytest.importorskip("jsonargparse", reason="needs the packages of fastattn[train]")
pytest.importorskip("lightning_fabric", reason="needs the packages of fastattn[train]")
pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
from training_cases import DOCUMENT_TASKS, TEXT, table_config, tiny_config, write_table

from fastattn.cli import command_for, main
from fastattn.training.config import DataConfig, OptimConfig
from fastattn.training.messages import UsageError
from fastattn.training.runs import throughput
from fastattn.training.runs.metrics import COLUMNS, MetricsLog, plot_losses, read_metrics
from fastattn.training.runs.train import train

VALUES = [name for name in COLUMNS if name != "step"]


@pytest.fixture
def table(tmp_path):
    write_table(tmp_path / "table.jsonl")
    return tmp_path / "table.jsonl"


def logged_tags(run):
    """The names that TensorBoard shows for a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return set(events.Tags()["scalars"]) - {"epoch"}


def all_logged(run):
    return {name for row in read_metrics(run) for name in row} - {"step"}


def assert_says_nothing_of_the_unknown(text):
    assert not {"None", "nan", "NaN", "inf", "MFU"} & set(text.replace(",", " ").split())


@pytest.mark.parametrize(
    ("task", "clip", "peak"),
    [*((task, 0.0, None) for task in ("lm", *DOCUMENT_TASKS)), ("lm", 1.0, None), ("lm", 0.0, 1e18), ("lm", 1.0, 1e18)],
)
def test_a_run_with_every_logger_and_unknown_values(tmp_path, table, monkeypatch, capsys, task, clip, peak):
    """No gradient norm without clipping, no MFU on an unknown device, one step, no test part."""
    monkeypatch.setattr(throughput, "peak_flops", lambda *_: peak)
    run = tmp_path / "run"
    optim = OptimConfig(warmup_steps=0, clip=clip)
    train(table_config(task, run, table, steps=1, evaluate_every=1, tensorboard=True, optim=optim))
    told = capsys.readouterr()
    expected = set(VALUES)
    expected -= {"grad_norm"} if not clip else set()
    expected -= {"mfu"} if peak is None else set()
    expected -= {"validation_accuracy"} if task in ("lm", "translate") else set()
    expected -= {"validation_macro_f1"}  # unless it selects
    assert all_logged(run) == logged_tags(run) == expected
    if peak is None:
        assert_says_nothing_of_the_unknown(told.out + told.err)
    assert main(["evaluate", str(run)]) == main(["compare", str(run)]) == 0
    assert_says_nothing_of_the_unknown(capsys.readouterr().out)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_every_column_of_the_log_may_be_unknown_or_not_finite(tmp_path, capsys, value):
    (tmp_path / "report.json").write_text(json.dumps({"loss": None, "parameters": None}))
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    for step, name in enumerate(VALUES, 1):
        log.log(step, **{**dict.fromkeys(VALUES, 1.0), name: value})
    log.log(len(VALUES) + 1, **dict.fromkeys(VALUES, value))
    log.close()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, len(VALUES) + 2))
    for row, name in zip(rows, VALUES, strict=False):
        assert row.get(name, None) == pytest.approx(value, nan_ok=True)
        assert all(row[other] == 1 for other in VALUES if other != name)
    assert logged_tags(tmp_path) == set(VALUES)
    plot_losses(tmp_path)
    MetricsLog(tmp_path, len(VALUES), tensorboard=True).close()  # like a resumed run
    assert len(read_metrics(tmp_path)) == len(VALUES)
    assert main(["compare", str(tmp_path), "--output", str(tmp_path / "table")]) == 0


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_a_clock_that_stands_still_leaves_the_speed_out(tmp_path, monkeypatch, seconds):
    ticks = itertools.count(0.0, seconds)
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    (tmp_path / "text.txt").write_text(TEXT)
    run = tmp_path / "run"
    train(tiny_config(run, tmp_path / "text.txt", steps=2, evaluate_every=2, tensorboard=True))
    assert ("tokens_per_second" in all_logged(run)) == bool(seconds)
    assert main(["evaluate", str(run)]) == 0
    assert (json.loads((run / "report.json").read_text())["tokens_per_second"] is None) == (not seconds)


def test_a_validation_part_without_a_prediction_is_no_loss_of_0(tmp_path):
    """All its words are unknown to a tokenizer of the training part, so nothing can be masked."""
    (tmp_path / "data").mkdir()
    for part, text in (("train", "red green blue"), ("validation", "one two")):
        (tmp_path / "data" / f"{part}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    data = DataConfig(source=str(tmp_path / "data"), tokenizer="word")
    config = table_config("masked_lm", tmp_path / "run", tmp_path / "data", batch_size=1, steps=1, data=data)
    with pytest.raises(UsageError, match="the validation part must have at least one token to predict"):
        train(config)


@pytest.mark.parametrize("task", DOCUMENT_TASKS)
@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_a_part_without_documents_is_refused_before_a_run_is_made(tmp_path, table, monkeypatch, task, part):
    from fastattn.training.data.documents import Documents
    from fastattn.training.tasks import base

    def parts(data):
        documents = {**read_parts(data), "test": read_parts(data)["validation"]}
        return {**documents, part: Documents([], [], [])}

    read_parts = base.read_parts
    monkeypatch.setattr(base, "read_parts", parts)
    with pytest.raises(UsageError, match=f"the {part} part has no documents|two classes, got none"):
        train(table_config(task, tmp_path / "run", table))
    assert not (tmp_path / "run").exists()


def test_a_missing_tensorboard_is_told_before_a_run_is_made(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"] + ["torch.utils.tensorboard"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    run = tmp_path / "run"
    data = DataConfig(source=str(tmp_path / "text.txt"))
    assert main(["train", "--run", str(run), "--data.source", data.source, "--steps", "1"]) == 2
    error = capsys.readouterr().err
    assert error == f"fastattn: error: missing package tensorboard: run {command_for('train')}\n"
    assert not run.exists()
