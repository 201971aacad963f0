"""Encoder and decoder layers in a training step, for the tests of the layer as one node of autograd."""

import pytest
import torch

import fastattn
from fastattn.nn import decoder, encoder, whole

MASKS = ("none", "causal", "bool", "float", "padding", "both")


@pytest.fixture
def calls(monkeypatch):
    """The calls of the node so far."""
    found, original = [], whole.train_layer
    monkeypatch.setattr(whole, "train_layer", lambda *args: found.append(args) or original(*args))
    return found


@pytest.fixture
def parts(monkeypatch):
    """Runs a function with the layers computed part by part."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(encoder, "encode", lambda *_: None)
            patch.setattr(decoder, "decode", lambda *_: None)
            return function()

    return run


def make(d_model=24, heads=3, d_ff=40, dropout=0.0, activation="gelu", kind="Encoder", **options):
    """A layer in training, with random biases and norms."""
    torch.manual_seed(0)
    options = {"batch_first": True, "norm_first": False} | options
    cls = getattr(fastattn.nn, f"Transformer{kind}Layer")
    layer = cls(d_model, heads, d_ff, dropout, activation, **options)
    for p in layer.parameters():  # biases and norms of torch start at 0 and 1
        torch.nn.init.normal_(p, std=0.3)
    return layer.train()


def masks_for(kind, batch, seqlen):
    """The arguments of a layer for a kind of `MASKS`."""
    hidden = torch.rand(seqlen, seqlen, generator=torch.Generator().manual_seed(1)) < 0.4
    hidden.fill_diagonal_(False)
    padding = torch.zeros(batch, seqlen, dtype=torch.bool)
    padding[-1, seqlen // 2 + 1 :] = True
    return {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"src_mask": hidden},
        "float": {"src_mask": torch.randn(seqlen, seqlen, generator=torch.Generator().manual_seed(2))},
        "padding": {"src_key_padding_mask": padding},
        "both": {"src_mask": hidden, "src_key_padding_mask": padding},
    }[kind]


def step(layer, x, *memory, seed=5, autocast=False, **masks):
    """{name: tensor} of the result, all gradients, and the next random number."""
    torch.manual_seed(seed)
    inputs = {name: t.detach().requires_grad_() for name, t in zip(("x", "memory"), (x, *memory), strict=False)}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(*inputs.values(), **masks)
    after = torch.rand(1)
    inputs |= dict(layer.named_parameters())
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).cos()
    grads = torch.autograd.grad(y, list(inputs.values()), dy)
    return {"y": y.detach(), "random": after, **dict(zip(inputs, grads, strict=True))}


def assert_close(found, expected, rtol=2e-5):
    """Each tensor is as far from the expected one as rtol of its largest element allows."""
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        scale = float(t.abs().max()) if t.numel() else 0.0
        torch.testing.assert_close(found[name].double(), t.double(), rtol=rtol, atol=rtol * scale, msg=name)
