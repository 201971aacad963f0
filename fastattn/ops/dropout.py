"""Dropout with the residual add in the same pass.

    out = keep * dropout_scale * x + residual          dx = keep * dropout_scale * dout,  dresidual = dout

The backward is the forward without a residual. The mask is never stored, but redrawn from (seed, offset).
"""

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastattn import reference
from fastattn.ops._backends import choose, device_name, grad_wanted, register_backend
from fastattn.ops._dtypes import why_not_dtypes
from fastattn.ops._kinds import FLOAT_DTYPES, check_float, check_memory, is_dtensor
from fastattn.ops._nested import on_rows
from fastattn.ops._public import Public
from fastattn.ops._random import check_dropout_p, draw_rng
from fastattn.ops._register import TRACED, apply, raw_ops, register_autograd, register_fake, traced_backend
from fastattn.ops._types import Backend


def _dropout_fake(x, residual, rng, dropout_p):
    return x.new_empty(x.shape, dtype=x.dtype if residual is None else residual.dtype)


register_fake("dropout_fwd", _dropout_fake)
_fwd = raw_ops("dropout_fwd")
for _backend in ("native", "triton"):
    register_backend("dropout", _backend, lambda facts: why_not_dtypes(*facts[1:]))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, rng, dropout_p, backend):
        ctx.save_for_backward(rng)
        ctx.options = (dropout_p, backend, x.dtype)
        fwd = _fwd if is_dynamo_compiling() else _fwd.direct
        return fwd[backend](x, residual, rng, dropout_p)

    @staticmethod
    def backward(ctx, dout):
        (rng,) = ctx.saved_tensors
        dropout_p, backend, dtype = ctx.options
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dout.to(dtype)
            if torch.is_grad_enabled():  # create_graph=True
                dx = reference.dropout(dx, dropout_p, rng=rng)
            else:
                dx = _fwd[backend](dx, None, rng, dropout_p)
        return dx, dout if ctx.needs_input_grad[1] else None, None, None, None


register_autograd(
    "dropout_fwd",
    lambda backend, x, residual, rng, dropout_p: apply(_Dropout, x, residual, rng, dropout_p, backend),
    lambda x, residual, rng, dropout_p: reference.dropout(x, dropout_p, residual, rng),
)


_DROPOUT = Public("dropout", tensors="x residual", numbers="dropout_p", nested=on_rows("x", "residual"))


@_DROPOUT.overridable
def dropout(
    x: Tensor,
    dropout_p: float = 0.5,
    *,
    residual: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """residual + dropout(x). All backends and devices draw the same mask for the same (seed, offset).

    Args:
        x: (..., cols), float32, bfloat16 or float16 (float64 runs on the reference), any strides.
        dropout_p: probability of setting an element of x to 0; the others are divided by the rate of kept elements.
        residual: like x, of any float dtype, or None.
        backend: "native", "triton" or "reference" instead of the automatic choice.
    Returns: like x; with a residual, in its dtype. x itself if dropout_p is 0 and there is no residual.
    Raises:
        ValueError: shapes, devices or dropout_p are invalid, or the named backend cannot serve the call.
        TypeError: an argument has a wrong type or dtype.
    Source: torch.nn.functional.dropout; the rate is exact to 1/65536.
    Example:
        >>> x = torch.randn(4, 64)
        >>> fastattn.dropout(x, 0.1, residual=x).shape
        torch.Size([4, 64])
    """
    dropout_p = _check(x, dropout_p, residual)
    if not dropout_p:
        if residual is None:
            return x
        check_memory("dropout", x=x, residual=residual)
        return x + residual
    runs = choose("dropout", _facts(x, residual), backend)
    if type(x) is not torch.Tensor and is_dtensor(x):
        return _dropout_sharded(x, residual, dropout_p, runs)
    return _dropout(x, residual, draw_rng(x), dropout_p, runs)


def _dropout(x, residual, rng, dropout_p, runs):
    runs = traced_backend(runs)
    if runs == "reference":
        check_memory("dropout", x=x, residual=residual)
        return reference.dropout(x, dropout_p, residual, rng)
    if runs not in TRACED and grad_wanted(x, residual):
        return apply(_Dropout, x, residual, rng, dropout_p, runs)
    fwd = _fwd if is_dynamo_compiling() else _fwd.direct
    return fwd[runs](x, residual, rng, dropout_p)


def _dropout_sharded(x, residual, dropout_p, runs):
    from fastattn.ops._sharded import ROWS, ShardedCall

    dims = ROWS[: x.dim()]
    call = ShardedCall("dropout", {"x": (x, dims), "residual": (residual, dims)}, dims)
    rng = call.draw_rng()
    return call(lambda x, residual: (_dropout(x, residual, rng, dropout_p, runs),), (dims,))[0]


def _facts(x, residual):
    return "cpu" if x.is_cpu else device_name(x.device), x.dtype, None if residual is None else residual.dtype


def _check(x, dropout_p, residual):
    """Raise unless the arguments are valid; return dropout_p as a number."""
    if type(dropout_p) is not float or not 0.0 <= dropout_p <= 1.0:
        dropout_p = check_dropout_p("dropout", dropout_p)
    if (
        x.dtype not in FLOAT_DTYPES
        or not x.dim()
        or (residual is not None and not (residual.dtype in FLOAT_DTYPES and residual.shape == x.shape))
        or (residual is not None and residual.device != x.device)
    ):
        _raise_for_operands(x, residual)
    return dropout_p


def _raise_for_operands(x, residual):
    """Raise for the first invalid operand."""
    if not x.dim() or not x.is_floating_point():
        raise ValueError(
            f"dropout: x must be a floating-point tensor with at least one dimension, got {x.dtype} {tuple(x.shape)}"
        )
    if residual is not None and (residual.shape != x.shape or residual.device != x.device):
        raise ValueError(
            f"dropout: residual must have the shape and device of x, {tuple(x.shape)} on {x.device},"
            f" got {tuple(residual.shape)} on {residual.device}"
        )
    check_float("dropout", "x", x)
    check_float("dropout", "residual", residual)
