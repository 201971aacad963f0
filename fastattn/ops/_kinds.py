"""What kind of value an argument is."""

import numbers as abstract
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nested._internal.nested_tensor import NestedTensor

# float8 and the like are stored in, not computed with
FLOAT_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def check_float(name, label, t):
    """Raise TypeError unless a tensor or None has a dtype that one can compute with."""
    if t is not None and t.dtype not in FLOAT_DTYPES:
        size = " of 16 to 64 bits" if t.is_floating_point() else ""
        raise TypeError(f"{name}: {label} must have a floating-point dtype{size}, got {t.dtype}")


def is_causal_bias(value):
    """Whether a value is one of torch's CausalBias masks: a tensor that says what is visible and holds no values."""
    if type(value) is torch.Tensor:
        return False
    # importing the module takes seconds; if nobody did, there is no object of its class
    module = sys.modules.get("torch.nn.attention.bias")
    return module is not None and isinstance(value, module.CausalBias)


def is_jagged(value):
    """Whether a value is a nested tensor of the jagged layout; asked without its __torch_function__."""
    return isinstance(value, NestedTensor)


def is_nested(value):
    """Whether a value is a nested tensor, of either layout."""
    return isinstance(value, torch.Tensor) and value.is_nested


def odd_kind(*tensors):
    """What the first tensor is that is not plain, in words, or None. Other subclasses and layouts have other memory.

    What stands for a plain tensor while a graph is made counts as plain, and so does a DTensor.
    """
    for t in tensors:
        if t is None or type(t) is torch.Tensor or type(t) is torch.nn.Parameter:
            if t is not None and t.layout is not torch.strided:
                return f"a tensor of layout {t.layout}"
        elif not isinstance(t, (FakeTensor, FunctionalTensor)) and not is_dtensor(t):
            return f"a {type(t).__name__}"
    return None


def is_dtensor(value):
    """Whether a value is a DTensor. Ask only if `type(value) is not torch.Tensor`: plain calls pay nothing."""
    module = sys.modules.get("torch.distributed.tensor")  # as above
    return module is not None and isinstance(value, module.DTensor)


def _has_one_element(value):
    return isinstance(value, torch.Tensor) and value.numel() == 1


def is_number(value):
    """Whether a value can stand for a number: of Python, numpy or a tensor of one element, but not complex."""
    if isinstance(value, torch.Tensor):
        return _has_one_element(value) and not value.is_complex()
    return isinstance(value, (abstract.Real, torch.SymInt, torch.SymFloat))


def is_integer(value):
    """Whether a value can stand for an integer, as above. True is none, as in torch."""
    if isinstance(value, torch.Tensor):
        return _has_one_element(value) and value.dtype != torch.bool and not value.dtype.is_floating_point
    return isinstance(value, (abstract.Integral, torch.SymInt)) and not isinstance(value, bool)


def is_flag(value):
    """Whether a value can stand for True or False: it equals one of them, or is None."""
    if isinstance(value, torch.Tensor):
        return _has_one_element(value) and value.dtype == torch.bool
    try:
        return isinstance(value, torch.SymBool) or value in (None, False, True)
    except ValueError:  # of an array
        return False


def describe(value):
    """What a value is, for a message: its type, for a tensor the shape."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"a tensor of shape {tuple(value.shape)}" + ("" if value.numel() != 1 else f" and {value.dtype}")


def numbers(t):
    """The elements of a small tensor as a list; those of a DTensor are gathered."""
    return (t.full_tensor() if type(t) is not torch.Tensor and is_dtensor(t) else t).tolist()


def is_readable(t):
    """Whether the values of a tensor may be looked at: it is on the CPU and has values, and nothing traces the call."""
    return (
        t.is_cpu
        and (type(t) in (torch.Tensor, torch.nn.Parameter) or is_dtensor(t))
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


def as_number(name, label, value, default=0.0, instead=""):
    """A number as it is, a tensor's as a float, None as `default`.

    Args:
        instead: what to do with a tensor that requires grad: numbers get no gradient.
    Raises:
        TypeError: a gradient would be wanted.
    """
    if value is None:
        return default
    if not isinstance(value, torch.Tensor):
        return value
    if value.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{name}: {label} must be a number, which gets no gradient, got a tensor that requires grad{instead}"
        )
    if value.numel() != 1:
        raise TypeError(f"{name}: {label} must be a number, got a tensor of shape {tuple(value.shape)}")
    return float(value)
