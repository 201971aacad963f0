"""Shared by the tests of the feed-forward op and of its kernels."""

import os

import pytest
import torch
from oracle import BACKWARD, assert_accurate

import fastattn
from fastattn import reference
from fastattn.ops.feed_forward import ACTIVATIONS

BACKEND = os.environ.get("FASTATTN_BACKEND") or "native"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Triton's interpreter computes bf16 on raw bits and truncates in stores
FLOATS = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16)

needs_kernels = pytest.mark.skipif(
    fastattn.backends()["cpu"][BACKEND] != "available",
    reason=f"no {BACKEND} kernels for the CPU: {fastattn.backends()['cpu'][BACKEND]}",
)


def keep_factor(rng, dropout_p, shape):
    rows = torch.arange(shape[:-1].numel())
    keep = reference.philox_keep(rng, dropout_p, rows, rows >> 32, shape[-1]).view(shape)
    return keep * reference.dropout_scale(dropout_p)


class Case:
    """A call of activation_fwd and activation_bwd, and the results of the reference."""

    def __init__(self, rows, cols, activation="gelu", dtype=torch.float32, gated=False, dropout_p=0.0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.preact, self.gate, self.dhidden = (
            torch.randn(rows, cols, generator=generator).to(dtype) * 3 for _ in range(3)
        )
        self.gate = self.gate if gated else None
        self.rng = torch.tensor([seed * 7919 - 2**45, 2**33 + seed]) if dropout_p else None
        self.activation, self.dropout_p = activation, dropout_p

    def run(self, kernels, need_hidden=True, need_dbias=True, need_dbias_gate=True):
        rest = (self.rng, self.dropout_p, ACTIVATIONS.index(self.activation))
        needs = (need_hidden, need_dbias, need_dbias_gate)
        hidden = kernels.activation_fwd(self.preact, self.gate, *rest)
        return hidden, *kernels.activation_bwd(self.dhidden, self.preact, self.gate, *rest, *needs)

    def expected(self, dtype):
        """hidden, dpreact, dgate, hidden, dbias, dbias_gate computed in `dtype`."""
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (self.preact, self.gate)]
        preact, gate = leaves
        act = reference.ACTIVATIONS[self.activation]
        hidden = act(preact) if gate is None else act(gate) * preact
        if self.rng is not None:
            hidden = hidden * keep_factor(self.rng, self.dropout_p, hidden.shape).to(dtype)
        grads = torch.autograd.grad(hidden, [t for t in leaves if t is not None], self.dhidden.to(dtype))
        dpreact, dgate = grads if gate is not None else (*grads, torch.empty(0, dtype=dtype))
        return hidden.detach(), dpreact, dgate, hidden.detach(), dpreact.sum(0), dgate.sum(0)

    def check(self, kernels):
        results = self.run(kernels)
        names = ("hidden", "dpreact", "dgate", "hidden again", "dbias", "dbias_gate")
        every = zip(names, results, self.expected(torch.float64), self.expected(self.preact.dtype), strict=True)
        for name, got, exact64, own in every:
            if self.gate is None and "gate" in name:
                assert got.shape == (0,), name
            else:
                factor = BACKWARD if name.startswith("d") else 2.0
                slack = 1e-6 * self.preact.shape[0] ** 0.5 if "bias" in name else 0.0
                assert_accurate(got, exact64, own, factor, name, slack)
        return results
