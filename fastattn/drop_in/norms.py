"""LayerNorm and RMSNorm of other libraries, found by what they compute.

y = xhat · (weight + offset) + bias
xhat = x / sqrt(mean(x²) + eps) in an RMSNorm, (x - mean) / sqrt(var + eps) in a LayerNorm

Libraries differ in the offset (1 in Gemma), in eps, in the names of the parameters, in the dtype of y if x and the
weight have different ones, in the places where half precision is rounded, and in whether the channels are the last
dimension or dimension 1 (ConvNeXt). Our kernel rounds once, from fp32.
"""

import copy
import itertools
from typing import NamedTuple

import torch

from fastattn.drop_in.change import (
    Change,
    Recognised,
    change_class,
    has_other_state,
    is_foreign,
    is_plain_input,
    make_class,
    why_not_take_over,
)
from fastattn.drop_in.guards import guards_of
from fastattn.drop_in.recognise import computes_the_same, halves_of, quiet, randomise, run
from fastattn.ops import layer_norm, rms_norm

_EPS = (1e-5, 1e-6, 1e-8, 1e-12, 1e-3, None)  # None: the epsilon of the accumulator
_MOST = 2**17  # the most channels of a module that is checked
_HALF = torch.bfloat16
_MIXED = ((torch.float32, _HALF), (_HALF, torch.float32))


class Formula(NamedTuple):
    """What a norm computes.

    weight, bias: the names of its parameters, or None.
    offset: is added to the weight.
    eps: a number, or the name of the attribute that has it.
    channels_first: whether dimension 1 of the input is normalised instead of the last one.
    dtype: of the result: that of the "input", of the "weight", or "promoted" from both.
    """

    rms: bool
    weight: str | None
    bias: str | None
    offset: float
    eps: float | str | None
    channels_first: bool
    dtype: str = "input"

    def result_dtype(self, x, weight):
        """The dtype of the result for an input and a weight or None."""
        if weight is None or self.dtype == "input":
            return x.dtype
        return weight.dtype if self.dtype == "weight" else torch.promote_types(x.dtype, weight.dtype)


class Norm(Recognised):
    """A norm of another library on our kernel."""

    def forward(self, *args, **kwargs):
        """The norm of one tensor, (..., channels) or (batch, channels, ...); other calls go to the original forward."""
        formula = self._fastattn
        if formula is None or kwargs or len(args) != 1 or not is_plain_input(args[0]):
            return super().forward(*args, **kwargs)
        x = args[0].movedim(1, -1) if formula.channels_first and args[0].dim() > 1 else args[0]
        weight, bias = (getattr(self, name) if name else None for name in (formula.weight, formula.bias))
        for name, t in ((formula.weight, weight), (formula.bias, bias)):
            if name and not (is_plain_input(t) and t.shape == x.shape[-1:]):
                return super().forward(*args, **kwargs)
        dtype = formula.result_dtype(x, weight)
        if formula.offset:
            weight = weight.float() + formula.offset
        eps = getattr(self, formula.eps) if isinstance(formula.eps, str) else formula.eps
        x = x if x.dtype == dtype or x.dtype == torch.float32 else x.to(dtype)
        y = rms_norm(x, weight, eps) if formula.rms else layer_norm(x, weight, bias, eps)
        if y.dtype != dtype and (formula.rms or formula.dtype != "input"):  # F.layer_norm keeps the dtype of autocast
            y = y.to(dtype)
        return y.movedim(-1, 1) if formula.channels_first and args[0].dim() > 1 else y


def _inputs(size, device):
    """Inputs with channels last and first. Some rows are so small that eps matters, and others have a mean."""
    kind = {"device": device, "dtype": torch.float32}
    x = torch.randn(6, 5, size, **kind) + torch.randn(6, 5, 1, **kind)
    x[1:4] = torch.randn(3, 5, size, **kind) * torch.tensor([1e-2, 1e-3, 1e-5], **kind)[:, None, None]
    return {False: x, True: x.movedim(-1, 1)[..., None].expand(-1, -1, -1, 2).contiguous()}


def _written_out(formula, module, x):
    x = x.double().movedim(1, -1) if formula.channels_first else x.double()
    mean = 0.0 if formula.rms else x.mean(-1, keepdim=True)
    eps = getattr(module, formula.eps) if isinstance(formula.eps, str) else formula.eps
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    y = (x - mean) * torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + eps)
    if formula.weight:
        y = y * (getattr(module, formula.weight).double() + formula.offset)
    if formula.bias:
        y = y + getattr(module, formula.bias).double()
    return y.movedim(-1, 1) if formula.channels_first else y


def _formulas(module, channels_first):
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    eps = [name for name, value in vars(module).items() if type(value) is float and 0 <= value < 1]
    roles = [(None, None)] if not names else [(names[0], None)] if len(names) == 1 else itertools.permutations(names)
    for (weight, bias), rms, epsilon in itertools.product(roles, (True, False), (*eps, *_EPS)):
        if bias is None or not rms:
            for offset in (0.0, 1.0) if weight else (0.0,):
                yield Formula(rms, weight, bias, offset, epsilon, channels_first)


def _find_formula(twin, size, device):
    """(Formula in fp32, input) of a twin, or None."""
    for channels_first, x in _inputs(size, device).items():
        y = run(twin, x)
        if y is None or y.shape != x.shape:
            continue
        largest = y.abs().max().item()
        for formula in _formulas(twin, channels_first):
            if (y.double() - _written_out(formula, twin, x)).abs().max().item() <= 2e-5 * largest:
                return formula, x
    return None


def _dtype_of_result(twin, x):
    """Which of the rules of Formula.dtype a twin follows, as far as its forward takes mixed dtypes; None if none."""
    found = {}
    for weights, inputs in _MIXED:
        other = copy.deepcopy(twin)
        randomise(other, weights)
        y = run(other, x.to(inputs))
        if y is not None:
            found[weights, inputs] = y.dtype
    rules = {"input": lambda w, x: x, "promoted": torch.promote_types, "weight": lambda w, x: w}
    return next((name for name, rule in rules.items() if all(rule(*key) == got for key, got in found.items())), None)


def _size(module):
    """The number of channels of a module that may be a norm, or None."""
    parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
    if has_other_state(module):
        return None
    if not parameters:
        size = getattr(module, "normalized_shape", None)
        size = size[-1:] if isinstance(size, (tuple, list, torch.Size)) and len(size) == 1 else [size]
        return size[0] if isinstance(size[0], int) and size[0] > 1 else 16 if _is_called_norm(module) else None
    same = all(p.dim() == 1 and p.shape == parameters[0].shape and p.numel() > 1 for p in parameters)
    return len(parameters[0]) if same and len(parameters) <= 2 and len(parameters[0]) <= _MOST else None


def _is_called_norm(module):
    return "norm" in type(module).__name__.lower()


def find(modules: dict[str, torch.nn.Module]) -> dict[str, Change | str]:
    """A Change for each norm of another library, and a reason for each module that is called a norm but is not one."""
    found = {name: recognise(module) for name, module in modules.items()}
    return {name: result for name, result in found.items() if result is not None}


def recognise(module: torch.nn.Module) -> Change | str | None:
    """A Change for a norm of any class, the reason why a module that is called a norm is left alone, or None."""
    if not is_foreign(module):
        return None
    size = _size(module)
    if size is None:
        if _is_called_norm(module) and hasattr(module, "parametrizations"):
            return why_not_take_over(module)
        reason = "it has other parameters or children than a norm of the last dimension"
        return reason if _is_leaf_norm(module) else None
    try:
        found: Change | str | None = why_not_take_over(module) or _recognise(module, size)
    except Exception as error:  # the module's own code, which runs in the check
        found = f"the check failed: {type(error).__name__}: {error}"
    if isinstance(found, Change) or _is_called_norm(module):
        return found
    return found if isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm)) else None


def _is_leaf_norm(module):
    name = type(module).__name__.lower()
    return not module._modules and ("layernorm" in name or "rmsnorm" in name)


def _recognise(module, size):
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    try:
        twin = copy.deepcopy(module)
    except Exception as error:
        return f"it cannot be copied for a check: {type(error).__name__}: {error}"
    with quiet(device):
        randomise(twin)
        found = _find_formula(twin, size, device)
        if found is None:
            return "its forward computes neither a LayerNorm nor an RMSNorm"
        formula, x = found
        rule = _dtype_of_result(twin, x)
        if rule is None:
            return "the dtype of its result follows none of the known rules"
        formula = formula._replace(dtype=rule)
        new_class = make_class(Norm, type(module), formula, guards_of(module))
        if not computes_the_same(twin, lambda: _become(twin, new_class), x, [*halves_of(module), *_MIXED]):
            return "our kernel gives different numbers from its forward"
    kind = "RMSNorm" if formula.rms else "LayerNorm"
    return change_class(module, new_class, f"{kind} (was {type(module).__name__})")


def _become(twin, new_class):
    twin.__class__ = new_class
