"""A linear layer, y = x · weightᵀ + bias, with the matrix products of _gemm.py in the forward and backward.

dx = dy · weight,  dweight = dyᵀ · x,  dbias = sum of dy over the rows
"""

import torch
import torch.nn.functional as F

from fastattn import _autocast
from fastattn.ops import _gemm
from fastattn.ops._backends import grad_wanted
from fastattn.ops._register import apply

_LEAST = 2**20  # multiplications below which the overhead of an autograd.Function exceeds the gain
_MOST_ROWS_OF_TORCH = 1  # of x · weight: our product packs the weight, torch's does not


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, transposed):
        ctx.save_for_backward(x, weight)
        ctx.transposed = transposed
        return _gemm.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_dx, need_dweight, need_dbias, _ = ctx.needs_input_grad
        a, b = (x, dy) if ctx.transposed else (dy, x)
        matrix = weight.t() if ctx.transposed else weight
        if torch.is_grad_enabled():  # create_graph=True
            dx = _autocast.matmul(dy, matrix) if need_dx else None
            dweight = _autocast.matmul(a.t(), b) if need_dweight else None
        else:
            dx = _gemm.input_grad(dy, matrix) if need_dx else None
            dweight = _gemm.weight_grad(a, b) if need_dweight else None
        return dx, dweight, dy.sum(0) if need_dbias else None, None


def linear(x, weight, bias=None, transposed=False):
    """`torch.nn.functional.linear` on the fastest matrix product for the operands.

    Args:
        x: (..., d_in) of any strides. weight: (d_out, d_in). bias: (d_out,) or None.
        transposed: weight is (d_in, d_out), as in the Conv1D of transformers.
    Returns: (..., d_out).
    Raises:
        RuntimeError: as torch.nn.functional.linear, and for a weight or bias on the meta device, with which that
            function computes nothing and returns whatever the memory holds.
    """
    if (weight.is_meta or (bias is not None and bias.is_meta)) and not x.is_meta:
        raise RuntimeError(f"linear: weight and bias must be on the device of x, {x.device}, but one is on meta")
    rows = x.numel() // max(1, x.shape[-1]) if x.dim() else 0
    if (
        not x.layout is weight.layout is torch.strided
        or (transposed and rows <= _MOST_ROWS_OF_TORCH)
        or not (_gemm.is_ours("any", rows, x, weight) or (not transposed and _gemm.is_few(x, weight)))
        or _autocast.autocast_dtype(x) is not None
    ):
        return F.linear(x, weight.t() if transposed else weight, bias)
    needs_grad = grad_wanted(x, weight, bias)
    matrix = weight.t() if transposed else weight
    fits = x.dim() > 0 and weight.dim() == 2 and x.shape[-1] == matrix.shape[1]
    fits = fits and (bias is None or bias.shape == matrix.shape[:1])  # torch's function broadcasts others
    if not fits or (needs_grad and x.numel() * matrix.shape[0] < _LEAST):
        return F.linear(x, matrix, bias)
    rows = x if x.dim() == 2 else x[None] if x.dim() == 1 else x.flatten(0, -2)
    y = apply(_Linear, rows, weight, bias, transposed) if needs_grad else _gemm.linear(rows, matrix, bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], matrix.shape[0])
