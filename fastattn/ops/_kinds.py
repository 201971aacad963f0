"""Tests for the kind of value that an argument is."""

import numbers as abstract
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nested._internal.nested_tensor import NestedTensor

# float8 and similar dtypes are for storage, not for computation
FLOAT_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def check_float(name, label, t):
    """Raise TypeError unless `t` is None or has a dtype that ops can compute with."""
    if t is not None and t.dtype not in FLOAT_DTYPES:
        size = " of 16 to 64 bits" if t.is_floating_point() else ""
        raise TypeError(f"{name}: {label} must have a floating-point dtype{size}, got {t.dtype}")


def is_causal_bias(value):
    """Whether a value is a CausalBias of torch: a tensor that describes a causal mask and holds no values."""
    if type(value) is torch.Tensor:
        return False
    # importing the module takes seconds; before it is imported, no object of its class can exist
    module = sys.modules.get("torch.nn.attention.bias")
    return module is not None and isinstance(value, module.CausalBias)


def is_jagged(value):
    """Whether a value is a nested tensor of the jagged layout. Does not call its __torch_function__."""
    return isinstance(value, NestedTensor)


def is_nested(value):
    """Whether a value is a nested tensor, of either layout."""
    return isinstance(value, torch.Tensor) and value.is_nested


def nonplain_kind(*tensors):
    """A description of the first tensor that has another class or layout than a plain one, or None.

    Fake and functional tensors, which stand for plain ones during tracing, and DTensors count as plain.
    """
    for t in tensors:
        if t is None or type(t) is torch.Tensor or type(t) is torch.nn.Parameter:
            if t is not None and t.layout is not torch.strided:
                return f"a tensor of layout {t.layout}"
        elif not isinstance(t, (FakeTensor, FunctionalTensor)) and not is_dtensor(t):
            return f"a {type(t).__name__}"
    return None


def is_dtensor(value):
    """Whether a value is a DTensor. Test `type(value) is not torch.Tensor` first, so that plain calls pay nothing."""
    module = sys.modules.get("torch.distributed.tensor")  # as above
    return module is not None and isinstance(value, module.DTensor)


def _has_one_element(value):
    return isinstance(value, torch.Tensor) and value.numel() == 1


def is_number(value):
    """Whether a value is a real number of Python or numpy, or a tensor of one element that is not complex."""
    if isinstance(value, torch.Tensor):
        return _has_one_element(value) and not value.is_complex()
    return isinstance(value, (abstract.Real, torch.SymInt, torch.SymFloat))


def is_integer(value):
    """Whether a value is an integer of Python or numpy, or a tensor of one. A bool is not, as in torch."""
    if isinstance(value, torch.Tensor):
        return _has_one_element(value) and value.dtype != torch.bool and not value.dtype.is_floating_point
    return isinstance(value, (abstract.Integral, torch.SymInt)) and not isinstance(value, bool)


def is_flag(value):
    """Whether a value equals True or False, or is None."""
    if isinstance(value, torch.Tensor):
        return _has_one_element(value) and value.dtype == torch.bool
    try:
        return isinstance(value, torch.SymBool) or value in (None, False, True)
    except ValueError:  # an array
        return False


def describe(value):
    """Describe a value for a message: its type or, for a tensor, its shape."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"a tensor of shape {tuple(value.shape)}" + ("" if value.numel() != 1 else f" and {value.dtype}")


def dtype_or_type(value):
    """For a message about a dtype: the dtype of a tensor; of anything else the type, since arrays have dtypes too."""
    return value.dtype if isinstance(value, torch.Tensor) else f"{type(value).__name__}, which is not a tensor"


def numbers(t):
    """The elements of a small tensor as a list. A DTensor is gathered."""
    return (t.full_tensor() if type(t) is not torch.Tensor and is_dtensor(t) else t).tolist()


def is_readable(t):
    """Whether the values of a tensor can be read at once: it is on the CPU and has values, and no tracer is active."""
    return (
        t.is_cpu
        and (type(t) is torch.Tensor or type(t) is torch.nn.Parameter or is_dtensor(t))
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._functorch.is_legacy_batchedtensor(t)  # is_grads_batched=True
    )


def check_memory(name, **tensors):
    """Raise RuntimeError for a tensor whose storage was freed, before a function of PyTorch reads it: some crash.

    The reference needs it for every operand; the C++ kernels check theirs.
    """
    for label, t in tensors.items():
        if t is None or not is_readable(t) or is_dtensor(t):
            continue
        if t.numel() and not t.untyped_storage().nbytes():
            raise RuntimeError(
                f"{name}: {label} is a tensor of {t.numel()} elements that has no memory: its storage was freed"
            )


def as_number(name, label, value, default=0.0, instead=""):
    """The value as a number: a tensor becomes a float, None becomes `default`.

    Args:
        instead: advice for a tensor that requires grad, appended to the message.
    Raises:
        TypeError: `value` is a tensor that requires grad (numbers get no gradient) or has several elements.
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
