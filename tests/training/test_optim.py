"""Optimizers, learning rates and initial weights."""

import math

import pytest
import torch
from training_cases import TEXT, assert_same_run, interrupt_after, tiny_config

from fastattn.models import CausalLM
from fastattn.models.initialize import SCHEMES, initialize
from fastattn.training.config import ModelConfig, OptimConfig, Rates, TrainConfig
from fastattn.training.messages import UsageError
from fastattn.training.runs.optim import build_optimizer, learning_rate, parameter_groups
from fastattn.training.runs.train import train


def rates(steps=100, **options):
    optim = OptimConfig(**{"learning_rate": 1.0, "min_learning_rate": 0.1, "warmup_steps": 9} | options)
    return [learning_rate(step, steps, optim) for step in range(steps + 1)]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "noam", "wsd"])
def test_warm_up_then_schedule(schedule):
    values = rates(schedule=schedule)
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert values[9:] == sorted(values[9:], reverse=True)
    assert min(values) >= 0.1 - 1e-12
    assert rates(3, schedule=schedule, min_learning_rate=1.0, warmup_steps=0) == [1.0] * 4


def test_values_of_the_schedules():
    assert rates(schedule="constant")[100] == 1.0
    assert rates(schedule="cosine")[100] == pytest.approx(0.1)
    assert learning_rate(60, 111, OptimConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=9)) == 0.55
    linear = rates(109, schedule="linear")
    assert [linear[59], linear[109]] == pytest.approx([0.55, 0.1])
    noam = rates(999, schedule="noam")
    assert [noam[39], noam[89], noam[999]] == pytest.approx([0.5, 1 / 3, 0.1])
    wsd = rates(100, schedule="wsd", decay_fraction=0.4)
    assert [wsd[9], wsd[60], wsd[80], wsd[100]] == pytest.approx([1.0, 1.0, 0.55, 0.1])


def test_unknown_names_and_values():
    with pytest.raises(UsageError, match=r"optim\.momentum must be at least 0 and below 1, got 1\.0"):
        OptimConfig(momentum=1.0)


def stepped(optimizer_of, steps=5):
    """The weights of a small model after some steps with fixed gradients."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = optimizer_of(model)
    for _ in range(steps):
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.weight.detach()


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.01)),
        ("momentum", lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.8)),
        ("nesterov", lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.8, nesterov=True)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.99))),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.99), weight_decay=0)),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_optimizers_by_name(name, same, fused):
    optim = OptimConfig(name=name, learning_rate=0.01, min_learning_rate=0.0, momentum=0.8, weight_decay=0.0)
    ours = stepped(lambda model: build_optimizer(model, optim, fused))
    torch.testing.assert_close(ours, stepped(lambda model: same(model.parameters())))


def test_weight_decay_is_on_trained_matrices_only():
    model = torch.nn.TransformerEncoderLayer(8, 2, 16)
    decayed, others = build_optimizer(model, OptimConfig(weight_decay=0.3), fused=False).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in others["params"]} == {1}
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
    model.linear1.requires_grad_(False)
    frozen, _ = build_optimizer(model, OptimConfig(), fused=False).param_groups
    assert len(frozen["params"]) == len(decayed["params"]) - 1


def small_model():
    torch.manual_seed(0)
    return CausalLM(20, n_layer=2, n_head=2, d_model=16, block_size=8, tied=False)


def test_groups_have_the_decay_and_the_rate_of_their_kind():
    model, rates = small_model(), Rates(embeddings=2.0, head=3.0, matrices=4.0, vectors=5.0)
    kinds = {id(p): name for name, p in model.named_parameters()}
    optim = OptimConfig(name="muon", weight_decay=0.3, decay_embeddings=False, rates=rates)
    seen = 0
    for group in parameter_groups(model, optim):
        for p in group["params"]:
            name, seen = kinds[id(p)], seen + 1
            expected = (0.3, 4.0, True)
            if p.dim() == 1:
                expected = (0.0, 5.0, False)
            elif "embedding" in name:
                expected = (0.0, 2.0, False)
            elif name == "head.weight":
                expected = (0.3, 3.0, False)
            assert (group["weight_decay"], group["rate"], group["muon"]) == expected, name
    assert seen == len(kinds)


def test_muon_is_torchs_muon_beside_adamw():
    models = [small_model(), small_model()]
    optim = OptimConfig(name="muon", learning_rate=0.01, min_learning_rate=0.0, weight_decay=0.1)
    ours = build_optimizer(models[0], optim, fused=False)
    tables = [p for n, p in models[1].named_parameters() if p.dim() == 2 and ("embedding" in n or n == "head.weight")]
    matrices = [p for n, p in models[1].named_parameters() if p.dim() == 2 and all(p is not t for t in tables)]
    vectors = [p for p in models[1].parameters() if p.dim() == 1]
    adamw = [{"params": tables, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    theirs = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw, lr=0.01, betas=(0.9, 0.99)),
    ]
    tokens = torch.arange(16).view(2, 8)
    for step in range(4):
        for model, optimizers in zip(models, ([ours], theirs), strict=True):
            model(tokens, tokens.flip(1)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        if step == 1:  # a loaded state goes on the same way
            state = ours.state_dict()
            ours = build_optimizer(models[0], optim, fused=False)
            ours.load_state_dict(state)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_batch_tokens_decide_how_many_passes_a_step_makes():
    model = ModelConfig(block_size=32)
    for _ in range(2):  # a stored config means the same
        config = TrainConfig(batch_size=4, batch_tokens=1024, model=model)
        assert (config.batch_size, config.accumulate) == (32, 8)
        config = TrainConfig(**vars(config))
        assert (config.batch_size, config.accumulate) == (32, 8)
    with pytest.raises(UsageError, match=r"batch_tokens must be a multiple of 4 sequences .* 128, got 1000"):
        TrainConfig(batch_size=4, batch_tokens=1000, model=model)
    with pytest.raises(UsageError, match="batch_tokens must be null for the task masked_lm"):
        TrainConfig(task="masked_lm", batch_tokens=1024, model=model)


@pytest.mark.parametrize("name", ["adamw", "adam", "muon", "sgd"])
@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_cautious_decay_takes_only_from_what_the_step_does_not_move_away_from_0(name, decay_embeddings):
    options = {"name": name, "learning_rate": 0.01, "min_learning_rate": 0.0, "decay_embeddings": decay_embeddings}
    results = []
    for decay in (0.0, 0.5):
        model = small_model()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = build_optimizer(model, OptimConfig(**options, weight_decay=decay, cautious_decay=True), fused=False)
        model(torch.arange(16).view(2, 8), torch.arange(16).view(2, 8).flip(1)).backward()
        optimizer.step()
        results.append({n: p.detach() for n, p in model.named_parameters()})
    taken = 0
    for parameter, old in before.items():
        plain, cautious = (result[parameter] for result in results)
        decays = old.dim() > 1 and (decay_embeddings or "embedding" not in parameter)
        towards = (plain - old) * old <= 0
        expected = plain - 0.01 * 0.5 * old * towards * decays
        torch.testing.assert_close(cautious, expected, rtol=1e-6, atol=1e-8, msg=parameter)
        taken += int((cautious != plain).sum())
        assert decays or torch.equal(cautious, plain)
    assert 0 < taken < sum(p.numel() for p in before.values() if p.dim() > 1)


def test_a_run_with_muon_resumes_exactly(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    rates = Rates(embeddings=0.5)
    optim = OptimConfig(name="muon", schedule="wsd", warmup_steps=2, rates=rates, cautious_decay=True)
    options = {"optim": optim, "steps": 12, "evaluate_every": 4, "sample_tokens": 0}
    whole, broken = (tiny_config(tmp_path / name, tmp_path / "text.txt", **options) for name in ("whole", "broken"))
    assert train(whole) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        assert train(broken) == 143
    assert train(broken, resume=True) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "broken", 12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_initialization(scheme):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {
            "embedding": torch.nn.Embedding(500, 64),
            "layer": torch.nn.TransformerEncoderLayer(64, 4, 256),
            "rnn": torch.nn.LSTM(64, 32),
        }
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0) if parameter.dim() > 1 else parameter.fill_(1.0)
    initialize(model, scheme, n_layer=8)
    expected = {  # standard deviations of linear1 (256, 64) and linear2 (64, 256)
        "gpt2": (0.02, 0.02 / 4),
        "normal": (0.02, 0.02),
        "uniform": (0.04 / math.sqrt(3),) * 2,
        "xavier": (math.sqrt(2 / 320),) * 2,
        "he": (math.sqrt(2 / 64), math.sqrt(2 / 256)),
        "nanochat": (math.sqrt(1 / 64), 0.0),
    }[scheme]
    got = model["layer"].linear1.weight.std().item(), model["layer"].linear2.weight.std().item()
    assert got == pytest.approx(expected, rel=0.05)
    embedding = 1.0 if scheme == "nanochat" else 0.02
    assert model["embedding"].weight.std().item() == pytest.approx(embedding, rel=0.05)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all(), name


def test_unknown_scheme():
    with pytest.raises(ValueError, match=r"init must be one of gpt2, .*nanochat, got 'best'"):
        initialize(torch.nn.Linear(2, 2), "best")
