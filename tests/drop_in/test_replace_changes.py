"""Attributes that change after `replace`: the check covered the old values, so a module's own forward runs again."""

import copy
import pickle
import sys
import types

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


class ReadsAnotherFile(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(D) + 0.5)

    def forward(self, x):
        y = self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return another_file.rounded(y) * another_file.SCALE


another_file = types.ModuleType("file_of_numbers")
another_file.SCALE = 1.0
exec("def rounded(y):\n    return y", vars(another_file))


class GatedBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = (torch.nn.Linear(*s) for s in ((D, FF), (D, FF), (FF, D)))
        self.act = torch.nn.GELU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class ConfigThatRefuses:
    refuses = False

    @property
    def scale(self):
        if self.refuses:
            raise ValueError("no scale")
        return 1.0


def rounded(y):
    return y


class ReadsWhatMayAppear(torch.nn.Module):
    """Whose forward reads what its config, a dict and a list do not have yet, and calls a function and a method."""

    own = 3.0

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(D) + 0.5)
        self.config, self.options, self.scales, self.own = ConfigThatRefuses(), {}, [1.0], 1.0

    def scaled(self, y):
        for scale in self.scales:
            y = y * scale
        try:
            y = y * self.config.scale
        except ValueError:
            y = y * 5
        if "shift" in self.options:
            y = y + self.options["shift"]
        y = y * self.options.get("factor", 1.0) * getattr(self.config, "another", 1.0) * getattr(self, "later", 1.0)
        return rounded(y) * self.own

    def forward(self, x):
        return self.scaled(self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def _twice(function):
    return lambda *args: function(*args) * 2


APPEARS = {
    "item of a list": lambda module, patch: module.scales.append(2.0),
    "item that is asked for": lambda module, patch: module.options.update(shift=2.0),
    "item with a default": lambda module, patch: module.options.update(factor=2.0),
    "attribute of a config": lambda module, patch: setattr(module.config, "another", 2.0),
    "attribute": lambda module, patch: setattr(module, "later", 2.0),
    "value of the class": lambda module, patch: delattr(module, "own"),
    "error of a config": lambda module, patch: setattr(module.config, "refuses", True),
    "function": lambda _, patch: patch.setattr(sys.modules[__name__], "rounded", _twice(rounded)),
    "method": lambda _, patch: patch.setattr(ReadsWhatMayAppear, "scaled", _twice(ReadsWhatMayAppear.scaled)),
    "forward": lambda _, patch: patch.setattr(ReadsWhatMayAppear, "forward", _twice(ReadsWhatMayAppear.forward)),
}

ELSEWHERE = {
    **{name: (ReadsWhatMayAppear, change) for name, change in APPEARS.items()},
    "config": (ReadsElsewhere, lambda module, patch: setattr(module.config, "scale", 2.0)),
    "item": (ReadsElsewhere, lambda module, patch: module.options.update(scale=2.0)),
    "item that is gone": (ReadsElsewhere, lambda module, patch: setattr(module, "options", {"scale": 3.0})),
    "class of the config": (ReadsElsewhere, lambda module, patch: patch.setattr(Config, "scale", 2.0)),
    "file": (ReadsElsewhere, lambda module, patch: patch.setattr(sys.modules[__name__], "FACTOR", 2.0)),
    "another file": (ReadsAnotherFile, lambda _, patch: patch.setattr(another_file, "SCALE", 2.0)),
    "its function": (ReadsAnotherFile, lambda _, patch: patch.setattr(another_file, "rounded", lambda y: y * 2)),
    "child": (GatedBlock, lambda module, patch: setattr(module.act, "approximate", "tanh")),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_value_elsewhere_that_changes(name, monkeypatch):
    kind, change = ELSEWHERE[name]
    monkeypatch.setitem(sys.modules, another_file.__name__, another_file)
    plain, x = kind(), torch.randn(4, D)
    module = copy.deepcopy(plain)
    assert "" in fastattn.replace(module).replaced
    change(module, monkeypatch)
    if name not in ("function", "method", "forward", "its function"):
        change(plain, monkeypatch)
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
    monkeypatch.setattr(kind.forward, "__code__", (lambda self, x: None).__code__)  # would fail
    assert module(x).shape == x.shape
    assert replica._fastattn is not None
