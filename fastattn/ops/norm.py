"""LayerNorm and RMSNorm, with the preceding bias, dropout and residual add in the same pass.

r = dropout(x + x_bias) + residual                          r is stored: the backward and pre-norm layers need it
y = (r - mean) * rstd * weight + bias                       rms: mean = 0, no bias
wdy = weight * dy,  xhat = (r - mean) * rstd
dr = (wdy - mean(wdy) - xhat * mean(wdy * xhat)) * rstd + dr_out        rms: without mean(wdy)
dresidual = dr,  dx = keep * dropout_scale * dr,  dweight = sum_rows(dy * xhat),  dbias = sum_rows(dy)
dx_bias = sum_rows(dx)
"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from typing_extensions import Unpack

from fastattn import reference
from fastattn._autocast import as_autocast_norm
from fastattn.ops._backends import choose, device_name, grad_wanted, register_backend
from fastattn.ops._dtypes import why_not_dtypes
from fastattn.ops._kinds import FLOAT_DTYPES, as_number, check_float, check_memory, is_dtensor
from fastattn.ops._nested import on_rows
from fastattn.ops._plain_norm import plain_norm
from fastattn.ops._public import Public
from fastattn.ops._random import check_dropout_p, draw_rng
from fastattn.ops._register import (
    TRACED,
    apply,
    checks_operands,
    differentiate,
    raw_ops,
    register_autograd,
    register_fake,
    register_reference,
    traced_backend,
)  # fmt: skip
from fastattn.ops._types import Backend, NormOptions


def _norm_infer_fake(x, residual, weight, bias, rng, dropout_p, eps, rms, x_bias=None):
    return x.new_empty(x.shape)


def _norm_fwd_fake(x, residual, weight, bias, rng, dropout_p, eps, rms, x_bias=None):
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    plain = residual is None and rng is None and x_bias is None
    r = x.new_empty((0,) if plain else x.shape, dtype=x.dtype if residual is None else residual.dtype)
    return x.new_empty(x.shape), r, x.new_empty((1 if rms else 2, rows), dtype=torch.float32)


def _norm_bwd_fake(
    dy, dr_out, r, weight, stats, rng, dropout_p, rms, separate_dresidual, need_dweight, need_dbias, need_dx_bias=False
):  # fmt: skip
    dtype = torch.float32 if weight is None else weight.dtype
    cols = dy.shape[-1]
    return (
        dy.new_empty(dy.shape),
        r.new_empty(dy.shape if separate_dresidual else (0,)),
        dy.new_empty(cols if need_dweight else 0, dtype=dtype),
        dy.new_empty(cols if need_dbias else 0, dtype=dtype),
        dy.new_empty(cols if need_dx_bias else 0, dtype=dtype),
    )


register_fake("norm_infer", _norm_infer_fake)
register_fake("norm_fwd", _norm_fwd_fake)
register_fake("norm_bwd", _norm_bwd_fake)
_EPSILON = {dtype: torch.finfo(reference.accumulator(dtype)).eps for dtype in FLOAT_DTYPES}
_infer, _fwd, _bwd = (raw_ops(op) for op in ("norm_infer", "norm_fwd", "norm_bwd"))


class Facts(NamedTuple):
    """The properties of a call that decide which backends can serve it."""

    device: str
    dtype: torch.dtype
    residual: torch.dtype | None = None
    weight: torch.dtype | None = None
    bias: torch.dtype | None = None
    x_bias: torch.dtype | None = None


def _why_not(facts):
    _, *dtypes = facts
    return why_not_dtypes(*dtypes)


for _backend in ("native", "triton"):
    register_backend("norm", _backend, _why_not, facts=Facts)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, x_bias, rng, dropout_p, eps, rms, backend):
        plain = residual is None and rng is None and x_bias is None
        fwd = _fwd if is_dynamo_compiling() else _fwd.direct
        y, r, stats = fwd[backend](x, residual, weight, bias, rng, dropout_p, eps, rms, x_bias)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if plain else r, weight, bias, stats, rng)
        ctx.options = (dropout_p, eps, rms, backend)
        ctx.dtypes = (
            x.dtype,
            None if residual is None else residual.dtype,
            None if x_bias is None else x_bias.dtype,
        )
        if backend not in TRACED:
            return y, None if plain else r, None
        ctx.mark_non_differentiable(stats)  # only a graph that includes the backward uses it
        return y, None if plain else r, stats

    @staticmethod
    def backward(ctx, dy, dr_out, _):
        r, weight, bias, stats, rng = ctx.saved_tensors
        dropout_p, _, rms, backend = ctx.options
        x_dtype, residual_dtype, x_bias_dtype = ctx.dtypes
        need_dx, need_dresidual, need_dweight, need_dbias, need_dx_bias = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():  # create_graph=True
            grads = _differentiable_backward(ctx, dy, dr_out, r, weight, bias, rng)
            return *grads, None, None, None, None, None
        if dy is None:  # y was not used: return no gradients instead of zeros, which an optimizer would decay
            dy, need_dweight, need_dbias = torch.zeros(r.shape, dtype=x_dtype, device=r.device), False, False
        # x and residual share one gradient unless dropout or the dtypes make them differ
        before_dropout = need_dx or need_dx_bias
        separate = need_dresidual and (residual_dtype != x_dtype or (before_dropout and rng is not None))
        if need_dresidual and not before_dropout and not separate:
            rng = None
        wide = weight
        if weight is not None and (
            (need_dbias and bias.dtype != weight.dtype) or (need_dx_bias and x_bias_dtype != weight.dtype)
        ):
            wide = weight.float()  # the sums over rows get the dtype of the weight
        bwd = _bwd if is_dynamo_compiling() else _bwd.direct
        dx, dresidual, dweight, dbias, dx_bias = bwd[backend](
            dy, dr_out, r, wide, stats, rng, dropout_p, rms, separate, need_dweight, need_dbias, need_dx_bias
        )
        if not separate:
            dresidual = dx
        return (
            dx if need_dx else None,
            dresidual if need_dresidual else None,
            dweight.to(weight.dtype) if need_dweight else None,
            dbias.to(bias.dtype) if need_dbias else None,
            dx_bias.to(x_bias_dtype) if need_dx_bias else None,
            None, None, None, None, None,
        )  # fmt: skip


def _differentiable_backward(ctx, dy, dr_out, r, weight, bias, rng):
    # r is in the graph, as the input or as this node's own output, so second-order gradients flow through it
    dropout_p, eps, rms, _ = ctx.options
    x_dtype, _, x_bias_dtype = ctx.dtypes
    leaf = r if r.requires_grad else r.detach().requires_grad_()

    def normalise(r, weight, bias):
        y, _ = reference.norm(r, None, weight, bias, eps=eps, rms=rms)
        return (y.to(x_dtype),)

    dr, dweight, dbias = (0.0, None, None) if dy is None else differentiate(normalise, (leaf, weight, bias), (dy,))
    if dr_out is not None:
        dr = dr + dr_out
    dx = reference.dropout(dr.to(x_dtype), dropout_p if rng is not None else 0.0, rng=rng)
    need_dx, need_dresidual, _, _, need_dx_bias = ctx.needs_input_grad[:5]
    dx_bias = dx.flatten(0, -2).sum(0, dtype=reference.accumulator(x_dtype)).to(x_bias_dtype) if need_dx_bias else None
    return dx if need_dx else None, dr if need_dresidual else None, dweight, dbias, dx_bias


def _apply(backend, x, residual, weight, bias, rng, dropout_p, eps, rms, x_bias=None):
    y, r, stats = apply(_Norm, x, residual, weight, bias, x_bias, rng, dropout_p, eps, rms, backend)
    return y, x.new_empty(0) if r is None else r, stats


def _reference(x, residual, weight, bias, rng, dropout_p, eps, rms, x_bias=None):
    y, r = reference.norm(x, residual, weight, bias, x_bias, eps=eps, rms=rms, dropout_p=dropout_p, rng=rng)
    wide = r.to(reference.accumulator(r.dtype)).flatten(0, -2)
    mean = torch.zeros_like(wide[:, :1]) if rms else wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt((wide - mean).square().mean(-1, keepdim=True) + eps)
    stats = (rstd if rms else torch.cat((mean, rstd), 1)).mT.float()
    plain = residual is None and rng is None and x_bias is None
    return y, x.new_empty(0) if plain else r, stats


register_autograd("norm_fwd", _apply, _reference)
register_reference("norm_infer", lambda *args: _reference(*args)[0])


def _check(name, x, weight, bias, x_bias, residual):
    shape, device = x.shape, x.device
    cols = shape[-1:]
    if (
        not cols
        or x.dtype not in FLOAT_DTYPES
        or (weight is not None and (weight.shape != cols or weight.device != device))
        or (bias is not None and (bias.shape != cols or bias.device != device))
        or (x_bias is not None and (x_bias.shape != cols or x_bias.device != device))
        or (residual is not None and (residual.shape != shape or residual.device != device))
    ):
        _raise_for_operands(name, x, weight, bias, x_bias, residual)


def _check_dtypes(name, **tensors):
    for label, t in tensors.items():
        check_float(name, label, t)


def _raise_for_operands(name, x, weight, bias, x_bias, residual):
    """Raise for the first invalid operand."""
    if not x.dim() or not x.is_floating_point():
        raise ValueError(
            f"{name}: x must be a floating-point tensor with at least one dimension, got {x.dtype} {tuple(x.shape)}"
        )
    check_float(name, "x", x)
    cols = (x.shape[-1],)
    operands = (
        ("weight", weight, cols, f"{cols}, the last dimension of x"),
        ("bias", bias, cols, f"{cols}, the last dimension of x"),
        ("x_bias", x_bias, cols, f"{cols}, the last dimension of x"),
        ("residual", residual, x.shape, f"{tuple(x.shape)}, the shape of x"),
    )
    for label, t, shape, wanted in operands:
        if t is None:
            continue
        if t.shape != shape:
            raise ValueError(f"{name}: {label} must have shape {wanted}, got {tuple(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"{name}: {label} must be on the device of x, {x.device}, got {t.device}")
        check_float(name, label, t)


def _facts(x, residual, weight, bias, x_bias):
    return (
        "cpu" if x.is_cpu else device_name(x.device),
        x.dtype,
        None if residual is None else residual.dtype,
        None if weight is None else weight.dtype,
        None if bias is None else bias.dtype,
        None if x_bias is None else x_bias.dtype,
    )


def _norm(name, x, residual, weight, bias, x_bias, eps, rms, dropout_p, return_residual, backend, rng=None):
    if dropout_p or backend is not None:  # before a mask is drawn; `explain` passes a backend, and stops in choose
        _check(name, x, weight, bias, x_bias, residual)
    dropout_p = check_dropout_p(name, dropout_p) if dropout_p else 0.0
    if not x.is_cpu:
        x = as_autocast_norm(x)
    if backend is not None:
        _check_dtypes(name, residual=residual, weight=weight, bias=bias, x_bias=x_bias)
    facts = _facts(x, residual, weight, bias, x_bias)
    backend = choose("norm", facts, backend)
    runs = traced_backend(backend)
    is_eager = checks_operands(runs, x, weight, bias, x_bias, residual)
    if not is_eager:
        _check(name, x, weight, bias, x_bias, residual)
    if type(eps) is not float:
        eps = as_number(name, "eps", eps, _EPSILON[x.dtype])
    if type(x) is not torch.Tensor and is_dtensor(x):
        return _norm_sharded(name, x, residual, weight, bias, x_bias, eps, rms, dropout_p, return_residual, backend)
    if dropout_p and rng is None:
        rng = draw_rng(x)
    plain = residual is None and rng is None and x_bias is None
    try:
        if runs == "reference":
            _check_dtypes(name, residual=residual, weight=weight, bias=bias, x_bias=x_bias)
            check_memory(name, x=x, residual=residual, weight=weight, bias=bias, x_bias=x_bias)
            y, r = reference.norm(x, residual, weight, bias, x_bias, eps=eps, rms=rms, dropout_p=dropout_p, rng=rng)
        elif runs in TRACED:
            y, r, _ = _fwd[runs](x, residual, weight, bias, rng, dropout_p, eps, rms, x_bias)
        elif grad_wanted(x, residual, weight, bias, x_bias):
            if is_eager and plain and (bias is None or facts[3] is facts[4]):
                y = plain_norm(x, weight, bias, eps, rms)
            else:
                y, r, _ = apply(_Norm, x, residual, weight, bias, x_bias, rng, dropout_p, eps, rms, runs)
        elif return_residual and not plain:
            y, r, _ = _fwd[runs](x, residual, weight, bias, rng, dropout_p, eps, rms, x_bias)
        else:
            infer = _infer if is_dynamo_compiling() else _infer.direct
            y = infer[runs](x, residual, weight, bias, rng, dropout_p, eps, rms, x_bias)
    except RuntimeError:
        _check(name, x, weight, bias, x_bias, residual)  # says what the kernel refused
        raise
    return (y, x if plain else r) if return_residual else y


def _norm_sharded(name, x, residual, weight, bias, x_bias, eps, rms, dropout_p, return_residual, backend):
    from fastattn.ops._sharded import ROWS, ShardedCall

    rows = ROWS[: x.dim() - 1]
    operands = {
        "x": (x, rows + "d"), "residual": (residual, rows + "d"), "weight": (weight, "d"), "bias": (bias, "d"),
        "x_bias": (x_bias, "d"),
    }  # fmt: skip
    call = ShardedCall(name, operands, rows)
    rng = call.draw_rng() if dropout_p else None
    pair = return_residual and not (residual is None and rng is None and x_bias is None)

    def function(*tensors):
        out = _norm(name, *tensors, eps, rms, dropout_p, pair, backend, rng)
        return out if pair else (out,)

    out = call(function, (rows + "d",) * (1 + pair))
    return (out if pair else (*out, x)) if return_residual else out[0]


_TENSORS = "x weight bias x_bias residual"
_LAYER_NORM, _RMS_NORM = (
    Public(name, tensors=_TENSORS, numbers="eps dropout_p", flags="return_residual", nested=on_rows("x", "residual"))
    for name in ("layer_norm", "rms_norm")
)


@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float | None = 1e-5, *,
    return_residual: Literal[False] = False, **options: Unpack[NormOptions],
) -> Tensor: ...  # fmt: skip


@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float | None = 1e-5, *,
    return_residual: Literal[True], **options: Unpack[NormOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@_LAYER_NORM.overridable
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-5,
    *,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    dropout_p: float | None = 0.0,
    return_residual: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension of dropout(x + x_bias) + residual.

    Args:
        x: (..., d_model), float32, bfloat16 or float16 (float64 runs on the reference), any strides.
        weight, bias: (d_model,), any float dtype, or None.
        eps: added to the variance.
        x_bias: (d_model,), any float dtype, or None: the bias of the linear layer that computed x without it. The
            sum is not rounded, and the backward computes the gradients of x and x_bias in one pass.
        residual: like x, of any float dtype (fp32 with bf16 activations is common), or None.
        dropout_p: probability of setting an element of x to 0; each call draws a new mask.
        return_residual: also return dropout(x + x_bias) + residual, which has the dtype of the residual.
        backend: "native", "triton" or "reference" instead of the automatic choice.
    Returns: y like x; with return_residual (y, dropout(x + x_bias) + residual).
    Raises:
        ValueError: shapes, devices or dropout_p are invalid, or the named backend cannot serve the call.
        TypeError: an argument has a wrong type or dtype.
    Source: torch.nn.functional.layer_norm; statistics in fp32, biased variance.
    Example:
        >>> x, weight = torch.randn(4, 64), torch.ones(64)
        >>> y, stream = fastattn.layer_norm(x, weight, residual=x, dropout_p=0.1, return_residual=True)
    """
    return _norm(
        "layer_norm", x, residual, weight, bias, x_bias, eps, False, dropout_p, return_residual, backend
    )  # fmt: skip


@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float | None = None, *, return_residual: Literal[False] = False,
    **options: Unpack[NormOptions],
) -> Tensor: ...  # fmt: skip


@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float | None = None, *, return_residual: Literal[True],
    **options: Unpack[NormOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@_RMS_NORM.overridable
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    dropout_p: float | None = 0.0,
    return_residual: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension of dropout(x + x_bias) + residual: r * rsqrt(mean(r²) + eps) * weight.

    Args, Returns and Raises as for `layer_norm`. eps None means the epsilon of the accumulator: 1.19e-7, for fp64
    2.2e-16.
    Source: torch.nn.functional.rms_norm.
    Example:
        >>> fastattn.rms_norm(torch.randn(4, 64), torch.ones(64)).shape
        torch.Size([4, 64])
    """
    return _norm("rms_norm", x, residual, weight, None, x_bias, eps, True, dropout_p, return_residual, backend)
