"""The feed-forward block against PyTorch's own ops, and its two activation passes alone.

flops counts the matrix products: 2 forward and 4 backward, or 3 and 6 if gated. nbytes of the passes counts inputs
read once and outputs written once.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, backend_of_raw_op

import fastattn
from fastattn.ops.feed_forward import ACTIVATIONS
from fastattn.reference import ACTIVATIONS as FUNCTIONS

D_MODELS = (128, 256, 512) if DEVICE == "cpu" else (512, 1024, 2048, 4096)
TOKENS = 1024 if DEVICE == "cpu" else 16384
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


def torch_feed_forward(x, w1, b1, w2, b2, w_gate, b_gate, activation, dropout_p):
    hidden = F.linear(x, w1, b1)
    act = FUNCTIONS[activation]
    hidden = act(hidden) if w_gate is None else act(F.linear(x, w_gate, b_gate)) * hidden
    return F.linear(F.dropout(hidden, dropout_p), w2, b2)


def our_feed_forward(x, w1, b1, w2, b2, w_gate, b_gate, activation, dropout_p):
    return fastattn.feed_forward(
        x, w1, b1, w2, b2, activation=activation, w_gate=w_gate, b_gate=b_gate, dropout_p=dropout_p
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("direction", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("d_model", D_MODELS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("form", ["gelu", "silu_gated"])
def test_feed_forward(compare, form, dtype, d_model, direction, dropout_p):
    activation, _, gated = form.partition("_")
    backward, d_ff = direction == "fwd_bwd", 4 * d_model
    torch.manual_seed(0)

    def leaf(*size, scale=1.0):
        return (torch.randn(size, device=DEVICE) * scale).to(dtype).requires_grad_(backward)

    x, w1, b1 = leaf(TOKENS, d_model), leaf(d_ff, d_model, scale=d_model**-0.5), leaf(d_ff)
    w2, b2 = leaf(d_model, d_ff, scale=d_ff**-0.5), leaf(d_model)
    w_gate, b_gate = (leaf(d_ff, d_model, scale=d_model**-0.5), leaf(d_ff)) if gated else (None, None)
    inputs = [t for t in (x, w1, b1, w2, b2, w_gate, b_gate) if t is not None]
    dy = torch.randn(TOKENS, d_model, device=DEVICE).to(dtype)

    def call(fn, p):
        def run():
            y = fn(x, w1, b1, w2, b2, w_gate, b_gate, activation, p)
            return (y, *torch.autograd.grad(y, inputs, dy)) if backward else y

        return run

    fns = {"torch": torch_feed_forward, "fastattn": our_feed_forward}
    products = (3 if gated else 2) * (3 if backward else 1)
    compare(
        {name: call(fn, dropout_p) for name, fn in fns.items()},
        verify={name: call(fn, 0.0) for name, fn in fns.items()},
        tolerance=TOLERANCE[dtype] * (TOKENS**0.5 if backward else 1),
        flops=products * 2 * TOKENS * d_model * d_ff,
        dtype=dtype,
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(compare, activation, dtype, dropout_p):
    """Forward and backward of the activation alone, on the raw ops as feed_forward calls them."""
    rows, cols = (2048, 1024) if DEVICE == "cpu" else (16384, 8192)
    torch.manual_seed(0)
    x = torch.randn(rows, cols, device=DEVICE).to(dtype).requires_grad_()
    preact = x.detach()
    dhidden = torch.randn_like(preact)
    rng = torch.tensor([1, 2], device=DEVICE)
    index = ACTIVATIONS.index(activation)
    backend = backend_of_raw_op("feed_forward")
    forward, backward = (getattr(getattr(torch.ops.fastattn, f"activation_{way}"), backend) for way in ("fwd", "bwd"))

    def in_torch(p):
        hidden = F.dropout(FUNCTIONS[activation](x), p) if p else FUNCTIONS[activation](x)
        return hidden, *torch.autograd.grad(hidden, x, dhidden)

    def ours(p):
        state = rng if p else None
        hidden = forward(preact, None, state, p, index)
        return hidden, backward(dhidden, preact, None, state, p, index, False, False, False)[0]

    compare(
        {"torch": lambda: in_torch(dropout_p), "fastattn": lambda: ours(dropout_p)},
        verify={"torch": lambda: in_torch(0.0), "fastattn": lambda: ours(0.0)},
        tolerance=TOLERANCE[dtype],
        nbytes=5 * preact.nbytes,
    )
