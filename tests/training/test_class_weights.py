"""Weights of rare classes, and the best checkpoint by macro F1."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_cases import column, numbers, table_config, tiny_config, tiny_model

from fastattn.training.config import Columns, DataConfig
from fastattn.training.evaluation.evaluate import evaluate_run
from fastattn.training.messages import UsageError
from fastattn.training.runs.train import train
from fastattn.training.tasks.classification import Classification


@pytest.fixture
def rare(tmp_path):
    """A table in which one of ten documents is of the class rare, and words say which one only in part."""
    generator, rows = np.random.default_rng(0), []
    for i in range(300):
        label = "rare" if i % 10 == 0 else "common"
        word = "odd" if generator.random() < (0.9 if label == "rare" else 0.15) else "even"
        rows.append({"text": f"{word} {generator.integers(10**6)}", "label": label})
    (tmp_path / "rare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rare.jsonl"


def config_of(table, run, **changes):
    data = DataConfig(source=str(table), tokenizer="word", vocab_size=40, columns=Columns(label="label"))
    data.validation_fraction = data.test_fraction = 0.2
    options = {"steps": 40, "batch_size": 16, "evaluate_every": 20, "sample_tokens": 0, "task": "classify"}
    return tiny_config(run, "", **{"data": data, "model": tiny_model(), **options, **changes})


def test_the_loss_is_the_weighted_mean_whatever_the_accumulation(rare, tmp_path):
    task = Classification(config_of(rare, tmp_path, class_weights="balanced"))
    counts = dict(zip(task.names, task.summary["class_counts"], strict=True))
    assert sum(counts.values()) == len(task.parts["train"])
    model = task.build_model(task.config, task.tokenizer, task.summary).eval()
    rows = task.train_rows(0)
    weights = torch.tensor([sum(counts.values()) / (2 * counts[name]) for name in task.names])
    expected = F.cross_entropy(model(*rows[:2]), rows[2], weights)
    torch.testing.assert_close(model(*rows), expected)
    assert task.count(rows) == pytest.approx(weights[rows[2]].sum().item())
    for accumulate in (1, 4):
        config = config_of(rare, tmp_path / f"run{accumulate}", class_weights="balanced", accumulate=accumulate)
        assert train(config) == 0
    losses = [numbers(tmp_path / name) for name in ("run1", "run4")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_weights_find_the_rare_class_and_macro_f1_selects(rare, tmp_path):
    scores = []
    for weights in ("none", "balanced"):
        run = tmp_path / weights
        assert train(config_of(rare, run, class_weights=weights, select="macro_f1")) == 0
        report = evaluate_run(run, config_of(rare, run, class_weights=weights, select="macro_f1"), split="validation")
        scores.append({row["name"]: row["recall"] for row in report["classes"]}["rare"])
        logged = [float(value) for _, value in column(run, "validation_macro_f1")]
        assert max(logged) == pytest.approx(report["averages"]["macro"]["f1"])  # scikit-learn's, of the best checkpoint
        assert report["checkpoint"] == "the best, with the highest macro F1 in validation"
    assert scores[1] > scores[0]


def test_other_tasks_refuse_both(tmp_path):
    for name, value, message in (
        ("select", "macro_f1", "select must be 'loss' or 'accuracy' for the task masked_lm, got 'macro_f1'"),
        ("class_weights", "balanced", "class_weights must be 'none' for the task masked_lm, got 'balanced'"),
    ):
        with pytest.raises(UsageError, match=message):
            table_config("masked_lm", tmp_path / "run", tmp_path / "x.jsonl", **{name: value})
