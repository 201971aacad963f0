"""Options of the loop, each tested for its documented effect: averaging, smoothing, recomputation, epochs, tasks."""

import os

import pytest

pytest.importorskip("lightning_fabric", reason="needs the packages of fastattn[train]")
import torch
from training_cases import (
    DOCUMENT_TASKS,
    TEXT,
    WORDS,
    assert_same_run,
    can_fork,
    column,
    interrupt_after,
    numbers,
    table_config,
    tiny_config,
    tiny_model,
    train_two,
    weights,
    write_table,
)

from fastattn.models import CausalLM, MaskedLM, Seq2Seq
from fastattn.training.config import OptimConfig
from fastattn.training.messages import UsageError
from fastattn.training.runs import checkpoint as ckpt
from fastattn.training.runs.load import load_run
from fastattn.training.runs.loop import Trainer
from fastattn.training.runs.lora import train_only
from fastattn.training.runs.throughput import flops_per_token
from fastattn.training.runs.train import train

TASKS = ("lm", *DOCUMENT_TASKS)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def table(tmp_path):
    write_table(tmp_path / "table.jsonl")
    return tmp_path / "table.jsonl"


def optim(**changes):
    return OptimConfig(**{"learning_rate": 5e-3, "min_learning_rate": 5e-4, "warmup_steps": 5, **changes})


def assert_resumes_exactly(tmp_path, monkeypatch, config, step):
    """A run stopped after this step and resumed equals an uninterrupted one; `config` takes the name of the run."""
    train(config("whole"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, step)
        train(config("parts"))
    train(config("parts"), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", config("whole").steps)


def test_averaged_weights_are_validated_and_saved(tmp_path, text_file, monkeypatch):
    """average = decay * average + (1 - decay) * weights after each step, starting from the first weights."""
    seen, train_step = [], Trainer.train_step

    def recorded(self):
        result = train_step(self)
        seen.append({name: value.detach().clone() for name, value in self.raw_model.named_parameters()})
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", recorded)
        config = tiny_config(tmp_path / "run", text_file, steps=6, evaluate_every=6, optim=optim(ema=0.8))
        train(config)
    average = seen[0]
    for now in seen[1:]:
        average = {name: 0.8 * value + 0.2 * now[name] for name, value in average.items()}
    saved = weights(tmp_path / "run", 6)
    for name, value in saved.items():
        torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(value, seen[-1][name])
    train(tiny_config(tmp_path / "plain", text_file, steps=6, evaluate_every=6))
    # averaging does not change training
    assert column(tmp_path / "run", "train_loss") == column(tmp_path / "plain", "train_loss")
    averaged, plain = (numbers(tmp_path / name, "validation_loss") for name in ("run", "plain"))
    assert averaged[0] == plain[0]
    assert averaged[1] > plain[1] + 1e-3  # the average lags behind


def test_averaged_weights_resume_exactly(tmp_path, text_file, monkeypatch):
    def config(name):
        return tiny_config(tmp_path / name, text_file, steps=20, optim=optim(ema=0.9))

    assert_resumes_exactly(tmp_path, monkeypatch, config, 13)


def test_label_smoothing_acts_in_training_only(tmp_path, text_file):
    for name, smoothing in (("sharp", 0.0), ("smooth", 0.2)):
        changes = {"steps": 1, "evaluate_every": 1, "optim": optim(label_smoothing=smoothing)}
        train(tiny_config(tmp_path / name, text_file, model=tiny_model(), **changes))
    sharp, smooth = tmp_path / "sharp", tmp_path / "smooth"
    assert column(sharp, "validation_loss")[0] == column(smooth, "validation_loss")[0]
    assert numbers(sharp) != numbers(smooth)


@pytest.mark.parametrize("layers", ["fastattn", "torch"])
def test_recomputed_activations_give_the_same_losses(tmp_path, text_file, layers):
    for name, checkpointing in (("kept", False), ("again", True)):
        model = tiny_model(dropout=0.2, checkpointing=checkpointing)
        train(tiny_config(tmp_path / name, text_file, layers=layers, steps=5, sample_tokens=0, model=model))
    assert column(tmp_path / "kept", "train_loss") == column(tmp_path / "again", "train_loss")


def test_epochs_count_passes_over_the_training_documents(tmp_path, table):
    for epochs, steps in ((1.5, 18), (0.01, 1)):  # 96 training documents, 8 per step
        config = table_config("classify", tmp_path / str(epochs), table, epochs=epochs)
        train(config)
        assert column(tmp_path / str(epochs), "train_loss")[-1][0] == str(steps)
        assert f"steps: {steps}\n" in (tmp_path / str(epochs) / "config.yaml").read_text()


def test_best_checkpoint_by_accuracy(tmp_path, table, monkeypatch, capsys):
    sums = iter([(24.0, 3), (12.0, 6), (6.0, 5), (18.0, 9), (30.0, 2)])
    monkeypatch.setattr("fastattn.training.runs.loop.evaluate_part", lambda *_, **__: (*next(sums), 24))
    config = table_config("classify", tmp_path / "run", table, steps=8, evaluate_every=2, keep=1, select="accuracy")
    train(config)
    run = tmp_path / "run"
    assert numbers(run, "validation_accuracy") == [3 / 24, 6 / 24, 5 / 24, 9 / 24, 2 / 24]
    assert ckpt.choose_checkpoint(run, "best")[1]["step"] == 6  # the lowest loss was at step 4
    assert [meta["step"] for _, meta in ckpt.find_checkpoints(run)] == [6, 8]
    assert "best validation loss 0.7500, accuracy 0.3750 at step 6" in capsys.readouterr().out
    with pytest.raises(UsageError, match="select must be 'loss' for the task translate, got 'accuracy'"):
        table_config("translate", run, table, select="accuracy")


@pytest.mark.parametrize("body", ["transformer", "cnn"])
def test_word_vectors_start_the_embedding_of_a_classifier(tmp_path, table, body):
    pytest.importorskip("gensim", reason="gensim is not installed")
    embeddings = {}
    for kind in ("random", "word2vec"):
        model = tiny_model(body=body, embedding=kind)
        train(table_config("classify", tmp_path / kind, table, steps=1, evaluate_every=1, model=model))
        saved = weights(tmp_path / kind, 1)
        embeddings[kind] = saved[next(name for name in saved if name.endswith("token_embedding.weight"))]
    changed = (embeddings["random"] - embeddings["word2vec"]).abs().amax(1) > 0.01
    assert len(WORDS) <= changed.sum() < len(changed)  # the words that are frequent enough


@pytest.mark.parametrize("task", TASKS)
def test_both_layers_learn_alike_and_the_loss_falls(tmp_path, table, task):
    """lm: packed documents, which must not see one another with either kind of layers."""
    steps = 100
    for layers in ("torch", "fastattn"):
        changes = {"layers": layers, "steps": steps, "evaluate_every": steps}
        train(table_config(task, tmp_path / layers, table, **changes))
    for name in ("train_loss", "validation_loss"):
        theirs, ours = (numbers(tmp_path / layers, name) for layers in ("torch", "fastattn"))
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert theirs[-1] < 0.9 * theirs[0]


@pytest.mark.parametrize("task", TASKS)
def test_exact_resume_of_every_task(tmp_path, table, monkeypatch, task):
    def config(name):
        changes = {"steps": 16, "evaluate_every": 8, "layers": "fastattn", "model": tiny_model(dropout=0.2)}
        return table_config(task, tmp_path / name, table, **changes)

    assert_resumes_exactly(tmp_path, monkeypatch, config, 14)


@pytest.mark.parametrize("task", TASKS)
def test_parts_of_a_batch_weigh_by_their_predictions(tmp_path, table, task):
    """With accumulation or two processes, the loss of a batch is the mean over its predictions, not over its parts."""
    changes = {"steps": 6, "evaluate_every": 6, "layers": "fastattn"}
    train(table_config(task, tmp_path / "whole", table, **changes))
    train(table_config(task, tmp_path / "halves", table, accumulate=2, **changes))
    others = ["halves"]
    if can_fork:
        train_two(table_config(task, tmp_path / "processes", table, devices=2, strategy="ddp", **changes))
        others.append("processes")
    for name in ("train_loss", "grad_norm", "validation_loss"):
        whole = numbers(tmp_path / "whole", name)
        for other in others:
            assert numbers(tmp_path / other, name) == pytest.approx(whole, abs=1e-5)


def test_speed_columns_follow_from_one_another(tmp_path, text_file, monkeypatch):
    monkeypatch.setattr("fastattn.training.runs.throughput.peak_flops", lambda *_: 1e15)
    config = tiny_config(tmp_path / "run", text_file, steps=4, log_every=2)
    train(config)
    run = tmp_path / "run"
    model = load_run(run, config, accelerator="cpu")[0]
    shape = config.model
    blocks, attention = 2 * 12 * shape.d_model**2, 12 * shape.n_layer * shape.d_model * shape.block_size
    expected = 6 * (blocks + 29 * shape.d_model) + attention  # the tied output knows 29 characters
    assert flops_per_token(model, shape) == expected
    options = dict(vars(shape))
    for name in ("body", "pooling", "embedding", "head_transform"):
        del options[name]
    assert flops_per_token(CausalLM(29, **{**options, "tied": False}), shape) == expected
    predicted = 0.15 * 29 * shape.d_model  # the head of a masked model reads only the positions that it predicts
    for tied in (True, False):
        masked = MaskedLM(29, **{**options, "tied": tied})
        assert flops_per_token(masked, shape) == pytest.approx(6 * (blocks + predicted) + attention)
    sides = blocks + blocks * 16 // 12  # cross-attention adds 4 * d_model**2 per block
    assert flops_per_token(Seq2Seq(29, **options), shape) == 3 * (sides + 29 * shape.d_model) + attention
    part = CausalLM(29, **{**options, "tied": False})
    train_only(part, "lora", 2)  # frozen matrices get no gradient but pass it on
    assert flops_per_token(part, shape) == 4 * blocks + 6 * 29 * shape.d_model + attention
    part = CausalLM(29, **{**options, "tied": False})
    train_only(part, "head", 2)
    assert flops_per_token(part, shape) == 2 * blocks + 4 * 29 * shape.d_model + attention // 3
    speeds, seconds, mfu = (numbers(run, name) for name in ("tokens_per_second", "seconds", "mfu"))
    assert len(speeds) == 2
    for speed, duration, part in zip(speeds, seconds, mfu, strict=True):
        assert speed == pytest.approx(config.batch_size * shape.block_size * 2 / duration)
        assert part == pytest.approx(speed * expected / 1e15)


@pytest.mark.parametrize(("peak", "logged"), [(1e15, 2), (1.0, 0), (None, 0)])
def test_a_share_of_more_than_the_peak_is_left_out(tmp_path, text_file, monkeypatch, peak, logged):
    monkeypatch.setattr("fastattn.training.runs.throughput.peak_flops", lambda *_: peak)
    train(tiny_config(tmp_path / "run", text_file, steps=4, log_every=2))
    shares = numbers(tmp_path / "run", "mfu")
    assert len(shares) == logged
    assert all(0 < share <= 1 for share in shares)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_every_number_format_trains_on_a_cpu_with_every_logger(tmp_path, text_file, precision):
    assert train(tiny_config(tmp_path / "run", text_file, steps=4, precision=precision, tensorboard=True)) == 0
    assert len(numbers(tmp_path / "run", "tokens_per_second")) == 4
    assert numbers(tmp_path / "run", "mfu") == []  # the peak of a CPU is not known


def test_bf16_mixed_learns_like_fp32(tmp_path, text_file):
    for precision in ("32-true", "bf16-mixed"):
        changes = {"precision": precision, "steps": 20, "model": tiny_model(), "layers": "fastattn"}
        train(tiny_config(tmp_path / precision, text_file, sample_tokens=0, **changes))
    exact, rough = (numbers(tmp_path / precision) for precision in ("32-true", "bf16-mixed"))
    assert exact != rough
    assert rough == pytest.approx(exact, abs=0.05)
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "bf16-mixed", 20).values())


def test_16_mixed_needs_a_gpu(tmp_path, text_file):
    config = tiny_config(tmp_path / "run", text_file, precision="16-mixed")
    with pytest.raises(UsageError, match="precision must be 32-true, bf16-mixed or bf16-true on a CPU"):
        train(config)
    assert not os.path.exists(tmp_path / "run")
