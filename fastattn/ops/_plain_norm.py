"""The node of autograd for a norm alone in eager mode on a CPU: without bias, dropout or residual before it.

The general node of norm.py asks what such a call never has, and that takes as long as a small norm.
"""

import torch

from fastattn import reference
from fastattn.ops._register import differentiate, eager_apply, raw_ops

_fwd, _bwd = (raw_ops(name).direct["native"] for name in ("norm_fwd", "norm_bwd"))


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


plain_norm = eager_apply(_PlainNorm)  # x, weight, bias (both of one dtype, or None), eps, rms -> the norm of x
