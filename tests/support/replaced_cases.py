"""What the tests of `fastattn.replace` share."""

import torch

import fastattn.ops.linear


def run(module, x):
    """The output of a module, and {"x" or the name of a parameter: gradient} of a weighted sum of it."""
    leaf = x.detach().clone().requires_grad_()
    y = module(leaf)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    inputs = {"x": leaf} | {name.removeprefix("_orig_mod."): p for name, p in module.named_parameters()}
    return y, dict(zip(inputs, torch.autograd.grad((y * weights).sum(), list(inputs.values())), strict=True))


def calls_of_linear(monkeypatch, module):
    """The list that collects the arguments of all calls of our linear layer by a module of drop_in, small ones too."""
    monkeypatch.setattr(fastattn.ops.linear, "_LEAST", 0)
    found, original = [], module.linear

    def counted(*args, **options):
        found.append(args)
        return original(*args, **options)

    monkeypatch.setattr(module, "linear", counted)
    return found
