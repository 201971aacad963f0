"""Attributes that change after `replace`: the check covered the old values, so a module's own forward runs again."""

import copy
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F

import fastattn

D, FF = 12, 20


class Linear(torch.nn.Module):
    factor = 1.0  # of the class

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(D, D))
        self.bias, self.scale, self.lora = None, 1.0, None

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias) * self.scale * self.factor
        return y if self.lora is None else y + self.lora(x)


class Norm(torch.nn.Module):
    factor = 1.0

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(D))
        self.eps, self.scale, self.lora = 1e-6, 1.0, None

    def forward(self, x):
        y = self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.scale * self.factor
        return y if self.lora is None else y + self.lora(x)


class FeedForward(torch.nn.Module):
    factor = 1.0

    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = (torch.nn.Linear(*s) for s in ((D, FF), (D, FF), (FF, D)))
        self.scale, self.lora = 1.0, None

    def forward(self, x):
        y = self.down(F.silu(self.gate(x)) * self.up(x)) * self.scale * self.factor
        return y if self.lora is None else y + self.lora(x)


class Residual(torch.nn.Module):
    def forward(self, x):
        return x


CHANGES = {"scale": 2.0, "factor": 3.0, "lora": Residual()}
kinds = pytest.mark.parametrize("kind", [Linear, Norm, FeedForward])


@kinds
@pytest.mark.parametrize("name", CHANGES)
def test_an_attribute_that_changes(kind, name):
    plain, x = kind(), torch.randn(4, D)
    module = copy.deepcopy(plain)
    report = fastattn.replace(module)
    assert "" in report.replaced
    setattr(module, name, CHANGES[name])
    setattr(plain, name, CHANGES[name])
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(twin(x), plain(x))
    report.undo()
    assert vars(module).keys() == vars(plain).keys()
    assert torch.equal(module(x), plain(x))


class Config:
    scale = 1.0

    @property
    def square(self):
        """The forward uses the same name for something else."""
        raise ValueError("not to be read")


FACTOR = 1.0


class ReadsElsewhere(torch.nn.Module):
    """A module whose forward also reads a config, a dict, a class and the globals of the file."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(D) + 0.5)
        self.config, self.options = Config(), {"scale": 1.0, "of another": 1.0}

    def scaled(self, y):
        return y * self.config.scale * self.options["scale"] * FACTOR

    def forward(self, x):
        return self.scaled(self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class GatedBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = (torch.nn.Linear(*s) for s in ((D, FF), (D, FF), (FF, D)))
        self.act = torch.nn.GELU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


ELSEWHERE = {
    "config": (ReadsElsewhere, lambda module, patch: setattr(module.config, "scale", 2.0)),
    "item": (ReadsElsewhere, lambda module, patch: module.options.update(scale=2.0)),
    "item that is gone": (ReadsElsewhere, lambda module, patch: setattr(module, "options", {"scale": 3.0})),
    "class of the config": (ReadsElsewhere, lambda module, patch: patch.setattr(Config, "scale", 2.0)),
    "file": (ReadsElsewhere, lambda module, patch: patch.setattr(sys.modules[__name__], "FACTOR", 2.0)),
    "child": (GatedBlock, lambda module, patch: setattr(module.act, "approximate", "tanh")),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_value_elsewhere_that_changes(name, monkeypatch):
    kind, change = ELSEWHERE[name]
    plain, x = kind(), torch.randn(4, D)
    module = copy.deepcopy(plain)
    assert "" in fastattn.replace(module).replaced
    for twin in (module, plain):
        change(twin, monkeypatch)
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), plain(x))


def test_a_bias_that_comes_later():
    plain, x = Linear(), torch.randn(4, D)
    module = copy.deepcopy(plain)
    fastattn.replace(module)
    plain.bias = module.bias = torch.nn.Parameter(torch.randn(D))
    torch.testing.assert_close(module(x), plain(x))


@kinds
def test_what_our_forward_reads_may_change(kind, monkeypatch):
    module, x = kind(), torch.randn(4, D)
    fastattn.replace(module)
    module.eval()
    module.scale = 1.0
    module.own_name = "first"
    module.load_state_dict({name: t + 1 for name, t in module.state_dict().items()}, assign=True)
    for name in list(module._modules):
        setattr(module, name, copy.deepcopy(getattr(module, name)))
    module.forward = module.forward  # the hooks of accelerate do this and later restore it
    replica = module._replicate_for_data_parallel()
    monkeypatch.setattr(kind, "forward", None)  # would fail
    assert module(x).shape == x.shape
    assert replica._fastattn is not None
