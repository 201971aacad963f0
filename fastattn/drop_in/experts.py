"""Mixtures of experts: modules that hold the weights of all experts as parameters of three dimensions.

Their forward does not change. While it runs, torch's products of two fp32 operands on the CPU go to
`fastattn.ops.linear`. These are `torch.nn.functional.linear`, x @ weight, the product of a batch for each expert, and
the grouped product, whose rows are sorted by expert. Calls under autocast and calls inside a checkpoint of the forward
stay torch's.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastattn._autocast import autocast_dtype
from fastattn.drop_in.change import (
    Change,
    Replaced,
    change_class,
    is_foreign,
    is_plain_input,
    make_class,
    why_not_take_over,
)
from fastattn.nn.plain import is_traced
from fastattn.ops.linear import linear

_LEAST_ROWS = 16


def _fits(x, weight):
    return (
        is_plain_input(x)
        and is_plain_input(weight)
        and x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and autocast_dtype(x) is None  # autocast does not cast the grouped product
    )


def _linear(x, weight, bias=None):
    return linear(x, weight, bias) if _fits(x, weight) and weight.dim() == 2 else NotImplemented


def _matmul(x, weight, *rest, **options):
    if rest or options or not _fits(x, weight) or not x.dim() == weight.dim() == 2 or x.shape[1] != weight.shape[0]:
        return NotImplemented
    return _product(x, weight)


def _product(x, weight):
    """x (rows, k) · weight (k, n); the weight may be a view of one that is stored as (n, k)."""
    return linear(x, weight, transposed=True) if weight.stride(1) == 1 else linear(x, weight.t())


def _are_offsets(offs, n):
    return type(offs) is Tensor and offs.is_cpu and offs.dtype == torch.int32 and offs.shape == (n,) and n > 0


def _grouped_mm(x, weight, offs=None, bias=None, out_dtype=None):
    """x (rows, k), of which rows offs[i - 1] to offs[i] are multiplied by weight[i] (k, n)."""
    fits = _fits(x, weight) and x.dim() == 2 and weight.dim() == 3 and x.shape[1] == weight.shape[1]
    fits = fits and _are_offsets(offs, len(weight))
    if not fits or bias is not None or out_dtype is not None:
        return NotImplemented
    ends = [0, *offs.tolist()]
    sizes = [end - begin for begin, end in itertools.pairwise(ends)]
    rest = len(x) - ends[-1]
    if min(*sizes, rest) < 0:
        return NotImplemented
    parts = x.split([*sizes, rest])[:-1]
    found = [_product(part, matrix) for part, matrix in zip(parts, weight.unbind(), strict=True)]
    return torch.cat([*found, x.new_zeros(rest, weight.shape[2])] if rest else found)


def _bmm(x, weight, *rest, **options):
    """x (n, rows, k) · weight (n, k, m). With few rows n separate calls would take longer, so torch serves those."""
    fits = not rest and not options and _fits(x, weight) and x.dim() == weight.dim() == 3 and x.shape[1] >= _LEAST_ROWS
    if not fits or len(x) != len(weight) or len(x) == 0 or x.shape[2] != weight.shape[1]:
        return NotImplemented
    return torch.stack([_product(*pair) for pair in zip(x.unbind(), weight.unbind(), strict=True)])


_SERVED: dict[Any, Callable[..., Any]] = {
    F.linear: _linear, torch.matmul: _matmul, Tensor.matmul: _matmul, Tensor.__matmul__: _matmul, torch.mm: _matmul,
    Tensor.mm: _matmul, torch.bmm: _bmm, Tensor.bmm: _bmm,
}  # fmt: skip
_KNOWN = {"bias", "offs", "out_dtype"}
if hasattr(torch, "_grouped_mm"):  # torch.nn.functional.grouped_mm calls it
    _SERVED[torch._grouped_mm] = _grouped_mm


def _saved_tensors_hooks():
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


class _ServeProducts(TorchFunctionMode):
    """While this mode is active, torch's products in this thread run on ours.

    It has no effect inside a checkpoint that begins later: that one computes again without the mode, and must save the
    same tensors.
    """

    only_serves = True

    def __init__(self):
        super().__init__()
        self.hooks = _saved_tensors_hooks()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        serve = _SERVED.get(func)
        known = serve is not None and len(args) >= 2 and kwargs.keys() <= _KNOWN
        known = known and _saved_tensors_hooks() == self.hooks
        out = serve(*args, **kwargs) if known else NotImplemented
        return func(*args, **kwargs) if out is NotImplemented else out


class Experts(Replaced):
    """A module with the weights of experts, on our products."""

    def forward(self, *args, **kwargs):
        """The original forward on our products; while a graph is traced, on torch's."""
        on_cpu = all(parameter.is_cpu for parameter in self._parameters.values() if parameter is not None)
        if not on_cpu or is_traced():
            return super().forward(*args, **kwargs)
        with _ServeProducts():
            return super().forward(*args, **kwargs)


def find(modules: dict[str, torch.nn.Module]) -> dict[str, Change | str]:
    """A Change or a reason for each module of another library with a parameter of three dimensions."""
    found: dict[str, Change | str] = {}
    for name, module in modules.items():
        parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
        if not is_foreign(module) or not any(p.dim() == 3 and min(p.shape) > 1 for p in parameters):
            continue
        kind: Any = type(module)
        what = f"products of experts (was {kind.__name__})"
        found[name] = why_not_take_over(module) or change_class(module, make_class(Experts, kind, "experts"), what)
    return found
