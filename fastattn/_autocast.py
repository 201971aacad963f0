"""Autocast: an op casts its inputs once, where it is entered; what it computes from them is out of autocast's reach.

torch's autocast casts the operands of every product that runs while it is enabled: also those of a backward that runs
inside of the region when the forward ran outside, and fp32 scores on their way to an exponential. So every product of
ours is either `shielded`, where we make the gradients ourselves, or it is the `matmul` or `linear` of this module,
whose gradients of any order are shielded as well.
"""

import functools

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

_is_any_enabled = torch._C._is_any_autocast_enabled  # costs a third of asking for the device and its autocast


def autocast_dtype(x):
    """The dtype in which autocast has products on the device of x computed, or None where it is not enabled."""
    if not _is_any_enabled() or x.is_meta:
        return None
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def as_autocast(*tensors):
    """The tensors or None as operands of one product: in autocast's dtype where it is enabled; fp64 stays."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def as_autocast_norm(x):
    """The input of a norm: in fp32 where autocast is enabled, but not on the CPU, where it leaves norms alone."""
    return x if x.is_cpu or x.dtype == torch.float64 or autocast_dtype(x) is None else x.float()


def shielded(product):
    """Decorator: the product is computed as if autocast were disabled. Its operands share the dtype of the first."""

    @functools.wraps(product)
    def function(first, *rest):
        if _is_any_enabled() and autocast_dtype(first) not in (None, first.dtype):
            with torch.autocast(first.device.type, enabled=False):
                return product(first, *rest)
        return product(first, *rest)

    return function


_transforms = torch._C._are_functorch_transforms_active
_functorch = torch._C._functorch
_TRANSFORMS = torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode


class _Product(torch.autograd.Function):
    """a @ b, or c + a @ b, for torch.func too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b, c):
        return a @ b if c is None else torch.addmm(c, a, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        need_da, need_db, need_dc = ctx.needs_input_grad
        return (
            matmul(grad, b.mT) if need_da else None,
            matmul(a.mT, grad) if need_db else None,
            grad.sum(0) if need_dc else None,
        )


def _excludes_functions():
    """Whether no autograd.Function can run: in an operator's own kernel under torch.func, and under functionalize."""
    return torch._C._dispatch_tls_is_dispatch_key_excluded(_TRANSFORMS) or (
        _transforms() and _functorch.peek_interpreter_stack().key() == _functorch.TransformType.Functionalize
    )


def _needs_function(*operands):
    """Whether autograd makes the gradients of the product, later, in whatever region the backward runs in.

    A tracer that records the operators alone gets PyTorch's own, as does forward mode, whose tangents are computed now.
    """
    return (
        torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in operands)
        and forward_ad._current_level < 0
        and (torch.compiler.is_compiling() or not _excludes_functions())
        and not torch.jit.is_tracing()
        and not torch.compiler.is_exporting()
    )


@shielded
def matmul(a, b):
    """a (..., m, k) · b (..., k, n), the leading dimensions the same."""
    return _Product.apply(a, b, None) if _needs_function(a, b) else a @ b


@shielded
def linear(x, weight, bias=None):
    """x (..., k) · weightᵀ (k, n) + bias."""
    if not _needs_function(x, weight, bias):
        return F.linear(x, weight, bias)
    rows = x[None] if x.dim() == 1 else x.flatten(0, -2)
    return _Product.apply(rows, weight.mT, bias).view(*x.shape[:-1], weight.shape[0])
