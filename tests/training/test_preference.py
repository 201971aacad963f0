"""Direct preference optimisation: the formula, and that a model comes to prefer what pairs prefer."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_chat import COLOURS, QUESTIONS, write_chats
from training_cases import column, numbers, tiny_config, tiny_model

from fastattn.cli import main
from fastattn.models import CausalLM
from fastattn.models.preference import PreferenceLM
from fastattn.training.config import Columns, DataConfig
from fastattn.training.data.documents import Documents
from fastattn.training.data.tokenizer import build_tokenizer
from fastattn.training.messages import UsageError
from fastattn.training.runs.train import train
from fastattn.training.tasks.preference import Preference


@pytest.mark.parametrize("layers", ["torch", "fastattn"])
def test_the_loss_is_that_of_the_paper(layers):
    torch.manual_seed(0)
    model = PreferenceLM(20, beta=0.3, n_layer=1, n_head=2, d_model=8, block_size=8, layers=layers)
    tokens, targets = torch.randint(20, (3, 2, 6)), torch.randint(20, (3, 2, 6))
    targets[:, :, :2], targets[1, 0, 4:] = -100, -100
    reference = -torch.rand(3, 2) * 9
    log_p = CausalLM.forward(model, tokens.flatten(0, 1)).log_softmax(-1).unflatten(0, (3, 2))
    total = 0.0
    for pair in range(3):
        sums = [
            sum(log_p[pair, side, i, t] for i, t in enumerate(targets[pair, side].tolist()) if t >= 0)
            for side in range(2)
        ]
        margin = (sums[0] - reference[pair, 0]) - (sums[1] - reference[pair, 1])
        total = total - F.logsigmoid(0.3 * margin)
    torch.testing.assert_close(model(tokens, targets, reference=reference), total / 3, rtol=1e-5, atol=1e-5)


@pytest.fixture
def start(tmp_path):
    """A chat run that has learnt to answer with colours in lower case."""
    write_chats(tmp_path / "chats.jsonl")
    data = DataConfig(source=str(tmp_path / "chats.jsonl"), tokenizer="char", columns=Columns(messages="messages"))
    data.validation_fraction = 0.2
    model = tiny_model(block_size=160, d_model=32, positions="rotary")
    config = tiny_config(tmp_path / "chat", "", task="chat", data=data, model=model, sample_tokens=0)
    assert train(config) == 0
    with open(tmp_path / "pairs.jsonl", "w") as file:  # of two colours, the later in the alphabet
        for question in QUESTIONS:
            for thing in COLOURS:
                for first in COLOURS.values():
                    for second in COLOURS.values():
                        if first != second:
                            low, high = sorted((first, second))
                            row = {"text": question.format(thing), "target": high, "rejected": low}
                            file.write(json.dumps(row) + "\n")
    return tmp_path / "chat"


def preference_config(start, run, **changes):
    columns = Columns(target="target", rejected="rejected")
    data = DataConfig(source=str(start.parent / "pairs.jsonl"), columns=columns, validation_fraction=0.2)
    data.test_fraction = 0.2
    model = tiny_model(block_size=160, d_model=32, positions="rotary")
    options = {"task": "preference", "start": str(start), "data": data, "model": model, "batch_size": 16}
    return tiny_config(run, "", **{**options, "sample_tokens": 0, "steps": 40, "evaluate_every": 20, **changes})


@pytest.mark.parametrize("trained", ["all", "lora"])
def test_pairs_are_learnt_and_the_first_loss_is_that_of_no_difference(start, tmp_path, capsys, trained):
    run = tmp_path / trained
    assert train(preference_config(start, run, trained=trained)) == 0
    losses = numbers(run, "validation_loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)  # the model is its own reference
    accuracies = numbers(run, "validation_accuracy")
    assert max(accuracies) > accuracies[0] + 0.15
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["preference_accuracy"] > accuracies[0] + 0.15
    assert report["log_prob_chosen"] > report["log_prob_rejected"]
    pairs = str(start.parent / "pairs.jsonl")
    assert main(["evaluate", str(run), "--data", pairs, "--output", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == len(QUESTIONS) * 4 * 12
    assert main(["generate", str(run), "--prompt", "What colour is snow?", "--max_new_tokens", "5"]) == 0


def test_a_resumed_run_has_the_same_reference(start, tmp_path):
    whole, broken = (preference_config(start, tmp_path / name, steps=20, evaluate_every=10) for name in "ab")
    assert train(whole) == 0
    broken.steps = 10
    assert train(broken) == 0
    broken.steps = 20
    broken.optim.schedule = whole.optim.schedule
    assert train(broken, resume=True) == 0
    first, second = (dict(column(tmp_path / name, "validation_loss")) for name in "ab")
    assert float(second["20"]) == pytest.approx(float(first["20"]), abs=0.1)


def test_what_is_missing_is_said(start, tmp_path):
    with pytest.raises(UsageError, match="start must be the folder of a run or model for the task preference"):
        replace(preference_config(start, tmp_path / "run"), start=None)
    config = preference_config(start, tmp_path / "run")
    config.data.columns.rejected = None
    with pytest.raises(UsageError, match=r"has no pairs of answers; name their columns"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_pairs_of_equal_answers_are_left_out_and_a_part_with_no_others_is_refused(capsys):
    documents = Documents(["q", "why", "q"], targets=["yes", "no", "one"], rejected=["no", "no", "two"])

    def pairs(block_size):
        config = tiny_config("run", "", task="preference", start="start", model=tiny_model(block_size=block_size))
        task = Preference.on_documents(config, build_tokenizer("byte", [], [], None), {}, documents)
        assert len(next(task.rows("all"))[0]) == len(task.examples["all"])
        return len(task.examples["all"])

    assert pairs(100) == 2
    assert "left out 1 of 3 pairs, whose two answers are equal within model.block_size" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"the two answers of every pair are equal within .* = 8 tokens"):
        pairs(8)
