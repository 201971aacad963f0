"""Autocast: an op casts its inputs once, on entry; autocast does not affect what it computes from them.

torch's autocast casts the operands of every product while it is enabled. That includes a backward inside the region
whose forward ran outside, and fp32 scores that go into an exponential. So each of our products is either `shielded`,
where we write the gradients ourselves, or is the `matmul` or `linear` of this module, whose gradients of any order are
also shielded.
"""

import functools

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

is_autocast_enabled = torch._C._is_any_autocast_enabled
"""Whether autocast is enabled for any device. Asking for one device takes three times as long."""


def autocast_dtype(x):
    """The dtype that autocast uses for products on the device of x, or None if autocast is not enabled."""
    if not is_autocast_enabled() or x.is_meta:
        return None
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def as_autocast(*tensors):
    """The operands of one product (tensors or None), cast to autocast's dtype if it is enabled; fp64 stays."""
    if not is_autocast_enabled():
        return tensors
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def as_autocast_norm(x):
    """The input of a norm, cast to fp32 if autocast is enabled; not on the CPU, where autocast does not cast norms."""
    return x if x.is_cpu or x.dtype == torch.float64 or autocast_dtype(x) is None else x.float()


def shielded(product):
    """Decorator: compute the product as if autocast were disabled. All operands have the dtype of the first."""

    @functools.wraps(product)
    def function(first, *rest):
        if is_autocast_enabled() and autocast_dtype(first) not in (None, first.dtype):
            with torch.autocast(first.device.type, enabled=False):
                return product(first, *rest)
        return product(first, *rest)

    return function


_transforms = torch._C._are_functorch_transforms_active
_functorch = torch._C._functorch
_TRANSFORMS = torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode


class _Product(torch.autograd.Function):
    """a @ b, or c + a @ b; also works under torch.func."""

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
    """Whether autograd will compute the gradients of the product later, possibly in another autocast region.

    Otherwise PyTorch's own product is used: for a tracer that records operators only, and for forward mode, which
    computes tangents now.
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
    """a (..., m, k) · b (..., k, n), with equal leading dimensions."""
    return _Product.apply(a, b, None) if _needs_function(a, b) else a @ b


@shielded
def linear(x, weight, bias=None):
    """x (..., k) · weightᵀ (k, n) + bias."""
    if not _needs_function(x, weight, bias):
        return F.linear(x, weight, bias)
    rows = x[None] if x.dim() == 1 else x.flatten(0, -2)
    return _Product.apply(rows, weight.mT, bias).view(*x.shape[:-1], weight.shape[0])
