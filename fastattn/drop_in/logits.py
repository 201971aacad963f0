"""Logits that are computed when they are read, so that a loss can run without them.

In training, an output layer that `replace` took over returns a `DeferredLogits`: a tensor of the right shape that holds
the input and the weights of the layer. The usual steps between the logits and a loss keep them deferred: slices and
views of the rows, float(), multiplication by a number, softcap. `torch.nn.functional.cross_entropy` of them is
`fastattn.linear_cross_entropy`, which never has the logits of all tokens. Every other operation computes them, with the
same gradient as the layer itself.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastattn.ops.linear import linear
from fastattn.ops.linear_cross_entropy import linear_cross_entropy


class Product(NamedTuple):
    """y = x·weightᵀ + bias, then the steps in order.

    A step is ("add", vector without gradient), only as the first one, ("mul", number), ("div", number), ("tanh", None)
    or ("to", dtype).
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    steps: tuple[tuple[str, Any], ...] = ()

    def dtype(self):
        """The dtype of y."""
        return next((value for step, value in reversed(self.steps) if step == "to"), self.x.dtype)

    def compute(self):
        """The elements, by the operations that the caller wrote."""
        with torch.autocast(self.x.device.type, enabled=False):  # the layer has already applied the casts of autocast
            y = linear(self.x, self.weight, self.bias)
            for step, value in self.steps:
                y = getattr(y, step)() if value is None else getattr(y, step)(value)
        return y

    def for_loss(self):
        """(x, bias, softcap) so that y = softcap(x·weightᵀ + bias); None if the steps are others."""
        scale, cap, bias = [1.0], 0.0, self.bias
        for step, value in self.steps:
            if step == "add":
                bias = value.flatten() if bias is None else bias + value.flatten()
            elif step == "tanh":
                if len(scale) == 2:
                    return None
                scale.append(1.0)
            elif step != "to":
                scale[-1] *= value if step == "mul" else 1 / value
        if len(scale) == 2:  # cap · tanh(s · y) = softcap(s · cap · y)
            scale, cap = [scale[0] * scale[1]], scale[1]
        factor = scale[0]
        if not (cap >= 0 and math.isfinite(factor)):
            return None
        if abs(factor - 1) < 1e-12:
            return self.x, bias, cap
        if self.x.dtype != torch.float32 and math.frexp(factor)[0] not in (0.5, -0.5):
            return None  # the product would round x
        return self.x * factor, None if bias is None else bias * factor, cap


class _Connect(torch.autograd.Function):
    """Gives a DeferredLogits its place in the graph, for code that autograd alone sees."""

    @staticmethod
    def forward(ctx, cls, x, weight, bias, steps):
        ctx.save_for_backward(x, weight, bias)
        ctx.steps = steps
        product = Product(x, weight, bias, steps)
        shape = (*x.shape[:-1], weight.shape[0])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=product.dtype(), device=x.device)

    @staticmethod
    def backward(ctx, dlogits):
        inputs = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            y = Product(*inputs, ctx.steps).compute()
        grads = iter(torch.autograd.grad(y, [t for t in inputs if t is not None], dlogits))
        return None, *(None if t is None else next(grads) for t in inputs), None


class _Family:
    """What logits share with their views and with the results of operations on them.

    had_loss: the loss of one of these tensors was computed without its elements.
    changed: the tensor that was changed in place. They share no memory, so the others must not be read after that.
    """

    had_loss = False
    changed: "DeferredLogits | None" = None


class DeferredLogits(Tensor):
    """Logits (..., vocabulary) that are computed when they are read. `product` says what they are."""

    product: Product
    _versions: tuple[int, ...]
    _made: Tensor | None
    _is_final: bool  # the elements are no longer what the product says
    _family: _Family

    @classmethod
    def make(cls, product: Product) -> "DeferredLogits":
        """The logits of a product, without computing them."""
        logits = _Connect.apply(cls, *product)
        logits.product, logits._made, logits._is_final, logits._family = product, None, False, _Family()
        logits._versions = tuple(t._version for t in product[:3] if t is not None)
        return logits

    def _with(self, **changes):
        if self._is_final:
            return NotImplemented
        self._check()
        logits = DeferredLogits.make(self.product._replace(**changes))
        logits._family = self._family
        return logits

    def _check(self):
        """Raise if reading the elements now would give different numbers from reading them in the forward."""
        if self._family.changed is not None and self._family.changed is not self:
            raise RuntimeError(
                "logits of a training step or a view of them were changed in place: while they are deferred they share"
                " no memory, so clone() them before, or leave the loss out of fastattn.replace(model, only=...)"
            )
        now = tuple(t._version for t in self.product[:3] if t is not None)
        if not self._is_final and (now != self._versions or self.product.weight.untyped_storage().nbytes() == 0):
            raise RuntimeError(
                "the logits of a training step are computed when they are read, and the weights of the output layer or"
                " its input were changed or freed since the forward: read logits before optimizer.step(), with FSDP"
                " before backward(), or leave the loss out of fastattn.replace(model, only=...)"
            )

    def elements(self) -> Tensor:
        """The logits as a plain tensor, with gradient."""
        if self._made is None or self._family.changed is not None:
            self._check()
        if self._made is None:
            with torch.enable_grad():
                self._made = self.product.compute()
        return self._made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Operations that keep the logits deferred, their loss, and all others on the elements."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], cls) else None
        # The loss of these logits has already been computed without their elements.
        too_late = first is not None and name in _WATCHING and first._family.had_loss
        if func in _OF_THE_SHELL or too_late:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if first is not None and func in _KEEPING:
            out = _KEEPING[func](*args, **kwargs)
            if out is not NotImplemented:
                return out
        changes = name == "__setitem__" or name in _WATCHING or (name.endswith("_") and not name.endswith("__"))
        if first is not None and (changes or name.startswith("__i")):
            first.elements()
            first._is_final, first._family.changed = True, None if name in _WATCHING else first
        args, kwargs = tree_map_only(cls, cls.elements, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Code that does not ask __torch_function__ gets the elements; _Connect has their gradient."""
        args, kwargs = tree_map_only(cls, lambda logits: logits.elements().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)


_WATCHING = frozenset(["register_hook", "retain_grad"])
_OF_THE_SHELL = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "is_leaf", "is_cuda",
                 "is_cpu", "is_meta", "is_sparse", "is_nested", "is_quantized", "_base")
} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__,
    Tensor.get_device, Tensor.ndimension, Tensor.nelement, Tensor.is_contiguous, Tensor.__hash__,
    torch.is_floating_point, torch.is_complex, torch.numel,
}  # fmt: skip


def _view(logits, *shape):
    shape = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)
    if not all(isinstance(size, int) for size in shape):
        return NotImplemented  # another dtype
    vocab = logits.product.weight.shape[0]
    if -1 in shape:
        rest = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = logits.numel() // rest if rest and logits.numel() % rest == 0 else -2
    if not shape or shape[-1] != vocab or math.prod(shape) != logits.numel():
        return NotImplemented
    return logits._with(x=logits.product.x.reshape(*shape[:-1], logits.product.x.shape[-1]))


def _flatten(logits, start_dim=0, end_dim=-1):
    start, end = (dim % logits.dim() for dim in (start_dim, end_dim))
    return logits._with(x=logits.product.x.flatten(start, end)) if end < logits.dim() - 1 else NotImplemented


def _consumes(entry):
    if entry is None:
        return 0
    return entry.dim() if isinstance(entry, Tensor) and entry.dtype == torch.bool else 1


def _getitem(logits, index):
    index = index if isinstance(index, tuple) else (index,)
    if not all(entry is None or entry is ... or isinstance(entry, (int, slice, Tensor)) for entry in index):
        return NotImplemented
    used = sum(_consumes(entry) for entry in index if entry is not ...)
    reaches_vocabulary = (... in [e for e in index if e is ...] and index[-1] is not ...) or used >= logits.dim()
    if reaches_vocabulary and not (isinstance(index[-1], slice) and index[-1] == slice(None)):
        return NotImplemented
    return logits._with(x=logits.product.x[index])


def _step(name):
    def function(logits, value, **options):
        if options or isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)) or value == 0:
            return NotImplemented
        return logits._with(steps=(*logits.product.steps, (name, value)))

    return function


def _add(logits, value, **options):
    """A vector of the vocabulary, such as BART's final_logits_bias, is another bias."""
    vector = isinstance(value, Tensor) and value.dtype == logits.dtype and value.shape[-1:] == logits.shape[-1:]
    if options or logits.product.steps or not vector or value.requires_grad or value.numel() != logits.shape[-1]:
        return NotImplemented
    return logits._with(steps=(("add", value),)) if value.dim() <= logits.dim() else NotImplemented


def _tanh(logits):
    return logits._with(steps=(*logits.product.steps, ("tanh", None)))


def _to(logits, target=None, *args, **options):
    if args or options.keys() - {"dtype", "device"}:
        return NotImplemented
    dtype = target if isinstance(target, torch.dtype) else options.get("dtype", logits.dtype)
    device = options.get("device", None if isinstance(target, torch.dtype) else target)
    if isinstance(device, Tensor) or (device is not None and torch.device(device) != logits.device):
        return NotImplemented
    if not dtype.is_floating_point:
        return NotImplemented
    return logits if dtype == logits.dtype else logits._with(steps=(*logits.product.steps, ("to", dtype)))


def _contiguous(logits, memory_format=torch.contiguous_format):
    return logits if memory_format is torch.contiguous_format else NotImplemented


def _cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0
):
    if input._is_final or weight is not None or size_average is not None or reduce is not None or input.dim() != 2:
        return NotImplemented
    if target.dtype != torch.int64 or target.shape != input.shape[:1] or target.device != input.device:
        return NotImplemented
    terms = input.product.for_loss()
    if terms is None:
        return NotImplemented
    input._check()
    x, bias, softcap = terms
    with torch.autocast(x.device.type, enabled=False):  # the layer has already applied the casts of autocast
        loss = linear_cross_entropy(
            x, input.product.weight, target, bias=bias, ignore_index=ignore_index, label_smoothing=label_smoothing,
            softcap=softcap, reduction=reduction,
        )  # fmt: skip
    input._family.had_loss = True
    # autocast computes a loss in fp32, whatever the dtype of the logits
    return loss.float() if torch.is_autocast_enabled(x.device.type) else loss.to(input.dtype)


_KEEPING = {
    Tensor.view: _view, Tensor.reshape: _view, torch.reshape: _view, Tensor.flatten: _flatten, torch.flatten: _flatten,
    Tensor.__getitem__: _getitem, Tensor.float: lambda logits: _to(logits, torch.float32), Tensor.to: _to,
    Tensor.contiguous: _contiguous, Tensor.add: _add, torch.add: _add, Tensor.__add__: _add, Tensor.tanh: _tanh,
    torch.tanh: _tanh, F.cross_entropy: _cross_entropy,
    **{f: _step("mul") for f in (Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.multiply)},
    **{f: _step("div") for f in (Tensor.div, torch.div, Tensor.__truediv__, Tensor.true_divide)},
}  # fmt: skip
