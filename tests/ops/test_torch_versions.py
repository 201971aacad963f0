"""What the ops take from inside PyTorch: they do without it where another version has something else there."""

import types

import pytest
import torch
from torch.autograd.function import BackwardCFunction

from fastattn.ops import _register


def double():
    """A new function of autograd, which no call has seen yet."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return dy * 2

    return Double


def gradient(function):
    x = torch.ones(3, requires_grad=True)
    y = _register.apply(function, x)
    return y, torch.autograd.grad(y.sum(), x)[0]


def assert_doubles(function):
    for result in gradient(function):
        assert result.tolist() == [2, 2, 2]


@pytest.fixture(autouse=True)
def forgets(monkeypatch):
    monkeypatch.setattr(_register, "_applies", {})


def test_this_pytorch_is_known():
    function = double()
    assert isinstance(_register.eager_apply(function), types.BuiltinMethodType)
    assert function._backward_cls.apply is function.backward
    assert_doubles(function)


def other_versions(original, calls):
    """Methods in place of `original` that do more than it does."""

    def with_a_name(self, *args):
        calls.append(self)
        return original(self, *args)

    def with_a_variable(self, *args, note=calls.append):
        note(self)
        return original(self, *args)

    class Callable:  # has no code of its own
        def __get__(self, instance, owner):
            return types.MethodType(with_a_name, owner if instance is None else instance)

    return {"a name": with_a_name, "a variable": with_a_variable, "no code": Callable()}


@pytest.mark.parametrize("kind", ["a name", "a variable", "no code"])
def test_another_apply_of_functions_is_called(monkeypatch, kind):
    calls = []
    original = torch.autograd.Function.__dict__["apply"]
    stand_in = other_versions(lambda cls, *args: original.__get__(None, cls)(*args), calls)[kind]
    monkeypatch.setattr(torch.autograd.Function, "apply", classmethod(stand_in) if callable(stand_in) else stand_in)
    function = double()
    for _ in range(2):
        assert_doubles(function)
    assert calls == [function] * 2


@pytest.mark.parametrize("kind", ["a name", "a variable", "no code"])
def test_another_apply_of_nodes_is_called(monkeypatch, kind):
    calls = []
    monkeypatch.setattr(BackwardCFunction, "apply", other_versions(BackwardCFunction.apply, calls)[kind])
    function = double()
    assert_doubles(function)
    assert len(calls) == 1


def test_an_apply_in_cpp_is_called_as_it_is(monkeypatch):  # PyTorch 2.14 and newer
    in_cpp = vars(torch._C._FunctionBase)["apply"]
    monkeypatch.setattr(torch.autograd.Function, "apply", in_cpp)
    function = double()
    assert _register.eager_apply(function) == function.apply
    assert_doubles(function)
