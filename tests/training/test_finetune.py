"""Runs that start from others: what is copied, what learns, what is refused; low-rank additions."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("lightning_fabric", reason="needs the packages of fastattn[train]")
pytest.importorskip("tokenizers", reason="needs the packages of fastattn[train]")
import torch
import yaml
from safetensors.torch import load_file
from test_training import assert_same_run, interrupt_after, weights

from fastattn.cli import main
from fastattn.commands._options import stored_config
from fastattn.training.config import Columns, DataConfig, ModelConfig, OptimConfig, TrainConfig
from fastattn.training.data.tokenizer import load_tokenizer
from fastattn.training.messages import UsageError
from fastattn.training.runs import loop
from fastattn.training.runs.load import load_run
from fastattn.training.runs.loop import Trainer
from fastattn.training.runs.lora import HEADS, add_lora, merge_lora
from fastattn.training.runs.train import train
from fastattn.training.tasks.registry import TASKS, make_task

WORDS = ["red", "green", "blue", "black", "white", "one", "two", "three", "four", "five", "six", "seven", "eight"]
SHAPE = {"n_layer": 2, "n_head": 2, "d_model": 16, "block_size": 12}
LABELS = ["one", "red", "two"]
KINDS = ("lm", "masked_lm", "classify", "translate")  # tests of the other tasks have starts of their own


def write_documents(path, labels=LABELS, n=90, seed=0):
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        words = [labels[i % len(labels)], *generator.choice(WORDS, generator.integers(2, 7)).tolist(), str(i)]
        rows.append({"text": " ".join(words), "label": words[0], "target": " ".join(words[::-1])})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents, other documents, two texts, and a trained run of each task, named after it."""
    folder = tmp_path_factory.mktemp("finetune")
    write_documents(folder / "documents.jsonl")
    write_documents(folder / "others.jsonl", ["black", "eight"], seed=1)
    (folder / "text.txt").write_text("one red rose, two blue roses. " * 30)
    (folder / "other.txt").write_text("red, blue, two roses. one rose. " * 30)
    for task in KINDS:
        assert train(config_for(task, folder / task, folder)) == 0
    return folder


def config_for(task, run, folder, start=None, model=(), data=(), **changes):
    source = folder / ("text.txt" if task == "lm" else "documents.jsonl")
    columns = Columns(label="label" if task == "classify" else None, target="target" if task == "translate" else None)
    values = {"steps": 4, "batch_size": 4, "log_every": 1, "evaluate_every": 2, "sample_tokens": 0, "seed": 7}
    data = {"source": str(source), "validation_fraction": 0.2, "test_fraction": 0.0, "columns": columns, **dict(data)}
    return TrainConfig(
        task=task, run=str(run), start=None if start is None else str(start), tensorboard=False, accelerator="cpu",
        data=DataConfig(tokenizer="char" if task == "lm" else "word", **data),
        model=ModelConfig(**{**SHAPE, "dropout": 0.1, **dict(model)}),
        optim=OptimConfig(learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=1), **{**values, **changes},
    )  # fmt: skip


def model_at_the_start(config, monkeypatch):
    """The model at the first step, and the content of the run folder at that time."""
    seen = []

    class SeenError(Exception):
        pass

    def fit(self):
        seen.append(self.raw_model)
        raise SeenError

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", fit)
        with pytest.raises(SeenError):
            train(config)
    return seen[0]


def best_weights(run):
    return load_run(run, stored_config(run), accelerator="cpu")[0].state_dict()


@pytest.mark.parametrize(
    ("start", "task", "new"),
    [
        ("masked_lm", "classify", {"head.weight", "head.bias"}),
        ("translate", "classify", {"head.weight", "head.bias"}),
        ("classify", "masked_lm", set()),
        ("masked_lm", "translate", None),
        ("lm", "lm", set()),
        ("classify", "classify", set()),
    ],
)
def test_what_a_start_gives(folder, tmp_path, monkeypatch, capsys, start, task, new):
    model = model_at_the_start(config_for(task, tmp_path / "run", folder, folder / start), monkeypatch)
    before, names = best_weights(folder / start), dict(model.named_parameters())
    fresh = {
        n for n in names if n not in before or before[n].shape != names[n].shape or not torch.equal(before[n], names[n])
    }
    if new is None:
        assert fresh
        assert all(name.startswith("decoder.") for name in fresh), fresh
        new = fresh
    assert fresh == new
    error = capsys.readouterr().err
    assert error.count("loaded all weights except") == bool(new)
    assert sum(name in error for name in new) == min(6, len(new))
    assert (tmp_path / "run" / "tokenizer.json").read_text() == (folder / start / "tokenizer.json").read_text()


def test_a_head_is_new_where_the_labels_are_others(folder, tmp_path, monkeypatch):
    config = config_for(
        "classify", tmp_path / "run", folder, folder / "classify", data={"source": str(folder / "others.jsonl")}
    )
    model, before = model_at_the_start(config, monkeypatch), best_weights(folder / "classify")
    assert model.head.weight.shape == (2, 16)
    assert torch.equal(model.encoder.blocks[1].linear1.weight, before["encoder.blocks.1.linear1.weight"])
    renamed = write_documents(tmp_path / "renamed.jsonl", ["five", "four", "six"])  # as many labels, but others
    config = config_for("classify", tmp_path / "again", folder, folder / "classify", data={"source": str(renamed)})
    assert not torch.equal(model_at_the_start(config, monkeypatch).head.weight, before["head.weight"])


def test_an_untied_head_starts_as_the_embedding(folder, tmp_path, monkeypatch):
    model = model_at_the_start(config_for("lm", tmp_path / "run", folder, folder / "lm", {"tied": False}), monkeypatch)
    assert model.head.weight is not model.token_embedding.weight
    assert torch.equal(model.head.weight, best_weights(folder / "lm")["token_embedding.weight"])


def test_a_shorter_block_takes_the_first_positions(folder, tmp_path, monkeypatch):
    for start, task in (("lm", "lm"), ("masked_lm", "classify")):
        config = config_for(task, tmp_path / task, folder, folder / start, {"block_size": 7})
        model = model_at_the_start(config, monkeypatch)
        table = getattr(model, "encoder", model).position_embedding.weight
        before = best_weights(folder / start)
        assert torch.equal(table, next(before[n] for n in before if n.endswith("position_embedding.weight"))[:7])


def test_training_on_from_a_run_is_better_at_once_than_anew(folder, tmp_path, capsys):
    """The first validation of a continued run equals the last one of its start: same text, tokenizer and weights."""
    train(config_for("lm", tmp_path / "run", folder, folder / "lm", steps=1))
    first = capsys.readouterr().out.split("step 0/1  validation loss ")[1].split()[0]
    metas = [json.loads(path.read_text()) for path in (folder / "lm").rglob("meta.json")]
    assert float(first) == pytest.approx(min(meta["validation_loss"] for meta in metas), abs=1e-4)
    config = config_for("lm", tmp_path / "other", folder, folder / "lm", data={"source": str(folder / "other.txt")})
    assert train(config) == 0


@pytest.mark.parametrize(
    ("start", "task", "changes", "expected"),
    [
        ("masked_lm", "classify", {"model": {"n_layer": 3}}, "model.n_layer must be 2 as in .*masked_lm, got 3"),
        ("masked_lm", "classify", {"model": {"n_layer": 1}}, "model.n_layer must be 2 as in .*masked_lm, got 1"),
        ("masked_lm", "classify", {"model": {"n_head": 4}}, "model.n_head must be 2"),
        ("masked_lm", "classify", {"model": {"norm_first": False}}, "model.norm_first must be True"),
        ("masked_lm", "classify", {"model": {"body": "lstm"}}, "model.body must be 'transformer'"),
        ("masked_lm", "classify", {"model": {"block_size": 13}}, r"must have shape \(13, 16\) .*, got \(12, 16\)"),
        ("lm", "classify", {}, "is of task lm, which cannot start task classify"),
        ("classify", "lm", {}, "is of task classify, which cannot start task lm"),
        ("lm", "lm", {"trained": "head"}, "trained 'head' needs a head with its own weights"),
        ("lm", "lm", {"data": {"source": "other.txt"}}, "characters that are not among the 14 of the vocabulary"),
        ("unfinished", "lm", {}, "has no checkpoint yet"),
        ("nothing", "lm", {}, "but it does not exist"),
        (".", "lm", {}, "but it has neither file"),
        ("damaged", "lm", {}, "config.yaml is not the config of a run"),
    ],
)  # fmt: skip
def test_a_start_that_does_not_fit_is_refused_before_anything_is_written(
    folder, tmp_path, start, task, changes, expected
):
    if start == "unfinished" and not (folder / start).exists():
        (folder / start / "checkpoints").mkdir(parents=True)
        for name in ("config.yaml", "tokenizer.json", "data.json"):
            (folder / start / name).write_bytes((folder / "lm" / name).read_bytes())
    if start == "damaged":
        for name in ("config.yaml", "tokenizer.json", "data.json"):
            (folder / start).mkdir(exist_ok=True)
            (folder / start / name).write_text("{}")
        (folder / start / "tokenizer.json").write_bytes((folder / "lm" / "tokenizer.json").read_bytes())
    if "source" in changes.get("data", ()):
        changes = {"data": {"source": str(folder / changes["data"]["source"])}}
        (folder / "other.txt").write_text((folder / "documents.jsonl").read_text())
    with pytest.raises(UsageError, match=expected):
        train(config_for(task, tmp_path / "run", folder, folder / start, **changes))
    assert not (tmp_path / "run").exists()


def test_tokens_on_disk_must_be_those_of_the_start(folder, tmp_path):
    from fastattn.training.data.prepare import SourceConfig, data_split, data_tokenize

    data_split(SourceConfig(str(folder / "documents.jsonl")), str(tmp_path / "split"))
    data_tokenize(SourceConfig(str(tmp_path / "split")), str(tmp_path / "tokens"), "byte")
    data = {"source": str(tmp_path / "tokens")}
    with pytest.raises(UsageError, match="were not made by the tokenizer of the model"):
        train(config_for("lm", tmp_path / "run", folder, folder / "lm", data=data))
    assert train(config_for("lm", tmp_path / "bytes", folder, data=data)) == 0
    assert train(config_for("lm", tmp_path / "run", folder, tmp_path / "bytes", data=data)) == 0


def test_low_rank_additions_in_an_average_of_weights(folder, tmp_path):
    config = config_for("lm", tmp_path / "run", folder, folder / "lm", trained="lora", lora_rank=2)
    config.optim.ema = 0.5
    assert train(config) == 0
    model, tokenizer, _ = load_run(tmp_path / "run", config, checkpoint="last", accelerator="cpu")
    metas = [json.loads(path.read_text()) for path in (tmp_path / "run").rglob("meta.json")]
    loss, _, count = loop.evaluate_part(model, make_task(config, tokenizer), "validation")
    expected = next(meta["validation_loss"] for meta in metas if meta["step"] == 4)
    assert loss / count == pytest.approx(expected, abs=1e-5)


def test_a_run_does_not_overwrite_its_start(folder):
    with pytest.raises(UsageError, match=r"run .*lm' must not be the folder of start"):
        train(config_for("lm", folder / "lm", folder, folder / "lm"), overwrite=True)
    assert best_weights(folder / "lm")


def test_nothing_but_all_learns_without_a_start(tmp_path):
    with pytest.raises(UsageError, match="trained must be 'all' without start, got 'lora'"):
        TrainConfig(run=str(tmp_path), trained="lora")


@pytest.mark.parametrize("task", KINDS)
def test_only_the_head_learns(folder, tmp_path, monkeypatch, task):
    model = {} if task == "classify" else {"tied": False}
    config = config_for(task, tmp_path / "run", folder, folder / task, model, trained="head")
    before = {
        n: p.clone()
        for n, p in model_at_the_start(replace(config, run=str(tmp_path / "a")), monkeypatch).named_parameters()
    }
    assert train(config) == 0
    after = load_run(tmp_path / "run", config, checkpoint="last", accelerator="cpu")[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"} & before.keys()
    assert changed


@pytest.mark.parametrize(
    ("start", "task", "layers"),
    [("lm", "lm", "fastattn"), ("masked_lm", "classify", "torch"), ("translate", "translate", "fastattn")],
)
def test_low_rank_additions(folder, tmp_path, monkeypatch, capsys, start, task, layers):
    """Only the additions and the head change; resuming is exact; the loaded model is plain and has the same losses."""
    options = {"trained": "lora", "lora_rank": 2, "layers": layers, "steps": 6, "evaluate_every": 3}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    model = model_at_the_start(config_for(task, tmp_path / "a", folder, folder / start, **options), monkeypatch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert train(config_for(task, whole, folder, folder / start, **options)) == 0
    out = capsys.readouterr().out
    assert "of them trained" in out
    after = weights(whole, 6)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    learning = {name for name in after if ".lora_" in name or (task == "classify" and name.startswith("head."))}
    assert changed == learning
    matrices = {"lm": 4, "classify": 4, "translate": 4 + 6}[task] * SHAPE["n_layer"]
    assert sum(".lora_b" in name for name in changed) == matrices

    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        assert train(config_for(task, parts, folder, folder / start, **options)) == 128 + signal.SIGTERM
    assert train(config_for(task, parts, folder, folder / start, **options), resume=True) == 0
    assert_same_run(whole, parts, 6)

    config = stored_config(whole)
    loaded, tokenizer, _ = load_run(whole, config, checkpoint="last", accelerator="cpu")
    assert set(loaded.state_dict()) == set(
        best_weights(folder / start) if task != "classify" else best_weights(folder / task)
    )
    data = make_task(config, tokenizer)
    logs = [line.split("validation loss ")[1].split()[0] for line in out.splitlines() if "step 6/6" in line]
    loss, _, count = loop.evaluate_part(loaded, data, "validation")
    assert loss / count == pytest.approx(float(logs[0]), abs=1e-4)


@pytest.mark.parametrize("layers", ["torch", "fastattn"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("feed_forward", ["gelu", "swiglu"])
def test_merged_and_separate_give_the_same_logits_and_the_plain_gradients(layers, norm_first, feed_forward):
    from fastattn.models import MaskedLM

    torch.manual_seed(0)
    model = MaskedLM(20, **SHAPE, layers=layers, norm_first=norm_first, feed_forward=feed_forward)
    tokens, lengths = torch.randint(20, (3, 12)), torch.tensor([12, 5, 9])
    start = model(tokens, lengths)
    assert add_lora(model, 2) == (10 if feed_forward == "swiglu" else 8)
    torch.testing.assert_close(model(tokens, lengths), start, rtol=0, atol=1e-6)  # the additions are still zero
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.3)
    separate = model(tokens, lengths)
    assert not torch.allclose(separate[0], start[0], atol=1e-3)
    separate.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if ".lora_" in name}
    factors = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}
    merge_lora(model)
    model.zero_grad()
    merged = model(tokens, lengths)
    torch.testing.assert_close(merged[0], separate[0], rtol=1e-5, atol=1e-6)
    merged.square().sum().backward()
    assert not any("lora" in name for name in model.state_dict())
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        path = f"{module}.parametrizations.{leaf}.0.lora_"
        if path + "a" in found:  # W + BA: dB = dW Aᵀ, dA = Bᵀ dW
            a, b = factors[path + "a"], factors[path + "b"]
            torch.testing.assert_close(found[path + "b"], parameter.grad @ a.T, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(found[path + "a"], b.T @ parameter.grad, rtol=1e-3, atol=1e-4)


def test_a_run_with_low_rank_additions_can_be_a_start(folder, tmp_path, monkeypatch):
    first = tmp_path / "first"
    train(config_for("lm", first, folder, folder / "lm", trained="lora", lora_rank=2))
    model = model_at_the_start(config_for("lm", tmp_path / "second", folder, first), monkeypatch)
    before = best_weights(first)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_without_blocks_or_head():
    config = TrainConfig(task="classify", model=ModelConfig(body="bag_of_words", **SHAPE))
    tokenizer = type("Tokenizer", (), {"vocab_size": 9})
    for what, expected in (
        ("lora", "'lora' needs a transformer"),
        ("head", "needs a head with its own weights"),
    ):
        model = TASKS["classify"].build_model(config, tokenizer, {"labels": LABELS})
        with pytest.raises(UsageError, match=expected):
            loop.train_only(model, what, 2)


@pytest.mark.parametrize("body", ["transformer", "lstm", "gru", "cnn"])
def test_every_name_outside_the_body_is_a_head(body):
    """What is neither an embedding nor a layer before the output is trained with the head, in every model."""
    config = TrainConfig(
        task="classify", model=ModelConfig(body=body, pooling="pooler" if body == "transformer" else "mean", **SHAPE)
    )
    tokenizer = type("Tokenizer", (), {"vocab_size": 9})
    names = {
        name for name, _ in TASKS["classify"].build_model(config, tokenizer, {"labels": LABELS}).named_parameters()
    }
    inside = ("encoder.", "token_embedding.", "rnn.", "convolutions.")
    assert {n for n in names if n.startswith(HEADS)} == {n for n in names if not n.startswith(inside)}
    assert {"head.weight", "head.bias"} <= names


def test_finetune_command(folder, tmp_path, monkeypatch, capsys):
    """The shape comes from the start, and options override it; evaluate, predict and resume work on the result."""
    monkeypatch.chdir(tmp_path)
    common = f"""--sample_tokens 0 --tensorboard false --accelerator cpu --steps 4 --evaluate_every 2 --batch_size 4
        --data.source {folder / "documents.jsonl"} --data.validation_fraction 0.2 --data.columns.label label""".split()
    assert main(["finetune", "--task", "classify", "--run", "run", *common]) == 2
    assert "finetune needs --start FOLDER, a run or a Hugging Face model" in capsys.readouterr().err
    arguments = ["finetune", "--start", str(folder / "masked_lm"), "--task", "classify", "--run", "run", *common]
    assert main([*arguments, "--model.n_layer", "1"]) == 2
    assert "model.n_layer must be 2 as in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--trained", "lora", "--model.dropout", "0.3"]) == 0
    error = capsys.readouterr().err
    assert "loaded all weights except head.weight, head.bias" in error
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {name: config["model"][name] for name in SHAPE} == SHAPE
    assert config["model"]["dropout"] == 0.3
    assert config["start"] == str(folder / "masked_lm")
    assert load_tokenizer(tmp_path / "run" / "tokenizer.json").vocab_size > 10
    assert main(["predict", "run", "one red rose"]) == 0
    assert capsys.readouterr().out.split("\t")[0] in LABELS
    assert main(["evaluate", "run", "--split", "validation", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] in (2, 4)
    assert main(["train", "--resume", "run", "--lora_rank", "3"]) == 2
    assert "lora_rank must be 8 as in the resumed run, got 3" in capsys.readouterr().err
    assert main(["finetune", "--resume", "run", "--steps", "5"]) == 0
    stored = load_file(next((tmp_path / "run" / "checkpoints").glob("step-00000005")) / "model.safetensors")
    assert any(".lora_a" in name for name in stored)
