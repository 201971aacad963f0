"""Pairs of a layer of ours and one of torch.nn, for tests that change their children or patch functions."""

import functools

import pytest
import torch
from nn_oracle import pair, slow_path

import fastattn.nn.decoder
import fastattn.nn.encoder

E, H, FF = 16, 4, 24
LAYERS = ("TransformerEncoderLayer", "TransformerDecoderLayer")


def build(name, **kwargs):
    ours, theirs = pair(name, E, H, FF, 0.0, batch_first=True, dtype=torch.float64, **kwargs)
    x = [torch.randn(3, 5, E, dtype=torch.float64) for _ in range(2 if "Decoder" in name else 1)]
    return ours, theirs, x


def assert_same(ours, theirs, x):
    with slow_path():
        torch.testing.assert_close(ours(*x), theirs(*x))


@pytest.fixture
def fused(monkeypatch):
    """A list that gets an entry for every fused add and norm."""
    calls = []

    def counted(function):
        @functools.wraps(function)
        def wrapper(*args):
            calls.append(function.__name__)
            return function(*args)

        return wrapper

    for module in (fastattn.nn.encoder, fastattn.nn.decoder):
        for name in ("add_norm", "add_norm_keep_sum"):
            monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return calls
