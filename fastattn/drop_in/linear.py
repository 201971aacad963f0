"""Linear layers: those of torch.nn, and layers of other libraries that compute x · weightᵀ or x · weight (Conv1D).

Their products go through `fastattn.ops.linear`, which takes our kernels where they are faster and torch's elsewhere.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastattn._autocast import autocast_dtype
from fastattn.drop_in.change import (
    Change,
    Recognised,
    Replaced,
    change_class,
    has_other_state,
    is_foreign,
    is_plain_input,
    make_class,
    why_not_take_over,
)
from fastattn.drop_in.guards import guards_of
from fastattn.drop_in.recognise import computes_the_same, halves_of, quiet, randomise, run
from fastattn.drop_in.torch_nn import CLASSES
from fastattn.nn.plain import torch_linear_is_replaced
from fastattn.ops.linear import linear

_IN, _OUT, _ROWS = 6, 10, 7  # the sizes of the twin


class Linear(Replaced):
    """A torch.nn.Linear on our product."""

    plain_as = torch.nn.Linear

    def forward(self, input):
        """(..., d_in) → (..., d_out)."""
        if not is_plain_input(input) or torch_linear_is_replaced():
            return super().forward(input)
        return linear(input, self.weight, self.bias)


class Product(Recognised):
    """A linear layer of another library. `_fastattn`: the names of weight and bias (or None), and whether the weight is
    (d_in, d_out)."""

    def forward(self, *args, **kwargs):
        """(..., d_in) → (..., d_out); what our product does not take goes to the original forward."""
        if self._fastattn is None or kwargs or len(args) != 1 or not is_plain_input(args[0]):
            return super().forward(*args, **kwargs)
        (x,), (weight, bias, transposed) = args, self._fastattn
        weight, bias = getattr(self, weight), getattr(self, bias) if bias else None
        # Layers differ in what they cast, and in what they do under autocast.
        if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype) or autocast_dtype(x) is not None:
            return super().forward(*args, **kwargs)
        if bias is not None and bias.shape != weight.shape[transposed : transposed + 1]:
            return super().forward(*args, **kwargs)
        return linear(x, weight, bias, transposed=transposed)


LINEAR = make_class(Linear, torch.nn.Linear, "linear")


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module is exactly a torch.nn.Linear, taken over or not."""
    return type(module) is torch.nn.Linear or type(module) is LINEAR


def find(modules: dict[str, torch.nn.Module]) -> dict[str, Change | str]:
    """A Change for each linear layer, and a reason for each subclass of torch.nn.Linear.

    Children of layers that fastattn.nn has are left out: the classes there call our products themselves.
    """
    parents = (m for m in modules.values() if type(m) in CLASSES or type(m).__module__.startswith("fastattn."))
    ours = {child for parent in parents for child in parent.children()}
    found = {name: recognise(module) for name, module in modules.items() if module not in ours}
    return {name: result for name, result in found.items() if result is not None}


def recognise(module: torch.nn.Module) -> Change | str | None:
    """A Change for a linear layer, the reason why a subclass of torch.nn.Linear is left alone, or None."""
    if isinstance(module, (Replaced, NonDynamicallyQuantizableLinear, torch.nn.Embedding, torch.nn.EmbeddingBag)):
        return None
    if isinstance(module, torch.nn.Linear):
        reason = why_not_take_over(module)
        if reason is None and type(module) is not torch.nn.Linear:
            return f"{type(module).__name__} is a subclass of torch.nn.Linear"
        return reason or change_class(module, LINEAR, "Linear")
    names = _names(module) if is_foreign(module) else None
    if names is None:
        return None
    with quiet(torch.device("cpu")):
        try:
            found = _recognise_other(module, *names)
        except Exception:  # raised by the module's own code: most such modules are not linear layers
            return None
    return found and (why_not_take_over(module) or found)


def _names(module):
    """The names of the parameters of a module that may be a linear layer: (weight, bias or None), or None."""
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    names = {p.dim(): name for name, p in parameters.items()}
    fits = set(names) in ({2}, {1, 2}) and len(names) == len(parameters)
    if not fits or has_other_state(module):
        return None
    return names[2], names.get(1)


def _twin(module, weight, bias):
    """A copy with a small random weight. Attributes that are equal to one of its sizes get the small size."""
    small = dict(zip(module._parameters[weight].shape, (_IN, _OUT), strict=True))
    twin = copy.copy(module)
    for name, value in vars(module).items():  # which its forward may change
        if isinstance(value, (list, dict, set)):
            twin.__dict__[name] = copy.copy(value)
    for name, value in vars(module).items():
        if type(value) is int and value in small:
            setattr(twin, name, small[value])
    for name in (weight, bias):
        if name:
            shape = [small.get(size, size) for size in module._parameters[name].shape]
            twin._parameters[name] = torch.nn.Parameter(torch.empty(shape, device="cpu"))
    randomise(twin)
    return twin


def _computes_linear(twin, x, matrix, bias):
    """Whether a twin computes x · matrixᵀ + bias, also for other shapes and infinite values unless it refuses these."""
    for t in (x, x[0], x[0, 0], x[:, :, None], math.inf * x):
        y, expected = run(twin, t), F.linear(t, matrix, bias)
        if y is None and t is not x:
            continue
        slack = 1e-5 * expected.nan_to_num(0, 0, 0).abs().max().item()
        if y is None or y.shape != expected.shape or not torch.allclose(y, expected, 0, slack, equal_nan=True):
            return False
    return True


def _recognise_other(module, weight, bias):
    """A Change for a layer that computes x · weight + bias or x · weightᵀ + bias, or None."""
    twin = _twin(module, weight, bias)
    for transposed in (True, False):
        matrix = getattr(twin, weight).t() if transposed else getattr(twin, weight)
        if bias and getattr(twin, bias).shape != matrix.shape[:1]:
            continue
        x = torch.randn(2, _ROWS, matrix.shape[1], device="cpu", dtype=torch.float32)
        if not _computes_linear(twin, x, matrix, getattr(twin, bias) if bias else None):
            continue
        new_class = make_class(Product, type(module), (weight, bias, transposed), guards_of(module))

        def become(new_class=new_class):
            twin.__class__ = new_class

        if computes_the_same(twin, become, x, halves_of(module)):
            return change_class(module, new_class, f"Linear (was {type(module).__name__})")
    return None
