"""LayerNorm and RMSNorm with dropout and residual, forward and backward, against PyTorch's own ops.

nbytes counts what a fused implementation must move: inputs read once, outputs written once.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE

import fastattn

SHAPES = [(2048, 1024), (4096, 512), (8192, 256)] if DEVICE == "cpu" else [(16384, 1024), (16384, 4096), (8192, 8192)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2}


class AddedBefore(torch.autograd.Function):
    """Treats x_bias as already added to x by a linear layer, so it costs only its sum in the backward."""

    @staticmethod
    def forward(ctx, x, x_bias):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx, dx.sum(0)


def joined(x, residual, x_bias, dropout_p):
    if x_bias is not None:
        x = AddedBefore.apply(x, x_bias)
    if dropout_p:
        x = F.dropout(x, dropout_p)
    return x if residual is None else x + residual


def torch_layer_norm(x, weight, bias, residual, x_bias, dropout_p):
    return F.layer_norm(joined(x, residual, x_bias, dropout_p), (x.shape[-1],), weight, bias)


def torch_rms_norm(x, weight, bias, residual, x_bias, dropout_p):
    return F.rms_norm(joined(x, residual, x_bias, dropout_p), (x.shape[-1],), weight)


def our_layer_norm(x, weight, bias, residual, x_bias, dropout_p):
    return fastattn.layer_norm(x, weight, bias, residual=residual, x_bias=x_bias, dropout_p=dropout_p)


def our_rms_norm(x, weight, bias, residual, x_bias, dropout_p):
    return fastattn.rms_norm(x, weight, residual=residual, x_bias=x_bias, dropout_p=dropout_p)


IMPLEMENTATIONS = {
    "layer_norm": (torch_layer_norm, our_layer_norm),
    "rms_norm": (torch_rms_norm, our_rms_norm),
}
# residual, bias of the preceding linear layer, dropout
FORMS = {
    "plain": (False, False, 0.0),
    "add": (True, False, 0.0),
    "dropout_add": (True, False, 0.1),
    "x_bias_dropout_add": (True, True, 0.1),
}


@pytest.mark.parametrize("direction", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_norm(compare, op, form, dtype, rows, cols, direction):
    with_residual, with_x_bias, dropout_p = FORMS[form]
    backward = direction == "fwd_bwd"
    torch.manual_seed(0)
    x = torch.randn(rows, cols, dtype=dtype, device=DEVICE, requires_grad=backward)
    residual = torch.randn_like(x, requires_grad=backward) if with_residual else None
    weight = torch.randn(cols, device=DEVICE, dtype=dtype, requires_grad=backward)
    bias = torch.randn(cols, device=DEVICE, dtype=dtype, requires_grad=backward)
    x_bias = torch.randn(cols, device=DEVICE, dtype=dtype, requires_grad=backward) if with_x_bias else None
    dy = torch.randn(rows, cols, dtype=dtype, device=DEVICE)

    def call(fn, p, x=x, residual=residual, weight=weight, bias=bias, x_bias=x_bias, dy=dy):
        if x_bias is not None and fn is theirs:
            x = (x + x_bias).detach().requires_grad_(backward)
        inputs = [t for t in (x, residual, weight, bias if op == "layer_norm" else None, x_bias) if t is not None]

        def run():
            y = fn(x, weight, bias, residual, x_bias, p)
            return (y, *torch.autograd.grad(y, inputs, dy)) if backward else y

        return run

    theirs, ours = IMPLEMENTATIONS[op]
    # verified in fp32, because PyTorch sums weight gradients of half precision in half precision
    in_fp32 = [None if t is None else t.float() for t in (x, residual, weight, bias, x_bias, dy)]
    # forward: x -> y; with a residual also residual -> r, if r is saved for the backward
    tensors = 2 + with_residual + (with_residual and backward)
    if backward:  # dy, r -> dx, and dresidual, which differs from dx with dropout
        tensors += 3 + (dropout_p > 0)
    compare(
        {"torch": call(theirs, dropout_p), "fastattn": call(ours, dropout_p)},
        verify={"torch": call(theirs, 0.0, *in_fp32), "fastattn": call(ours, 0.0)},
        tolerance=TOLERANCE[dtype] * (4 if backward else 1),  # sums over thousands of rows, in another order
        nbytes=tensors * dy.nbytes,
    )
