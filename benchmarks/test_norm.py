"""LayerNorm and RMSNorm with dropout and residual, forward and backward, beside the same in PyTorch's own ops.

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


def torch_layer_norm(x, weight, bias, residual=None, dropout_p=0.0):
    if dropout_p:
        x = F.dropout(x, dropout_p)
    if residual is not None:
        x = x + residual
    return F.layer_norm(x, (x.shape[-1],), weight, bias)


def torch_rms_norm(x, weight, bias, residual=None, dropout_p=0.0):
    if dropout_p:
        x = F.dropout(x, dropout_p)
    if residual is not None:
        x = x + residual
    return F.rms_norm(x, (x.shape[-1],), weight)


def our_layer_norm(x, weight, bias, residual=None, dropout_p=0.0):
    return fastattn.layer_norm(x, weight, bias, residual=residual, dropout_p=dropout_p)


def our_rms_norm(x, weight, bias, residual=None, dropout_p=0.0):
    return fastattn.rms_norm(x, weight, residual=residual, dropout_p=dropout_p)


IMPLEMENTATIONS = {
    "layer_norm": (torch_layer_norm, our_layer_norm),
    "rms_norm": (torch_rms_norm, our_rms_norm),
}
FORMS = {"plain": (False, 0.0), "add": (True, 0.0), "dropout_add": (True, 0.1)}


@pytest.mark.parametrize("direction", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_norm(compare, op, form, dtype, rows, cols, direction):
    with_residual, dropout_p = FORMS[form]
    backward = direction == "fwd_bwd"
    torch.manual_seed(0)
    x = torch.randn(rows, cols, dtype=dtype, device=DEVICE, requires_grad=backward)
    residual = torch.randn_like(x, requires_grad=backward) if with_residual else None
    weight = torch.randn(cols, device=DEVICE, dtype=dtype, requires_grad=backward)
    bias = torch.randn(cols, device=DEVICE, dtype=dtype, requires_grad=backward)
    dy = torch.randn(rows, cols, dtype=dtype, device=DEVICE)

    def call(fn, p, x=x, residual=residual, weight=weight, bias=bias, dy=dy):
        inputs = [t for t in (x, residual, weight, bias if op == "layer_norm" else None) if t is not None]

        def run():
            y = fn(x, weight, bias, residual, p)
            return (y, *torch.autograd.grad(y, inputs, dy)) if backward else y

        return run

    theirs, ours = IMPLEMENTATIONS[op]
    # checked against fp32: PyTorch sums the weight gradients of half precision in half precision
    in_fp32 = [None if t is None else t.float() for t in (x, residual, weight, bias, dy)]
    # forward: x -> y, with a residual also residual -> r when it is kept for the backward
    tensors = 2 + with_residual + (with_residual and backward)
    if backward:  # dy, r -> dx, and dresidual where dropout tells the two apart
        tensors += 3 + (dropout_p > 0)
    compare(
        {"torch": call(theirs, dropout_p), "fastattn": call(ours, dropout_p)},
        verify={"torch": call(theirs, 0.0, *in_fp32), "fastattn": call(ours, 0.0)},
        tolerance=TOLERANCE[dtype] * (4 if backward else 1),  # sums over thousands of rows, in another order
        nbytes=tensors * dy.nbytes,
    )
