"""Optimizers, learning rates and initial weights."""

import math

import pytest
import torch

from fastattn.models.initialize import SCHEMES, initialize
from fastattn.training.config import OptimConfig
from fastattn.training.messages import UsageError
from fastattn.training.runs.optim import build_optimizer, learning_rate


def rates(steps=100, **options):
    optim = OptimConfig(**{"learning_rate": 1.0, "min_learning_rate": 0.1, "warmup_steps": 9} | options)
    return [learning_rate(step, steps, optim) for step in range(steps + 1)]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "noam"])
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
    }[scheme]
    got = model["layer"].linear1.weight.std().item(), model["layer"].linear2.weight.std().item()
    assert got == pytest.approx(expected, rel=0.05)
    assert model["embedding"].weight.std().item() == pytest.approx(0.02, rel=0.05)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all(), name


def test_unknown_scheme():
    with pytest.raises(ValueError, match=r"init must be one of gpt2, .*he, got 'best'"):
        initialize(torch.nn.Linear(2, 2), "best")
