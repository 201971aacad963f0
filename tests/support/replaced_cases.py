"""What the tests of `fastattn.replace` share."""

import torch


def run(module, x):
    """The output of a module, and {"x" or the name of a parameter: gradient} of a weighted sum of it."""
    leaf = x.detach().clone().requires_grad_()
    y = module(leaf)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    inputs = {"x": leaf} | {name.removeprefix("_orig_mod."): p for name, p in module.named_parameters()}
    return y, dict(zip(inputs, torch.autograd.grad((y * weights).sum(), list(inputs.values())), strict=True))
