"""Small layers of torch.nn and ours, and the tools that are run on both: what the tests of PyTorch's tools share.

A tool takes a module and its inputs and returns something comparable: tensors, including gradients, and text. What a
tool cannot do with ours is in docs/torch-nn.md, section Tools.
"""

import functools

import torch
from nn_oracle import slow_path

from fastattn import nn

E, H, FF, N, L = 16, 4, 24, 3, 6
LAYER = {"dim_feedforward": FF, "dropout": 0.0, "batch_first": True}
LAYERS = {
    "LayerNorm": (lambda lib: lib.LayerNorm(E), 1),
    "RMSNorm": (lambda lib: lib.RMSNorm(E), 1),
    "MultiheadAttention": (lambda lib: lib.MultiheadAttention(E, H, batch_first=True), 3),
    "TransformerEncoderLayer": (lambda lib: lib.TransformerEncoderLayer(E, H, **LAYER), 1),
    "TransformerDecoderLayer": (
        lambda lib: lib.TransformerDecoderLayer(E, H, activation="gelu", norm_first=True, **LAYER), 2,
    ),
    "Transformer": (lambda lib: lib.Transformer(E, H, 1, 1, **LAYER), 2),
}  # fmt: skip


def build(name, library):
    torch.manual_seed(0)
    module = LAYERS[name][0](library)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() < 2:  # norms and biases other than 1 and 0
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def inputs_of(name):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(N, L, E, generator=generator) for _ in range(LAYERS[name][1])]


def first(out):
    return out[0] if isinstance(out, tuple) else out


def trained(module, inputs, call=None):
    """The output, and the gradients of the inputs and of the parameters, by name, as some tools change their order."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    parameters = dict(sorted(module.named_parameters()))
    out = first((module if call is None else call)(*leaves))
    grads = torch.autograd.grad(out.square().sum(), [*leaves, *parameters.values()], allow_unused=True)
    return [out.detach(), *grads]


def smaller(inputs):
    """Inputs of other sizes, for a tool that recorded with the first ones."""
    return [x[:2, :4].contiguous() for x in inputs]


class Tools(dict):
    """The tools of a test file, by name."""

    def add(self, **options):
        """Register a tool under its own name, or one for each value of its single option."""

        def register(function):
            if not options:
                self[function.__name__] = function
            for argument, values in options.items():
                for value in values:
                    self[f"{function.__name__}-{value}"] = functools.partial(function, **{argument: value})
            return function

        return register


def outcome(tool, name, library):
    module, inputs = build(name, library), inputs_of(name)
    torch.manual_seed(3)
    with slow_path():
        return tool(module, inputs)


def assert_same(got, expected):
    assert len(got) == len(expected)
    for found, wanted in zip(got, expected, strict=True):
        if isinstance(wanted, torch.Tensor):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * (10 + wanted.abs().max().item()))
        else:
            assert found == wanted


def assert_same_outcome(tool, name):
    """A tool gives the same with the layer of this name from fastattn.nn and from torch.nn."""
    assert_same(outcome(tool, name, nn), outcome(tool, name, torch.nn))


def weights(module):
    """(child, name) of each parameter that is not a bias."""
    return [
        (child, name)
        for child in list(module.modules())
        for name, _ in list(child.named_parameters(recurse=False))
        if "bias" not in name
    ]
