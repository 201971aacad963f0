"""The node of autograd for a norm alone in eager mode on a CPU: without bias, dropout or residual before it.

The general node of norm.py asks what such a call never has, and that takes as long as a small norm.
"""

import torch

from fastattn import reference
from fastattn.ops._backends import choose, grad_wanted
from fastattn.ops._register import (
    apply_is_patched,
    checks_operands,
    differentiate,
    eager_apply,
    raw_ops,
    traced_backend,
)

_fwd, _bwd, _infer = (raw_ops(name).direct["native"] for name in ("norm_fwd", "norm_bwd", "norm_infer"))
_is_compiling, _is_mode_enabled = torch.compiler.is_compiling, torch._C._is_torch_function_mode_enabled


class _PlainNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, rms):
        y, _, stats = _fwd(x, None, weight, bias, None, 0.0, eps, rms, None)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.options = eps, rms
        return y

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return None, None, None, None, None
        x, weight, bias, stats = ctx.saved_tensors
        eps, rms = ctx.options
        if torch.is_grad_enabled():  # create_graph=True

            def normalise(*tensors):
                return (reference.norm(tensors[0], None, *tensors[1:], eps=eps, rms=rms)[0],)

            return *differentiate(normalise, (x, weight, bias), (dy,)), None, None
        need_dx, need_dweight, need_dbias, _, _ = ctx.needs_input_grad
        dx, _, dweight, dbias, _ = _bwd(
            dy, None, x, weight, stats, None, 0.0, rms, False, need_dweight, need_dbias, False
        )  # fmt: skip
        return dx if need_dx else None, dweight if need_dweight else None, dbias if need_dbias else None, None, None


_apply = eager_apply(_PlainNorm)


def plain_norm(x, weight, bias, eps, rms):
    """The norm of x with gradients; weight and bias have one dtype, or are None."""
    return (_PlainNorm.apply if apply_is_patched() else _apply)(x, weight, bias, eps, rms)


def eager_norm(x, weight, bias, eps, rms):
    """A module's norm of x by the C++ kernel in eager mode; None where the public op must look closer, or complain."""
    if _is_compiling() or type(x) is not torch.Tensor or not x.is_cpu or type(eps) is not float or _is_mode_enabled():
        return None
    of_weight, of_bias = (None if t is None else t.dtype for t in (weight, bias))
    backend = choose("norm", ("cpu", x.dtype, None, of_weight, of_bias, None))
    if backend != "native" or traced_backend(backend) != backend or not checks_operands(backend, x, weight, bias):
        return None
    try:
        if not grad_wanted(x, weight, bias):
            return _infer(x, None, weight, bias, None, 0.0, eps, rms, None)
        return plain_norm(x, weight, bias, eps, rms) if bias is None or of_weight is of_bias else None
    except RuntimeError:
        return None
